"""Rows as people have them, through the chat templates of real models: what is trained on, token by token.

The templates are TRL's copies (Apache-2.0) of those that the models ship. Mistral's are not among them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from prepared_rows import prepared, tokenizer_with

SOURCES = {
    "llama3": ("meta-llama/Meta-Llama-3-8B-Instruct", "Llama 3 Community License"),
    "llama3_1": ("meta-llama/Llama-3.1-8B-Instruct", "Llama 3.1 Community License"),
    "qwen2_5": ("Qwen/Qwen2.5-7B-Instruct", "Apache-2.0"),
    "qwen3": ("Qwen/Qwen3-8B", "Apache-2.0"),
    "gemma3": ("google/gemma-3-4b-it", "Gemma terms"),
    "phi3": ("microsoft/Phi-3-mini-4k-instruct", "MIT"),
}
"""Template -> a model that ships it, and the licence of that model."""

SHARE = {
    "system": "Be brief.",
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "See you."},
    ],
}
ALPACA = {
    "system": "Be brief.",
    "instruction": "Bye",
    "input": "",
    "output": "See you.",
    "history": [["Hi", "Hello."]],
}

# ‹...› is trained on with `assistant_only_loss`, «...» without it as well.
TURNS = {
    "llama3": "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n‹Hello.<|eot_id|>›"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«See you.<|eot_id|>»",
    "llama3_1": "<bos><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n‹Hello.<|eot_id|>›"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«See you.<|eot_id|>»",
    "qwen2_5": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n‹Hello.<|im_end|>\n›<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n«See you.<|im_end|>\n»",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\n‹Hello.<|im_end|>\n›<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n«<think>\n\n</think>\n\nSee you.<|im_end|>\n»",
    "gemma3": "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
    "<start_of_turn>model\n‹Hello.<end_of_turn>\n›<start_of_turn>user\nBye<end_of_turn>\n"
    "<start_of_turn>model\n«See you.<end_of_turn>\n»",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n‹Hello.<|end|>\n›"
    "<|user|>\nBye<|end|>\n<|assistant|>\n«See you.<|end|>\n<eos>»",
}


def of_turns(template: str) -> str:
    """The text where each answer is trained on; TRL renders these two by templates of its own."""
    text = TURNS[template].replace("‹", "«").replace("›", "»")
    if template == "qwen2_5":
        return text.replace("assistant\n«", "assistant«\n")
    return text.replace("«Hello", "«<think>\n\n</think>\n\nHello") if template == "qwen3" else text


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def marked(folder: Path, rows: list[dict], template: str, **settings: Any) -> list[str]:
    """The text of each row, what is trained on in « and »: a token is a byte."""
    trainer = prepared(folder, rows, template, **settings)
    made = []
    for row in trainer.train_dataset:
        text, inside = "", False
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (token, -100)
            text += "«" if label != -100 and not inside else "»" if label == -100 and inside else ""
            inside = label != -100
            text += trainer.processing_class.decode([token])
        made.append(text + "»" * inside)
    return made


@pytest.mark.parametrize("template", SOURCES)
def test_sharegpt(template: str, tmp_path: Path) -> None:
    last = TURNS[template].replace("‹", "").replace("›", "")
    assert marked(tmp_path, [SHARE], template) == [last]
    turns = of_turns(template)
    second = json.loads(json.dumps(SHARE))
    second["conversations"][1]["weight"] = 0
    first, _, rest = turns.partition("«")
    skipped = first + rest.replace("»", "", 1)
    assert marked(tmp_path, [SHARE, second], template, assistant_only_loss=True) == [turns, skipped]


@pytest.mark.parametrize(("template", "only"), [("qwen2_5", False), ("qwen3", True), ("llama3_1", True)])
def test_alpaca_with_a_history(template: str, only: bool, tmp_path: Path) -> None:
    last = TURNS[template].replace("‹", "").replace("›", "")
    expected = of_turns(template) if only else last
    assert marked(tmp_path, [ALPACA], template, assistant_only_loss=only) == [expected]


TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
OPENAI = {
    "messages": [
        {"role": "user", "content": "Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3 C"},
        {"role": "assistant", "content": "It is 3 C.", "weight": 1},
    ],
    "tools": [TOOL], "parallel_tool_calls": False,
}  # fmt: skip
SHARE_CALL = {
    "conversations": [
        {"from": "human", "value": "Paris?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "3 C"},
        {"from": "gpt", "value": "It is 3 C."},
    ],
    "tools": json.dumps([TOOL["function"]]),
}
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n»'
CALLED = {
    "llama3_1": '«{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>»',
    "qwen2_5": f"«\n{QWEN_CALL}",
    "qwen3": f"«<think>\n\n</think>\n\n{QWEN_CALL}",
}


@pytest.mark.parametrize("template", CALLED)
def test_calls_of_openai_and_of_sharegpt_are_the_same(template: str, tmp_path: Path) -> None:
    unweighted = json.loads(json.dumps(OPENAI))
    unweighted["messages"][1]["weight"] = 0
    one, less = marked(tmp_path, [OPENAI, unweighted], template, assistant_only_loss=True)
    assert marked(tmp_path, [SHARE_CALL], template, assistant_only_loss=True) == [one]
    assert CALLED[template] in one and "It is 3 C." in one.rpartition("«")[2] and one.count("«") == 2
    # The same text, in which the call is not trained on.
    assert less.count("«") == 1 and less == one.replace("«", "", 1).replace("»", "", 1)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_is_trained_on(key: str, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "4", key: "Two and two."}
    row = {"messages": [{"role": "user", "content": "2+2?"}, answer]}
    (text,) = marked(tmp_path, [row], "qwen3")
    assert text.endswith("<|im_start|>assistant\n«<think>\nTwo and two.\n</think>\n\n4<|im_end|>\n»")
    assert text.count("«") == 1


@pytest.mark.parametrize(
    ("change", "template", "message"),
    [
        ({"system": "Be long."}, "qwen3", "is not the system message that `messages` begins with"),
        ({"messages": [OPENAI["messages"][0], {"from": "gpt", "content": "b", "value": "c"}]}, "qwen3",
         "a message with `from` and `content`"),
        ({"messages": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "so"}]}, "qwen3",
         "has text that is no JSON"),
        ({"messages": [OPENAI["messages"][0], {**OPENAI["messages"][1], "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": '"Paris"'}}]}]}, "qwen3",
         "a tool call whose arguments are no object"),
        ({}, "llama3", "only calls a tool, which the chat template cannot write"),
    ],
)  # fmt: skip
def test_what_is_ambiguous_is_refused_with_its_row(change, template, message, tmp_path: Path) -> None:
    system = {"messages": [{"role": "system", "content": "Be brief."}, *OPENAI["messages"]]}
    with pytest.raises(ValueError, match=r"row 0 \(from 0\)") as caught:
        prepared(tmp_path, [OPENAI | system | change], template)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_renders_a_beginning_otherwise_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.chat_template = (  # the last question is marked, as the tools of Mistral's are
        "{% for m in messages %}[{{ m.role }}{% if loop.index0 == (messages | length) - 2 %}!{% endif %}]"
        "{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"row 0 \(from 0\), the chat template renders the messages before"):
        prepared(tmp_path, [SHARE], tokenizer, assistant_only_loss=True)
