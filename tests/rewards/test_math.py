"""Mathematics compared in a process that can be killed: verdicts, hostile input, threads."""

from __future__ import annotations

import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopt.rewards import math as math_module
from lopt.rewards.answers import last_boxed
from lopt.rewards.math import MAX_LENGTH, math_reward, same_math

pytest.importorskip("math_verify", reason='needs math-verify: pip install "lopt[math]"')

HOSTILE = [
    "9^{9^{9^9}}",
    "9^{9^9}",
    "(10^{10})!",
    r"\binom{10^9}{5\cdot 10^8}",
    "(x+y+z+w)^{1000}",
    r"\sin(" * 100 + "x" + ")" * 100,
    "{" * 400 + "}" * 400,
]


@pytest.fixture(autouse=True)
def _forget(patient_math_check):
    same_math.cache_clear()


@pytest.mark.parametrize(
    ("wanted", "given", "same"),
    [
        (r"\frac{3}{4}", "0.75", True),
        (r"\frac{3}{4}", r"x = \dfrac34", True),
        (r"\frac{14}{3}", r"4\frac{2}{3}", True),
        ("(x+1)^2", "x^2 + 2x + 1", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("1234", "1{,}234", True),
        (r"x \le 5", r"(-\infty, 5]", True),
        (r"\text{Monday}", "Monday", True),
        (r"\text{unparseable \(", r"\text{unparseable \(", True),
        ("5", r"5 \text{ or } 6", False),
        ("5", r"\{4, 5\}", False),
        ("(1,2)", "(2,1)", False),
        ("5", "5.01", False),
        ("i", "j", False),
        ("5", "", False),
        ("", "", False),
        ("5", "\ud800\n", False),
        ("5", "5 + 0" * MAX_LENGTH, False),
    ],
)
def test_verdicts(wanted, given, same):
    assert same_math(wanted, given) is same


def test_hostile_expressions_are_bounded_in_time(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(math_module, "TIME_LIMIT", 1.0)
        for expression in HOSTILE:
            start = time.monotonic()
            assert same_math("5", expression) is False
            # Without a limit some take hours. Besides the limit: the start of a process, on a busy machine.
            assert time.monotonic() - start < 60, expression
    assert same_math("5", "5.0") is True  # a new process serves as well
    monkeypatch.setattr(math_module._CHECKER, "ask", None)  # remembered: nobody is asked
    assert [same_math("5", expression) for expression in HOSTILE] == [False] * len(HOSTILE)


def test_in_threads():
    verdicts: dict[int, bool] = {}

    def work(n: int) -> None:
        verdicts[n] = same_math(str(n), rf"\frac{{{2 * n}}}{{2}}") and not same_math(str(n), f"{n}.5")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == dict.fromkeys(range(8), True)


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "lopt\[math\]"'):
        math_module.require_math_verify()
    math_module._CHECKER.stop()
    with pytest.raises(ImportError, match="math-verify"):
        same_math("5", "5.0")
    assert same_math("5", "5")  # equal text needs no library


def score(completion, answer) -> float | None:
    (value,) = math_reward(prompts=["q"], completions=[completion], answer=[answer], extra=[1])
    return value


@settings(deadline=None, max_examples=30)
@given(st.text(max_size=40) | st.text("\\{}^_$#&%abx0123456789+-*/=(),. ", max_size=20))
def test_any_mathematics_scores_0_or_1(text):
    assert score(text, "5") in (0, 1) and score(f"\\boxed{{{text}}}", "5") in (0, 1)


@pytest.mark.parametrize(
    ("completion", "answer", "wanted"),
    [
        (r"so $\boxed{\frac{3}{4}}$.", "0.75", 1),
        (r"first \boxed{1}, then \boxed{\dfrac{3}{4}}", r"\frac{3}{4}", 1),
        (r"first \boxed{\frac{3}{4}}, then \boxed{1}", r"\frac{3}{4}", 0),
        (r"\boxed{\frac{3}{4}} hence \boxed{\frac{3}", r"\frac{3}{4}", 1),
        (r"\boxed{\frac{3}", r"\frac{3}{4}", 0),
        (r"the answer is $\frac{3}{4}$", r"\frac{3}{4}", 0),
        (r"\boxed{5 \text{ or } 6}", "5", 0),
        ("", "5", 0),
    ],
)
def test_math_on_completions(completion, answer, wanted):
    assert score(completion, answer) == wanted
    assert score([{"role": "assistant", "content": completion}], answer) == wanted


def test_math_solutions_are_right(shared_data):
    lines = (shared_data / "math" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["solution"] for line in lines[::25]]
    answers = [last_boxed(text) for text in texts]
    assert None not in answers
    assert math_reward(texts, texts, answers) == [1.0] * len(texts)
    # Written differently, so that it is math-verify that decides: right in all 2,500 rows of the file.
    boxes = [f"\\boxed{{\\displaystyle {answer} }}".replace("\\frac", "\\dfrac") for answer in answers]
    assert math_reward(texts, boxes, answers) == [1.0] * len(texts)
    others = [*answers[1:], answers[0]]
    matches = math_reward(texts, texts, others)
    assert sum(matches) == sum(a == b for a, b in zip(answers, others, strict=True))
