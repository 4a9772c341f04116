"""Plain text files to measure a model on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lopt.evaluation.names import text_names

CHARACTERS_PER_TOKEN = 64  # more than any tokenizer needs for real text


def read_texts(paths: Sequence[str], tokens: int, name: str) -> dict[str, str]:
    """Return the beginning of every file, enough for `tokens` tokens, by short names that differ.

    Raises:
        ValueError: a file is missing, empty, given twice or not UTF-8; the message names the argument `name`.
    """
    texts: dict[str, str] = {}
    for path, short in zip(paths, text_names(paths), strict=True):
        if short in texts:
            raise ValueError(f"`{name}` {path} is given twice")
        texts[short] = read_text(path, tokens, name)
    return texts


def read_text(path: str | Path, tokens: int, name: str) -> str:
    """Return the beginning of a file, enough for `tokens` tokens.

    Raises:
        ValueError: it is missing, a pipe, not UTF-8, or nearly empty; the message names the argument `name`.
    """
    file = Path(path).expanduser()
    if file.is_fifo():  # reading it may block for ever, and works only once
        raise ValueError(f"`{name}` {path} is a pipe: write the text to a file first")
    try:
        with file.open(encoding="utf-8-sig") as opened:
            text = opened.read(CHARACTERS_PER_TOKEN * tokens)
    except UnicodeDecodeError as error:
        raise ValueError(f"`{name}` {path} is not UTF-8 text: convert it, or give another file") from error
    except OSError as error:
        raise ValueError(f"`{name}` {path} cannot be read: {error.strerror}. Give a text file") from error
    if len(text.strip()) < 2:
        raise ValueError(f"`{name}` {path} is empty or too short: give a file with some text")
    return text
