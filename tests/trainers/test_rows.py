"""From a file of rows to labels, with the chat templates that TRL ships: nothing is lost without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from trl import DPOConfig, SFTConfig, SFTTrainer

from lopt import LoPTConfig, LoPTDPOTrainer
from lopt.data.columns import needed_columns
from lopt.data.formats import format_rows
from lopt.data.load import load_rows
from lopt.data.questions import question_rows
from lopt.trainers import LoPTSFTTrainer
from lopt.trainers.config import LoPTSFTConfig
from prepared_rows import learned, model, prepared, tokenizer_with

E2E = LoPTConfig(method="e2e")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def call(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], **more}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(name: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": schema}}


# Arguments of other types and keys, a call without a word, a result, tools as a list and as JSON text.
CALLS = [
    {"messages": [user("Paris?"), call("at", {"time": "2025-08-01"}, content=None)], "tools": [tool("at")]},
    {"messages": [user("Rome?"), call("at", {"time": 1690876800, "no": None}, content="So:")],
     "tools": json.dumps([tool("at")])},
    {"messages": [user("Oslo?"), call("at", '{"city": "Oslo"}'),
                  {"role": "tool", "name": "at", "content": "3 C"}, said("It is 3 C.")]},
]  # fmt: skip


@pytest.mark.parametrize(("assistant_only", "streaming"), [(False, False), (True, False), (True, True)])
def test_calls_and_tools_reach_the_template_as_in_trl(tmp_path, assistant_only, streaming) -> None:
    extra = {"streaming": True, "max_steps": 1} if streaming else {}
    trainer = prepared(tmp_path, CALLS, "qwen3", assistant_only_loss=assistant_only, **extra)
    texts = learned(trainer)
    assert '"arguments": {"time": "2025-08-01"}}' in texts[0]
    assert 'So:\n<tool_call>\n{"name": "at", "arguments": {"time": 1690876800, "no": null}}' in texts[1]
    assert ('"arguments": {"city": "Oslo"}}' in texts[2]) == assistant_only and "It is 3 C." in texts[2]
    render = trainer.processing_class.apply_chat_template
    for row, made in zip(CALLS, trainer.train_dataset, strict=True):
        messages = [{"content": None, **turn} for turn in row["messages"]]
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options = {"tools": tools, "chat_template": trainer.chat_template, "return_dict": True}
        assert made["input_ids"] == render(messages, tokenize=True, **options)["input_ids"]


def test_parquet_has_keys_that_a_row_does_not_have(tmp_path: Path) -> None:
    """Arrow has one set of keys for all rows, and fills up with None."""
    rows = [
        {"messages": [user("a"), call("at", {"x": 1}, content="so")], "tools": [tool("at")]},
        {"messages": [user("b"), call("by", {"y": "z"}, content="so", id="7")], "tools": None},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    tokenizer = tokenizer_with("qwen3")
    made = format_rows(load_rows(tmp_path / "rows.parquet", choose=needed_columns), tokenizer)
    for row, one in zip(rows, made, strict=True):
        assert [*one["prompt"], *one["completion"]] == row["messages"] and one["tools"] == row["tools"]


def test_labels_are_trls_own(tmp_path: Path) -> None:
    """What TRL's trainer makes of the same rows, which have types that Arrow can hold."""
    rows = [{"messages": [user("a"), said("b"), user(f"c{i}"), said("d" * i)]} for i in range(1, 4)]
    for template, only in (("qwen3", False), ("llama3", False), ("qwen2_5", True)):
        ours = prepared(tmp_path, rows, template, assistant_only_loss=only)
        given = (
            rows if only else [{"prompt": r["messages"][:3], "completion": r["messages"][3:]} for r in rows]
        )
        theirs = SFTTrainer(
            model(),
            args=SFTConfig(output_dir=str(tmp_path), max_length=None, assistant_only_loss=only, use_cpu=True),
            train_dataset=Dataset.from_list(given),
            processing_class=tokenizer_with(template),
        )
        for one, other in zip(ours.train_dataset, theirs.train_dataset, strict=True):
            assert (one["input_ids"], one["labels"]) == (other["input_ids"], other["labels"])


def test_reasoning_is_trained_on_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": [user("2+2?"), said("4", reasoning_content="Two and two.")]}] * 2
    assert "<think>\nTwo and two.\n</think>\n\n4" in learned(prepared(tmp_path, rows, "qwen3"))[0]
    assert "left out" not in caplog.text
    assert learned(prepared(tmp_path, rows, "llama3"))[0] == "4<|eot_id|>"
    assert "2 of 2 rows: `reasoning_content` of a message is left out" in caplog.text


def test_what_a_template_cuts_is_counted_in_every_run(tmp_path: Path, caplog) -> None:
    rows = [
        {"messages": [user("2+2?"), said("<think>\nTwo.\n</think>\n\n4")]},
        {"messages": [user("?"), said("4")]},
    ]
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        assert learned(prepared(tmp_path, rows, "deepseek_r1_distill"))[0].startswith("\n\n4")
        assert (
            "1 of 2 train rows: the chat template leaves out a part of the text of an assistant message "
            "(row 0 from 0: '<think>\\nTwo." in caplog.text
        )
        assert "2 of 2 train rows: the end of the rendered prompt is not in the text" in caplog.text
    caplog.clear()
    prepared(tmp_path, rows, "deepseek_r1_distill", streaming=True, max_steps=1)
    assert "1 of the first 1,000 train rows: the chat template leaves out a part" in caplog.text


def test_roles_of_other_formats(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": [{"role": "developer", "content": "Be kind."}, {"role": "human", "content": "Hi"},
                          {"role": "gpt", "content": "Hello."}]}]  # fmt: skip
    trainer = prepared(tmp_path, rows, "qwen2_5")
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
    assert "1 of 1 rows: the role human is read as user" in caplog.text
    rows[0]["messages"][1]["role"] = "critic"
    with pytest.raises(
        ValueError, match=r"row 0 .*leaves out messages of the role 'critic', which it does not"
    ):
        prepared(tmp_path, rows, "qwen2_5")
    # A template that writes any role has lost nothing; gpt-oss has a place for developers.
    assert learned(prepared(tmp_path, rows, "llama3")) == ["Hello.<|eot_id|>"]
    developer = prepared(
        tmp_path, [{"messages": [rows[0]["messages"][0], user("Hi"), said("Hello.")]}], "gptoss"
    )
    assert "developer" in developer.processing_class.decode(developer.train_dataset[0]["input_ids"])


def test_marks_of_messages_are_honoured_or_refused(tmp_path: Path, caplog) -> None:
    turns = [user("a"), said("b", weight=0), user("c"), said("d", weight=1), user("e"), said("f")]
    rows = [{"messages": turns}, {"messages": [user("a"), said("b", train=False)]}]
    texts = learned(prepared(tmp_path, rows, "llama3", assistant_only_loss=True))
    assert texts == ["d<|eot_id|>f<|eot_id|>"]
    assert "1 of 2 rows: left out, no message of them is marked for training" in caplog.text
    for bad, words in (
        (turns, "`assistant_only_loss` trains on those that are marked"),
        ([user("a"), said("b", weight=0.5)], "`weight` is 0.5: give 0 or 1"),
        ([user("a"), said("b", weight=1, masked=True)], "masked and weight disagree"),
        ([{**user("a"), "train": True}, said("b")], "marks a user message for training by `train`"),
    ):
        with pytest.raises(ValueError, match="row 0") as caught:
            prepared(tmp_path, [{"messages": bad}], "llama3")
        assert words in str(caught.value)
    agreeing = [{"messages": [user("a"), said("b", weight=0), user("c"), said("d", masked=0)]}]
    assert learned(prepared(tmp_path, agreeing, "llama3")) == ["d<|eot_id|>"]


def test_text_that_is_rendered_already(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    rows = [{"prompt": whole, "completion": "Hello<eos>\n"}]
    trainer = prepared(tmp_path, rows, "gemma")
    decoded = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert decoded == f"{whole}Hello<eos>" and learned(trainer) == ["Hello<eos>"]
    assert "1 of 1 rows: `prompt` is rendered by the chat template already" in caplog.text
    with pytest.raises(ValueError, match=r"row 1 .*`prompt`, is not rendered .*and the first row's is"):
        prepared(tmp_path, [*rows, {"prompt": "Hi", "completion": "Hello"}], "gemma")
    made = question_rows(Dataset.from_list(rows).remove_columns("completion"), tokenizer_with("gemma"), None)
    bos = 1 if tokenizer_with("gemma")("a")["input_ids"][0] == tokenizer_with("gemma").bos_token_id else 0
    assert made[0]["prompt"] == whole.removeprefix("<bos>" * bos)


def test_no_row_begins_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tokenizer_with(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    rows = Dataset.from_list([{"text": "<bos>a"}, {"text": "b"}])
    for given in (rows.to_iterable_dataset(), rows):
        trainer = LoPTSFTTrainer(
            model(), args=LoPTSFTConfig(output_dir=str(tmp_path), max_steps=1), lopt_config=E2E,
            train_dataset=given, processing_class=tokenizer,
        )  # fmt: skip
        decoded = [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]
        assert decoded == ["<bos>a<eos>", "<bos>b<eos>"]
        assert [len(row["labels"]) for row in trainer.train_dataset] == [3, 3]
    assert "1 of 2 train rows begin with <bos> twice, one is left out" in caplog.text


def test_an_answer_without_an_end_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": [user("a"), said("b")]}]
    prepared(tmp_path, rows, "llama3")
    assert "1 of 1 train rows do not end in a token that stops generation (<eos>)" in caplog.text
    caplog.clear()
    prepared(tmp_path, rows, None)
    assert "do not end" not in caplog.text


def test_system_and_history_are_used(tmp_path: Path) -> None:
    rows = [{"instruction": "And of Spain?", "input": "", "output": "Madrid.", "system": "One word.",
             "history": [["Capital of France?", "Paris."]]},
            {"instruction": "Go", "input": "on", "output": "So."}]  # fmt: skip
    trainer = prepared(tmp_path, rows, "llama3")
    text = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    for part in ("system<|end_header_id|>\n\nOne word.", "Capital of France?", "Paris.", "And of Spain?"):
        assert part in text
    plain = prepared(tmp_path, rows, None)
    texts = [plain.processing_class.decode(row["input_ids"]) for row in plain.train_dataset]
    assert texts[0] == (
        "One word.\n\n### Instruction:\nCapital of France?\n\n### Response:\nParis.\n\n"
        "### Instruction:\nAnd of Spain?\n\n### Response:\nMadrid.<eos>"
    )
    assert texts[1].startswith("Below is an instruction that describes a task, paired with an input")


def test_preferences_with_calls(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """DPO on rows whose calls differ in type, read from a file."""
    path = tmp_path / "pairs.jsonl"
    pairs = [
        {"prompt": [user("?")], "chosen": [call("at", {"a": 1}, content="")], "tools": [tool("at")],
         "rejected": [call("at", {"a": "x", "b": []}, content="")]},
        {"prompt": [user("??")], "chosen": [said("no")], "rejected": [said("yes")]},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    args = DPOConfig(output_dir=str(tmp_path), max_length=None, use_cpu=True, bf16=False, report_to="none")
    trainer = LoPTDPOTrainer(
        model(), args=args, ref_model=model(), lopt_config=E2E,
        train_dataset=load_rows(path), processing_class=tokenizer_with("qwen3"),
    )  # fmt: skip
    decode = trainer.processing_class.decode
    assert '{"name": "at", "arguments": {"a": "x", "b": []}}' in decode(
        trainer.train_dataset[0]["rejected_ids"]
    )
    assert "leaves out" not in caplog.text


def test_prompts_of_grpo_lose_nothing(caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": "developer", "content": "Be kind."}, {"role": "human", "content": "Hi", "name": "Al"}]
    rows = Dataset.from_list([{"prompt": turns, "tools": "[]"}])
    made = question_rows(rows, tokenizer_with("qwen3"), None)
    assert made[0]["prompt"] == [{"role": "system", "content": "Be kind."}, {**user("Hi"), "name": "Al"}]
    assert "the column `tools` is for rewards alone" in caplog.text
    turns[0]["role"] = "critic"
    with pytest.raises(ValueError, match=r"row 0 .*of the role 'critic'"):
        question_rows(Dataset.from_list([{"prompt": turns}]), tokenizer_with("qwen3"), None)
