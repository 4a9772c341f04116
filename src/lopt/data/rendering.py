"""What of a row's messages is in the text that the chat template makes of them, and what is not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lopt.data.chat import REASONING, Chat, common_start
from lopt.data.messages import KNOWN_ROLES

_SHOWN = 60
_TAKEN = "\0"  # in place of text that was found, so that it is not found again


ANSWERS = ("completion", "chosen", "rejected")
"""Columns that go on from `prompt`."""


def lost(chat: Chat, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the template does with a row's messages that it should not, each with its beginning.

    Args:
        row: `messages`, or `prompt` with or without `ANSWERS`, as TRL takes them.

    Raises:
        ValueError: the template refuses the messages, or a message vanishes whose role it does not know.
    """
    options = template_options(row)
    prompt = row.get("messages") or row.get("prompt") or []
    answers = [row[name] for name in ANSWERS if row.get(name)]
    if not _are_messages(prompt) or not all(map(_are_messages, answers)):
        return []
    if row.get("messages") or not answers:
        text = chat.render(prompt, add_generation_prompt=not row.get("messages"), **options)
        return list(dict.fromkeys(_missing(chat, prompt, text)))
    found: list[tuple[str, str]] = []
    for answer in answers:
        text = chat.render([*prompt, *answer], **options)
        found += _missing(chat, [*prompt, *answer], text)
        opening = chat.render(prompt, add_generation_prompt=True, **options)
        if not text.startswith(opening):
            end = opening[len(common_start(opening, text)) :]
            found.append(("the end of the rendered prompt is not in the text that is trained on", end))
    return list(dict.fromkeys(found))


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a row for its template."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}


def _missing(chat: Chat, messages: list[Mapping[str, Any]], text: str) -> Iterator[tuple[str, str]]:
    """Yield what of the messages is not in `text`."""
    wanted = [(part, what, turn) for turn in messages for part, what in _parts(chat, turn) if part.strip()]
    # The longest first, and each found once: a short text is not found within another one.
    for part, what, turn in sorted(wanted, key=lambda item: -len(item[0])):
        written = next((form for form in _forms(part, what) if form in text), None)
        if written is not None:
            text = text.replace(written, _TAKEN, 1)
            continue
        role = str(turn["role"])
        lines = [line.strip() for line in part.split("\n") if line.strip()]
        whole = not any(line in text for line in lines)
        if what == "text" and whole and role not in KNOWN_ROLES:
            raise ValueError(
                f"the chat template leaves out messages of the role {role!r}, which it does not know: rename "
                f"it to one of {', '.join(KNOWN_ROLES)}, or give another template with `chat_template_path`"
            )
        amount = "" if whole else "a part of "
        yield f"the chat template leaves out {amount}the {what} of {_a(role)} message", part


def _parts(chat: Chat, turn: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the texts of a message that should be rendered, each with what it is."""
    content = turn.get("content")
    if isinstance(content, str):
        yield content, "text"
    elif isinstance(content, list):
        yield from ((str(part.get("text", "")), "text") for part in content if isinstance(part, Mapping))
    # A key that the template does not read at all was named before.
    reasoning = next((turn[name] for name in REASONING if isinstance(turn.get(name), str)), "")
    if chat.knows(REASONING[0]):
        yield reasoning, "reasoning"
    if not chat.knows("tool_calls"):
        return
    for call in turn.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        yield str(function.get("name", "")), "tool call"
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            yield arguments, "tool call's arguments (text, which it may quote once more: give an object)"
        else:
            yield from ((leaf, "tool call's arguments") for leaf in _leaves(arguments))


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _forms(part: str, what: str) -> Iterator[str]:
    """Yield how a text may be written: as it is, and in JSON if it is within a call."""
    yield part.strip()
    if what.startswith("tool"):
        yield json.dumps(part, ensure_ascii=False)[1:-1]
        yield json.dumps(part)[1:-1]


def _a(noun: str) -> str:
    return f"an {noun}" if noun[:1] in "aeiou" else f"a {noun}"


def summary(
    found: Counter[str], starts: Mapping[str, tuple[int, str]], rows: str, name: str
) -> Iterator[str]:
    """Yield a sentence for each thing that is lost: in how many rows, and where it happens first."""
    for what, count in found.items():
        row, start = starts[what]
        shown = start if len(start) <= _SHOWN else start[:_SHOWN] + "..."
        yield f"{count} of {rows} {name} rows: {what} (row {row} from 0: {shown!r})"
