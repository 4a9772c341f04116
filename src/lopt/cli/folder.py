"""First words of a command that are no flags: `lopt chat FOLDER`, `lopt compare dpo`."""

from __future__ import annotations

from collections.abc import Sequence


def folder_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `--model_name_or_path` before a first word that is no flag.

    Raises:
        ValueError: it is named twice.
    """
    if not arguments or arguments[0].startswith("-"):
        return list(arguments)
    if any(word.partition("=")[0] == "--model_name_or_path" for word in arguments):
        raise ValueError(
            f"the model is named twice, as {arguments[0]} and by --model_name_or_path: leave one out"
        )
    return ["--model_name_or_path", *arguments]


def for_pairs(command: str, arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the command that is meant, for pairs if its first word is dpo, and the words after that."""
    return (f"{command} dpo", arguments[1:]) if arguments[:1] == ["dpo"] else (command, arguments)
