"""Plain text of questions and conversations, for tokenizers without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
"""One turn of a conversation: `{"role": ..., "content": ...}`, and what else a chat template may use."""

_ALPACA_INTRO = "Below is an instruction that describes a task"
_ALPACA_ASK = "Write a response that appropriately completes the request."


def message(role: str, content: str | None) -> Message:
    """Return one turn of a conversation."""
    return {"role": role, "content": content}


def question_prompt(question: str) -> str:
    """Return the prompt of a question; the answer follows after one space."""
    return f"Question: {question}\nAnswer:"


def alpaca_prompt(
    instruction: str, context: str = "", system: str = "", history: Sequence[tuple[str, str]] = ()
) -> str:
    """Return Alpaca's prompt.

    Args:
        context: Its `input`, left out if it is blank.
        system: In place of the introduction, if it is not blank.
        history: Earlier instructions and responses.
    """
    turns = [*((asked, "", f"{answered}\n\n") for asked, answered in history), (instruction, context, "")]
    with_context = ", paired with an input that provides further context" if context.strip() else ""
    head = system if system.strip() else f"{_ALPACA_INTRO}{with_context}. {_ALPACA_ASK}"
    made = f"{head}\n\n"
    for asked, about, answered in turns:
        about = f"### Input:\n{about}\n\n" if about.strip() else ""
        made += f"### Instruction:\n{asked}\n\n{about}### Response:\n{answered}"
    return made


def plain_conversation(messages: list[Message]) -> str:
    """Return a conversation as text, one line for each turn."""
    return "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages)


def conversation_prompt(messages: list[Message]) -> str:
    """Return a conversation as text that the assistant goes on from; the answer follows after one space."""
    return f"{plain_conversation(messages)}\nAssistant:"


def as_text(value: Any) -> str:
    """Return a prompt or a completion, which may be a list of messages, as text without roles."""
    if isinstance(value, str):
        return value
    return "\n".join(str(message.get("content") or "") for message in value)
