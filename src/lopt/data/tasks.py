"""Procedural tasks: arithmetic problems made on the spot, checked exactly, in any number.

The generators are reasoning-gym's (`pip install lopt[demo]`). Prompts use the plain question
template of `lopt.data.formats`, so rows `{question, answer: solution}` train on the same text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from lopt.data.formats import question_prompt

MARK = "####"
"""What stands before the final answer, as in GSM8K."""

# Not every small tokenizer knows these signs; the currency signs have no plain equivalent.
_PLAIN_SIGNS = str.maketrans({"×": "*", "÷": "/", "•": "-"})


_ENDS = "." + "".join(filter(str.isspace, map(chr, range(0x3001))))


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
    """The chain of thought of a sum: "4 - 1 - 7" gives "4 - 1 = 3\\n3 - 7 = -4".

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

    The same arguments give the same problems, and a larger `size` the same ones first. Each seed
    gives problems of its own; use `train_and_held_out` where not one may be shared by chance.

    Raises:
        ValueError: `name` is not in `TASKS`, `size` is negative, or the generator has not enough
            different questions.
        ImportError: reasoning-gym is not installed.
    """
    if name not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, not {name}")
    if size < 0:
        raise ValueError(f"the number of problems must not be negative, not {size}")
    problems: dict[str, Problem] = {}
    for item in _items(name, 4 * size + 100, seed) if size else ():
        problem = TASKS[name](item)
        problems.setdefault(problem.question, problem)
        if len(problems) == size:
            return list(problems.values())
    if size:
        raise ValueError(f"{name} gave only {len(problems)} different questions: ask for fewer")
    return []


def train_and_held_out(
    name: str, train_size: int, held_out_size: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and problems to test on, with no question in common.

    The held-out problems depend on `held_out_size` and `seed` alone, so runs that train on
    different amounts are tested on the same problems. Raises as `make_task`.
    """
    if min(train_size, held_out_size) < 0:
        raise ValueError(f"sizes must not be negative, not {train_size} and {held_out_size}")
    problems = make_task(name, train_size + held_out_size, seed)
    return problems[held_out_size:], problems[:held_out_size]


def prompt(problem: Problem) -> str:
    """The plain prompt: "Question: {question}\\nAnswer:"."""
    return question_prompt(problem.question)


def extract_answer(text: str) -> str | None:
    """What follows the first `####` on its line, without commas and final periods.

    None where there is no `####` or nothing follows it.
    """
    _, mark, rest = text.partition(MARK)
    if not mark:
        return None
    # All of them, so that an answer found once is found again.
    answer = rest.partition("\n")[0].replace(",", "").strip().rstrip(_ENDS)
    return answer or None


def is_correct(text: str, problem: Problem) -> bool:
    """Whether the answer in `text` equals the problem's: as numbers where both are, else as text.

    "36.0" is therefore right where the answer is "36".
    """
    return answer_is(text, problem.answer)


def answer_is(text: str, wanted: str) -> bool:
    """`is_correct` for an answer without its problem."""
    answer = extract_answer(text)
    if answer is None:
        return False
    left, right = _number(answer), _number(wanted)
    if left is None or right is None:
        return answer == wanted
    return left == right


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _items(name: str, size: int, seed: int) -> Any:
    """A lazy reasoning-gym data set of `size` items."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("tasks need reasoning-gym: pip install lopt[demo]") from error
    # Item i is drawn with seed + i, so seeds 1 and 2 as they are would share all items but one.
    digest = hashlib.sha256(f"{name}:{seed}".encode()).digest()
    options = _OPTIONS.get(name, {})
    return reasoning_gym.create_dataset(name, size=size, seed=int.from_bytes(digest[:6]), **options)
