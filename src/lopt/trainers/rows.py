"""What a trainer looks at in its rows before it trains on them, and says in every run.

TRL's own warnings come while rows are tokenized, so never again once these come from a cache.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset
from transformers import PreTrainedTokenizerBase

from lopt.data.batches import IGNORED
from lopt.data.cells import ROWS, JsonCell
from lopt.data.chat import Chat
from lopt.data.rendering import ANSWERS, lost, summary
from lopt.data.rows import SOURCE, column_names
from lopt.version import __version__

logger = logging.getLogger(__name__)

_LOOK_AHEAD = 1_000  # rows of a stream that are looked at
_BEHIND = 4  # tokens from the end of a row among which one must stop generation: some templates go on
_SEEN = ("messages", "prompt", *ANSWERS, "tools", "chat_template_kwargs")


def say_what_is_lost(rows: Any, tokenizer: Any, chat_template: str | None, name: str) -> None:
    """Warn of what the chat template leaves out of the rows' messages, with counts.

    What is found is cached as the tokenized rows are, and counted anew in every run.

    Raises:
        ValueError: the template refuses a row, or leaves out a message of a role that it does not know.
    """
    names = [column for column in column_names(rows) if column in _SEEN]
    if not getattr(tokenizer, "chat_template", None) or not {"messages", "prompt"} & set(names):
        return
    streamed = isinstance(rows, IterableDataset)
    count: Any = f"the first {_LOOK_AHEAD:,}" if streamed else len(rows)
    # The version, since the cache does not see that a function has changed.
    options: dict[str, Any] = {"chat": Chat(tokenizer, chat_template), "name": name, "version": __version__}
    if streamed:
        found = [_lost_of(row, place, **options)["lost"] for place, row in enumerate(rows.take(_LOOK_AHEAD))]
    else:
        found = rows.select_columns(names).map(
            _lost_of_encoded, with_indices=True, fn_kwargs=options, remove_columns=names,
            features=Features({"lost": JsonCell()}), desc=f"Looking for what {name} rows lose",
        )["lost"]  # fmt: skip
    counts: Counter[str] = Counter()
    starts: dict[str, tuple[int, str]] = {}
    for place, row in enumerate(found):
        for what, start in row:
            counts[what] += 1
            starts.setdefault(what, (place, start))
    for line in summary(counts, starts, count, name):
        logger.warning(line)


def _lost_of(row: Any, place: int, chat: Chat, name: str, version: str) -> dict[str, Any]:
    try:
        return {"lost": lost(chat, row)}
    except ValueError as error:
        raise ValueError(f"{SOURCE}: {name} row {place} (from 0), {error}") from error


def _lost_of_encoded(row: Any, place: int, **options: Any) -> dict[str, Any]:
    return {"lost": JsonCell().encode_example(_lost_of(row, place, **options)["lost"])}


def as_tokens(rows: Any) -> Any:
    """Return tokenized rows without the cells they were made of, which every later map would read."""
    if not isinstance(rows, Dataset) or rows.format["type"] != ROWS:
        return rows
    cells = [name for name, feature in rows.features.items() if isinstance(feature, JsonCell)]
    return rows.remove_columns(cells).with_format(None)


def only_marked(rows: Any) -> Any:
    """Return tokenized rows with labels for those assistant messages alone that `trained` says.

    Raises:
        ValueError: the labels of a row are not in as many parts as it has assistant messages.
    """
    if "trained" not in column_names(rows):
        return rows
    return rows.map(_mask_messages, with_indices=True, remove_columns=["trained"])


def _mask_messages(row: Any, place: int) -> dict[str, Any]:
    labels = np.asarray(row["labels"])
    if all(row["trained"]):
        return {"labels": row["labels"]}
    with_label = labels != IGNORED
    starts = with_label & ~np.concatenate([[False], with_label[:-1]])
    message = np.cumsum(starts) - 1  # which of the assistant messages a labelled token belongs to
    if starts.sum() != len(row["trained"]):
        raise ValueError(
            f"{SOURCE}: row {place} (from 0) has marks for {len(row['trained'])} assistant messages, and the "
            f"chat template tells {starts.sum()} apart: remove the marks, or give another template with "
            "`chat_template_path`"
        )
    kept = np.asarray(row["trained"])[message] & with_label
    return {"labels": np.where(kept, labels, IGNORED).tolist()}


def one_beginning(rows: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> Any:
    """Return tokenized rows without the second of two tokens that begin a text (BOS)."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return rows
    if isinstance(rows, IterableDataset):
        return rows.map(_without_second, fn_kwargs={"bos": bos})
    twice = 0
    for values, starts, ends in _lists(rows, "input_ids"):
        first = starts[ends - starts > 1]
        twice += int(((values[first] == bos) & (values[first + 1] == bos)).sum())
    if not twice:
        return rows
    logger.warning(
        "%d of %d %s rows begin with %s twice, one is left out: the tokenizer adds it to the text's own",
        twice, len(rows), name, tokenizer.bos_token,
    )  # fmt: skip
    return rows.map(_without_second, fn_kwargs={"bos": bos})


def _without_second(row: Any, bos: int) -> dict[str, Any]:
    cut = int(row["input_ids"][:2] == [bos, bos])
    return {"input_ids": row["input_ids"][cut:], "labels": row["labels"][cut:]}


def say_where_rows_do_not_end(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, config: Any, name: str
) -> None:
    """Warn of tokenized rows whose last labels hold no token that stops generation.

    Args:
        config: The model's `generation_config`, if it has one.
    """
    stops = stop_tokens(tokenizer, config)
    open_ended = 0
    for values, starts, ends in _lists(rows, "labels"):
        last = ends[:, None] - np.arange(1, _BEHIND + 1)
        ended = (last >= starts[:, None]) & np.isin(values[np.maximum(last, 0)], stops)
        open_ended += int((~ended.any(axis=1)).sum())
    if open_ended:
        names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(stops)))
        logger.warning(
            "%d of %d %s rows do not end in a token that stops generation (%s): the model learns to go on "
            "behind its answer. Name the token that ends an answer with `eos_token`",
            open_ended, len(rows), name, names,
        )  # fmt: skip


def stop_tokens(tokenizer: PreTrainedTokenizerBase, config: Any) -> list[int]:
    """Return the ids of the tokens that stop generation."""
    found = getattr(config, "eos_token_id", None)
    listed = found if isinstance(found, Collection) else [found]
    return sorted({*listed, tokenizer.eos_token_id} - {None})


def _lists(rows: Dataset, column: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield a column of lists in parts: the values of all its lists, and where each list starts and ends."""
    for table in rows.select_columns([column]).with_format("arrow").iter(1000):
        for lists in table[column].chunks:
            offsets = lists.offsets.to_numpy()
            yield lists.values.to_numpy(zero_copy_only=False), offsets[:-1], offsets[1:]
