r"""Final answers in text: after `####`, as the last number, or in `\boxed{}`.

All of it takes time linear in the text and looks at the last `TAIL` characters only, so an endless
completion costs no more than a long one. A number is read exactly, as a fraction:

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

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import regex as re  # possessive quantifiers in Python 3.11.2's own lose parts of a match

from lopt.data.tasks import MARK

TAIL = 10_000
"""How many characters, counted from the end of a text, are looked at."""

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

_BRACES = re.compile(r"(\\(?:boxed|fbox)\s{0,3}\{)|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True)
class Number:
    """A number as written: its exact value before a percent sign, and whether there is one."""

    value: Fraction
    percent: bool = False

    def equals(self, other: Number) -> bool:
        """Whether both are the same number.

        25% equals 25, because a question may ask for percent, and 0.25. It is taken as that share
        of one only where the plain number is below 1, so that 2500% does not equal 25.
        """
        if self.percent == other.percent:
            return self.value == other.value
        rate, plain = (self.value, other.value) if self.percent else (other.value, self.value)
        return plain == rate or (abs(plain) < 1 and 100 * plain == rate)


def only_number(text: str) -> Number | None:
    """The number in a text that holds just one ("72", "$1,234", "18 eggs"), else None."""
    found = list(_numbers(text)) if len(text) <= TAIL else []
    return found[0] if len(found) == 1 else None


def final_number(text: str) -> Number | None:
    """The number that a completion ends in, or None.

    It is the first number after the last `####` on whose line there is one; where that line holds a
    `=`, the first number after it. A completion that runs on to another `####` is therefore marked
    by what it says last. Without any such `####` it is the last number in the text. Sums and other
    expressions are not worked out: "5 + 13" is no number, and no 5 either.
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
    r"""What stands in the last complete `\boxed{}` (or `\fbox{}`), braces balanced; else None.

    Of nested ones the inner counts, and one cut off before its closing brace does not.
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


def _tail(text: str) -> str:
    """The last `TAIL` characters, from the first white space on: half a number is none."""
    if len(text) <= TAIL:
        return text
    space = re.search(r"\s", text[-TAIL:])
    return text[len(text) - TAIL + space.start() :] if space else ""


def _numbers(text: str) -> Iterator[Number | None]:
    """Every number in the text in order; None for an expression that is not one number."""
    for match in _TOKEN.finditer(_plain(text)):
        if not match["name"]:
            yield _number(match)


def _plain(text: str) -> str:
    """The text with other ways to write signs, fractions and powers made plain."""
    text = _BOLD.sub("", text.translate(_SIGNS))
    text = _COMMAND.sub(lambda match: _COMMANDS.get(match[0], ""), text)
    return _FRACTION.sub(_ratio, _POWER.sub(r"^\1", text))


def _ratio(match: re.Match[str]) -> str:
    whole, above, below, short_above, short_below, sign = match.groups()
    ratio = _VULGAR[sign] if sign else f"{above or short_above}/{below or short_below}"
    return f"{whole} {ratio}" if whole else ratio


def _number(match: re.Match[str]) -> Number | None:
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
    """The value of one number without sign and units, or None where it is an expression."""
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
