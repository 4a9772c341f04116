"""How the words of a flag become a value of its type, where argparse and transformers do not know."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from transformers.hf_argparser import string_to_bool

# Flags whose mapping may stand in a JSON file of this name instead.
_PATH_OR_MAPPING = ("accelerator_config", "deepspeed", "fsdp_config")


class OneOrMore(argparse.Action):
    """Stores one word as text and several as a list."""

    def __call__(self, _: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Store the value."""
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Return the types in a flag's type hint but None, those in lists and mappings as `list` and `dict`."""
    parts = [hint] if get_origin(hint) in (None, list, dict, Literal) else get_args(hint)
    return tuple(get_origin(part) or part for part in parts if part is not NoneType)


def takes_text(hint: Any) -> bool:
    """Return whether a flag takes any text, such as a name or a path."""
    return str in kinds_of(hint) or list[str] in (hint, *get_args(hint))


def options_of(name: str, hint: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return what to change in the `options` that transformers gives argparse for a flag.

    Args:
        name: The flag's name.
        hint: Its type.
        given: The options so far.
    """
    kinds = kinds_of(hint)
    alone = {"nargs": "?", "const": True}  # the flag without a value means true
    if list in kinds and str in kinds:
        return {"type": str, "nargs": "+", "action": OneOrMore}
    if dict in kinds:
        return {"type": _mapping(text=str in kinds, path=name in _PATH_OR_MAPPING)}
    if bool in kinds and str in kinds:
        return {"type": _true_or(str), **alone}
    if bool in kinds:
        return alone
    if given.get("const") is True:
        return {"type": _true_or(str)}
    if Literal in kinds and str in kinds:  # text, or false
        return {"type": _true_or(str)}
    if int in kinds and str in kinds:
        return {"type": _number_or_text}
    return {}


def _true_or(other: Callable[[str], Any]) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        return string_to_bool(text) if text.lower() in ("true", "false") else other(text)

    return value


def _number_or_text(text: str) -> int | str:
    return int(text) if text.lstrip("+-").isdigit() else text


def _mapping(*, text: bool, path: bool) -> Callable[[str], Any]:
    """Return what reads a mapping: as JSON text, which transformers reads once more, or as a path."""

    def value(words: str) -> Any:
        if path and os.path.isfile(words):
            return words
        try:
            found = json.loads(words)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            kind = "a JSON file, or a mapping" if path else "a mapping"
            raise argparse.ArgumentTypeError(f"""{words!r} is not {kind} such as '{{"name": 1}}'""")
        return words.strip() if text else found

    return value


def words_of(value: Any) -> Sequence[str]:
    """Return the words of a command line for a value of a YAML file."""
    if isinstance(value, list):
        return [word for part in value for word in words_of(part)]
    if isinstance(value, dict):
        return [json.dumps(value, default=str)]
    return [str(value)]
