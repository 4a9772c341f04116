"""What preview shows is what training sees, and no text can drive the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import save_tiny
from lopt.cli.main import main
from lopt.data import preview
from lopt.data.preview import ShownSequence, legend, render, sequences
from lopt.trainers import LoPTDPOTrainer, LoPTSFTTrainer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("chat"), chat_template=CHAT)


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 dialogues of two turns; one in five has a prompt of its own that is too long."""
    path = tmp_path_factory.mktemp("rows") / "dialogues.jsonl"
    with path.open("w") as file:
        for i in range(30):
            talk = [f"Hi {i} " * (40 if i % 5 == 0 else 1), f"Hello {i}", "And?", "so " * i]
            roles = ["user", "assistant"] * 2
            messages = [{"role": r, "content": c} for r, c in zip(roles, talk, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--max_seq_length 60 --held_out 4 --seed 7",
        "--max_seq_length 60 --truncation_mode keep_end",
        "--max_seq_length 60 --packing --per_device_train_batch_size 1",
        "--max_seq_length 60 --packing --packing_strategy wrapped",
        "--assistant_only_loss --max_seq_length 90",
        "--streaming --max_seq_length 60 --max_samples 20 --max_steps 2",
        "--completion_only_loss false --pad_to_multiple_of 16",
    ],
)
def test_preview_is_what_training_sees(
    flags: str, model: Path, dialogues: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ShownSequence] = []
    shown: list[ShownSequence] = []
    step, take = LoPTSFTTrainer.training_step, preview.first_sequences

    def note(self, model, inputs, *rest):
        seen.extend(sequences(inputs))
        return step(self, model, inputs, *rest)

    def keep(batches, count):
        shown.extend(take(batches, count))
        return shown

    monkeypatch.setattr(LoPTSFTTrainer, "training_step", note)
    monkeypatch.setattr(preview, "first_sequences", keep)
    settings = {"--per_device_train_batch_size": "3", "--max_steps": "2"}
    common = [word for pair in settings.items() if pair[0] not in flags for word in pair]
    common += ["--model_name_or_path", str(model), "--train_file", str(dialogues), *flags.split()]
    assert main(["sft", *common, "--output_dir", str(tmp_path / "out"), "--head_warmup_steps", "1"]) == 0
    assert main(["data", "preview", *common, "--rows", str(len(seen))]) == 0
    masked = any(label == -100 for s in seen for label in s.labels)
    assert len(seen) > 1 and masked == ("completion_only_loss false" not in flags)
    what = [(s.tokens, s.labels, s.padding) for s in shown]
    assert what == [(s.tokens, s.labels, s.padding) for s in seen]


def test_preview_of_pairs_is_what_dpo_sees(model: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    pairs = [{"prompt": f"Hi {i}", "chosen": f"Hello {i}", "rejected": "so " * i} for i in range(1, 21)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    seen: list[ShownSequence] = []
    shown: list[ShownSequence] = []
    step, take = LoPTDPOTrainer.training_step, preview.first_sequences
    monkeypatch.setattr(
        LoPTDPOTrainer, "training_step",
        lambda self, model, inputs, *rest: seen.extend(sequences(inputs)) or step(self, model, inputs, *rest),
    )  # fmt: skip
    monkeypatch.setattr(
        preview, "first_sequences", lambda batches, count: shown.extend(take(batches, count)) or shown
    )
    flags = f"--model_name_or_path {model} --train_file {path} --max_length 50 --held_out 2 --max_steps 2"
    flags += " --per_device_train_batch_size 3 --beta 0.3 --seed 5"
    assert main(f"dpo {flags} --head_warmup_steps 1 --output_dir {tmp_path / 'out'}".split()) == 0
    capsys.readouterr()
    assert main(f"data preview dpo {flags} --rows 6".split()) == 0
    assert len(seen) == 12
    assert [(s.tokens, s.labels, s.padding) for s in shown] == [(s.tokens, s.labels, s.padding) for s in seen]
    out, err = capsys.readouterr()
    assert "examples/s" not in err  # a bar of datasets, of which a file would hold every state
    chosen, rejected = out.index("1. chosen: "), out.index("1. rejected: ")
    assert chosen < rejected and "]Hello" in out[chosen:rejected].replace("│", "")
    assert "20 rows; 2 held out; 0 dropped" in out and "18 pairs trained on, " in out
    assert main(["data", "preview", "--model_name_or_path", str(model), "--train_file", str(path)]) == 2
    assert "pairs of answers are for `lopt dpo`" in capsys.readouterr().err


def test_cut_rows_are_told_from_rows_that_just_fit(model: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "rows.jsonl"
    # 6 + 11 bytes of roles and one token for the end: the first is 40 long, the second goes on.
    rows = [{"prompt": "ab", "completion": "c" * 20}, {"prompt": "ab", "completion": "c" * 21}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model_name_or_path", str(model), "--train_file", str(path), "--max_seq_length", "40"]
    assert main(["data", "preview", *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("40 tokens, 21 of them trained on\n") == 1
    assert out.count("40 tokens, 21 of them trained on, cut at --max_length 40\n") == 1
    assert "2 trained on, 1 of them cut" in out


def test_states_look_different_with_and_without_colour(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer.encode("ab\n[é")
    shown = ShownSequence(ids, [ids[0], -100, -100, *ids[3:]], padding=3)
    # The first token has a label but nothing to be predicted from; é is two tokens.
    assert render(shown, tokenizer, colour=False) == "[a│b│\\n\n][││é{<pad> × 3}"
    grey, green, yellow, end = "\x1b[90m", "\x1b[1;32m", "\x1b[33m", "\x1b[0m"
    coloured = f"{grey}a│b│\\n{end}\n{green}[││é{end}{yellow}<pad> × 3{end}"
    assert render(shown, tokenizer, colour=True) == coloured
    assert shown.trained == 3
    assert legend(colour=False).startswith("trained on  [masked]  {padding}")


def test_text_cannot_drive_the_terminal(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    hostile = "\x1b]0;owned\x07\x9b2J\r\u202etxt\u2028\x00ok\\n"
    ids = tokenizer.encode(hostile)
    text = render(ShownSequence(ids, [-100] * len(ids), 0), tokenizer, colour=False)
    assert all(char.isprintable() for char in text)
    assert "\\x1b" in text and "\\x9b" in text and "\\u202e" in text


def test_real_data(shared_data: Path, model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path))
    flags = ["--model_name_or_path", str(model), "--max_samples", "20", "--rows", "1"]
    flags += ["--dataset_preset", "alpaca", "--train_file", str(shared_data / "alpaca" / "train.jsonl")]
    assert main(["data", "preview", *flags]) == 0
    assert "20 rows; 0 dropped" in capsys.readouterr().out
