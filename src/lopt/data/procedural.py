"""Procedural tasks: arithmetic problems made on the spot, checked exactly, in any number.

The generators are reasoning-gym's (`pip install lopt[demo]`). Prompts use the plain question template, so
rows `{question, answer: solution}` train on the same text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lopt.data.templates import question_prompt
from lopt.rewards.answers import MARK, answer_is
from lopt.validation import check_choice, check_number

# Not every small tokenizer knows these signs; the currency signs have no plain equivalent.
_PLAIN_SIGNS = str.maketrans({"×": "*", "÷": "/", "•": "-"})


@dataclass(frozen=True)
class Problem:
    """One problem: its question, its answer, and a chain of thought ending in `#### {answer}`."""

    question: str
    answer: str
    solution: str


def _gsm_symbolic(item: Mapping[str, Any]) -> Problem:
    answer = str(item["answer"])
    # The generator ends some chains in `#### 36.0` where its answer is 36.
    thought = item["metadata"]["answer_cot"].rpartition(MARK)[0].rstrip().translate(_PLAIN_SIGNS)
    return Problem(item["question"], answer, f"{thought}\n{MARK} {answer}")


def _chain_sum(item: Mapping[str, Any]) -> Problem:
    answer = str(item["answer"])
    thought = running_sums(item["metadata"]["expression"])
    return Problem(item["question"], answer, f"{thought}\n{MARK} {answer}")


TASKS: dict[str, Callable[[Mapping[str, Any]], Problem]] = {
    "gsm_symbolic": _gsm_symbolic,
    "chain_sum": _chain_sum,
}
"""Name of a reasoning-gym data set -> how one of its items becomes a `Problem`."""

# Sums that a model of a few hundred million parameters can learn in minutes.
_OPTIONS: dict[str, dict[str, int]] = {
    "chain_sum": dict(min_terms=2, max_terms=4, min_digits=1, max_digits=1)
}


def running_sums(expression: str) -> str:
    """Return the chain of thought of a sum: "4 - 1 - 7" gives "4 - 1 = 3\\n3 - 7 = -4".

    Raises:
        ValueError: `expression` is not whole numbers joined by ` + ` and ` - `.
    """
    if not re.fullmatch(r"-?\d+( [+-] -?\d+)+", expression):
        raise ValueError(f"not a sum of whole numbers: {expression!r}")
    first, *rest = expression.split(" ")
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = after
    return "\n".join(lines)


def make_task(name: str, size: int, seed: int) -> list[Problem]:
    """Make `size` problems of the task `name`, no question twice.

    The same arguments give the same problems, and a larger `size` the same ones first. Each seed gives
    problems of its own; use `train_and_held_out` if not even one may be shared by chance.

    Raises:
        ValueError: `name` is not in `TASKS`, `size` is below 0, or the generator has not enough different
            questions.
        ImportError: reasoning-gym is not installed.
    """
    check_choice("task", name, TASKS)
    check_number("size", size, minimum=0)
    problems: dict[str, Problem] = {}
    for item in _items(name, 4 * size + 100, seed) if size else ():
        problem = TASKS[name](item)
        problems.setdefault(problem.question, problem)
        if len(problems) == size:
            break
    if len(problems) < size:
        raise ValueError(f"{name} gave only {len(problems)} different questions: ask for fewer")
    return list(problems.values())


def train_and_held_out(
    name: str, train_size: int, held_out_size: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Return problems to train on and problems to test on, with no question in common.

    The held-out problems depend on `held_out_size` and `seed` alone, so runs that train on different amounts
    are tested on the same problems. Raises as `make_task` does.
    """
    check_number("train_size", train_size, minimum=0)
    check_number("held_out_size", held_out_size, minimum=0)
    problems = make_task(name, train_size + held_out_size, seed)
    return problems[held_out_size:], problems[:held_out_size]


def prompt(problem: Problem) -> str:
    """Return the plain prompt: "Question: {question}\\nAnswer:"."""
    return question_prompt(problem.question)


def is_correct(text: str, problem: Problem) -> bool:
    """Return whether `text` has the problem's answer after its first `####`: see `answer_is`."""
    return answer_is(text, problem.answer)


def _items(name: str, size: int, seed: int) -> Any:
    """Return a reasoning-gym data set of `size` items, which are made when they are read."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError('tasks need reasoning-gym: pip install "lopt[demo]"') from error
    # Item i is drawn with seed + i, so seeds 1 and 2 as they are would share all items but one.
    digest = hashlib.sha256(f"{name}:{seed}".encode()).digest()
    options = _OPTIONS.get(name, {})
    return reasoning_gym.create_dataset(name, size=size, seed=int.from_bytes(digest[:6]), **options)
