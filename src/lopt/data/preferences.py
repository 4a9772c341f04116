"""Rows to pairs for DPO: a prompt, an answer that is preferred and one that is rejected."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase
from trl import extract_prompt

from lopt.data.cells import JsonCell
from lopt.data.chat import Chat, check_alike
from lopt.data.columns import FOR_TEMPLATE
from lopt.data.messages import read_messages, read_options, read_tools
from lopt.data.notes import Notes
from lopt.data.rows import SOURCE, Example, column_error, column_names, convert_rows, prompt_text
from lopt.data.templates import conversation_prompt, message, plain_conversation

logger = logging.getLogger(__name__)

ANSWERS = ("chosen", "rejected")
_READ = {"tools": read_tools, "chat_template_kwargs": read_options}


def preference_columns(found: list[str]) -> list[str]:
    """Return the columns that pairs are made of; say which of those found are left out.

    Raises:
        ValueError: `chosen` or `rejected` is missing.
    """
    missing = [name for name in ANSWERS if name not in found]
    if missing:
        raise ValueError(
            f"{SOURCE}: no column {' and no '.join(missing)}, found {', '.join(found) or 'none'}: rename "
            "them to prompt (where there is one), chosen and rejected"
        )
    prompt = "prompt" if "prompt" in found or "conversations" not in found else "conversations"
    needed = [prompt, *ANSWERS, *FOR_TEMPLATE]
    others = [name for name in found if name not in needed]
    if others:
        logger.warning("left out the columns %s: pairs do not need them", ", ".join(others))
    return needed


def preference_rows(
    rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, every_column: bool = False
) -> Dataset | IterableDataset:
    """Turn rows into what TRL's `DPOTrainer` takes, with a prompt of their own.

    Without a column `prompt` (or `conversations`), it is what `chosen` and `rejected` begin with alike.
    Answers may begin with the messages of the prompt, or be one message. With a chat template, a prompt and
    answers of plain text become messages, as for SFT, unless the template has rendered them already; without
    one, messages become plain text.

    Args:
        rows: Rows whose columns `preference_columns` accepts.
        tokenizer: Decides between messages (it has a chat template) and plain strings.
        every_column: Make each column that such pairs can have, so that they go together with others.

    Returns:
        A data set, or a stream, with the columns `prompt`, `chosen` and `rejected`, and `FOR_TEMPLATE` where
        there are such.

    Raises:
        ValueError: a column is missing; a malformed row, with its number (from 0) and the column; answers
            that are equal in all rows.
    """
    names = column_names(rows)
    used = preference_columns(names)
    if used[0] == "conversations":
        rows = rows.rename_column("conversations", "prompt")
        names = used = ["prompt", *(name for name in names if name in used[1:])]
    chat = Chat(tokenizer) if tokenizer.chat_template else None
    notes = Notes(isinstance(rows, IterableDataset))
    extra = tuple(name for name in FOR_TEMPLATE if every_column or name in names)
    convert = _Pairs(next(iter(rows), {}), chat, notes, extra)
    made = convert_rows(rows, used, convert, convert.features, "Formatting pairs", named=used)
    if isinstance(made, Dataset):
        notes.show(len(rows))
        if all(row["chosen"] == row["rejected"] for row in made):
            raise ValueError(f"{SOURCE}: in all rows `chosen` equals `rejected`: give others")
    elif next(iter(made), None) is None:
        raise ValueError(f"{SOURCE}: the stream has no rows: give at least one")
    return made


class _Pairs:
    """Converts rows that are all of the kind of `first`: text, or messages."""

    def __init__(
        self, first: Mapping[str, Any], chat: Chat | None, notes: Notes, extra: tuple[str, ...]
    ) -> None:
        self.chat, self.notes = chat, notes
        self.rendered = self._is_rendered(first)
        self.messages = self._are_messages(first)
        as_messages = chat is not None and self.messages
        self.extra = extra if as_messages else ()
        value = JsonCell() if as_messages else Value("string")
        self.features = Features(
            dict.fromkeys(("prompt", *ANSWERS), value) | dict.fromkeys(self.extra, JsonCell())
        )

    def __call__(self, row: dict[str, Any]) -> Example:
        row |= {name: [row[name]] for name in ANSWERS if isinstance(row[name], Mapping)}
        for name in ANSWERS:
            if not isinstance(row[name], str | list):
                raise column_error(name, "must be text or a list of messages: fill it or remove the row")
        if self._are_messages(row) != self.messages:
            this, first = ("messages", "text") if not self.messages else ("text", "messages")
            raise column_error("chosen", f"is {this}, and the first row's {first}: make them alike")
        if not self.messages:
            return self._text(row)
        made = self._conversation(row)
        if self.chat is None:
            return {
                "prompt": conversation_prompt(made["prompt"]),
                **{name: _plain_answer(made[name]) for name in ANSWERS},
            }
        return made | {name: _READ[name](row.get(name)) for name in self.extra}

    def _are_messages(self, row: Mapping[str, Any]) -> bool:
        """Return whether the row is of messages, or of text that the chat template renders."""
        if any(isinstance(row.get(name), list | Mapping) for name in ("prompt", *ANSWERS)):
            return True
        return self.chat is not None and "prompt" in row and not self.rendered

    def _is_rendered(self, row: Mapping[str, Any]) -> bool:
        prompt, chosen = row.get("prompt"), row.get("chosen")
        texts = isinstance(prompt, str) and isinstance(chosen, str)
        return texts and self.chat is not None and self.chat.has_rendered(str(prompt), str(chosen))

    def _text(self, row: Mapping[str, Any]) -> Example:
        if "prompt" not in row:
            made: Example = dict(extract_prompt({name: row[name] for name in ANSWERS}))
            if not made["prompt"].strip():
                raise _nothing_alike()
            return made
        check_alike(self._is_rendered(row), self.rendered, "prompt")
        return {"prompt": prompt_text(row["prompt"], "prompt"), **{name: row[name] for name in ANSWERS}}

    def _conversation(self, row: Mapping[str, Any]) -> Example:
        """Return the messages of prompt and answers, none of them twice."""
        if "prompt" in row and not isinstance(row["prompt"], list):
            check_alike(self._is_rendered(row), False, "prompt")
            prompt_text(row["prompt"], "prompt")
        roles = {"prompt": "user", **dict.fromkeys(ANSWERS, "assistant")}
        made: dict[str, Any] = {
            name: self._read([message(role, row[name])] if isinstance(row[name], str) else row[name], name)
            for name, role in roles.items()
            if name in row
        }
        if "prompt" not in made:
            made = dict(extract_prompt(made))
        else:
            made |= {name: _without(made["prompt"], made[name]) for name in ANSWERS}
        if not made["prompt"]:
            raise _nothing_alike()
        for name in ANSWERS:
            self._check_answer(made[name], name)
        return {name: made[name] for name in roles}

    def _read(self, value: Any, column: str) -> Any:
        return read_messages(value, column, self.chat, self.notes)

    @staticmethod
    def _check_answer(answer: list[Any], column: str) -> None:
        if not answer or answer[0]["role"] != "assistant":
            found = f"has one of {answer[0]['role']}" if answer else "has none"
            raise column_error(
                column,
                f"must go on after the prompt with an assistant message, and {found}: let `chosen` and "
                "`rejected` differ in what the assistant says alone",
            )


def _nothing_alike() -> ValueError:
    return column_error(
        "chosen", "begins with nothing that `rejected` begins with: give their prompt in a column `prompt`"
    )


def _without(prompt: list[Any], answer: list[Any]) -> list[Any]:
    """Return the answer without the messages of the prompt, if it begins with them."""
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _plain_answer(answer: list[Any]) -> str:
    """Return an answer as it follows after `conversation_prompt`."""
    return f" {answer[0]['content']}" + "".join(f"\n{plain_conversation([turn])}" for turn in answer[1:])
