"""What a run trains on, token by token.

Nothing here says what is masked: the rows go through the trainer itself, on a small model that stands
in for the real one, and come out of its data loader as they would in training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lopt.core.config import LoPTConfig
from lopt.trainers import LoPTSFTTrainer
from lopt.trainers.sft import IGNORED, longer_rows

TRAINED, MASKED, PADDING = "trained on", "masked", "padding"
_COLOURS = {TRAINED: "\x1b[1;32m", MASKED: "\x1b[90m", PADDING: "\x1b[33m"}
_BRACKETS = {TRAINED: ("", ""), MASKED: ("[", "]"), PADDING: ("{", "}")}
_RESET = "\x1b[0m"
_BETWEEN = "│"


@dataclass(frozen=True)
class Shown:
    """One sequence of a training batch; with packing, one document of a packed sequence.

    Attributes:
        tokens: Token ids, without padding.
        labels: A label for each, -100 where it is masked.
        padding: How many padding tokens follow in its batch.
        cut: Whether its text goes on beyond `max_length`; None where rows are not counted, as of a stream.
    """

    tokens: list[int]
    labels: list[int]
    padding: int
    cut: bool | None = None

    @property
    def trained(self) -> int:
        """Tokens that the loss counts; the first one of a sequence has nothing to be predicted from."""
        return sum(label != IGNORED for label in self.labels[1:])


def stand_in_trainer(rows: Any, tokenizer: PreTrainedTokenizerBase, args: Any) -> LoPTSFTTrainer:
    """The trainer of an SFT run in all that touches its data, on a model of no size.

    Args:
        rows: Formatted training rows, from `format_rows`.
        tokenizer: The real one; token ids and labels depend on nothing else of the model.
        args: The run's `SFTConfig`.
    """
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return LoPTSFTTrainer(
        LlamaForCausalLM(config),
        args=args,
        lopt_config=LoPTConfig(method="e2e"),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def sequences(trainer: LoPTSFTTrainer, count: int) -> list[Shown]:
    """The first `count` sequences of the first pass in the trainer's order; fewer where it has fewer."""
    made: list[Shown] = []
    for batch in trainer.get_train_dataloader():
        made.extend(_of_batch(batch))
        if len(made) >= count:
            break
    return _note_cuts(trainer, made[:count])


def render(shown: Shown, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    """The sequence as text with a mark between tokens: by state coloured, or in brackets.

    Whatever is not printable is escaped, so that no text can give commands to a terminal.
    """
    states = [TRAINED if label != IGNORED else MASKED for label in shown.labels]
    states[:1] = [MASKED]  # never predicted
    parts: list[tuple[str, str]] = []
    for state, piece in zip(states, _pieces(tokenizer, shown.tokens), strict=True):
        parts.append((state, _visible(piece)))
    if shown.padding:
        parts.append((PADDING, f"{_visible(str(tokenizer.pad_token))} × {shown.padding}"))
    return _mark(parts, colour)


def legend(colour: bool) -> str:
    """How the states look."""
    marks = [_mark([(state, state)], colour) for state in (TRAINED, MASKED, PADDING)]
    return f"{'  '.join(marks)}   ({_BETWEEN} parts tokens)"


def _of_batch(batch: Any) -> Iterator[Shown]:
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    if "attention_mask" in batch:
        for tokens, targets, mask in zip(ids, labels, batch["attention_mask"].tolist(), strict=True):
            real = sum(mask)
            yield Shown(tokens[:real], targets[:real], len(tokens) - real)
        return
    # Without padding, all sequences lie in one row, and each begins at position 0.
    positions = batch["position_ids"][0].tolist()
    starts = [place for place, position in enumerate(positions) if position == 0]
    for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
        yield Shown(ids[0][start:end], labels[0][start:end], 0)


def _note_cuts(trainer: LoPTSFTTrainer, made: list[Shown]) -> list[Shown]:
    """Find the sequences again among the rows that were too long."""
    args: Any = trainer.args
    whole, limit = trainer.whole_rows.get("train"), args.max_length
    if whole is None or limit is None:
        return made
    kept = slice(limit) if args.truncation_mode == "keep_start" else slice(-limit, None)
    wanted = {tuple(shown.tokens) for shown in made if len(shown.tokens) == limit}
    found: set[tuple[int, ...]] = set()
    for row in longer_rows(whole, limit) if wanted else ():
        found |= {tuple(row["input_ids"][kept])} & wanted
    return [replace(shown, cut=tuple(shown.tokens) in found) for shown in made]


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of every token. A character of several tokens is with its last one, the others are empty."""

    def text(part: list[int]) -> str:
        decoded = tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(decoded, str)
        return decoded

    made: list[str] = []
    start = shown = 0  # tokens from `start` to `shown` are context: alone, a word may lose its space
    for end in range(1, len(ids) + 1):
        before, now = text(ids[start:shown]), text(ids[start:end])
        unfinished = now.endswith("\ufffd") and end - shown < 4 and end < len(ids)
        made.append("" if unfinished else now[len(before) :])
        if not unfinished:
            start, shown = shown, end
    return made


def _visible(text: str) -> str:
    """The text with what is not printable escaped; a line ends where its escape says so."""
    made = []
    for char in text:
        made.append(char if char.isprintable() else char.encode("unicode_escape").decode())
        if char == "\n":
            made.append("\n")
    return "".join(made)


def _mark(parts: Sequence[tuple[str, str]], colour: bool) -> str:
    made = []
    for state, run in itertools.groupby(parts, key=lambda part: part[0]):
        text = _BETWEEN.join(piece for _, piece in run)
        if colour:
            # Line by line: pagers end a colour with the line.
            lines = (f"{_COLOURS[state]}{line}{_RESET}" if line else "" for line in text.split("\n"))
            made.append("\n".join(lines))
        else:
            opening, closing = _BRACKETS[state]
            made.append(f"{opening}{text}{closing}")
    return "".join(made)
