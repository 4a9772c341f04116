r"""Final answers in text: after `####`, as the last number, or in `\boxed{}`.

The functions take time linear in the text. Those for numbers and boxes read its last `TAIL` characters
only, so that an endless completion costs no more than a long one. A number is read exactly, as a fraction:

| written                                          | read as       |
| ------------------------------------------------ | ------------- |
| `1,234`  `$1,234.00`  `**1234**`  `1{,}234 km`   | 1234          |
| `-5`  `−5`  `-$5`  `$-5`                         | -5            |
| `3/4`  `\frac{3}{4}`  `¾`, `1 1/2`  `1\frac{1}{2}` | 3/4, 3/2    |
| `1.5e6`  `1.5 × 10^6`  `1.5 million`             | 1500000       |
| `25%`  `25 percent`                              | 25 percent    |
| `5 + 13`  `10:30`  `1,23`  `1 234`  `2^3`  `5π`  `x2` | no number |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

import regex as re  # possessive quantifiers in Python 3.11.2's own lose parts of a match

MARK = "####"
"""What stands before the final answer, as in GSM8K."""

Completion = str | Sequence[Mapping[str, Any]]
"""What a model has written: text, or a list of messages."""

TAIL = 10_000
"""How many characters at the end of a text are read."""

_MAX_LENGTH = 100  # characters of one number; no answer is longer, and huge powers are slow
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅛": "1/8"}

_SIGNS = str.maketrans({**dict.fromkeys("−－﹣–‐‑", "-"), "×": "*", "·": "*", "÷": "/", "\u00a0": " "})
_BOLD = re.compile(r"(?<![0-9])\*\*|\*\*(?![0-9])")
_COMMAND = re.compile(r"\\(?:times|cdot|div|left|right|[,!;:]|displaystyle)(?![A-Za-z])|\{,\}|\^\{?\\circ\}?")
_COMMANDS = {r"\times": "*", r"\cdot": "*", r"\div": "/", "{,}": ","}
_POWER = re.compile(r"\^\{([-+]?[0-9]{1,3})\}")
_FRACTION = re.compile(
    rf"([0-9]?)(?:\\[dtc]?frac(?:\{{ ?(-?[0-9]{{1,50}}) ?\}}\{{ ?([0-9]{{1,50}}) ?\}}|([0-9])([0-9]))"
    rf"|([{''.join(_VULGAR)}]))"
)

# Possessive (`++`), so that a part of a number is never taken where the whole does not fit.
_ATOM = r"(?:(?<![0-9A-Za-z])\.)?[0-9]++(?:[.,:/][0-9]++)*+(?:[eE][-+]?[0-9]++)?+"
_OPERATOR = r"\\?%?\)?[ \t]{0,3}(?:\*\*|[-+*/^xX])[ \t]{0,3}\(?[-+]?(?:\\?[$£€¥₹])?"
_ROOT = r"\\sqrt(?:\[[0-9]\])?\{[^{}]{0,50}\}"
_TOKEN = re.compile(
    rf"""
    (?<![A-Za-z_√^/]) (?P<name> [A-Za-z_√^/]++ [0-9][0-9.,:/]*+ )   # x2, H2O, km/18
    | {_ROOT}
    | (?: (?<![0-9A-Za-z)}}%]) (?P<sign>[-+]) )?
      (?: \\?[$£€¥₹] [ ]? (?P<inner>[-+])? )?
      (?P<chain> {_ATOM} (?: (?: {_OPERATOR} | [ \t]{{1,3}} ) {_ATOM} )*+ )
      (?P<percent> [ ]? (?: \\?% | per[ ]?cent\b ) )?+
      (?: [ ] (?P<scale> {"|".join(_SCALES)} ) s? \b )?+
      (?P<factor> [ ]? (?: [\^²³π√] | \\pi\b | {_ROOT} ) )?+
    """,
    re.VERBOSE | re.IGNORECASE,
)
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = re.compile(rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}})?")
_SCIENTIFIC = re.compile(r"(?:(.+?) ?\* ?)?10(?:\^|\*\*)([-+]?[0-9]{1,3})")
_RATIO = re.compile(rf"(?:([0-9]+) +)?({_DIGITS}) ?/ ?({_DIGITS})")

_ENDS = "." + "".join(filter(str.isspace, map(chr, range(0x3001))))
_BRACES = re.compile(r"(\\(?:boxed|fbox)\s{0,3}\{)|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True)
class Number:
    """A number as written: its exact value before a percent sign, and whether there is one."""

    value: Fraction
    percent: bool = False

    def equals(self, other: Number) -> bool:
        """Return whether both are the same number.

        25% equals 25, because a question may ask for percent, and also 0.25. The second reading counts only
        if the plain number is below 1, so that 2500% does not equal 25.
        """
        if self.percent == other.percent:
            return self.value == other.value
        rate, plain = (self.value, other.value) if self.percent else (other.value, self.value)
        return plain == rate or (abs(plain) < 1 and 100 * plain == rate)


def only_number(text: str) -> Number | None:
    """Return the number in a text that holds exactly one ("72", "$1,234", "18 eggs"), else None."""
    found = list(_numbers(text)) if len(text) <= TAIL else []
    return found[0] if len(found) == 1 else None


def final_number(text: str) -> Number | None:
    """Return the number that a completion ends in, or None.

    It is the first number after the last `####` that has a number on its line; if that line holds a `=`,
    the first number after the `=`. A completion that goes on to another `####` is therefore marked by what
    it says last. Without such a `####` it is the last number in the text. Expressions are not evaluated:
    "5 + 13" is neither 18 nor 5 nor 13.
    """
    text = _tail(text)
    for part in reversed(text.split(MARK)[1:]):
        line = part.partition("\n")[0].rpartition("=")[2]
        for number in _numbers(line):
            if number is not None:
                return number
    last = None
    for number in _numbers(text):
        last = number or last
    return last


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{}` or `\fbox{}`, braces balanced; None without one.

    Of nested boxes the inner one counts. A box that is cut off before its closing brace does not count.
    """
    text = _tail(text)
    opened: list[re.Match[str] | None] = []
    start, content = -1, None
    for match in _BRACES.finditer(text):
        if match[1]:
            opened.append(match)
        elif match[0] == "{":
            opened.append(None)
        elif match[0] == "}" and opened:
            box = opened.pop()
            if box is not None and box.start() > start:
                start, content = box.start(), text[box.end() : match.start()]
    return content.strip() or None if content is not None else None


def extract_answer(text: str) -> str | None:
    """Return the text after the first `####` on its line, without commas and final periods, or None."""
    answer = text.partition(MARK)[2].partition("\n")[0]
    # All final periods and spaces, so that an answer extracted once is the same when it is extracted again.
    return answer.replace(",", "").strip().rstrip(_ENDS) or None


def answer_is(text: str, wanted: str) -> bool:
    """Return whether the answer after the first `####` in `text` is `wanted`.

    Both are compared as numbers if both are numbers ("36.0" is right where 36 is wanted), else as text.
    """
    answer = extract_answer(text)
    if answer is None:
        return False
    numbers = _decimal(answer), _decimal(wanted)
    return answer == wanted if None in numbers else numbers[0] == numbers[1]


def text_of(completion: Completion) -> str:
    """Return the text of a completion: itself, or the content of its last assistant message.

    Of messages without an assistant's the last one counts; of content in parts, the text of the parts.
    """
    if isinstance(completion, str):
        return completion
    turns = [turn for turn in completion if turn.get("role") == "assistant"] or list(completion)
    content = turns[-1].get("content") if turns else None
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def _decimal(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _tail(text: str) -> str:
    """Return the last `TAIL` characters from their first white space on, so that no number is cut in two."""
    if len(text) <= TAIL:
        return text
    space = re.search(r"\s", text[-TAIL:])
    return text[len(text) - TAIL + space.start() :] if space else ""


def _numbers(text: str) -> Iterator[Number | None]:
    """Yield every number of the text in order, and None for an expression that is not one number."""
    for match in _TOKEN.finditer(_plain(text)):
        if not match["name"]:
            yield _number(match)


def _plain(text: str) -> str:
    """Return the text with one notation for signs, fractions and powers, without bold and LaTeX spacing."""
    text = _BOLD.sub("", text.translate(_SIGNS))
    text = _COMMAND.sub(lambda match: _COMMANDS.get(match[0], ""), text)
    return _FRACTION.sub(_ratio, _POWER.sub(r"^\1", text))


def _ratio(match: re.Match[str]) -> str:
    """Return the fraction that `_FRACTION` matched as "3/4" or "1 3/4"."""
    whole, above, below, short_above, short_below, sign = match.groups()
    ratio = _VULGAR[sign] if sign else f"{above or short_above}/{below or short_below}"
    return f"{whole} {ratio}" if whole else ratio


def _number(match: re.Match[str]) -> Number | None:
    """Return the number that `_TOKEN` matched; None for an expression."""
    chain = match["chain"]
    if chain is None or match["factor"] or (match["sign"] and match["inner"]):
        return None
    value = _value(" ".join(chain.split())) if len(chain) <= _MAX_LENGTH else None
    if value is None:
        return None
    if match["scale"]:
        value *= _SCALES[match["scale"].lower()]
    negative = "-" in (match["sign"], match["inner"])
    return Number(-value if negative else value, percent=bool(match["percent"]))


def _value(chain: str) -> Fraction | None:
    """Return the value of one number without sign and units; None for an expression."""
    if _DECIMAL.fullmatch(chain):
        return Fraction(chain.replace(",", ""))
    if match := _SCIENTIFIC.fullmatch(chain):
        factor = _value(match[1]) if match[1] else Fraction(1)
        return None if factor is None else factor * Fraction(10) ** int(match[2])
    if match := _RATIO.fullmatch(chain):
        whole, above, below = (int((group or "0").replace(",", "")) for group in match.groups())
        # "2 7/3" is two numbers side by side.
        if below == 0 or (match[1] and above >= below):
            return None
        return whole + Fraction(above, below)
    return None
