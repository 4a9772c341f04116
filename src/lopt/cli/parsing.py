"""From a command line and a YAML file to dataclasses; every mistake is one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from transformers.hf_argparser import HfArgumentParser

from lopt.cli.config_file import flags_in
from lopt.cli.flag_values import options_of
from lopt.cli.flags import flags_of
from lopt.reliability.secrets import known_secrets, redact

IN_PIPELINE = ("sft", "dpo", "grpo")
"""Commands whose processes may be those of a pipeline."""


class _Parser(HfArgumentParser):
    """Raises a mistake as a ValueError of one line, where argparse prints the usage and exits.

    Flags are not abbreviated: what `--num_block` means would change with every new flag.
    """

    def __init__(self, groups: Sequence[Any] = (), **options: Any) -> None:
        self.types = _types(groups)
        super().__init__(groups, allow_abbrev=False, **options)

    def add_argument(self, *names: str, **options: Any) -> Any:
        name = names[0].lstrip("-")
        if name in self.types and options.get("action") is None:
            options |= options_of(name, self.types[name], options)
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument (--\w+)[^:]*:", r"\1:", message))


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
        if command in IN_PIPELINE:
            _join_pipeline(parser, words)
        try:
            *parsed, unknown = parser.parse_args_into_dataclasses(
                words, return_remaining_strings=True, look_for_args_file=False
            )
        except TypeError as error:  # of what the library makes of a mapping
            raise ValueError(f"a flag's value does not fit: {error}") from error
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


def _join_pipeline(parser: _Parser, words: Sequence[str]) -> None:
    """Join the pipeline that the flags ask for, before the trainer's arguments set up torch.distributed."""
    given, _ = parser.parse_known_args(list(words))
    if given.schedule == "pipeline":
        from lopt.core.config import LoPTConfig
        from lopt.trainers.pipeline import join_pipeline

        own = {field.name: getattr(given, field.name) for field in fields(LoPTConfig)}
        join_pipeline(LoPTConfig(**own), use_cpu=given.use_cpu)


def check_effect(args: Any, **names_of: Sequence[str]) -> None:
    """Refuse flags without effect where none of the flags that they belong to is given.

    Args:
        args: a dataclass of `flags_of`.
        names_of: by the flag that they belong to (`_or_` between several), the names of the flags.

    Raises:
        ValueError: with both flags.
    """
    plain = type(args)()
    for words, names in names_of.items():
        needed = words.split("_or_")
        if any(getattr(args, name) for name in needed):
            continue
        for name in names:
            if getattr(args, name) != getattr(plain, name):
                others = " or ".join(f"--{name}" for name in needed)
                raise ValueError(f"--{name} has no effect without {others}: add it, or leave it out")


def settings(command: str, arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the value of every flag, and the values of those that differ from their defaults.

    Both can be written to a YAML file. `arguments` are those that `parse` has accepted.
    """
    defaults = vars(_parser(command).parse_args([]))
    parser, words = _words(command, arguments)
    values = vars(parser.parse_args(words))
    return values, {name: value for name, value in values.items() if value != defaults[name]}


def flag_types(command: str) -> dict[str, Any]:
    """Return the type of every flag of `command` by its name."""
    return _types(flags_of(command))


def _types(groups: Iterable[Any]) -> dict[str, Any]:
    types: dict[str, Any] = {}
    for group in groups:
        hints = get_type_hints(group)
        types |= {field.name: hints[field.name] for field in fields(group)}
    return types


def _parser(command: str) -> _Parser:
    """Return the parser of a command; where transformers names the output folder, it is named after it."""
    parser = _Parser(flags_of(command), prog=f"lopt {command}")
    if "output_dir" in parser.types and parser.get_default("output_dir") is None:
        parser.set_defaults(output_dir=f"outputs/{command.split()[0]}")
    return parser


def _words(command: str, arguments: Sequence[str]) -> tuple[_Parser, list[str]]:
    """Return a parser and the words that it is to read: those of the YAML file first, so that flags win."""
    first = _Parser(add_help=False)
    first.add_argument("--config", type=Path, action="append", default=[])
    given, words = first.parse_known_args(list(arguments))
    if len(given.config) > 1:
        raise ValueError("--config is given twice: put all flags into one file")
    parser = _parser(command)
    for path in given.config:
        of_file, defaults = flags_in(path, parser.types, lambda name: _hint(name, parser.types))
        parser.set_defaults(**defaults)
        words = of_file + words
    return parser, words


def _hint(name: str, known: Iterable[str], dashes: str = "") -> str:
    known = list(known)
    begun = [flag for flag in known if name and flag.startswith(name)]
    close = begun[:3] or difflib.get_close_matches(name, known, n=1)
    return f"did you mean {' or '.join(dashes + flag for flag in close)}?" if close else "--help lists them"
