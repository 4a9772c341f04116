"""Messages of a row: their keys and roles, and the marks that say which of them are trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lopt.data.cells import DECODER
from lopt.data.chat import REASONING, Chat, why_unused
from lopt.data.notes import Notes
from lopt.data.rows import column_error
from lopt.data.templates import Message

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
"""Roles of other formats -> what chat templates call them."""

CALLS = ("function_call", "tool_call")
"""Roles of messages that are a call of a tool, as JSON text."""

MARKS = {"weight": True, "train": True, "training": True, "trainable": True, "loss": True,
         "masked": False, "mask": False}  # fmt: skip
"""Keys that say of a message whether it is trained on -> what they say where they are true."""

KNOWN_ROLES = ("system", "user", "assistant", "tool")


def read_messages(value: Any, column: str, chat: Chat | None, notes: Notes) -> list[Message]:
    """Return `value` as messages with all their keys but those that are None and those of `MARKS`.

    Role and content may be called `from` and `value`, as in ShareGPT. The content None of an assistant
    becomes "" where it calls no tool. Text in parts is joined. Arguments of a call that are JSON text become
    an object, as servers give it to the template.

    Args:
        chat: The template that renders them; None for the plain one, which knows role and content alone.
        notes: Counts roles that are renamed, and keys that do not reach the template.

    Raises:
        ValueError: `value` is not a list of messages, or one has no role, no text, a call that is none, or is
            an empty user message; a message that is nothing but a call, which the template cannot
            write.
    """
    if not isinstance(value, list) or not value:
        raise column_error(column, "must be a non-empty list of {role, content} messages")
    found, said = [], []
    for given in value:
        turn = _named(given, column)
        role = turn.get("role")
        if not isinstance(role, str) or not role:
            raise column_error(column, "has a message without a role: give {role, content}")
        named = _role(role, chat)
        if named != role and turn is given:  # those of ShareGPT are as expected
            said.append(f"the role {role} is read as {named}")
        if named in CALLS and (chat is None or not chat.knows_role(named)):
            turn, named = _call(turn, chat, column), "assistant"
        keys = {name for name, value in turn.items() if value is not None} - {"role", "content", *MARKS}
        if turn.get("tool_calls") == []:
            keys.remove("tool_calls")
        for name in keys.intersection(REASONING):
            if not isinstance(turn[name], str):
                raise column_error(column, f"has a message whose `{name}` is not text")
        read = {name: turn[name] for name in turn if name in keys}
        if chat is not None:
            read = {chat.name_of(name): value for name, value in read.items()} | {
                name: value for name, value in read.items() if chat.name_of(name) == name
            }
        if "tool_calls" in read:
            read["tool_calls"] = _calls(read["tool_calls"], column)
        lost = keys if chat is None else {name for name in keys if not chat.knows(name)}
        said += [f"`{name}` of a message is left out, {why_unused(chat)}" for name in sorted(lost)]
        content = _content(turn, named, column, calls=chat is not None and "tool_calls" in read)
        if chat is not None and "tool_calls" in lost and not (content or "").strip():
            raise column_error(
                column,
                "has a message that only calls a tool, which the chat template cannot write: give one that "
                "can with `chat_template_path`, or remove the row",
            )
        found.append({"role": named, "content": content, **(read if chat is not None else {})})
    notes.add(*said)
    return found


def _named(turn: Any, column: str) -> Mapping[str, Any]:
    """Return a message with `role` and `content` in place of ShareGPT's `from` and `value`."""
    if not isinstance(turn, Mapping) or turn.get("role") is not None or turn.get("from") is None:
        return turn if isinstance(turn, Mapping) else {}
    if turn.get("content") is not None:
        raise column_error(
            column, "has a message with `from` and `content`: give {from, value} or {role, content}"
        )
    rest = {name: value for name, value in turn.items() if name not in ("from", "value", "role", "content")}
    return {"role": turn["from"], "content": turn.get("value"), **rest}


def _call(turn: Mapping[str, Any], chat: Chat | None, column: str) -> Mapping[str, Any]:
    """Return a message of a role of `CALLS` as one that calls tools, if the template can write calls."""
    call = _from_json(turn.get("content"), column, "a call {name, arguments}")
    calls = call if isinstance(call, list) else [call]
    if not calls or not all(isinstance(call, Mapping) and call.get("name") for call in calls):
        raise column_error(column, "has a call that is none: give {name, arguments}, or a list of them")
    if chat is None or not chat.knows("tool_calls"):
        return turn
    made = [{"type": "function", "function": call} for call in calls]
    return {**turn, "content": None, "tool_calls": made}


def _calls(calls: Any, column: str) -> list[Any]:
    """Return tool calls, their arguments as objects."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise column_error(column, "has a message whose `tool_calls` is no list of calls")
    made = []
    for call in calls:
        function = call.get("function", call)
        text = function.get("arguments") if isinstance(function, Mapping) else None
        if not isinstance(text, str):
            made.append(call)
            continue
        arguments = (
            _from_json(text, column, "the arguments of a tool call as an object") if text.strip() else {}
        )
        if not isinstance(arguments, Mapping):
            raise column_error(column, f"has a tool call whose arguments are no object: {text[:60]!r}")
        changed = {**function, "arguments": arguments}
        made.append({**call, "function": changed} if "function" in call else changed)
    return made


def _role(role: str, chat: Chat | None) -> str:
    if role in KNOWN_ROLES or (chat is not None and chat.knows_role(role)):
        return role
    lowered = role.strip().lower()
    return lowered if lowered in KNOWN_ROLES else ROLES.get(lowered, role)


def _content(turn: Mapping[str, Any], role: str, column: str, calls: bool) -> str | None:
    """Return the text of a message; None only where an assistant calls a tool without a word."""
    content = turn.get("content")
    if content is None and role == "assistant":
        return None if calls else ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if parts and all(isinstance(part, str) for part in parts):
            content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise column_error(column, f"has a {role} message whose content is not text")
    if role == "user" and not content.strip():
        raise column_error(column, "has an empty user message: fill it or remove the row")
    return content


def says_something(turn: Message, chat: Chat | None) -> bool:
    """Return whether a message has text, or a call that the template can write."""
    calls = chat is not None and turn.get("tool_calls") and chat.knows("tool_calls")
    return bool((turn["content"] or "").strip() or calls)


def last_assistant(messages: list[Message], column: str) -> int:
    """Return the position of the last assistant message.

    Raises:
        ValueError: there is none, or no message before it.
    """
    roles = [turn["role"] for turn in messages]
    if "assistant" not in roles:
        raise column_error(column, f"has no assistant message (roles: {', '.join(roles)})")
    position = len(roles) - 1 - roles[::-1].index("assistant")
    if position == 0:
        raise column_error(column, "has no message before its assistant message")
    return position


def read_marks(value: list[Any], messages: list[Message], column: str) -> list[bool | None]:
    """Return of each assistant message whether it is to be trained on, None where it does not say.

    Args:
        value: The messages of the row, whose beginning `messages` were read from.

    Raises:
        ValueError: a mark that is neither yes nor no, two that disagree, or a message of another role that
            is marked for training.
    """
    marks: list[bool | None] = []
    for turn, message in zip(value, messages, strict=False):
        names = sorted(name for name in MARKS if turn.get(name) is not None)
        for name in names:
            if turn[name] not in (0, 1):
                raise column_error(column, f"has a message whose `{name}` is {turn[name]!r}: give 0 or 1")
        said = {bool(turn[name]) == MARKS[name] for name in names}
        if len(said) > 1:
            raise column_error(column, f"has a message whose {' and '.join(names)} disagree: remove one")
        if message["role"] == "assistant":
            marks.append(next(iter(said), None))
        elif True in said:
            raise column_error(
                column,
                f"marks a {message['role']} message for training by `{names[0]}`: remove the mark, only "
                "those of the assistant are trained on",
            )
    return marks


def check_only_last(marks: list[bool | None], column: str) -> None:
    """Raise a ValueError if marks train on other messages than the last assistant's."""
    if marks[-1] is False or True in marks[:-1]:
        raise column_error(
            column,
            "marks other messages for training than its last: `assistant_only_loss` trains on those that are "
            "marked",
        )


def read_tools(value: Any, column: str = "tools") -> list[Any] | None:
    """Return the tools of a row, which may be JSON text; None where there are none.

    A function alone becomes the function of a tool, as servers give it to the template.

    Raises:
        ValueError: they are no list of objects.
    """
    value = _from_json(value, column, "a list of tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise column_error(column, "must be a list of tools, each an object, or JSON text of it")
    bare = ("type", "function")
    return [
        {"type": "function", "function": tool} if "name" in tool and not any(map(tool.get, bare)) else tool
        for tool in value
    ]


def read_options(value: Any, column: str = "chat_template_kwargs") -> dict[str, Any]:
    """Return the arguments that a row has for its template.

    Raises:
        ValueError: they are no object.
    """
    value = _from_json(value, column, "an object")
    if not value:
        return {}
    if not isinstance(value, Mapping):
        raise column_error(column, "must be an object")
    return dict(value)


def _from_json(value: Any, column: str, wanted: str) -> Any:
    """Return the value that JSON text stands for; other values, and blank text, as they are."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value, **DECODER)
    except (json.JSONDecodeError, RecursionError) as error:
        raise column_error(column, f"has text that is no JSON ({error}): give {wanted}") from error
