"""Values of JSON in a data set: kept as the text of the file, and read from it when a row is used.

Arrow has one type for a column, and `datasets` guesses it from the beginning of a file. Such a cell is JSON
text of its own instead, so that rows need not be alike: no key is filled up with None, no text becomes a date
or a number, and no digit is lost.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets.features.features import register_feature

from lopt.compat import register_plain_format

ROWS = "lopt_rows"
"""Name of the format of plain Python values."""


class JsonFloat(float):
    """A float that knows how the file writes it; `text` is for example "1.50".

    It is written so by `str`, `repr` and f-strings, also within lists and dicts. `json.dumps`, which a chat
    template's `tojson` calls, writes every float its own way (1.5), and has no hook for that.
    """

    text: str

    def __new__(cls, text: str) -> JsonFloat:
        made = super().__new__(cls, text)
        made.text = text
        return made

    def __repr__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[type[JsonFloat], tuple[str]]:
        return JsonFloat, (self.text,)


def parse_int(text: str) -> int | str:
    """Return the integer; its text if it has more digits than Python takes."""
    try:
        return int(text)
    except ValueError:
        return text


DECODER: dict[str, Any] = {"parse_float": JsonFloat, "parse_constant": JsonFloat, "parse_int": parse_int}
"""Arguments for a JSON decoder that keeps what the file says of numbers."""


@dataclass
class JsonCell:
    """A feature of `datasets` for any value of JSON, stored as its text."""

    dtype: ClassVar[str] = "string"
    pa_type: ClassVar[Any] = pa.string()
    id: str | None = field(default=None, repr=False)
    _type: str = field(default="JsonCell", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        """Return the type of the column in Arrow."""
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        """Return the text of a value, None for null."""
        if value is None:
            return None
        return _text(value) if _holds_float(value) else json.dumps(value, ensure_ascii=False)

    def decode_example(self, text: str | None, token_per_repo_id: Any = None) -> Any:
        """Return the value of a text."""
        return None if text is None else json.loads(text, **DECODER)


def _holds_float(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_float, value.values()))
    if isinstance(value, list):
        return any(map(_holds_float, value))
    return isinstance(value, JsonFloat)


def _text(value: Any) -> str:
    """Return the JSON of a value that `DECODER` has read, every float as the file has it."""
    if isinstance(value, JsonFloat):
        return value.text
    if isinstance(value, dict):
        pairs = (f"{json.dumps(name, ensure_ascii=False)}: {_text(inner)}" for name, inner in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


with warnings.catch_warnings():  # the function is called experimental
    warnings.simplefilter("ignore")
    register_feature(JsonCell, "JsonCell")


register_plain_format(ROWS)


def kept_as_cells(rows: Any) -> Any:
    """Return a data set whose cells stay as they are in the maps of others, which would guess their types."""
    cells = any(isinstance(feature, JsonCell) for feature in (rows.features or {}).values())
    return rows.with_format(ROWS) if cells and isinstance(rows, Dataset) else rows


def feature_of(only_text: bool) -> Value | JsonCell:
    """Return the feature of a column of a JSON file."""
    return Value("string") if only_text else JsonCell()


def encoded(example: dict[str, Any], features: Features) -> dict[str, Any]:
    """Return the example as `Dataset.map` wants it, which does not encode itself."""
    return {
        name: feature.encode_example(example[name]) if isinstance(feature, JsonCell) else example[name]
        for name, feature in features.items()
    }
