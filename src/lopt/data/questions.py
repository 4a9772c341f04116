r"""Questions to examples for GRPO: a prompt for the model, and the answer that a reward checks.

| task         | question   | final answer                                              | reward       |
| ------------ | ---------- | --------------------------------------------------------- | ------------ |
| `gsm8k`      | `question` | `answer`: after `####`, or a bare number                  | `gsm8k`      |
| `numinamath` | `problem`  | `answer`, else the last `\boxed{}` of `solution`          | `math`       |
| procedural   | `question` | `answer`: after `####`, or all of it                      | `procedural` |
| none         | see below  | `answer` as it is, if there is one                        | the user's   |

Procedural tasks are those of `lopt.data.TASKS`. Without a task the question is in the first column
there is of `prompt` (text or messages), `question`, `problem`, `query`, `instruction` (+ `input`).

With a chat template the prompt is a list of messages; with none it is a string, by the templates of
`lopt.data.formats`, so a model trained on these rows before sees the text it knows. The instruction,
if any, follows the question on a line of its own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from lopt.data.formats import alpaca_prompt, question_prompt
from lopt.data.tasks import MARK, TASKS, extract_answer, make_task
from lopt.data.values import Message, as_messages, completion_text, fault, message, prompt_text, turns
from lopt.rewards.answers import last_boxed, only_number

logger = logging.getLogger(__name__)

QUESTION_COLUMNS = ("prompt", "question", "problem", "query", "instruction")
"""Columns that may hold the question where no task is named, in order of precedence."""

TAKEN_COLUMNS = (
    *("prompts", "completions", "completion", "completion_ids", "trainer_state"),
    *("log_extra", "log_metric", "environment", "environments", "image", "images"),
)
"""Names that TRL's `GRPOTrainer` gives a meaning of its own; columns so named are left out."""

# What NuminaMath writes in `answer` where there is no answer to compare.
_NO_ANSWER = ("proof", "notfound", "not found")


@dataclass(frozen=True)
class Task:
    """Where the rows of a kind of task keep question and answer, and how they are asked and marked.

    Attributes:
        reward: Key of `lopt.rewards.rewards.REWARDS`.
        question: Column of the question.
        answers: Columns that may hold the final answer, in order of precedence, each with the
            function that finds it in the column's text (None where it does not).
        expected: What these columns must hold, for an error message.
        instruction: What the prompt asks for after the question.
    """

    reward: str
    question: str
    answers: Mapping[str, Callable[[str], str | None]]
    expected: str
    instruction: str = ""


def _number_answer(text: str) -> str | None:
    answer = _marked_answer(text)
    return answer if answer and only_number(answer) else None


def _marked_answer(text: str) -> str | None:
    """What follows `####`; all of the text, without commas as there, where that is absent."""
    return extract_answer(text) if MARK in text else text.replace(",", "").strip() or None


def _math_answer(text: str) -> str | None:
    if "\\boxed" in text:
        return last_boxed(text)
    dollars = re.fullmatch(r"\s*(\$+)([^$]*)\1\s*", text)
    answer = (dollars[2] if dollars else text).strip()
    return None if answer in _NO_ANSWER else answer or None


QUESTION_TASKS: dict[str, Task] = {
    "gsm8k": Task(
        "gsm8k",
        "question",
        {"answer": _number_answer},
        "`#### <number>` or a bare number in `answer`",
        "Think step by step, and end with #### and the number.",
    ),
    "numinamath": Task(
        "math",
        "problem",
        {"answer": _math_answer, "solution": last_boxed},
        "`\\boxed{...}` in `solution`, or `answer`",
        "Please reason step by step, and put your final answer within \\boxed{}.",
    ),
} | {name: Task("procedural", "question", {"answer": _marked_answer}, "text in `answer`") for name in TASKS}
"""Name of a task -> where its rows keep what."""


def procedural_rows(name: str, size: int, seed: int) -> Dataset:
    """`size` rows {question, answer} of the procedural task `name`; raises as `make_task`."""
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
    """Turn rows into what TRL's `GRPOTrainer` takes, by the table in this module's docstring.

    Rows without a final answer, and rows whose prompt is too long, are dropped; a warning counts
    either. Other columns stay as they are for the user's reward functions, except for those in
    `TAKEN_COLUMNS` (left out) and a `prompt` that is not the question (replaced), with a warning.

    Args:
        rows: Rows with the columns of the task.
        tokenizer: Decides between messages (it has a chat template) and plain strings.
        task: A key of `QUESTION_TASKS`; None where the user brings a reward function.
        instruction: In place of the task's; "" for none.
        max_prompt_length: Tokens that a prompt may have, the chat template's included.
        chat_template_kwargs: More arguments for the chat template.

    Returns:
        A data set with `prompt`, `answer` (a string with a task; without one as given, if it is
        given) and the other columns.

    Raises:
        ValueError: An unknown task, columns that do not fit it, a question that is empty or not
            text (with its row, from 0), or no row left.
    """
    if task is not None and task not in QUESTION_TASKS:
        raise ValueError(f"--task must be one of {', '.join(QUESTION_TASKS)}, not {task}")
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"--max_prompt_length must be at least 1, not {max_prompt_length}")
    known = QUESTION_TASKS[task] if task else None
    question = _question_column(rows.column_names, task, known)
    if instruction is None:
        instruction = known.instruction if known else ""
    kept = _kept_columns(rows.column_names, question, known)
    chat = bool(tokenizer.chat_template)
    made = rows.map(
        _convert_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={
            "question": question, "task": known, "instruction": instruction, "kept": kept, "chat": chat,
        },
        remove_columns=rows.column_names,
        features=_features(rows.features, kept, known, chat),
        load_from_cache_file=False,  # as in `format_rows`
        desc="Reading questions",
    )  # fmt: skip
    if known:
        _report_dropped(rows, made, task, known)
    if max_prompt_length is not None:
        made = _drop_long(made, tokenizer, max_prompt_length, dict(chat_template_kwargs or {}))
    return made


def _question_column(columns: list[str], task: str | None, known: Task | None) -> str:
    found = ", ".join(columns) or "none"
    if known is None:
        for name in QUESTION_COLUMNS:
            if name in columns:
                return name
        raise ValueError(
            f"--train_file/--dataset_name: no question, found {found}: "
            f"rename its column to one of {', '.join(QUESTION_COLUMNS)}"
        )
    if known.question not in columns or not set(known.answers) & set(columns):
        needed = f"`{known.question}` and {' or '.join(f'`{name}`' for name in known.answers)}"
        raise ValueError(f"--task {task} needs the columns {needed}, found {found}: rename yours")
    return known.question


def _kept_columns(columns: list[str], question: str, known: Task | None) -> list[str]:
    """The columns that stay as they are, the new `prompt` and the task's `answer` not among them."""
    taken = [name for name in columns if name in TAKEN_COLUMNS]
    if taken:
        logger.warning("left out the columns %s: TRL uses these names", ", ".join(taken))
    if "prompt" in columns and question != "prompt":
        logger.warning("the column `prompt` is replaced by the prompt made of `%s`", question)
    made = {"prompt", "answer"} if known else {"prompt"}
    return [name for name in columns if name not in made and name not in taken]


def _features(given: Features, kept: list[str], known: Task | None, chat: bool) -> Features:
    # Stated, not inferred: a first batch with every row dropped would give columns of type null.
    turns = List({"role": Value("string"), "content": Value("string")})
    answer = {"answer": Value("string")} if known else {}
    return Features(
        {"prompt": turns if chat else Value("string"), **answer, **{name: given[name] for name in kept}}
    )


def _convert_batch(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    *,
    question: str,
    task: Task | None,
    instruction: str,
    kept: list[str],
    chat: bool,
) -> dict[str, list[Any]]:
    names = ["prompt", *(["answer"] if task else []), *kept]
    made: dict[str, list[Any]] = {name: [] for name in names}
    for at, index in enumerate(indices):
        row = {name: values[at] for name, values in batch.items()}
        prompt = _prompt(row, index, question, instruction, chat)
        answer = _final_answer(row, index, task) if task else None
        if task and answer is None:
            continue
        example = {**row, "prompt": prompt, **({"answer": answer} if task else {})}
        for name in names:
            made[name].append(example[name])
    return made


def _final_answer(row: Mapping[str, Any], index: int, task: Task) -> str | None:
    for column, find in task.answers.items():
        answer = find(completion_text(row.get(column), index, column))
        if answer is not None:
            return answer
    return None


def _prompt(
    row: Mapping[str, Any], index: int, column: str, instruction: str, chat: bool
) -> str | list[Message]:
    value = row[column]
    if isinstance(value, list):
        messages = as_messages(value, index, column)
        if messages[-1]["role"] == "assistant":
            raise fault(index, column, "ends in an assistant message: end it before the answer")
        *before, last = messages
        messages = [*before, message(last["role"], _with(last["content"], instruction))]
        return messages if chat else f"{turns(messages)}\nAssistant:"
    text = prompt_text(value, index, column)
    context = completion_text(row.get("input"), index, "input") if column == "instruction" else ""
    if not chat and column == "instruction":
        return alpaca_prompt(_with(text, instruction), context if context.strip() else "")
    if context.strip():
        text = f"{text}\n\n{context}"
    text = _with(text, instruction)
    if chat:
        return [message("user", text)]
    return text if column == "prompt" else question_prompt(text)


def _with(text: str, instruction: str) -> str:
    return f"{text}\n{instruction}" if instruction else text


def _report_dropped(rows: Dataset, made: Dataset, task: str | None, known: Task) -> None:
    dropped = len(rows) - len(made)
    if len(made) == 0:
        raise ValueError(
            f"--task {task}: none of the {len(rows)} rows has an answer: it expects {known.expected}"
        )
    if dropped:
        logger.warning("dropped %d of %d rows without %s", dropped, len(rows), known.expected)


def _drop_long(made: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int, options: dict) -> Dataset:
    """The rows whose prompt has at most `limit` tokens, counted as the trainer will."""

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
        raise ValueError(f"--max_prompt_length {limit}: all {len(made)} prompts are longer: raise it")
    if dropped:
        logger.warning("dropped %d of %d rows with a prompt over %d tokens", dropped, len(made), limit)
    return short
