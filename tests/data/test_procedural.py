"""Procedural tasks: their chains of thought are right, their seeds apart, their marking exact."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt.data.procedural import (
    TASKS,
    Problem,
    is_correct,
    make_task,
    prompt,
    running_sums,
    train_and_held_out,
)
from lopt.rewards.answers import extract_answer


@pytest.fixture(autouse=True)
def _generator() -> None:
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install lopt[demo]")


@pytest.mark.parametrize("name", TASKS)
def test_solutions_end_in_the_answer(name):
    problems = make_task(name, 300, seed=0)
    assert len({problem.question for problem in problems}) == 300
    for problem in problems:
        thought, last = problem.solution.rsplit("\n", 1)
        assert last == f"#### {problem.answer}" and thought.strip() and "####" not in thought
        assert is_correct(problem.solution, problem)
        assert not is_correct(f"#### {problem.answer}1", problem)
        assert prompt(problem) == f"Question: {problem.question}\nAnswer:"


def test_running_sums_reach_the_generators_answer():
    for problem in make_task("chain_sum", 200, seed=3):
        lines = problem.solution.split("\n")[:-1]
        assert lines[-1].endswith(f" = {problem.answer}")
        for line in lines:
            match = re.fullmatch(r"(-?\d+) ([+-]) (\d+) = (-?\d+)", line)
            assert match, line
            left, sign, right, total = match.groups()
            assert int(total) == int(left) + (int(right) if sign == "+" else -int(right))
    assert running_sums("4 - 1 - 7") == "4 - 1 = 3\n3 - 7 = -4"
    with pytest.raises(ValueError, match="not a sum"):
        running_sums("__import__('os')")


@pytest.mark.parametrize("name", TASKS)
def test_seeds_are_apart_and_repeatable(name):
    first = make_task(name, 200, seed=1)
    assert first == make_task(name, 200, seed=1)
    assert first[:50] == make_task(name, 50, seed=1)
    # The generator's own seeds 1 and 2 would share 199 of 200. A third of the sums have two terms,
    # of which there are 200 in all, so a few are shared by chance.
    other = {problem.question for problem in make_task(name, 200, seed=2)}
    assert len(other & {problem.question for problem in first}) < 30


@pytest.mark.parametrize("name", TASKS)
def test_held_out_questions_are_never_trained_on(name):
    train, held_out = train_and_held_out(name, 1500, 300, seed=5)
    assert (len(train), len(held_out)) == (1500, 300)
    assert not {p.question for p in train} & {p.question for p in held_out}
    assert train_and_held_out(name, 10, 300, seed=5)[1] == held_out
    assert train_and_held_out(name, 0, 0, seed=5) == ([], [])


def test_bad_requests():
    with pytest.raises(ValueError, match="`task` must be one of gsm_symbolic, chain_sum"):
        make_task("knitting", 1, 0)
    with pytest.raises(ValueError, match=r"`size` must be >= 0 \(got -1\)"):
        make_task("chain_sum", -1, 0)
    with pytest.raises(ValueError, match=r"`train_size` must be >= 0 \(got -1\)"):
        train_and_held_out("chain_sum", -1, 5, 0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so\n#### 1,234.\nmore #### 5", "1234"),
        ("####   -4  \r\n", "-4"),
        ("#### 2.50", "2.50"),
        ("no mark: 7", None),
        ("####\n7", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_numbers_are_compared_exactly():
    problem = Problem("q", "36", "#### 36")
    assert is_correct("#### 36.0", problem) and is_correct("#### +36.", problem)
    for wrong in ("#### 36.0000000000000000001", "#### 36 apples", "#### NaN", "#### sNaN", "36"):
        assert not is_correct(wrong, problem)
    assert is_correct("#### red", Problem("q", "red", "#### red"))


@settings(deadline=None)
@given(st.text())
def test_marking_never_fails(text):
    for candidate in (text, f"####{text}"):
        answer = extract_answer(candidate)
        assert answer is None or (answer and "," not in answer and "\n" not in answer)
        is_correct(candidate, Problem("q", "1", "#### 1"))


@settings(deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False), st.text())
def test_a_written_answer_is_read_back(number, thought):
    problem = Problem("q", str(number), "")
    assert is_correct(f"{thought.replace('#', '')}\n#### {number}\nand on", problem)
