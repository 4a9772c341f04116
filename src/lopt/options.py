"""Dataclasses of options whose fields are flags as well, with their help."""

from __future__ import annotations

import inspect
import re
from dataclasses import field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def documented(cls: type[T]) -> type[T]:
    """Give each field of a dataclass its text under "Attributes:" in the docstring as `metadata["help"]`."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    texts = dict(re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", section, re.MULTILINE))
    for part in fields(cls):  # type: ignore[arg-type]
        if "help" in part.metadata:  # of a base class
            continue
        assert part.name in texts, f"{cls.__name__}.{part.name} is not in the docstring"
        part.metadata = {"help": " ".join(texts[part.name].split())}  # type: ignore[assignment]
    return cls


def flag(default: Any, text: str, **options: Any) -> Any:
    """Return a dataclass field that HfArgumentParser reads; `options` are aliases, or argparse's own."""
    metadata = {"help": text, **options}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
