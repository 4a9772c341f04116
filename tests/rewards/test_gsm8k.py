"""The gsm8k reward, and the procedural one: what scores and what does not, on made and real completions."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lopt.data.procedural import Problem, is_correct
from lopt.rewards import gsm8k_reward, procedural_reward


def score(completion, answer) -> float | None:
    (value,) = gsm8k_reward(prompts=["q"], completions=[completion], answer=[answer], extra=[1])
    return value


REAL = [
    # As models write them: (completion, answer, score).
    ("She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n9 * 2 = $<<9*2=18>>18.\n#### 18", "18", 1),
    ("Therefore, Janet makes **$18** every day at the farmers' market.", "18", 1),
    ("The total profit is $195,000 - $125,000 = $70,000.\n\n#### $70,000", "70000", 1),
    ("So the answer is $\\boxed{70{,}000}$ dollars.", "70,000", 1),
    ("**Final Answer:** 5 km\n", "5", 1),
    ("#### 3/4 of the cake", "0.75", 1),
    ("It rose by 25%.\n#### 25%", "25", 1),
    ("It rose by a quarter, 25%.", "0.25", 1),
    ("#### −12 degrees.", "-12", 1),
    ("#### 1.5 × 10^6 people", "1500000", 1),
    ("#### 18\n#### 18\n#### 18\n#### 1", "18", 0),  # runs on, and ends in something else
    ("#### 17 or 18", "18", 0),
    ("#### 5 + 13", "5", 0),
    ("#### 5 + 13", "13", 0),
    ("#### 180", "18", 0),
    ("#### 0.18", "18", 0),
    ("#### 18 thousand", "18", 0),
    ("#### -18", "18", 0),
    ("#### 1,8", "18", 0),
    ("#### 18:30", "18", 0),
    ("#### 18\\sqrt{2}", "18", 0),
    ("#### eighteen", "18", 0),
    ("####", "18", 0),
    ("", "18", 0),
    ("Let me think. " * 5000, "18", 0),
]


@pytest.mark.parametrize(("completion", "answer", "wanted"), REAL)
def test_gsm8k_on_real_completions(completion, answer, wanted):
    assert score(completion, answer) == wanted
    assert score([{"role": "assistant", "content": completion}], answer) == wanted


STYLES = [
    *("{n}", "{n}.", "**{n}**", "${n}", "£{n}", "€{n}", "{n} eggs", "{n}km", "`{n}`", "*{n}*", "x = {n}"),
    *(r"\boxed{{{n}}}", "${n}$", r"\${n}", r"$\boxed{{{n}}}$", r"{n}\text{{ cm}}"),
    *("{n}\nIt is", "{n} (rounded)", "{n}</s>"),
]
PLACES = ["{x}", "We get 3 + 4 = 7.\n#### {x}", "First #### 99\nthen #### {x}", "After 3 steps: {x}"]
NUMBERS = st.decimals(-(10**9), 10**9, places=2, allow_nan=False) | st.integers(-(10**9), 10**9).map(Decimal)


def write(number: Decimal, style: str, place: str, commas: bool, minus: str) -> str:
    text = f"{number:,f}" if commas else f"{number:f}"
    return place.format(x=style.format(n=text.replace("-", minus)))


WAYS = st.tuples(st.sampled_from(STYLES), st.sampled_from(PLACES), st.booleans(), st.sampled_from("-−"))


@settings(deadline=None, max_examples=300)
@given(NUMBERS, NUMBERS, WAYS)
def test_formatting_never_changes_the_verdict(number, other, way):
    number, other = number + 0, other + 0  # no -0
    text = write(number, *way)
    for answer in (number, f"{number:,}", f"${number}"):
        assert score(text, answer) == 1, (text, answer)
    assume(number != other)
    assert score(text, other) == 0
    for near in (number + 1, number * 10 + 3, -number, number + Decimal("0.01")):
        assert score(text, near) == (near == number)


@settings(deadline=None)
@given(NUMBERS, st.sampled_from(["%", r"\%", " percent"]), NUMBERS)
def test_a_percent_sign(number, sign, other):
    text = f"#### {number + 0:f}{sign}"
    assert score(text, number) == 1
    share = number / 100
    assert score(text, share) == (abs(share) < 1 or share == number)
    assume(other not in (number, share))
    assert score(text, other) == 0


@settings(deadline=None)
@given(st.text() | st.text().map(lambda text: f"#### {text}"), st.integers())
def test_any_text_scores_0_or_1(text, answer):
    assert score(text, answer) in (0, 1)
    assert procedural_reward(["q"], [text], [answer])[0] == is_correct(text, Problem("", str(answer), ""))


def test_an_answer_that_is_no_number_is_an_error():
    with pytest.raises(ValueError, match="needs a number in the column `answer`, not 'none'"):
        score("5", "none")


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_gsm8k_solution_is_right(shared_data, step):
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[::step]]
    texts = [row["answer"] for row in rows]
    answers = [text.rpartition("#### ")[2] for text in texts]
    wrong = [str(int(answer.replace(",", "")) + 1) for answer in answers]
    assert gsm8k_reward(texts, texts, answers) == [1.0] * len(rows)
    assert gsm8k_reward(texts, texts, wrong) == [0.0] * len(rows)
    # Without the mark the last number is the answer in 97.3% of the solutions: a few end in a remark.
    unmarked = [text.partition("####")[0] for text in texts]
    assert sum(gsm8k_reward(texts, unmarked, answers)) >= 0.97 * len(rows)
    assert sum(gsm8k_reward(texts, unmarked, wrong)) <= 0.01 * len(rows)
