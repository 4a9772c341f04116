"""From a command line and a YAML file to dataclasses; every mistake is one line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser
from yaml.constructor import ConstructorError

from lopt.cli.flags import flags_of
from lopt.messages import error_text
from lopt.reliability.secrets import known_secrets, redact


class _Parser(HfArgumentParser):
    """Raises a mistake as a ValueError of one line, where argparse prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument (--\w+)[^:]*:", r"\1:", message))


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(command: str, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Return one instance of each dataclass of `flags_of(command)`, from `--config file.yaml` and flags.

    Flags win over the file.

    Raises:
        ValueError: An unknown flag, or a value of the wrong type; the YAML file is missing, broken or has
            unknown keys. No message shows a token.
    """
    secrets = known_secrets(arguments)
    try:
        parser, words = _words(command, arguments)
        secrets |= known_secrets(words)
        *parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), unknown[0])
            name = flag.lstrip("-").partition("=")[0]
            hint = _hint(name, flag_types(command), "--")
            raise ValueError(f"{flag} is no flag of lopt {command}: {hint}")
    except ValueError as error:
        message = redact(str(error), secrets)
        if message == str(error):
            raise
        raise ValueError(message) from None  # the cause would show the secret
    return tuple(parsed)


def settings(command: str, arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the value of every flag, and the values of those that differ from their defaults.

    Both can be written to a YAML file. `arguments` are those that `parse` has accepted.
    """
    defaults = vars(_Parser(flags_of(command)).parse_args([]))
    parser, words = _words(command, arguments)
    values = vars(parser.parse_args(words))
    return values, {name: value for name, value in values.items() if value != defaults[name]}


def flag_types(command: str) -> dict[str, Any]:
    """Return the type of every flag of `command` by its name."""
    types: dict[str, Any] = {}
    for group in flags_of(command):
        hints = get_type_hints(group)
        types |= {field.name: hints[field.name] for field in fields(group)}
    return types


def _words(command: str, arguments: Sequence[str]) -> tuple[_Parser, list[str]]:
    """Return a parser and the words that it is to read: those of the YAML file first, so that flags win."""
    first = _Parser([], add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path, action="append", default=[])
    given, words = first.parse_known_args(list(arguments))
    if len(given.config) > 1:
        raise ValueError("--config is given twice: put all flags into one file")
    parser = _Parser(flags_of(command), prog=f"lopt {command}")
    for path in given.config:
        words = _words_of(_read_yaml(path), f"--config {path}", parser, flag_types(command)) + words
    return parser, words


def _hint(name: str, known: Iterable[str], dashes: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {dashes}{close[0]}?" if close else "--help lists them"


def _read_yaml(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path} is not a file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeys)  # noqa: S506  (a SafeLoader)
    # PyYAML itself raises the last three: for deep nesting, and for values that do not fit their tags.
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else error_text(error)
        raise ValueError(f"--config {path} is not valid YAML: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} must hold flags, one 'name: value' per line")
    return content


def _words_of(content: dict[Any, Any], where: str, parser: _Parser, types: Mapping[str, Any]) -> list[str]:
    """Return a YAML file as words of a command line, so that its values are checked like those of flags."""
    words: list[str] = []
    for key, value in content.items():
        if key not in types:
            raise ValueError(f"{where}: {key!r} is no flag: {_hint(str(key), types)}")
        if value is None and NoneType not in get_args(types[key]):
            raise ValueError(f"{where}: {key} has no value: give it one, or leave the line out")
        kinds: tuple[Any, ...] = (types[key], *get_args(types[key]))
        if isinstance(value, bool) and bool not in kinds:  # YAML takes no for false: --save_strategy no
            value = "yes" if value else "no"
        if isinstance(value, list) and list not in [get_origin(kind) for kind in kinds]:
            raise ValueError(f"{where}: {key} takes one value, not a list")
        if value is None or value == []:  # no word of a command line means this
            parser.set_defaults(**{key: value})
        elif isinstance(value, list) and len(value) > 1:
            words += [f"--{key}", *map(str, value)]
        else:
            (value,) = value if isinstance(value, list) else [value]
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
