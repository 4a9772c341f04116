"""Plain text files to measure a model on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CHARACTERS_PER_TOKEN = 64  # more than any tokenizer needs for real text


def read_texts(paths: Sequence[str], tokens: int, flag: str) -> dict[str, str]:
    """The beginning of every file, enough for `tokens` tokens, by short names that differ.

    Raises:
        ValueError: a file is missing, empty, given twice or not UTF-8; the message names `flag`.
    """
    texts: dict[str, str] = {}
    for path, name in zip(paths, short_names(paths), strict=True):
        if name in texts:
            raise ValueError(f"{flag} {path} is given twice")
        texts[name] = read_text(path, tokens, flag)
    return texts


def read_text(path: str | Path, tokens: int, flag: str) -> str:
    """The beginning of a file, enough for `tokens` tokens.

    Raises:
        ValueError: it is missing, a pipe, not UTF-8, or has hardly any text; the message names `flag`.
    """
    file = Path(path).expanduser()
    if file.is_fifo():  # it would be waited for, perhaps without end, and is gone once read
        raise ValueError(f"{flag} {path} is a pipe: write the text to a file first")
    try:
        with file.open(encoding="utf-8-sig") as opened:
            text = opened.read(CHARACTERS_PER_TOKEN * tokens)
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path} is not UTF-8 text: convert it, or give another file") from error
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read: {error.strerror}. Give a text file") from error
    if len(text.strip()) < 2:
        raise ValueError(f"{flag} {path} is empty or too short: give a file with some text")
    return text


def short_names(paths: Sequence[str]) -> list[str]:
    """The ends of the paths, as short as tells them apart, without the suffix of a text file."""
    parts = [Path(path).expanduser().absolute().parts for path in paths]
    for length in range(1, max(map(len, parts), default=0)):
        names = [_name(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _name(parts: Sequence[str]) -> str:
    path = Path(*parts)
    return str(path.with_suffix("") if path.suffix.lower() in (".txt", ".md", ".jsonl", ".json") else path)
