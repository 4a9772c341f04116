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

With a chat template, prompt and completion are lists of messages for that template to render. With
none, they are strings in these plain templates (the leading space of a completion keeps tokens from
merging across the boundary):

| columns                  | prompt                                       | completion      |
| ------------------------ | -------------------------------------------- | --------------- |
| `prompt` + ...           | as it is                                     | as it is        |
| `instruction` + `output` | Alpaca's: "Below is ... ### Response:\\n"     | as it is        |
| the other pairs          | "Question: {question}\\nAnswer:"              | " {answer}"     |
| messages                 | "System: ...\\nUser: ...\\nAssistant:"         | " {answer}"     |
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from lopt.data.files import column_names
from lopt.data.values import (
    SOURCE,
    Message,
    as_messages,
    completion_text,
    fault,
    last_assistant,
    message,
    prompt_text,
    turns,
)

logger = logging.getLogger(__name__)

_ALPACA_INTRO = "Below is an instruction that describes a task"
_ALPACA_ASK = "Write a response that appropriately completes the request."


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
    """The first of `FORMATS` whose columns are all in `column_names`.

    Raises:
        ValueError: None fits; the line lists the columns found and the accepted combinations.
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


def format_rows(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    assistant_only: bool = False,
) -> Dataset | IterableDataset:
    """Turn rows into what TRL's `SFTTrainer` takes, by the tables in this module's docstring.

    Rows whose completion (or `text`) is empty or None are dropped, and a warning says how many.
    A number as a completion becomes text, a whole one without a decimal point.

    Of a stream, rows are formatted when they are needed: empty ones are skipped without a count, and
    a malformed one raises its error, with its number in the order of the stream, when it is reached.

    Args:
        rows: Rows whose columns `infer_format` accepts.
        tokenizer: Decides between messages (it has a chat template) and plain strings.
        assistant_only: Keep `messages` rows as messages, for a loss on every assistant turn rather
            than the last alone. Turns after the last assistant message are dropped either way.

    Returns:
        A data set, or a stream, with the columns `prompt` and `completion`, or `messages`, or `text`.

    Raises:
        ValueError: Columns that fit no format; a prompt that is empty or not text, or messages that
            are malformed, with the row (from 0) and the column; no row left; `assistant_only`
            without a chat template or on `text` rows.
    """
    names = column_names(rows)
    fmt = infer_format(names)
    chat = bool(tokenizer.chat_template)
    if assistant_only and not chat:
        raise ValueError(
            "--assistant_only_loss needs a tokenizer with a chat template: drop it or name a chat model"
        )
    if assistant_only and fmt.kind == "text":
        raise ValueError("--assistant_only_loss needs messages or prompts, not `text` rows: drop it")
    keep_messages = assistant_only and fmt.kind == "messages"
    used = [name for name in names if name in fmt.columns + fmt.optional]
    options: dict[str, Any] = dict(
        batched=True,
        with_indices=True,
        fn_kwargs={"fmt": fmt, "chat": chat, "keep_messages": keep_messages},
        remove_columns=used,
        features=_features(fmt, chat, keep_messages),
    )
    if isinstance(rows, IterableDataset):
        made = rows.select_columns(used).map(_convert_streamed, **options)
        if next(iter(made), None) is None:
            raise ValueError(
                f"{SOURCE}: no row left, `{fmt.columns[-1]}` is empty in every row of the stream: fill it"
            )
        return made
    # The cache is keyed by the function's name, so it would outlive a change of templates.
    options |= {"load_from_cache_file": False, "desc": "Formatting rows"}
    made = rows.select_columns(used).map(_convert_batch, **options)
    _report_empty(len(rows), len(made), fmt.columns[-1])
    return made


def _report_empty(rows: int, made: int, column: str) -> None:
    if not made:
        raise ValueError(f"{SOURCE}: no row left, `{column}` is empty in all {rows} rows: fill it")
    if made < rows:
        logger.warning("dropped %d of %d rows whose `%s` is empty", rows - made, rows, column)


def question_prompt(question: str) -> str:
    """The plain template of a question; the answer follows after one space."""
    return f"Question: {question}\nAnswer:"


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Alpaca's own template; `context` is its `input`, left out where empty."""
    if not context:
        head = f"{_ALPACA_INTRO}. {_ALPACA_ASK}"
        return f"{head}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    return (
        f"{_ALPACA_INTRO}, paired with an input that provides further context. {_ALPACA_ASK}\n\n"
        f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
    )


def _features(fmt: Format, chat: bool, keep_messages: bool) -> Features:
    # Stated, not inferred: a first batch with every row dropped would give columns of type null.
    if fmt.kind == "text":
        return Features({"text": Value("string")})
    turns = List({"role": Value("string"), "content": Value("string")})
    if keep_messages:
        return Features({"messages": turns})
    side = turns if chat else Value("string")
    return Features({"prompt": side, "completion": side})


def _convert_batch(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    *,
    fmt: Format,
    chat: bool,
    keep_messages: bool,
) -> dict[str, list[Any]]:
    columns, made = list(batch), []
    for index, *values in zip(indices, *(batch[name] for name in columns), strict=True):
        row = dict(zip(columns, values, strict=True))
        example = _convert(row, index, fmt, chat)
        if example is None:
            continue
        if keep_messages:
            example = {"messages": example["prompt"] + example["completion"]}
        made.append(example)
    names = _features(fmt, chat, keep_messages)
    return {name: [example[name] for example in made] for name in names}


def _convert_streamed(
    batch: Mapping[str, list[Any]], indices: list[int], **options: Any
) -> dict[str, list[Any]]:
    """`_convert_batch` where a row's number alone does not find it: the stream is not in file order."""
    made: dict[str, list[Any]] = {}
    for position, index in enumerate(indices):
        row = {name: [values[position]] for name, values in batch.items()}
        try:
            one = _convert_batch(row, [index], **options)
        except ValueError as error:
            start = repr({name: value for name, (value,) in row.items()})[:100]
            raise ValueError(f"{error}; in the order of the stream, it starts with {start}") from error
        for name, values in one.items():
            made.setdefault(name, []).extend(values)
    return made


def _convert(row: dict[str, Any], index: int, fmt: Format, chat: bool) -> dict[str, Any] | None:
    """One example, or None where the row's completion is empty."""
    prompt_column, completion_column = fmt.columns[0], fmt.columns[-1]
    value, answer = row[prompt_column], row[completion_column]
    if fmt.kind == "messages":
        messages = as_messages(value, index, prompt_column)
        cut = last_assistant(messages, index, prompt_column)
        return _conversation(messages[:cut], messages[cut : cut + 1], chat)
    if fmt.kind == "pair" and (isinstance(value, list) or isinstance(answer, list)):
        return _conversational_pair(row, index, fmt, chat)
    completion = completion_text(answer, index, completion_column)
    if fmt.kind == "text":
        return {"text": completion} if completion.strip() else None
    prompt = prompt_text(value, index, prompt_column)
    if not completion.strip():
        return None
    context = completion_text(row.get("input"), index, "input") if fmt.kind == "alpaca" else ""
    if chat:
        content = f"{prompt}\n\n{context}" if context.strip() else prompt
        return _conversation([message("user", content)], [message("assistant", completion)], True)
    if fmt.kind == "alpaca":
        plain = alpaca_prompt(prompt, context if context.strip() else "")
        return {"prompt": plain, "completion": completion}
    if fmt.kind == "qa":
        return {"prompt": question_prompt(prompt), "completion": f" {completion}"}
    return {"prompt": prompt, "completion": completion}


def _conversational_pair(
    row: dict[str, Any],
    index: int,
    fmt: Format,
    chat: bool,
) -> dict[str, Any] | None:
    """A prompt, a completion or both already given as lists of messages."""
    prompt_column, completion_column = fmt.columns
    value, answer = row[prompt_column], row[completion_column]
    if isinstance(value, list):
        prompt = as_messages(value, index, prompt_column)
    else:
        prompt = [message("user", prompt_text(value, index, prompt_column))]
    if not isinstance(answer, list):
        text = completion_text(answer, index, completion_column)
        completion = [message("assistant", text)]
    elif answer:
        completion = as_messages(answer, index, completion_column)
    else:
        return None
    if completion[0]["role"] != "assistant":
        raise fault(index, completion_column, "must begin with an assistant message")
    return _conversation(prompt, completion, chat)


def _conversation(
    prompt: list[Message],
    completion: list[Message],
    chat: bool,
) -> dict[str, Any] | None:
    if not any(message["content"].strip() for message in completion):
        return None
    if chat:
        return {"prompt": prompt, "completion": completion}
    opening = f"{turns(prompt)}\nAssistant:"
    return {"prompt": opening, "completion": turns([*prompt, *completion])[len(opening) :]}
