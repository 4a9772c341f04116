"""Read the rows of a CSV file one by one, every cell as the text that the file has."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any, BinaryIO

from lopt.data.json_file import not_utf8, nul_byte
from lopt.data.places import BrokenFileError, Place, opened

LONGEST = 2**31 - 1  # characters of a cell
UNNAMED = "Unnamed: {}"  # pandas' name for a column without one, as to_csv writes for its index


def csv_columns(path: Place) -> list[str]:
    """Return the names in the first line; a column without a name is called as pandas calls it.

    Raises:
        BrokenFileError: two columns of one name, or a separator other than a comma.
    """
    header = next((cells for _, cells in _lines(path) if cells), [])
    names = [name or UNNAMED.format(place) for place, name in enumerate(header)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise BrokenFileError(f"has two columns called {twice[0]!r}: rename one")
    separators = [character for character in ";\t|" if len(names) == 1 and character in names[0]]
    if separators:
        raise BrokenFileError(f"has the header {names[0]!r}: separate columns by commas")
    return names


def csv_rows(path: Place) -> Iterator[dict[str, Any]]:
    """Yield the rows below the header; cells that a row lacks at its end are None, empty lines are left out.

    Raises:
        BrokenFileError: a quoted cell without an end, or more cells than columns, with the line (from 1).
    """
    names = csv_columns(path)
    lines = ((number, cells) for number, cells in _lines(path) if cells)
    next(lines, None)
    for number, cells in lines:
        if len(cells) > len(names):
            raise BrokenFileError(
                f"is broken: line {number} has {len(cells)} cells, the header {len(names)}: quote cells that "
                "contain commas"
            )
        yield dict.fromkeys(names) | dict(zip(names, cells, strict=False))


def _lines(path: Place) -> Iterator[tuple[int, list[str]]]:
    """Yield every row's cells with the number of the line it begins in (from 1)."""
    csv.field_size_limit(LONGEST)
    with opened(path) as handle:
        reader, number = csv.reader(_decoded(handle), strict=True), 1
        try:
            for cells in reader:
                yield number, cells
                number = reader.line_num + 1
        except csv.Error as error:
            raise BrokenFileError(
                f"is broken: line {number} is no CSV ({error}): correct its quotes"
            ) from error


def _decoded(handle: BinaryIO) -> Iterator[str]:
    # A binary file ends its lines at \n alone, and old spreadsheets write \r.
    lines = (line for part in handle for line in part.splitlines(keepends=True))
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(number) from error
        if "\0" in text:
            raise nul_byte(number)
        yield text
