"""Plain text of questions and conversations, for tokenizers without a chat template."""

from __future__ import annotations

Message = dict[str, str]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""

_ALPACA_INTRO = "Below is an instruction that describes a task"
_ALPACA_ASK = "Write a response that appropriately completes the request."


def message(role: str, content: str) -> Message:
    """Return one turn of a conversation."""
    return {"role": role, "content": content}


def question_prompt(question: str) -> str:
    """Return the prompt of a question; the answer follows after one space."""
    return f"Question: {question}\nAnswer:"


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Return Alpaca's prompt; `context` is its `input`, left out if it is blank."""
    if not context.strip():
        head = f"{_ALPACA_INTRO}. {_ALPACA_ASK}"
        return f"{head}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    return (
        f"{_ALPACA_INTRO}, paired with an input that provides further context. {_ALPACA_ASK}\n\n"
        f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
    )


def plain_conversation(messages: list[Message]) -> str:
    """Return a conversation as text, one line for each turn."""
    return "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages)


def conversation_prompt(messages: list[Message]) -> str:
    """Return a conversation as text that the assistant goes on from; the answer follows after one space."""
    return f"{plain_conversation(messages)}\nAssistant:"
