"""From the words of a command line and a YAML file to dataclasses, every mistake in one line."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser
from yaml.constructor import ConstructorError

from lopt.messages import error_text
from lopt.reliability.secrets import known_secrets, redact


class _Parser(TrlParser):
    """Says a mistake in one line, as all of lopt does, rather than after three hundred lines of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument (--\w+)[^:]*:", r"\1:", message))


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(command: str, groups: Sequence[Any], arguments: Sequence[str]) -> tuple[Any, ...]:
    """Flags and `--config file.yaml` (flags win) into one instance per dataclass.

    Raises:
        ValueError: an unknown flag, a value of the wrong type; the YAML file is missing, broken or has
            unknown keys. No message shows a token.
    """
    secrets = known_secrets(arguments)
    try:
        parser, words = _words(command, groups, arguments)
        secrets |= known_secrets(words)
        *parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), unknown[0])
            name = flag.lstrip("-").partition("=")[0]
            raise ValueError(f"{flag} is no flag of lopt {command}: {_hint(name, _hints(groups), '--')}")
    except ValueError as error:
        told = redact(str(error), secrets)
        if told == str(error):
            raise
        raise ValueError(told) from None  # the cause would show the secret
    return tuple(parsed)


def settings(
    command: str, groups: Sequence[Any], arguments: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The value of every flag, from `arguments`, the YAML file or by default; and those that are no default.

    Both as they can be written in a YAML file, for arguments that `parse` has accepted.
    """
    defaults = vars(_Parser(groups).parse_args([]))
    parser, words = _words(command, groups, arguments)
    values = vars(parser.parse_args(words))
    return values, {name: value for name, value in values.items() if value != defaults[name]}


def _words(command: str, groups: Sequence[Any], arguments: Sequence[str]) -> tuple[_Parser, list[str]]:
    """A parser, and the words that it is to read: those of the YAML file first, so that flags win."""
    parser = _Parser(groups, prog=f"lopt {command}")
    path, words = _take_config(_resume_alone(list(arguments)))
    if path is not None:
        words = _words_of(_read_yaml(path), f"--config {path}", parser, _hints(groups)) + words
    return parser, words


def _hints(groups: Sequence[Any]) -> dict[str, Any]:
    """The types of all flags."""
    return {name: hint for group in groups for name, hint in get_type_hints(group).items()}


def _hint(name: str, known: Iterable[str], dashes: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {dashes}{close[0]}?" if close else "--help lists them"


def _resume_alone(arguments: list[str]) -> list[str]:
    """`--resume` without a value means the newest."""
    return [
        "--resume=auto" if flag == "--resume" and following.startswith("--") else flag
        for flag, following in pairwise([*arguments, "--"])
    ]


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The file of `--config FILE` or `--config=FILE`, and the other arguments."""
    for position, word in enumerate(arguments):
        flag, sign, value = word.partition("=")
        if flag == "--config":
            end = position + (1 if sign else 2)
            value = value if sign else "".join(arguments[position + 1 : end])
            if not value:
                raise ValueError("--config needs a YAML file")
            return Path(value), arguments[:position] + arguments[end:]
    return None, arguments


def _read_yaml(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path} is not a file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeys)  # noqa: S506  (a SafeLoader)
    # The last three are what PyYAML itself stumbles over: deep nesting, values that their tags do not fit.
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError) as error:
        mark = getattr(error, "problem_mark", None)
        told = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else error_text(error)
        raise ValueError(f"--config {path} is not valid YAML: {told}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} must hold flags, one 'name: value' per line")
    return content


def _words_of(content: dict[Any, Any], where: str, parser: _Parser, hints: Mapping[str, Any]) -> list[str]:
    """A YAML file as words of a command line, so that its values are checked like those of flags."""
    words: list[str] = []
    for key, value in content.items():
        if key not in hints:
            raise ValueError(f"{where}: {key!r} is no flag: {_hint(str(key), hints)}")
        if value is None and NoneType not in get_args(hints[key]):
            raise ValueError(f"{where}: {key} has no value: give it one, or leave the line out")
        kinds: tuple[Any, ...] = (hints[key], *get_args(hints[key]))
        if isinstance(value, bool) and bool not in kinds:  # YAML takes no for false: --save_strategy no
            value = "yes" if value else "no"
        if isinstance(value, list) and list not in [get_origin(kind) for kind in kinds]:
            raise ValueError(f"{where}: {key} takes one value, not a list")
        if value is None or value == []:  # no word says this
            parser.set_defaults(**{key: value})
        elif isinstance(value, list) and len(value) > 1:
            words += [f"--{key}", *map(str, value)]
        else:
            (value,) = value if isinstance(value, list) else [value]
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
