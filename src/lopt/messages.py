"""Text of exceptions, short enough for an error message."""

from __future__ import annotations


def error_text(error: BaseException, limit: int = 300, *, with_type: bool = False) -> str:
    """Return the message of `error` as one line of at most `limit` characters and "...".

    Args:
        with_type: Put the exception's type before the message, as Python does. Without it, the type is
            returned only if there is no message.
    """
    kind, text = type(error).__name__, str(error)
    if not text.strip():
        return kind
    return shorten(f"{kind}: {text}" if with_type else text, limit)


def shorten(text: str, limit: int) -> str:
    """Return `text` as one line without repeated white space, cut after `limit` characters by "..."."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + "..."
