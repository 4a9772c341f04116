"""What a row may hold: text, numbers, lists of messages. All else is refused by row and column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Message = dict[str, str]
"""One turn: `{"role": ..., "content": ...}`."""

SOURCE = "--train_file/--dataset_name"


def turns(messages: list[Message]) -> str:
    """A conversation in the plain template, a line for each turn."""
    return "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages)


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def as_messages(value: Any, index: int, column: str) -> list[Message]:
    """`value` as messages of role and content alone; a None from an assistant becomes empty."""
    if not isinstance(value, list) or not value:
        raise fault(index, column, "must be a non-empty list of {role, content} messages")
    found = []
    for turn in value:
        role = turn.get("role") if isinstance(turn, Mapping) else None
        if not isinstance(role, str) or not role:
            raise fault(index, column, "has a message without a role: give {role, content}")
        content = turn.get("content")
        if content is None and role == "assistant":
            content = ""
        if not isinstance(content, str):
            raise fault(index, column, f"has a {role} message whose content is not text")
        if role == "user" and not content.strip():
            raise fault(index, column, "has an empty user message: fill it or remove the row")
        found.append(message(role, content))
    return found


def last_assistant(messages: list[Message], index: int, column: str) -> int:
    """Position of the last assistant message, which must have a message before it."""
    roles = [turn["role"] for turn in messages]
    if "assistant" not in roles:
        raise fault(index, column, f"has no assistant message (roles: {', '.join(roles)})")
    cut = len(roles) - 1 - roles[::-1].index("assistant")
    if cut == 0:
        raise fault(index, column, "has no message before its assistant message")
    return cut


def prompt_text(value: Any, index: int, column: str) -> str:
    """Text, of which there must be some."""
    if not isinstance(value, str):
        raise fault(index, column, f"must be text, not {type(value).__name__}")
    if not value.strip():
        raise fault(index, column, "is empty: fill it or remove the row")
    return value


def completion_text(value: Any, index: int, column: str) -> str:
    """Text as it is, None as empty, a number as text (2.0, as Arrow stores 2, as "2")."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fault(index, column, f"must be text or a number, not {type(value).__name__}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def fault(index: int, column: str, what: str) -> ValueError:
    """What to raise where row `index` is not as it should be."""
    return ValueError(f"{SOURCE}: row {index} (from 0), column `{column}`, {what}")
