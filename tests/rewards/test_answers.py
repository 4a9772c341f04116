"""Final answers in text: what is a number and what is not, which one counts, and linear time."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lopt.rewards import answers
from lopt.rewards.answers import TAIL, Number, final_number, last_boxed, only_number, text_of

WRITTEN = {
    "1234": [
        "1,234",
        "$1,234.00",
        "**1234**",
        "1{,}234 km",
        r"\$1234",
        r"$\boxed{1234}$",
        r"12\,34",
        "€ 1,234",
    ],
    "-5": ["-5", "−5", "-$5", "$-5", "–5 degrees", "-**5**", "(-5)", "x = -5.", r"-5^\circ"],
    "5": ["- 5", "+5", "5!", "A: 5.", "`5`", "*5*", "5km", r"5 \text{ cm}^2", "5 cm^2", "Rs.5", "5</s>"],
    "3/4": ["3/4", r"\frac{3}{4}", r"\dfrac34", "¾", "0.75", ".75", "3 / 4"],
    "-1/2": [r"-\frac{1}{2}", r"\frac{-1}{2}", "-½", "-0.50"],
    "3/2": ["1 1/2", r"1\frac{1}{2}", "1½ cups"],
    "1500000": ["1.5e6", "1.5E+6", "1.5 × 10^6", r"1.5 \times 10^{6}", "$1.5 million", "1500 thousand"],
}
NOT_ONE = [
    *("", "none", "5 + 13", "5-6", "10:30", "1,23", "1,2,3", "1 234", "1.2.3", "2^3", "2**3", "2 x 3", "5π"),
    *(r"2\sqrt{3}", r"\sqrt{2}", "√2", "x2", "H2O", "v1.5", "3/0", "2 7/3", "25% + 5%", "(5+3)*2", "9" * 101),
    *(r"5 \times 3", "5²", "1.5/2", "1e9999"),
]


@pytest.mark.parametrize(("value", "text"), [(v, text) for v, texts in WRITTEN.items() for text in texts])
def test_one_number_however_written(value, text):
    for found in (only_number(text), final_number(f"#### {text}"), final_number(f"7 so\n{text}")):
        assert found is not None and found.value == Fraction(value)


@pytest.mark.parametrize("text", NOT_ONE)
def test_what_is_not_one_number(text):
    assert only_number(text) is None
    # Nor is a part of it: the number before, which stands alone, is the last.
    found = final_number(f"17 so\n#### {text}")
    assert found is not None and found.value == 17


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("#### 1\nQuestion: next\n#### 2\n", 2),
        ("#### 18 #### 18 ####", 18),
        ("I end with #### and the number: 3 + 4 = 7.\n#### 7", 7),
        ("write #### at the end\n5 and 7", 7),
        ("#### 17 or 18", 17),
        ("#### 5 + 13 = 18 eggs", 18),
        ("#### 3 boxes = 18 eggs", 18),
        ("#### x = 18 = ", 18),
        ("so 9 * 2 = <<9*2=18>>18 (that is 9 * 2)", 18),
        ("The answer is 18.\n\nI hope it helps!", 18),
    ],
)
def test_which_number_counts(text, value):
    found = final_number(text)
    assert found is not None and found.value == value


def test_percent():
    def number(text: str) -> Number:
        found = only_number(text)
        assert found is not None
        return found

    for left, right, same in [
        ("25%", "25", True),
        ("25 percent", "0.25", True),
        (r"25\%", "25.0 per cent", True),
        ("2500%", "25", False),
        ("100%", "1", False),
        ("0.25%", "25", False),
        ("2500%", "25%", False),
        ("0.25", "25", False),
        ("0%", "0", True),
    ]:
        assert number(left).equals(number(right)) is same
        assert number(right).equals(number(left)) is same


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{\frac{3}{4}}.", r"\frac{3}{4}"),
        (r"\boxed{\{1, 2\}} and }", r"\{1, 2\}"),
        (r"\boxed{5} so \boxed{\frac{1}{2", "5"),
        (r"{ \boxed{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox {5}", "5"),
        (r"\boxed{\frac{1}{2", None),
        (r"\boxed{ }", None),
        (r"\boxed 5 \\boxed", None),
        ("the answer is 5", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


def test_only_the_end_is_looked_at():
    filler = "so it goes " * TAIL
    assert final_number(f"#### 5\n{filler}") is None and last_boxed(f"\\boxed{{5}} {filler}") is None
    assert final_number(f"{filler}\n#### 5") == Number(Fraction(5))
    # A number cut in two where the end begins is none.
    assert final_number("1" * 100 + " " + "x" * (TAIL - 50)) is None
    assert final_number("12345 " + "x" * (TAIL - 4)) is None


PIECES = [
    *("9", ".", "1.", "1,", "1/", "1 ", "1+", "1   ", "(1)*", "1e", "a", "a1", "^", "-", "$", "*", " "),
    *("####", "#### ", "#### 1\n", "\\", "{", "\\boxed{", "\\frac{", "\\frac{1}{", "\\sqrt{", "{,}", "½"),
    *("million", "per", "1 percen"),
]


@pytest.mark.parametrize("piece", PIECES)
def test_time_is_linear(piece, monkeypatch):
    # At this length a quadratic pattern takes ten seconds, a linear one a tenth of one of this process.
    monkeypatch.setattr(answers, "TAIL", 60_000)
    text = (piece * 60_000)[:60_000]
    start = time.process_time()
    final_number(text), last_boxed(text), only_number(text)
    assert time.process_time() - start < 3


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from(PIECES)).map("".join))
@example("\ud800 #### \ud800")
@example("#### ٣")
def test_any_text(text):
    for found in (final_number(text), only_number(text)):
        assert found is None or isinstance(found.value, Fraction)
    assert last_boxed(text) is None or "\\boxed" in text or "\\fbox" in text


def test_text_of():
    tool = {"role": "tool", "content": "7"}
    assert text_of("a") == "a" and text_of([]) == ""
    assert text_of([{"role": "assistant", "content": "a"}, tool]) == "a"
    assert text_of([tool, {"role": "assistant", "content": None}]) == ""
    assert (
        text_of([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]) == "a"
    )
    assert text_of([tool]) == "7"
