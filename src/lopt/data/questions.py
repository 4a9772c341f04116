r"""Questions to examples for GRPO: a prompt for the model, and the answer that a reward checks.

With a task (`lopt.data.question_tasks`) question and answer are where that says. Without one the question
is in the first column there is of `prompt` (text or messages), `question`, `problem`, `query`,
`instruction` (+ `input`), and `answer` is left unchanged, for the user's own reward.

With a chat template the prompt is a list of messages; without one it is a string, by the same templates as
in `lopt.data.columns`, so that a model trained on these rows before sees the text it knows. The
instruction, if any, follows the question on a line of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from lopt.data.cells import JsonCell
from lopt.data.chat import Chat, check_alike, without_bos
from lopt.data.columns import FOR_TEMPLATE
from lopt.data.examples import text_prompt
from lopt.data.messages import read_messages
from lopt.data.notes import Notes
from lopt.data.procedural import make_task
from lopt.data.question_tasks import QUESTION_TASKS, QuestionTask
from lopt.data.rendering import lost
from lopt.data.rows import (
    SOURCE,
    TIMES,
    Example,
    answer_text,
    column_error,
    convert_rows,
    prompt_text,
)
from lopt.data.templates import Message, conversation_prompt
from lopt.validation import check_choice, check_number

logger = logging.getLogger(__name__)

QUESTION_COLUMNS = ("prompt", "question", "problem", "query", "instruction")
"""Columns that may hold the question where no task is named, in order of precedence."""

RESERVED_COLUMNS = (
    *("prompts", "completions", "completion", "completion_ids", "trainer_state"),
    *("log_extra", "log_metric", "environment", "environments", "image", "images"),
)
"""Names that TRL's `GRPOTrainer` gives a meaning of its own; columns so named are left out."""


def procedural_rows(name: str, size: int, seed: int) -> Dataset:
    """Return `size` rows {question, answer} of the procedural task `name`; raise as `make_task` does."""
    problems = make_task(name, size, seed)
    return Dataset.from_dict(
        {
            "question": [problem.question for problem in problems],
            "answer": [problem.answer for problem in problems],
        }
    )


def question_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    task: str | None,
    instruction: str | None = None,
    max_prompt_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Dataset:
    """Turn rows into what TRL's `GRPOTrainer` takes, by the rules in this module's docstring.

    Rows without a final answer, and rows whose prompt is too long, are dropped; a warning counts either.
    Other columns stay unchanged for the user's reward functions, except for those in `RESERVED_COLUMNS`
    (left out) and a `prompt` that is not the question (replaced), with a warning.

    Args:
        rows: Rows with the columns of the task.
        tokenizer: Decides between messages (it has a chat template) and plain strings.
        task: A key of `QUESTION_TASKS`; None where the user brings a reward function.
        instruction: In place of the task's; "" for none.
        max_prompt_length: Tokens that a prompt may have, those of the chat template included.
        chat_template_kwargs: More arguments for the chat template.

    Returns:
        A data set with `prompt`, `answer` (a string with a task; without one unchanged, if there is one)
        and the other columns.

    Raises:
        ValueError: an unknown task, columns that do not fit it, a question that is empty or not text (with
            its row, from 0), or no row left.
    """
    if task is not None:
        check_choice("task", task, QUESTION_TASKS)
    check_number("max_prompt_length", max_prompt_length, minimum=1)
    known = QUESTION_TASKS[task] if task else None
    question = _question_column(rows.column_names, task, known)
    if instruction is None:
        instruction = known.instruction if known else ""
    kept = _kept_columns(rows.column_names, question, known)
    prompts = _prompts(rows, question, instruction, tokenizer, dict(chat_template_kwargs or {}))
    answer = {"answer": Value("string")} if known else {}
    kept_features = {name: _kept_feature(rows.features[name]) for name in kept}
    features = Features({"prompt": prompts.feature, **answer, **kept_features})
    convert = partial(_example, task=known, prompt_of=prompts)
    made = convert_rows(
        rows, rows.column_names, convert, features, "Questions", [question, *(known.answers if known else ())]
    )
    assert isinstance(made, Dataset)
    if known and not len(made):
        raise ValueError(
            f"`task` {task}: none of the {len(rows)} rows has an answer: it expects {known.expected}"
        )
    if known and len(made) < len(rows):
        dropped = len(rows) - len(made)
        logger.warning("dropped %d of %d rows without %s", dropped, len(rows), known.expected)
    prompts.notes.show(len(rows))
    if max_prompt_length is not None:
        made = _drop_long(made, tokenizer, max_prompt_length, dict(chat_template_kwargs or {}))
    return made


def _question_column(columns: list[str], task: str | None, known: QuestionTask | None) -> str:
    found = ", ".join(columns) or "none"
    if known is None:
        for name in QUESTION_COLUMNS:
            if name in columns:
                return name
        raise ValueError(
            f"{SOURCE}: no question, found {found}: rename its column to one of {', '.join(QUESTION_COLUMNS)}"
        )
    if known.question not in columns or not set(known.answers) & set(columns):
        needed = f"`{known.question}` and {' or '.join(f'`{name}`' for name in known.answers)}"
        raise ValueError(f"`task` {task} needs the columns {needed}, found {found}: rename yours")
    return known.question


def _kept_columns(columns: list[str], question: str, known: QuestionTask | None) -> list[str]:
    """Return the columns that stay unchanged; the new `prompt` and the task's `answer` are not among them."""
    reserved = [name for name in columns if name in RESERVED_COLUMNS]
    if reserved:
        logger.warning("left out the columns %s: TRL uses these names", ", ".join(reserved))
    for name in FOR_TEMPLATE:
        if name in columns:
            logger.warning("the column `%s` is for rewards alone: TRL's GRPO has none in its prompts", name)
    if "prompt" in columns and question != "prompt":
        logger.warning("the column `prompt` is replaced by the prompt made of `%s`", question)
    made = {"prompt", "answer"} if known else {"prompt"}
    return [name for name in columns if name not in made and name not in reserved]


def _kept_feature(feature: Any) -> Any:
    """Return the feature of a column that rewards get: times are text, all else is unchanged."""
    times = ("timestamp", "date", "time", "duration")
    return Value("string") if str(getattr(feature, "dtype", "")).startswith(times) else feature


def _example(
    row: dict[str, Any], task: QuestionTask | None, prompt_of: Callable[[Mapping[str, Any]], Any]
) -> Example | None:
    """Return the example of a row, or None if the task finds no answer in it."""
    made = {name: str(value) if isinstance(value, TIMES) else value for name, value in row.items()}
    made["prompt"] = prompt_of(row)
    if task is None:
        return made
    for column, find in task.answers.items():
        made["answer"] = find(answer_text(row.get(column), column))
        if made["answer"] is not None:
            return made
    return None


@dataclass
class _Prompts:
    """Makes the prompt of a row.

    Attributes:
        column: That of the question.
        chat: The template; None for the plain ones.
        options: Arguments for the template.
        notes: Counts what does not reach the template.
        rendered: The questions are rendered by the template already.
    """

    column: str
    instruction: str
    tokenizer: PreTrainedTokenizerBase
    chat: Chat | None
    options: Mapping[str, Any]
    notes: Notes
    rendered: bool

    @property
    def feature(self) -> Value | JsonCell:
        """The feature of the column of prompts."""
        return Value("string") if self.chat is None or self.rendered else JsonCell()

    def __call__(self, row: Mapping[str, Any]) -> str | list[Message]:
        prompt = self._prompt(row)
        if isinstance(prompt, str):
            return without_bos(prompt, self.tokenizer)
        assert self.chat is not None
        found = lost(self.chat, {"prompt": prompt, "chat_template_kwargs": self.options})
        self.notes.add(*(what for what, _ in found))
        return prompt

    def _prompt(self, row: Mapping[str, Any]) -> str | list[Message]:
        value, end = row[self.column], f"\n{self.instruction}" if self.instruction else ""
        if isinstance(value, list):
            messages = read_messages(value, self.column, self.chat, self.notes)
            last = messages.pop()
            if last["role"] == "assistant":
                raise column_error(self.column, "ends in an assistant message: end it before the answer")
            messages.append({**last, "content": last["content"] + end})
            return messages if self.chat is not None else conversation_prompt(messages)
        text = prompt_text(value, self.column)
        if self.chat is not None:
            check_alike(self.chat.has_rendered(text), self.rendered, self.column)
        if self.rendered:
            self.notes.add(f"`{self.column}` is rendered by the chat template already, and is not again")
            if self.instruction:
                self.notes.add("the instruction is left out, the prompt is rendered already")
            return text
        kind = {"prompt": "pair", "instruction": "alpaca"}.get(self.column, "qa")
        return text_prompt(row, kind, text, self.chat is not None, end)


def _prompts(
    rows: Dataset, column: str, instruction: str, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> _Prompts:
    chat = Chat(tokenizer) if tokenizer.chat_template else None
    rendered = chat is not None and bool(len(rows)) and chat.has_rendered(str(rows[0][column]))
    return _Prompts(column, instruction, tokenizer, chat, options, Notes(), rendered)


def _drop_long(made: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int, options: dict) -> Dataset:
    """Return the rows whose prompt has at most `limit` tokens, counted as the trainer will."""

    def fits(prompts: list[Any]) -> list[bool]:
        if tokenizer.chat_template:
            encoded: Any = tokenizer.apply_chat_template(
                prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **options
            )
        else:
            encoded = tokenizer(prompts)
        return [len(ids) <= limit for ids in encoded["input_ids"]]

    short = made.filter(
        fits, input_columns="prompt", batched=True, load_from_cache_file=False, desc="Measuring prompts"
    )
    dropped = len(made) - len(short)
    if len(short) == 0:
        raise ValueError(f"`max_prompt_length` {limit}: all {len(made)} prompts are longer: raise it")
    if dropped:
        logger.warning("dropped %d of %d rows with a prompt over %d tokens", dropped, len(made), limit)
    return short
