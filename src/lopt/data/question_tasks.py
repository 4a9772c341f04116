r"""Kinds of questions that GRPO knows: where the rows keep question and answer, and which reward marks them.

| task         | question   | final answer                                              | reward       |
| ------------ | ---------- | --------------------------------------------------------- | ------------ |
| `gsm8k`      | `question` | `answer`: after `####`, or a bare number                  | `gsm8k`      |
| `numinamath` | `problem`  | `answer`, else the last `\boxed{}` of `solution`          | `math`       |
| procedural   | `question` | `answer`: after `####`, or all of it                      | `procedural` |

The procedural tasks are those of `lopt.data.procedural.TASKS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lopt.data.procedural import TASKS
from lopt.rewards.answers import MARK, extract_answer, last_boxed, only_number

# What NuminaMath writes in `answer` where there is no answer to compare.
_NO_ANSWER = ("proof", "notfound", "not found")


@dataclass(frozen=True)
class QuestionTask:
    """Where the rows of a kind of question keep question and answer, and how they are asked and marked.

    Attributes:
        reward: Key of `lopt.rewards.REWARDS`.
        question: Column of the question.
        answers: Columns that may hold the final answer, in order of precedence, each with the function that
            finds it in the column's text (None where it does not).
        expected: What these columns must hold, for an error message.
        instruction: What the prompt asks for after the question.
    """

    reward: str
    question: str
    answers: Mapping[str, Callable[[str], str | None]]
    expected: str
    instruction: str = ""


def _marked_answer(text: str) -> str | None:
    """Return what follows `####`; without it all of the text, whose commas are removed in the same way."""
    return extract_answer(text) if MARK in text else text.replace(",", "").strip() or None


def _number_answer(text: str) -> str | None:
    answer = _marked_answer(text)
    return answer if answer and only_number(answer) else None


def _math_answer(text: str) -> str | None:
    if "\\boxed" in text:
        return last_boxed(text)
    dollars = re.fullmatch(r"\s*(\$+)([^$]*)\1\s*", text)
    answer = (dollars[2] if dollars else text).strip()
    return None if answer in _NO_ANSWER else answer or None


QUESTION_TASKS: dict[str, QuestionTask] = {
    "gsm8k": QuestionTask(
        "gsm8k",
        "question",
        {"answer": _number_answer},
        "`#### <number>` or a bare number in `answer`",
        "Think step by step, and end with #### and the number.",
    ),
    "numinamath": QuestionTask(
        "math",
        "problem",
        {"answer": _math_answer, "solution": last_boxed},
        "`\\boxed{...}` in `solution`, or `answer`",
        "Please reason step by step, and put your final answer within \\boxed{}.",
    ),
    **{
        name: QuestionTask("procedural", "question", {"answer": _marked_answer}, "text in `answer`")
        for name in TASKS
    },
}
"""Name of a task -> where its rows keep what."""
