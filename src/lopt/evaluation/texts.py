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
    texts = {}
    for path, name in zip(paths, short_names(paths), strict=True):
        try:
            refuse_pipe(path, flag)
            with Path(path).expanduser().open(encoding="utf-8-sig") as file:
                text = file.read(CHARACTERS_PER_TOKEN * tokens)
        except UnicodeDecodeError as error:
            raise ValueError(f"{flag} {path} is not UTF-8 text: convert it, or give another file") from error
        except OSError as error:
            raise ValueError(f"{flag} {path} cannot be read: {error.strerror}. Give a text file") from error
        if not text.strip():
            raise ValueError(f"{flag} {path} is empty: give a file with some text")
        if name in texts:
            raise ValueError(f"{flag} {path} is given twice")
        texts[name] = text
    return texts


def refuse_pipe(path: str | Path, flag: str) -> None:
    """A pipe would be waited for, perhaps without end, and is gone once read."""
    if Path(path).expanduser().is_fifo():
        raise ValueError(f"{flag} {path} is a pipe: write the text to a file first")


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
