"""Flags that say which columns and which template rows are made with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from conftest import save_tiny
from lopt.cli import rows as cli_rows
from lopt.cli.flags import DataArguments, ModelArguments
from lopt.cli.main import main
from lopt.trainers.config import LoPTSFTConfig

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    return path


def preview(model: Path, rows: Path, *flags: str) -> int:
    return main(
        [
            "data",
            "preview",
            "--model_name_or_path",
            str(model),
            "--train_file",
            str(rows),
            "--rows",
            "1",
            *flags,
        ]
    )


def test_rows_are_made_with_the_template_that_is_saved(
    tiny_folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(CHAT)
    other = save_tiny(tmp_path / "other", chat_template=CHAT)
    for source in (template, other):
        assert preview(tiny_folder, rows, "--chat_template_path", str(source)) == 0
        shown = capsys.readouterr().out.replace("│", "")
        assert "[<user>Hi<eos><assistant>]Hello<eos>" in shown, shown
    out = tmp_path / "out"
    flags = ["--train_file", str(rows), "--output_dir", str(out), "--max_steps", "1", "--method", "e2e"]
    flags += ["--chat_template_path", str(template)]
    assert main(["sft", "--model_name_or_path", str(tiny_folder), *flags]) == 0
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--chat_template_path", "none.jinja"], "--chat_template_path none.jinja does not exist"),
        (["--chat_template_path", "{rows}"], "must end in .jinja or .j2, or name a model"),
        (["--chat_template_path", "{model}"], "its tokenizer has no chat template"),
        (["--eos_token", "<end>"], "--eos_token <end> is no token of the model's tokenizer"),
    ],
)
def test_mistakes(
    tiny_folder: Path, rows: Path, capsys: pytest.CaptureFixture, flags: list[str], words: str
) -> None:
    given = [flag.format(rows=rows, model=tiny_folder) for flag in flags]
    assert preview(tiny_folder, rows, *given) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_dataset_text_field_of_rows_that_have_another_format_as_well(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the hub are read with all their columns."""
    found = Dataset.from_dict({"question": ["Q?"], "answer": ["A"], "body": ["The text"], "text": ["Other"]})
    monkeypatch.setattr(cli_rows, "load_rows", lambda **_: found)
    args = LoPTSFTConfig(output_dir=str(tmp_path), use_cpu=True, dataset_text_field="body")
    model = ModelArguments(model_name_or_path=str(tiny_folder))
    made = cli_rows.sft_rows(model, DataArguments(dataset_name="a/b"), args)
    assert list(made.train) == [{"text": "The text"}]
    args.dataset_text_field = "nothing"
    with pytest.raises(ValueError, match="`dataset_text_field` nothing is no column of the rows, which have"):
        cli_rows.sft_rows(model, DataArguments(dataset_name="a/b"), args)


def test_rows_of_retention_are_rendered_as_they_are_trained_on(tmp_path: Path, rows: Path) -> None:
    chat, plain = (
        AutoTokenizer.from_pretrained(save_tiny(tmp_path / name, chat_template=template))
        for name, template in (("chat", CHAT), ("plain", None))
    )
    pair = ("<user>Hi<eos><assistant>", "Hello<eos>")
    assert cli_rows.retention_rows([str(rows)], chat, limit=3) == {"rows": [pair]}
    questions = tmp_path / "more.jsonl"
    questions.write_text(
        "".join(json.dumps({"prompt": f"{n}?", "completion": str(n)}) + "\n" for n in range(9))
    )
    found = cli_rows.retention_rows([str(questions)], plain, limit=2)
    assert found == {"more": [("0?", "0"), ("1?", "1")]}
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "no question"}) + "\n")
    with pytest.raises(ValueError, match=r"`retention_rows` .*texts.jsonl has rows without an answer"):
        cli_rows.retention_rows([str(texts)], plain, limit=None)
    with pytest.raises(ValueError, match="given twice"):
        cli_rows.retention_rows([str(rows), str(rows)], chat, limit=None)
