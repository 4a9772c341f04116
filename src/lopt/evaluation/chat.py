"""Talk to a model: what it is asked, by the template of its training, and its answer, word by word."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from lopt.architectures import base_model
from lopt.data.chat import Chat
from lopt.data.examples import text_prompt
from lopt.data.templates import Message, conversation_prompt, message
from lopt.models.router_logits import without_router_logits
from lopt.trainers.rows import stop_tokens

PLAIN = {
    "messages": "User: ... Assistant:",
    "alpaca": "Alpaca's instruction and response",
    "qa": "Question: ... Answer:",
    "pair": "none, the text goes on",
}
"""Template without a chat template -> what it looks like; names are kinds of `lopt.data.columns.Format`."""

TEMPLATES = ("chat", *PLAIN)

# Where a model that was not trained to end begins the next turn by itself.
_NEXT_TURN = {"messages": "\nUser:", "alpaca": "\n### Instruction:", "qa": "\nQuestion:"}


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; None leaves it to the model's generation_config.json.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        seed: Of every answer, so that each can be had again.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def options(self, config: Any) -> dict[str, Any]:
        """Return the arguments of `generate` for a model with this generation config."""
        if self.temperature == 0 or (not config.do_sample and not self._asks_to_sample()):
            found: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        else:
            given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
            found = {"do_sample": True} | {name: value for name, value in given.items() if value is not None}
        if self.repetition_penalty is not None:
            found["repetition_penalty"] = self.repetition_penalty
        return found

    def _asks_to_sample(self) -> bool:
        return any(value is not None for value in (self.temperature, self.top_p, self.top_k))


@dataclass(frozen=True)
class Answer:
    """What a model has said.

    Attributes:
        tokens: How many tokens it took.
        seconds: How long.
        whole: Whether it ended by itself: False at `max_new_tokens`, at the end of the context, or on Ctrl-C.
    """

    text: str
    tokens: int
    seconds: float
    whole: bool


@dataclass
class Conversation:
    """A model, its tokenizer, and what was said.

    Attributes:
        template: One of `TEMPLATES`. Without turns ("qa", "pair") each question is asked on its own.
        system: What the model is told first, "" for nothing.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str
    system: str = ""
    said: list[Message] = field(default_factory=list)

    @property
    def remembers(self) -> bool:
        """Whether a question is asked with those before it."""
        return self.template not in ("qa", "pair")

    def reset(self) -> None:
        """Forget what was said."""
        self.said.clear()

    def prompt(self, question: str) -> str:
        """Return the text that the model goes on from.

        Raises:
            ValueError: the chat template refuses it.
        """
        before = self.said if self.remembers else []
        if self.template in ("chat", "messages"):
            system = [message("system", self.system)] if self.system.strip() else []
            messages = [*system, *before, message("user", question)]
            if self.template == "chat":
                return Chat(self.tokenizer).render(messages, add_generation_prompt=True)
            return conversation_prompt(messages)
        history = [
            [asked["content"], told["content"]] for asked, told in zip(*[iter(before)] * 2, strict=True)
        ]
        row = {"system": self.system, "history": history}
        return str(text_prompt(row, self.template, question, chat=False))

    def ask(self, question: str, sampling: Sampling, show: Callable[[str], None]) -> Answer:
        """Return the model's answer, of which `show` is given every word as soon as it is there.

        Ctrl-C ends the answer, and what there is of it stays in the conversation.

        Raises:
            ValueError: the chat template refuses the question, or does not fit into the context.
        """
        encoded = self.tokenizer(
            self.prompt(question), return_tensors="pt", add_special_tokens=self.template != "chat"
        ).to(self.model.device)
        length = encoded["input_ids"].shape[1]
        shape: Any = base_model(self.model).config.get_text_config()
        limit = getattr(shape, "max_position_embeddings", None)
        room = min(sampling.max_new_tokens, limit - length) if limit else sampling.max_new_tokens
        if room < 1:
            full = f"{length:,} tokens, and the model's context is {limit:,}"
            if self.remembers and self.said:
                raise ValueError(f"the conversation is full: it has {full}: type /reset to start over")
            raise ValueError(f"the question is too long: with its template it has {full}: shorten it")
        config: Any = self.model.generation_config
        stops = stop_tokens(self.tokenizer, config)
        next_turn = _NEXT_TURN.get(self.template)
        words = _Words(self.tokenizer, show, next_turn or "")
        generate: Any = self.model.generate
        set_seed(sampling.seed)
        begun = time.perf_counter()
        interrupted = False
        with torch.no_grad(), without_router_logits(self.model):
            try:
                generate(
                    **encoded,
                    **sampling.options(config),
                    stop_strings=next_turn,
                    tokenizer=self.tokenizer,
                    max_new_tokens=room,
                    eos_token_id=stops,
                    pad_token_id=self.tokenizer.pad_token_id,
                    streamer=words,
                )
            except KeyboardInterrupt:
                interrupted = True
                words.end()
        text = words.text.strip()
        self.said += [message("user", question), message("assistant", text)]
        whole = not interrupted and words.count < room
        return Answer(text, words.count, time.perf_counter() - begun, whole)


class _Words(TextStreamer):
    """Gives every word to `show`, and keeps all of them but the `end` that a text stops at."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None], end: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.last, self.text, self.count = show, end, "", 0

    def put(self, value: torch.Tensor) -> None:
        """Count tokens, but those of the prompt."""
        if not self.next_tokens_are_prompt:
            self.count += value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on text that no later token changes."""
        whole = self.text + text if self.text else text.lstrip()
        if stream_end and self.last:
            whole = whole.removesuffix(self.last)
        new, self.text = whole[len(self.text) :], whole
        if new:
            self.show(new)
