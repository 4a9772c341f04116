"""Dataclasses of options whose docstring is also the help of their flags."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import TypeVar

T = TypeVar("T")


def documented(cls: type[T]) -> type[T]:
    """Give each field of a dataclass its text under "Attributes:" in the docstring as `metadata["help"]`."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    texts = dict(re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", section, re.MULTILINE))
    for field in fields(cls):  # type: ignore[arg-type]
        assert field.name in texts, f"{cls.__name__}.{field.name} is not in the docstring"
        field.metadata = {"help": " ".join(texts[field.name].split())}  # type: ignore[assignment]
    return cls
