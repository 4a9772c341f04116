"""Read the rows of a JSON file one by one: objects one after the other (JSONL), or a list of objects.

Python's own `json` reads them. Faster parsers guess one type for a whole column (pyarrow, pandas), cannot
read a part of a list (orjson, msgspec) or do not tell how a number is written (orjson, ujson).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from lopt.data.cells import DECODER
from lopt.data.places import BrokenFileError, Place, opened

CHUNK = 1 << 20  # bytes that are read at a time
_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_UNFINISHED = 32  # an error so many characters from the end of what was read may mean "read on"


def json_rows(path: Place) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, of which a part is in memory at a time.

    Numbers with a point or an exponent are `lopt.data.cells.JsonFloat`. A text in a list is a row with the
    column `text`.

    Raises:
        BrokenFileError: no UTF-8, no JSON, or a value that is no row, with its line (from 1).
    """
    with opened(path) as handle:
        text = _Text(handle)
        if not text.take("["):
            while text.next_character():
                yield text.row(in_list=False)
            return
        if text.take("]"):
            return
        yield text.row(in_list=True)
        while not text.take("]"):
            if not text.take(","):
                raise text.error("is not valid JSON (a comma or ] is missing): add it")
            yield text.row(in_list=True)
        if text.next_character():
            raise text.error("goes on after the list: remove what follows it")


def not_utf8(line: int) -> BrokenFileError:
    """Return the error to raise for bytes that are no text."""
    return BrokenFileError(f"is not UTF-8 (line {line}): convert it to UTF-8")


def nul_byte(line: int) -> BrokenFileError:
    """Return the error to raise for text of two bytes a character."""
    return BrokenFileError(f"has a NUL byte (line {line}), as UTF-16 does: write it anew as UTF-8")


class _Text:
    """The text of a file around the place that is read."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle = handle
        self.bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self.json = json.JSONDecoder(object_pairs_hook=_unique, **DECODER)
        self.buffer, self.place = "", 0
        self.line, self.before = 1, 0  # the line of the buffer's start, and characters before it there
        self.ended = False

    def next_character(self) -> str:
        """Return the next character that is no white space without taking it, "" at the end."""
        while True:
            found = _SPACE.match(self.buffer, self.place)
            assert found is not None
            self.place = found.end()
            if self.place < len(self.buffer) or not self._read_on():
                return self.buffer[self.place : self.place + 1]

    def take(self, character: str) -> bool:
        """Take the next character if it is this one."""
        found = self.next_character() == character
        self.place += found
        return found

    def row(self, in_list: bool) -> dict[str, Any]:
        """Take and return the next value, which must be a row."""
        self.next_character()
        value, end = self._value()
        if in_list and isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            raise self.error(
                "is not a JSON object such as {'prompt': ...}: write one object a line, or a list of objects"
            )
        if _SURROGATE.search(self.buffer, self.place, end):
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = ascii(error.object[error.start])
                raise self.error(f"has half a character ({half}): remove it") from error
        self.place = end
        return value

    def _value(self) -> tuple[Any, int]:
        """Return the next value and the place behind it."""
        while True:
            try:
                return self.json.raw_decode(self.buffer, self.place)
            except json.JSONDecodeError as error:
                ahead = error.pos - self.place
                may_go_on = error.pos > len(self.buffer) - _UNFINISHED or error.msg.startswith("Unterminated")
                if may_go_on and self._read_on():
                    continue
                # Where the last line breaks off, the error is noticed behind it.
                place = min(self.place + ahead, len(self.buffer.rstrip()))
                column = self._before(place) + 1
                raise self.error(
                    f"is not valid JSON ({error.msg}, column {column}): correct it, one object a line or a "
                    "list of objects",
                    place,
                ) from error
            except RecursionError as error:
                raise self.error("is nested too deeply: flatten it") from error
            except _TwiceError as error:
                raise self.error(f"has the key {error} twice in one object: rename one") from error

    def _read_on(self) -> bool:
        """Add what comes next to the buffer; return False at the end of the file."""
        if self.ended:
            return False
        read = self.handle.read(CHUNK)
        self.line, self.before = self.line + self.buffer.count("\n", 0, self.place), self._before(self.place)
        self.buffer, self.place = self.buffer[self.place :], 0
        try:
            new = self.bytes.decode(read, final=not read)
        except UnicodeDecodeError as error:
            self.buffer += error.object[: error.start].decode("utf-8", "replace")
            raise not_utf8(self.line + self.buffer.count("\n")) from error
        if "\0" in new:
            raise nul_byte(self.line + (self.buffer + new[: new.index("\0")]).count("\n"))
        self.buffer += new
        self.ended = not read
        return bool(read)

    def _before(self, place: int) -> int:
        """Return how many characters are before `place` of the buffer in its line."""
        line_end = self.buffer.rfind("\n", 0, place)
        return self.before + place if line_end < 0 else place - line_end - 1

    def error(self, problem: str, place: int | None = None) -> BrokenFileError:
        """Return the error to raise for what is at `place` of the buffer; by default, where reading is."""
        place = min(self.place, len(self.buffer.rstrip())) if place is None else place
        line = self.line + self.buffer.count("\n", 0, place)
        return BrokenFileError(f"is broken: line {line} {problem}")


class _TwiceError(Exception):
    """A key that an object has twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(repr(next(name for name in names if names.count(name) > 1)))
    return made
