"""Rows to training examples: what TRL's `SFTTrainer` is given, by the tables in `lopt.data.columns`."""

from __future__ import annotations

import logging

from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from lopt.data.cells import JsonCell
from lopt.data.chat import Chat
from lopt.data.columns import FOR_TEMPLATE, Format, infer_format, needed_columns
from lopt.data.examples import Examples, is_rendered
from lopt.data.notes import Notes
from lopt.data.rows import SOURCE, column_names, convert_rows

logger = logging.getLogger(__name__)


def format_rows(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    assistant_only: bool = False,
    every_column: bool = False,
) -> Dataset | IterableDataset:
    """Turn rows into what TRL's `SFTTrainer` takes, by the tables in `lopt.data.columns`.

    Rows whose completion (or `text`) is empty or None are dropped, and a warning says how many. A number as a
    completion becomes text, a whole one without a decimal point. The rows of a stream are converted when they
    are needed: empty ones are skipped without a count, and a malformed one raises when it is reached. What
    does not reach the template is said and counted. Text that the chat template has rendered already, which
    the first row shows, is not rendered again.

    Args:
        rows: Rows whose columns `infer_format` accepts.
        tokenizer: Decides between messages (it has a chat template) and plain strings.
        assistant_only: Make messages of each row, for a loss on every assistant turn rather than the last
            alone (of a prompt and a completion: on those of the completion). Turns after the last assistant
            message are dropped either way.
        every_column: Make each column that such examples can have, so that they go together with others.

    Returns:
        A data set, or a stream, with the columns `prompt` and `completion`, or `messages`, or `text`, and
        `FOR_TEMPLATE` where there are such. Where messages are marked as not trained on, `trained` has a list
        of yes and no for the assistant messages of a row.

    Raises:
        ValueError: columns that fit no format; a malformed row, with its number (from 0) and the column; no
            row left; `assistant_only` without a chat template or on `text` rows.
    """
    names = column_names(rows)
    used, fmt = needed_columns(names), infer_format(names)
    chat = Chat(tokenizer) if tokenizer.chat_template else None
    streamed = isinstance(rows, IterableDataset)
    notes = Notes(streamed)
    rendered = is_rendered(next(iter(rows), {}), fmt, chat)
    if assistant_only:
        _check_turns(fmt, chat, rendered)
    extra = tuple(name for name in FOR_TEMPLATE if every_column or (name in fmt.optional and name in names))
    convert = Examples(fmt, chat, notes, extra, keep_messages=assistant_only, rendered=rendered)
    made = convert_rows(rows, used, convert, _features(convert), "Formatting rows", named=used)
    last = fmt.columns[-1]
    if isinstance(made, IterableDataset):
        empty, where = next(iter(made), None) is None, "every row of the stream"
    else:
        empty, where = len(made) == 0, f"all {len(rows)} rows"
        if 0 < len(made) < len(rows):
            logger.warning(
                "dropped %d of %d rows whose `%s` is empty", len(rows) - len(made), len(rows), last
            )
        notes.show(len(rows))
    if empty:
        raise ValueError(f"{SOURCE}: no row left, `{last}` is empty in {where}: fill it")
    all_trained = assistant_only and not convert.some_are_not_trained
    if isinstance(made, Dataset) and all_trained and not every_column:
        made = made.remove_columns("trained")
    return made


def _check_turns(fmt: Format, chat: Chat | None, rendered: bool) -> None:
    """Raise a ValueError if there are no turns to tell an assistant's from others."""
    if chat is None:
        raise ValueError(
            "`assistant_only_loss` needs a tokenizer with a chat template: drop it or name a chat model"
        )
    if fmt.kind == "text":
        raise ValueError("`assistant_only_loss` needs messages or prompts, not `text` rows: drop it")
    if rendered:
        raise ValueError(
            f"`assistant_only_loss` needs messages, and `{fmt.columns[0]}` is rendered by the chat template "
            "already: drop it, or give `messages`"
        )


def _features(convert: Examples) -> Features:
    if convert.fmt.kind == "text":
        return Features({"text": Value("string")})
    if convert.chat is None or convert.rendered:
        return Features({"prompt": Value("string"), "completion": Value("string")})
    sides = ("messages", "trained") if convert.keep_messages else ("prompt", "completion")
    return Features({name: JsonCell() for name in (*sides, *convert.extra)})
