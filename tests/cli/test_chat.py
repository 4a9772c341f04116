"""`lopt chat` and `lopt merge` on a run of adapters: answers are the model's own, by its rows' template."""

from __future__ import annotations

import builtins
import hashlib
import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import save_tiny
from lopt.cli import chat as chat_module
from lopt.cli.main import main
from lopt.evaluation.chat import Conversation

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def run(tiny_folder: Path, sums_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of adapters on questions and answers, from a base in bfloat16 without a chat template."""
    folder = tmp_path_factory.mktemp("run")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    base.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder / "base")
    words = (
        f"sft --model_name_or_path {folder / 'base'} --train_file {sums_file} --method lora --max_steps 3 "
    )
    words += f"--learning_rate 0.3 --output_dir {folder / 'lora'}"
    assert main(words.split()) == 0
    return folder / "lora"


def continued(model: Any, text: str, tokens: int) -> str:
    """What the model goes on with, taking the likeliest byte each time."""
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    inputs = tokenizer(text, return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True)


def visible(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def test_one_shot_beside_the_base(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["chat", str(run), "--base", "--prompt", "What is 2 plus 4?", "--max_new_tokens", "9"]) == 0
    out, err = capsys.readouterr()
    assert "Loading weights" not in err  # a bar of transformers, of which a file would hold every state
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base")
    asked = "Question: What is 2 plus 4?\nAnswer:"  # as the run was trained on
    first = continued(base, asked, 9)
    second = continued(PeftModel.from_pretrained(base, run), asked, 9)
    assert first != second
    assert out == f"base: {visible(first.lstrip())}\ntuned: {visible(second.lstrip())}\n"


Say = Callable[..., list[str]]


@pytest.fixture
def say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Talk to a model with the template `CHAT`; returns what the model was asked to go on from."""
    folder = save_tiny(tmp_path / "chatty", chat_template=CHAT)

    def talk(*lines: Any, flags: str = "") -> list[str]:
        asked: list[str] = []
        prompt = Conversation.prompt
        given: Iterator[Any] = iter(lines)

        def read(_: str) -> str:
            line = next(given, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        with monkeypatch.context() as patch:
            patch.setattr(builtins, "input", read)
            patch.setattr(
                Conversation,
                "prompt",
                lambda self, question: asked.append(prompt(self, question)) or asked[-1],
            )
            assert main(["chat", str(folder), "--max_new_tokens", "12", *flags.split()]) == 0
        return asked

    return talk


def test_a_conversation(say: Say, capsys: pytest.CaptureFixture) -> None:
    asked = say("Hi", KeyboardInterrupt(), "", "/help", "/none", "So?", "/reset", "Hi", "/exit", "never")
    assert asked[0] == asked[2] == "<user>Hi<assistant>" and len(asked) == 3
    assert asked[1].startswith("<user>Hi<assistant>") and asked[1].endswith("<user>So?<assistant>")
    assert len(asked[1]) > len("<user>Hi<assistant><user>So?<assistant>")
    out = capsys.readouterr().out
    assert out.count("/reset   forget") == 2 and "There is no /none" in out and "\x1b" not in out
    say("Hi", "x" * 600)
    said = capsys.readouterr().err
    assert "the conversation is full: it has 6" in said
    assert "the model's context is 512: type /reset to start over" in said


def test_ctrl_c_ends_an_answer_and_not_the_program(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text)
        if len(shown) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "_show", show)
    asked = say("Hi", "So?", flags="--temperature 1 --seed 3")
    assert shown[0] and asked[1].startswith(f"<user>Hi<assistant>{shown[0].strip()}")


def test_what_chat_refuses(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for words, message in (
        ("", "no model is named"),
        (f"{run} --model_name_or_path {run}", "the model is named twice"),
        (f"{run} --template chat --prompt x", "has no chat template: use one of messages, alpaca, qa, pair"),
        (
            f"{run.parent / 'base'} --base --prompt x",
            "does not say which model it was made from: name it, as --base",
        ),
        (f"{run} --temperature 0 --top_p 0.5", "leave --top_p and --top_k out"),
    ):
        assert main(["chat", *words.split()]) == 2
        assert message in capsys.readouterr().err
    long = "x" * 600
    assert main(["chat", str(run), "--prompt", long]) == 2
    said = capsys.readouterr().err
    assert "the question is too long" in said and "the model's context is 512: shorten it" in said


def test_merged_weights_are_those_of_peft_in_the_dtype_of_the_base(run: Path, capsys) -> None:
    before = {
        path.name: hashlib.sha256(path.read_bytes()).digest() for path in run.iterdir() if path.is_file()
    }
    assert main(["merge", str(run)]) == 0
    merged = run.with_name("lora-merged")
    assert f"lopt chat {merged}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(merged)
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
    exact = PeftModel.from_pretrained(base, run).merge_and_unload().state_dict()
    saved = load_file(merged / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16} == {model.dtype}
    assert set(saved) == set(exact)
    for name, weight in saved.items():
        torch.testing.assert_close(weight.float(), exact[name], rtol=2**-7, atol=2**-9)
    assert not torch.equal(saved["model.layers.0.mlp.up_proj.weight"].float(),
                           load_file(run.parent / "base" / "model.safetensors")
                           ["model.layers.0.mlp.up_proj.weight"].float())  # fmt: skip
    assert not [name for name in saved if "lora" in name]
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "run.json"} <= names
    assert not {"adapter_config.json", "adapter_model.safetensors"} & names
    modes = {stat.S_IMODE((merged / name).stat().st_mode) for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1  # that of the umask
    assert json.loads((merged / "run.json").read_text())["template"] == "qa"
    after = {
        path.name: hashlib.sha256(path.read_bytes()).digest() for path in run.iterdir() if path.is_file()
    }
    assert after == before and not list(run.parent.glob(".lora-merged*"))
    for words, message in (
        (f"{run}", "is not empty, and nothing is overwritten"),
        (f"{merged}", "holds no adapter to merge (it is a whole model already)"),
        (f"{run.parent}", "holds no adapter to merge (no adapter_config.json)"),
        (f"{run.parent / 'none'}", "is not a folder"),
    ):
        assert main(["merge", *words.split()]) == 2
        assert message in capsys.readouterr().err


def test_an_adapter_of_another_model_is_refused(run: Path, tmp_path: Path, capsys) -> None:
    other = save_tiny(tmp_path / "other", intermediate_size=64)
    assert main(["merge", str(run), "--base", str(other), "--output_dir", str(tmp_path / "out")]) == 2
    assert "cannot be merged into its base" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
