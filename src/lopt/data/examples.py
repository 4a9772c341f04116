"""One row to one example, by its format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopt.data.chat import Chat, check_alike, why_unused
from lopt.data.columns import Format
from lopt.data.messages import (
    check_only_last,
    last_assistant,
    read_marks,
    read_messages,
    read_options,
    read_tools,
    says_something,
)
from lopt.data.notes import Notes
from lopt.data.rows import Example, answer_text, column_error, prompt_text
from lopt.data.templates import (
    Message,
    alpaca_prompt,
    conversation_prompt,
    message,
    plain_conversation,
    question_prompt,
)


def is_rendered(row: Mapping[str, Any], fmt: Format, chat: Chat | None) -> bool:
    """Return whether the chat template has made the row's text already."""
    prompt, completion = row.get(fmt.columns[0]), row.get(fmt.columns[-1])
    if chat is None or fmt.kind in ("messages", "text"):
        return False
    return isinstance(prompt, str) and isinstance(completion, str) and chat.has_rendered(prompt, completion)


def text_prompt(
    row: Mapping[str, Any], kind: str, prompt: str, chat: bool, end: str = ""
) -> str | list[Message]:
    """Return the prompt of a row whose question is text, with its `system`, `input` and `history`.

    Args:
        kind: That of a `lopt.data.columns.Format`.
        chat: Return messages rather than plain text.
        end: Text to add to the question.
    """
    system = answer_text(row.get("system"), "system")
    alpaca = kind == "alpaca"
    context = answer_text(row.get("input"), "input") if alpaca else ""
    history = _history(row.get("history")) if alpaca else []
    if not chat:
        if alpaca:
            return alpaca_prompt(prompt + end, context, system, history)
        text = question_prompt(prompt + end) if kind == "qa" else prompt + end
        return f"{system}\n\n{text}" if system.strip() else text
    messages = [message("system", system)] if system.strip() else []
    for question, reply in history:
        messages += [message("user", question), message("assistant", reply)]
    asked = f"{prompt}\n\n{context}" if context.strip() else prompt
    return [*messages, message("user", asked + end)]


class Examples:
    """Makes the example of a row, or None to drop it.

    Args:
        chat: The template that renders messages; None for the plain ones.
        notes: Counts what does not reach the template.
        extra: Columns for the template.
        keep_messages: Make messages of each row, for a loss on every assistant message.
        rendered: The rows' text is rendered by the chat template already.

    Attributes:
        some_are_not_trained: Whether an assistant message of a row is not trained on, with `keep_messages`.
    """

    some_are_not_trained = False

    def __init__(
        self,
        fmt: Format,
        chat: Chat | None,
        notes: Notes,
        extra: tuple[str, ...],
        *,
        keep_messages: bool,
        rendered: bool,
    ) -> None:
        self.fmt, self.chat, self.notes, self.extra = fmt, chat, notes, extra
        self.keep_messages, self.rendered = keep_messages, rendered

    def __call__(self, row: dict[str, Any]) -> Example | None:
        made = self._sides(row)
        if made is None and self.notes.streamed:  # other rows are counted by whoever has all of them
            self.notes.add(f"left out, their `{self.fmt.columns[-1]}` has nothing to train on")
        if made is None or self.fmt.kind == "text":
            return made
        self._note_left_out(row)
        if self.keep_messages and "messages" not in made:
            made = self._turns(**made)
        if self.chat is not None and not self.rendered:
            readers = {"tools": read_tools, "chat_template_kwargs": read_options}
            made |= {name: readers[name](row.get(name)) for name in self.extra}
        return made

    def _sides(self, row: dict[str, Any]) -> Example | None:
        prompt_column, completion_column = self.fmt.columns[0], self.fmt.columns[-1]
        value, answer = row.get(prompt_column), row.get(completion_column)
        if self.fmt.kind == "messages":
            return self._messages(row, value, prompt_column)
        if self.fmt.kind == "pair" and (isinstance(value, list) or isinstance(answer, list)):
            return self._pair_of_messages(row, value, answer)
        completion = answer_text(answer, completion_column)
        if self.fmt.kind == "text":
            return {"text": self._ended(completion)} if completion.strip() else None
        prompt = prompt_text(value, prompt_column)
        if not completion.strip():
            return None
        check_alike(is_rendered(row, self.fmt, self.chat), self.rendered, prompt_column)
        if self.rendered:
            self.notes.add(f"`{prompt_column}` is rendered by the chat template already, and is not again")
            return {"prompt": prompt, "completion": self._ended(completion)}
        return self._text(row, prompt, completion)

    def _text(self, row: dict[str, Any], prompt: str, completion: str) -> Example:
        """Return the example of two texts."""
        asked = text_prompt(row, self.fmt.kind, prompt, self.chat is not None)
        if self.chat is not None:
            return {"prompt": asked, "completion": [message("assistant", completion)]}
        return {"prompt": asked, "completion": f" {completion}" if self.fmt.kind == "qa" else completion}

    def _messages(self, row: Mapping[str, Any], value: Any, column: str) -> Example | None:
        messages = read_messages(value, column, self.chat, self.notes)
        cut = last_assistant(messages, column)
        messages = messages[: cut + 1]
        marks = read_marks(value, messages, column)
        prompt, answer = _with_system(row, messages[:cut], column), messages[cut:]
        if not self.keep_messages:
            check_only_last(marks, column)
            return self._conversation(prompt, answer)
        messages = [*prompt, *answer]
        said = [says_something(turn, self.chat) for turn in messages if turn["role"] == "assistant"]
        trained = [mark is not False and spoken for mark, spoken in zip(marks, said, strict=True)]
        if not any(trained):
            if any(said):
                self.notes.add("left out, no message of them is marked for training")
            return None
        self.some_are_not_trained |= not all(trained)
        return {"messages": messages, "trained": trained}

    def _turns(self, prompt: list[Message], completion: list[Message]) -> Example:
        """Return a prompt and a completion as messages; the answers of Alpaca's history are trained on."""
        earlier = self.fmt.kind == "alpaca"
        trained = [
            earlier and says_something(turn, self.chat) for turn in prompt if turn["role"] == "assistant"
        ]
        trained += [says_something(turn, self.chat) for turn in completion if turn["role"] == "assistant"]
        self.some_are_not_trained |= not all(trained)
        return {"messages": [*prompt, *completion], "trained": trained}

    def _pair_of_messages(self, row: dict[str, Any], value: Any, answer: Any) -> Example | None:
        """Return the example of a prompt and a completion of which at least one is a list of messages."""
        prompt_column, completion_column = self.fmt.columns
        if isinstance(value, list):
            prompt = read_messages(value, prompt_column, self.chat, self.notes)
            if True in read_marks(value, prompt, prompt_column):
                raise column_error(prompt_column, "marks a message for training: give it in `messages`")
        else:
            prompt = [message("user", prompt_text(value, prompt_column))]
        prompt = _with_system(row, prompt, prompt_column)
        if answer == []:
            return None
        if isinstance(answer, list):
            completion = read_messages(answer, completion_column, self.chat, self.notes)
            if False in read_marks(answer, completion, completion_column):
                raise column_error(
                    completion_column, "marks a message as not trained on: give it in `messages`"
                )
        else:
            completion = [message("assistant", answer_text(answer, completion_column))]
        if completion[0]["role"] != "assistant":
            raise column_error(completion_column, "must begin with an assistant message")
        return self._conversation(prompt, completion)

    def _conversation(self, prompt: list[Message], completion: list[Message]) -> Example | None:
        if not any(says_something(turn, self.chat) for turn in completion):
            return None
        if self.chat is not None:
            return {"prompt": prompt, "completion": completion}
        opening = conversation_prompt(prompt)
        return {"prompt": opening, "completion": plain_conversation([*prompt, *completion])[len(opening) :]}

    def _ended(self, text: str) -> str:
        """Return the text without white space behind its end-of-text token, which TRL would add again."""
        end = str(self.chat.tokenizer.eos_token) if self.chat is not None else ""
        return text.rstrip() if end and text.rstrip().endswith(end) else text

    def _note_left_out(self, row: Mapping[str, Any]) -> None:
        """Count what the row has for a template that does not use it."""
        for name in self.extra:
            if row.get(name) and (self.chat is None or self.rendered or not _uses(self.chat, name)):
                self.notes.add(f"the column `{name}` is left out, {why_unused(self.chat)}")
        if self.rendered and row.get("system"):
            self.notes.add("the column `system` is left out, `prompt` is rendered already")


def _uses(chat: Chat, name: str) -> bool:
    return name == "chat_template_kwargs" or chat.knows(name)


def _with_system(row: Mapping[str, Any], messages: list[Message], column: str) -> list[Message]:
    """Return messages that begin with what the column `system` says, if it says anything."""
    system = answer_text(row.get("system"), "system")
    if not system.strip():
        return messages
    own = messages[0]["content"] if messages[0]["role"] == "system" else None
    if own is None:
        return [message("system", system), *messages]
    if own.strip() != system.strip():
        raise column_error(
            "system", f"is not the system message that `{column}` begins with: keep one of them"
        )
    return messages


def _history(value: Any) -> list[tuple[str, str]]:
    """Return the earlier instructions and outputs of a row."""
    if value is None or value == "":
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise column_error("history", "must be a list of pairs [instruction, output]")
    return [(prompt_text(asked, "history"), answer_text(reply, "history")) for asked, reply in value]
