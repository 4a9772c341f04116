"""Show what a run trains on, token by token.

The rows come out of the trainer's own data loader, so that nothing here decides what is masked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lopt.data.batches import IGNORED

TRAINED, MASKED, PADDING = "trained on", "masked", "padding"
_COLOURS = {TRAINED: "\x1b[1;32m", MASKED: "\x1b[90m", PADDING: "\x1b[33m"}
_BRACKETS = {TRAINED: ("", ""), MASKED: ("[", "]"), PADDING: ("{", "}")}
_RESET = "\x1b[0m"
_BETWEEN = "│"


@dataclass(frozen=True)
class ShownSequence:
    """One sequence of a training batch; with packing, one document of a packed sequence.

    Attributes:
        tokens: Token ids, without padding.
        labels: A label for each, -100 where it is masked.
        padding: How many padding tokens follow in its batch.
        cut: Whether its text goes on beyond `max_length`; None where that is not known, as of a stream.
    """

    tokens: list[int]
    labels: list[int]
    padding: int
    cut: bool | None = None

    @property
    def trained(self) -> int:
        """Tokens that the loss counts; the first one of a sequence has nothing to be predicted from."""
        return sum(label != IGNORED for label in self.labels[1:])


def first_sequences(batches: Iterable[Any], count: int) -> list[ShownSequence]:
    """Return the first `count` sequences of a data loader's batches; fewer if it has fewer."""
    return list(itertools.islice(itertools.chain.from_iterable(map(sequences, batches)), count))


def sequences(batch: Any) -> Iterator[ShownSequence]:
    """Yield the sequences of a batch of tensors (B, T), or (1, T) with `position_ids` if unpadded.

    Those of a batch of pairs, which has the preferred answers first (2B, T), come in turn.
    """
    if "completion_mask" in batch:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
        turns = torch.arange(len(labels)).reshape(2, -1).T.flatten()  # chosen, rejected, chosen, ...
        batch = {"input_ids": batch["input_ids"], "labels": labels, "attention_mask": batch["attention_mask"]}
        batch = {name: value[turns] for name, value in batch.items()}
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    if "attention_mask" in batch:
        for tokens, targets, mask in zip(ids, labels, batch["attention_mask"].tolist(), strict=True):
            real = sum(mask)
            yield ShownSequence(tokens[:real], targets[:real], len(tokens) - real)
        return
    # Without padding, all sequences lie in one row, and each begins at position 0.
    positions = batch["position_ids"][0].tolist()
    starts = [place for place, position in enumerate(positions) if position == 0]
    for start, end in zip(starts, [*starts[1:], len(positions)], strict=True):
        yield ShownSequence(ids[0][start:end], labels[0][start:end], 0)


def pair_rows(rows: Iterable[Any]) -> Iterator[dict[str, list[int]]]:
    """Yield the tokens of prompt and answer for both answers of tokenized pairs."""
    for row in rows:
        for name in ("chosen_ids", "rejected_ids"):
            yield {"input_ids": row["prompt_ids"] + row[name]}


def mark_cut(
    shown: list[ShownSequence], longer_rows: Iterable[Any], max_length: int, keep_start: bool
) -> list[ShownSequence]:
    """Return the sequences with `cut` set.

    Args:
        longer_rows: The tokenized rows of the run that have more than `max_length` tokens.
        keep_start: Whether cutting keeps a row's start rather than its end.
    """
    kept = slice(max_length) if keep_start else slice(-max_length, None)
    wanted = {tuple(sequence.tokens) for sequence in shown if len(sequence.tokens) == max_length}
    found = {tuple(row["input_ids"][kept]) for row in longer_rows} if wanted else set()
    return [replace(sequence, cut=tuple(sequence.tokens) in found) for sequence in shown]


def render(shown: ShownSequence, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    """Return the sequence as text with a mark between tokens, its states shown by colour or by brackets.

    What is not printable is escaped, so that no text can give commands to a terminal.
    """
    states = [TRAINED if label != IGNORED else MASKED for label in shown.labels]
    states[:1] = [MASKED]  # never predicted
    parts: list[tuple[str, str]] = []
    for state, piece in zip(states, _token_texts(tokenizer, shown.tokens), strict=True):
        parts.append((state, _visible(piece)))
    if shown.padding:
        parts.append((PADDING, f"{_visible(str(tokenizer.pad_token))} × {shown.padding}"))
    return _mark(parts, colour)


def legend(colour: bool) -> str:
    """Return one line that shows how the states look."""
    marks = [_mark([(state, state)], colour) for state in (TRAINED, MASKED, PADDING)]
    return f"{'  '.join(marks)}   ({_BETWEEN} parts tokens)"


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the text of every token; a character of several tokens is the text of the last of them."""

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
    """Return the text with what is not printable escaped; a line break stays one, after its escape."""
    escaped = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return "".join(piece + "\n" if char == "\n" else piece for char, piece in zip(text, escaped, strict=True))


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
