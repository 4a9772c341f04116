"""Pairs for DPO: what every layout of the same pair becomes, with and without a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from lopt.data.preferences import preference_rows

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}{{ tools }}"
)
ASKED, GOOD, BAD = "What is 1 plus 1?", "It is 2.", "It is 3."
MESSAGES = {
    "prompt": [{"role": "user", "content": ASKED}],
    "chosen": [{"role": "assistant", "content": GOOD}],
    "rejected": [{"role": "assistant", "content": BAD}],
}
WITH_PROMPT = {name: MESSAGES["prompt"] + MESSAGES[name] for name in ("chosen", "rejected")}
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "messages": MESSAGES,
    "implicit": WITH_PROMPT,
    "prompt twice": MESSAGES | WITH_PROMPT,
    "prompt twice, once as text": {"prompt": ASKED, **WITH_PROMPT},  # as in UltraFeedback
    "prompt as text": MESSAGES | {"prompt": ASKED},
}


@pytest.fixture
def plain(tiny_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def chatty(tiny_folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_conversation(layout: str, chatty: Any, plain: Any) -> None:
    rows = Dataset.from_list([LAYOUTS[layout]] * 2)
    assert list(preference_rows(rows, chatty)) == [MESSAGES] * 2
    assert list(preference_rows(rows.to_iterable_dataset(), chatty)) == [MESSAGES] * 2
    text = {"prompt": f"User: {ASKED}\nAssistant:", "chosen": f" {GOOD}", "rejected": f" {BAD}"}
    assert list(preference_rows(rows, plain)) == [LAYOUTS["plain"] if layout == "plain" else text] * 2


def test_text_stays_text_where_nothing_else_is_known(chatty: Any, plain: Any) -> None:
    rendered = {"prompt": f"[user]{ASKED}[assistant]", "chosen": f"{GOOD}<eos>", "rejected": f"{BAD}<eos>"}
    assert list(preference_rows(Dataset.from_list([rendered]), chatty)) == [rendered]
    implicit = {
        "chosen": f"\n\nHuman: {ASKED}\n\nAssistant: Yes",
        "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: No",
    }
    made = {"prompt": f"\n\nHuman: {ASKED}\n\nAssistant:", "chosen": " Yes", "rejected": " No"}
    for tokenizer in (chatty, plain):
        assert list(preference_rows(Dataset.from_list([implicit]), tokenizer)) == [made]


def test_tools_reach_the_template(chatty: Any) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    rows = Dataset.from_list(
        [MESSAGES | {"tools": str(tools).replace("'", '"'), "chat_template_kwargs": "{}"}]
    )
    assert list(preference_rows(rows, chatty)) == [MESSAGES | {"tools": tools, "chat_template_kwargs": {}}]
