"""Which columns of rows count, and what is made of them.

`infer_format` takes the first line of this table whose columns are all present:

| columns                            | prompt                       | completion                |
| ---------------------------------- | ---------------------------- | ------------------------- |
| `messages` or `conversations`      | all before the last answer   | last assistant message    |
| `prompt` + `completion`            | `prompt`                     | `completion`              |
| `prompt` + `response`              | `prompt`                     | `response`                |
| `instruction` (+ `input`) + `output` | `instruction` and `input`  | `output`                  |
| `query` + `response`               | `query`                      | `response`                |
| `question` + `answer`              | `question`                   | `answer`                  |
| `problem` + `solution`             | `problem`                    | `solution`                |
| `text`                             | none: loss on every token    | `text`                    |

Messages are {role, content}, or ShareGPT's {from, value}. Where they are present, `system` is used with all
of these but `text`, `history` (pairs of instruction and output) with `instruction`, and `tools` and
`chat_template_kwargs` with messages and `prompt`, as in TRL.

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
from typing import Literal

from lopt.data.rows import SOURCE

logger = logging.getLogger(__name__)

FOR_TEMPLATE = ("tools", "chat_template_kwargs")
"""Columns that go to the chat template as they are."""


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
    Format("messages", ("messages",), ("system", *FOR_TEMPLATE)),
    Format("messages", ("conversations",), ("system", *FOR_TEMPLATE)),
    Format("pair", ("prompt", "completion"), ("system", *FOR_TEMPLATE)),
    Format("pair", ("prompt", "response"), ("system", *FOR_TEMPLATE)),
    Format("alpaca", ("instruction", "output"), ("input", "system", "history")),
    Format("qa", ("query", "response"), ("system",)),
    Format("qa", ("question", "answer"), ("system",)),
    Format("qa", ("problem", "solution"), ("system",)),
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
    pairs = " (pairs of answers are for `lopt dpo`)" if {"chosen", "rejected"} <= set(found) else ""
    raise ValueError(
        f"{SOURCE}: no usable columns, found {', '.join(found) or 'none'}: "
        f"rename them to one of these combinations: {accepted}{pairs}"
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
