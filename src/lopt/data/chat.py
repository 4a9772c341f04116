"""What a tokenizer's chat template knows: keys of messages, roles, and the marks around a turn."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lopt.data.rows import column_error
from lopt.messages import error_text

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which its reasoning is found."""

# What a program in Jinja raises; a keyword that is given twice is a TypeError.
_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_ASKED, _SAID = "QUESTION", "REPLY"


class Chat:
    """The chat template of a tokenizer.

    Args:
        chat_template: In place of the tokenizer's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        self.tokenizer, self.chat_template = tokenizer, chat_template
        found: Any = chat_template or tokenizer.chat_template
        self.source = "\n".join(found.values()) if isinstance(found, dict) else str(found)

    def render(self, messages: list[Any], /, **options: Any) -> str:
        """Return the text of a conversation.

        Raises:
            ValueError: the template refuses it, or fails.
        """
        options = {"chat_template": self.chat_template, **options}
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except _FAILURES as error:
            raise ValueError(
                f"the chat template refuses the messages ({error_text(error)}): change the row, or the "
                "template with `chat_template_path`"
            ) from error

    def knows(self, name: str) -> bool:
        """Return whether the template reads a key of this name, as far as its text tells."""
        return self._reads(self.name_of(name))

    def name_of(self, name: str) -> str:
        """Return `name`, or the other name of reasoning that the template reads in its place.

        transformers gives reasoning under all of its names, but only since 5.23.
        """
        if name not in REASONING or self._reads(name):
            return name
        return next((other for other in REASONING if self._reads(other)), name)

    def _reads(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def knows_role(self, role: str) -> bool:
        """Return whether the template asks for messages of this role by name."""
        return re.search(rf"(==|!=|\bin\b)[^%}}]*['\"]{re.escape(role)}['\"]", self.source) is not None

    @functools.cached_property
    def marks(self) -> tuple[str, str] | None:
        """What is before a question and before a reply in rendered text; None if nothing tells them."""
        question, reply = {"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}
        try:
            asked = self.render([question], add_generation_prompt=True)
            said = self.render([question, reply])
        except ValueError:
            return None
        if _ASKED not in asked or _SAID not in said:
            return None
        before, after = asked.split(_ASKED, 1)
        # Some templates begin a reply in one way and write it in another, as DeepSeek's <think>.
        between = common_start(after, said.split(_ASKED, 1)[1].split(_SAID, 1)[0])
        user = before.removeprefix(str(self.tokenizer.bos_token or "")).strip().rpartition("\n")[2]
        assistant = between.strip().rpartition("\n")[2]
        return (user, assistant) if user and assistant else None

    def has_rendered(self, prompt: str, completion: str = "") -> bool:
        """Return whether text is what the template makes of a question and a reply."""
        if self.marks is None:
            return False
        user, assistant = self.marks
        return user in prompt and assistant in (prompt + completion)[prompt.rindex(user) + len(user) :]


def why_unused(chat: Chat | None) -> str:
    """Return why a key or column that the template does not know is left out."""
    return "there is no chat template" if chat is None else "the template does not use it"


def common_start(one: str, other: str) -> str:
    """Return the text that both begin with."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(character for character, _ in same)


def check_alike(found: bool, rendered: bool, column: str) -> None:
    """Raise a ValueError unless a row is rendered by the template as the first row is."""
    if found != rendered:
        this, first = ("is", "is not") if found else ("is not", "is")
        raise column_error(
            column,
            f"{this} rendered by the chat template, and the first row's {first}: make them alike",
        )


def without_bos(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text without the token that begins a text, if the tokenizer adds that itself."""
    bos = str(tokenizer.bos_token or "")
    adds = bool(bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(bos) if adds else text
