"""Rows to training examples: which columns count, and what TRL's `SFTTrainer` is given.

`infer_format` takes the first line of this table whose columns are all present:

| columns                            | prompt                       | completion                |
| ---------------------------------- | ---------------------------- | ------------------------- |
| `messages`                         | all before the last answer   | last assistant message    |
| `prompt` + `completion`            | `prompt`                     | `completion`              |
| `prompt` + `response`              | `prompt`                     | `response`                |
| `instruction` (+ `input`) + `output` | `instruction` and `input`  | `output`                  |
| `query` + `response`               | `query`                      | `response`                |
| `question` + `answer`              | `question`                   | `answer`                  |
| `problem` + `solution`             | `problem`                    | `solution`                |
| `text`                             | none: loss on every token    | `text`                    |

With a chat template, prompt and completion are lists of messages for that template to render. Without one,
they are strings in the plain templates of `lopt.data.templates` (the leading space of a completion keeps
tokens from merging across the boundary):

| columns                  | prompt                                       | completion      |
| ------------------------ | -------------------------------------------- | --------------- |
| `prompt` + ...           | unchanged                                    | unchanged       |
| `instruction` + `output` | Alpaca's: "Below is ... ### Response:\\n"     | unchanged       |
| the other pairs          | "Question: {question}\\nAnswer:"              | " {answer}"     |
| messages                 | "System: ...\\nUser: ...\\nAssistant:"         | " {answer}"     |
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from lopt.data.rows import (
    MESSAGES,
    SOURCE,
    Example,
    answer_text,
    as_messages,
    column_error,
    column_names,
    convert_rows,
    last_assistant,
    prompt_text,
)
from lopt.data.templates import (
    Message,
    alpaca_prompt,
    conversation_prompt,
    message,
    plain_conversation,
    question_prompt,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """One accepted combination of columns.

    Attributes:
        kind: How the columns become an example; see the tables above.
        columns: Columns a row must have, the prompt's first and the completion's last.
        optional: Columns used where present.
    """

    kind: Literal["messages", "pair", "alpaca", "qa", "text"]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The required columns joined by `+`, for example `question+answer`."""
        return "+".join(self.columns)


FORMATS = (
    Format("messages", ("messages",)),
    Format("pair", ("prompt", "completion")),
    Format("pair", ("prompt", "response")),
    Format("alpaca", ("instruction", "output"), optional=("input",)),
    Format("qa", ("query", "response")),
    Format("qa", ("question", "answer")),
    Format("qa", ("problem", "solution")),
    Format("text", ("text",)),
)
"""Accepted formats, in order of precedence."""


def infer_format(column_names: Iterable[str]) -> Format:
    """Return the first of `FORMATS` whose columns are all in `column_names`.

    Raises:
        ValueError: none fits; the message lists the columns found and the accepted combinations.
    """
    found = list(column_names)
    for fmt in FORMATS:
        if set(fmt.columns) <= set(found):
            return fmt
    accepted = ", ".join(fmt.name for fmt in FORMATS)
    raise ValueError(
        f"{SOURCE}: no usable columns, found {', '.join(found) or 'none'}: "
        f"rename them to one of these combinations: {accepted}"
    )


def needed_columns(found: list[str]) -> list[str]:
    """Return the columns that examples are made of; say which of those found are left out.

    Raises:
        ValueError: they fit no format.
    """
    fmt = infer_format(found)
    needed = [*fmt.columns, *fmt.optional]
    others = [name for name in found if name not in needed]
    if others:
        logger.warning("left out the columns %s: %s rows do not need them", ", ".join(others), fmt.name)
    return needed


def format_rows(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    assistant_only: bool = False,
) -> Dataset | IterableDataset:
    """Turn rows into what TRL's `SFTTrainer` takes, by the tables in this module's docstring.

    Rows whose completion (or `text`) is empty or None are dropped, and a warning says how many. A number as a
    completion becomes text, a whole one without a decimal point. The rows of a stream are converted when they
    are needed: empty ones are skipped without a count, and a malformed one raises when it is reached.

    Args:
        rows: Rows whose columns `infer_format` accepts.
        tokenizer: Decides between messages (it has a chat template) and plain strings.
        assistant_only: Keep `messages` rows as messages, for a loss on every assistant turn rather than the
            last alone. Turns after the last assistant message are dropped either way.

    Returns:
        A data set, or a stream, with the columns `prompt` and `completion`, or `messages`, or `text`.

    Raises:
        ValueError: columns that fit no format; a malformed row, with its number (from 0) and the column; no
            row left; `assistant_only` without a chat template or on `text` rows.
    """
    names = column_names(rows)
    used, fmt = needed_columns(names), infer_format(names)
    chat = bool(tokenizer.chat_template)
    if assistant_only and not chat:
        raise ValueError(
            "`assistant_only_loss` needs a tokenizer with a chat template: drop it or name a chat model"
        )
    if assistant_only and fmt.kind == "text":
        raise ValueError("`assistant_only_loss` needs messages or prompts, not `text` rows: drop it")
    keep_messages = assistant_only and fmt.kind == "messages"
    if fmt.kind == "text":
        features = Features({"text": Value("string")})
    elif keep_messages:
        features = Features({"messages": MESSAGES})
    else:
        features = Features(dict.fromkeys(("prompt", "completion"), MESSAGES if chat else Value("string")))
    convert = partial(_example, fmt=fmt, chat=chat, keep_messages=keep_messages)
    made = convert_rows(rows, used, convert, features, "Formatting rows", named=used)
    if isinstance(made, IterableDataset):
        empty, where = next(iter(made), None) is None, "every row of the stream"
    else:
        empty, where = len(made) == 0, f"all {len(rows)} rows"
        if 0 < len(made) < len(rows):
            dropped = len(rows) - len(made)
            logger.warning("dropped %d of %d rows whose `%s` is empty", dropped, len(rows), fmt.columns[-1])
    if empty:
        raise ValueError(f"{SOURCE}: no row left, `{fmt.columns[-1]}` is empty in {where}: fill it")
    return made


def _example(row: dict[str, Any], fmt: Format, chat: bool, keep_messages: bool) -> Example | None:
    """Return the example of a row, or None if its completion is empty."""
    prompt_column, completion_column = fmt.columns[0], fmt.columns[-1]
    value, answer = row[prompt_column], row[completion_column]
    if fmt.kind == "messages":
        messages = as_messages(value, prompt_column)
        cut = last_assistant(messages, prompt_column)
        example = _conversation(messages[:cut], messages[cut : cut + 1], chat)
        return {"messages": messages[: cut + 1]} if example and keep_messages else example
    if fmt.kind == "pair" and (isinstance(value, list) or isinstance(answer, list)):
        return _conversational_pair(value, answer, fmt, chat)
    completion = answer_text(answer, completion_column)
    if fmt.kind == "text":
        return {"text": completion} if completion.strip() else None
    prompt = prompt_text(value, prompt_column)
    if not completion.strip():
        return None
    context = answer_text(row.get("input"), "input") if fmt.kind == "alpaca" else ""
    if chat:
        content = f"{prompt}\n\n{context}" if context.strip() else prompt
        return _conversation([message("user", content)], [message("assistant", completion)], chat)
    if fmt.kind == "alpaca":
        return {"prompt": alpaca_prompt(prompt, context), "completion": completion}
    if fmt.kind == "qa":
        return {"prompt": question_prompt(prompt), "completion": f" {completion}"}
    return {"prompt": prompt, "completion": completion}


def _conversational_pair(value: Any, answer: Any, fmt: Format, chat: bool) -> Example | None:
    """Return the example of a prompt and a completion of which at least one is a list of messages."""
    prompt_column, completion_column = fmt.columns
    if isinstance(value, list):
        prompt = as_messages(value, prompt_column)
    else:
        prompt = [message("user", prompt_text(value, prompt_column))]
    if answer == []:
        return None
    if isinstance(answer, list):
        completion = as_messages(answer, completion_column)
    else:
        completion = [message("assistant", answer_text(answer, completion_column))]
    if completion[0]["role"] != "assistant":
        raise column_error(completion_column, "must begin with an assistant message")
    return _conversation(prompt, completion, chat)


def _conversation(prompt: list[Message], completion: list[Message], chat: bool) -> Example | None:
    if not any(turn["content"].strip() for turn in completion):
        return None
    if chat:
        return {"prompt": prompt, "completion": completion}
    opening = conversation_prompt(prompt)
    return {"prompt": opening, "completion": plain_conversation([*prompt, *completion])[len(opening) :]}
