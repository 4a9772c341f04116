"""What the assistant says in a conversation, told apart by rendering its beginnings.

TRL asks the chat template for marks around it, `{% generation %}`, which those of Llama 3.1, Mistral and
many others do not have, and has templates of its own for some. For the rest, an answer begins where the text
of the messages before it ends, opened for an answer, and ends where the text of the messages up to it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from trl import get_training_chat_template
from trl.chat_template_utils import has_generation_markers

from lopt.data.batches import IGNORED
from lopt.data.cells import kept_as_cells
from lopt.data.chat import Chat, common_start
from lopt.data.rendering import template_options
from lopt.data.rows import SOURCE, column_names


def has_marks(tokenizer: Any) -> bool:
    """Return whether the chat template marks what the assistant says, or TRL has one for it that does."""
    if has_generation_markers(tokenizer.chat_template):
        return True
    try:
        get_training_chat_template(processing_class=tokenizer)
    except ValueError:
        return False
    return True


def check_turns(tokenizer: Any) -> None:
    """Refuse a tokenizer by which the assistant's tokens cannot be told from others.

    Raises:
        ValueError: with the arguments that help.
    """
    if not has_marks(tokenizer) and not tokenizer.is_fast:
        raise ValueError(
            "`assistant_only_loss` needs a chat template with {% generation %} and {% endgeneration %} "
            "around what the assistant says, or a fast tokenizer, and this one has neither: give a template "
            "with `chat_template_path`, or leave `assistant_only_loss` out, to train on the last answer of "
            "each row"
        )


def by_turns(rows: Any, tokenizer: Any, name: str) -> Any:
    """Return rows of messages as tokens with labels for what the assistant says.

    Args:
        rows: with the column `messages`, and `trained` where some of its answers are not trained on.
        name: of the rows, for messages.

    Raises:
        ValueError: with the row (from 0), if its beginning is rendered in another way than the whole.
    """
    if "messages" not in column_names(rows):
        raise ValueError(
            f"`assistant_only_loss` needs the {name} rows as `messages`, since the chat template does not "
            "mark what the assistant says: give them so, or leave it out"
        )
    options: dict[str, Any] = {"desc": f"Tokenizing {name} dataset"} if isinstance(rows, Dataset) else {}
    return kept_as_cells(rows).map(
        _tokens_of,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, "name": name},
        remove_columns=column_names(rows),
        **options,
    )


def _tokens_of(row: Any, place: int, tokenizer: Any, name: str) -> dict[str, list[int]]:
    chat = Chat(tokenizer)
    options = template_options(row)
    try:
        text = chat.render(row["messages"], **options)
        spans = list(_spans(chat, row["messages"], text, options))
    except ValueError as error:
        raise ValueError(f"{SOURCE}: {name} row {place} (from 0), {error}") from error
    trained = row.get("trained") or [True] * len(spans)
    wanted = [span for span, asked in zip(spans, trained, strict=True) if asked]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(start <= first < end for start, end in wanted) and last > first else IGNORED
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def _spans(chat: Chat, messages: list[Any], text: str, options: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield where each answer of the assistant begins and ends in the text of all messages."""
    for place, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        opening = chat.render(messages[:place], add_generation_prompt=True, **options)
        # Some templates end the whole, but no beginning, with the token that ends a text.
        end = len(common_start(chat.render(messages[: place + 1], **options), text))
        said = (turn.get("content") or "").strip()
        if not text.startswith(opening) or said not in text[len(opening) : end]:
            raise ValueError(
                "the chat template renders the messages before an answer in another way than it does in the "
                "whole, so that its tokens cannot be told: leave `assistant_only_loss` out, or give a "
                "template with {% generation %} with `chat_template_path`"
            )
        yield len(opening), end
