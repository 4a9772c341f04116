"""Presets: a local copy is checked against them, and the licence is shown once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from lopt.data.columns import FORMATS, infer_format
from lopt.data.load import load_rows
from lopt.data.preferences import preference_columns
from lopt.data.presets import PRESETS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path / "lopt"))


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_preset_has_columns_that_make_an_example() -> None:
    assert sorted(PRESETS) == [
        *("alpaca", "gsm8k", "metamathqa", "numinamath", "tulu3", "tulu3_preferences", "ultrafeedback")
    ]
    for preset in PRESETS.values():
        if preset.use == "dpo":
            assert preference_columns(list(preset.columns))[1:3] == list(preset.columns)
            continue
        fmt = infer_format(preset.columns)
        assert fmt in FORMATS and set(fmt.columns) <= set(preset.columns) <= {*fmt.columns, *fmt.optional}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_copy_must_have_the_columns_and_gives_no_others(tmp_path: Path, streaming: bool) -> None:
    row = {
        "source": "amc",
        "problem": "1+1?",
        "solution": "2",
        "messages": [{"role": "user", "content": "x"}],
    }
    path = write(tmp_path / "numina.jsonl", row)
    rows = load_rows(path, dataset_preset="numinamath", streaming=streaming)
    assert list(rows) == [{"problem": "1+1?", "solution": "2"}]
    with pytest.raises(
        ValueError, match="`dataset_preset` alpaca: `train_file` has no column instruction"
    ) as e:
        load_rows(path, dataset_preset="alpaca", streaming=streaming)
    assert "it has source, problem, solution, messages" in str(e.value)


def test_a_preset_has_its_own_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_hub(name: str, config: str | None, split: str, *more: object, **options: object) -> Dataset:
        asked.append((name, split))
        return Dataset.from_list([{"chosen": "a b", "rejected": "a c", "prompt": "a"}])

    monkeypatch.setattr("lopt.data.load.load_hub", load_hub)
    for split in ("train", "train[:5%]", "test_prefs"):
        rows = load_rows(dataset_preset="ultrafeedback", dataset_split=split)
        assert rows.column_names == ["chosen", "rejected"]
    name = "HuggingFaceH4/ultrafeedback_binarized"
    assert asked == [(name, "train_prefs"), (name, "train_prefs[:5%]"), (name, "test_prefs")]


def test_mistakes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    for arguments, words in [
        (
            {"dataset_preset": "gsm9k", "train_file": path},
            r"`dataset_preset` must be one of metamathqa, .* \(got gsm9k\)",
        ),
        ({"dataset_preset": "gsm8k", "dataset_name": "org/data"}, "leave `dataset_name` out"),
        ({"dataset_preset": "gsm8k", "dataset_config": "socratic"}, "leave `dataset_config` out"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_rows(**arguments)  # type: ignore[arg-type]


def test_the_licence_is_shown_once(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", {"instruction": "do", "input": "", "output": "done"})
    load_rows(path, dataset_preset="alpaca")
    line = capsys.readouterr().out
    assert "CC BY-NC 4.0" in line and "https://huggingface.co/datasets/tatsu-lab/alpaca" in line
    load_rows(path, dataset_preset="alpaca")
    assert capsys.readouterr().out == ""
    # A cache that cannot be written to is no reason to stop.
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LOPT_CACHE", str(blocked))
    load_rows(path, dataset_preset="alpaca")
    assert "CC BY-NC 4.0" in capsys.readouterr().out


def test_real_data(shared_data: Path) -> None:
    for name in ("alpaca", "gsm8k"):
        rows = load_rows(shared_data / name / "train.jsonl", dataset_preset=name, max_samples=10)
        assert rows.column_names == list(PRESETS[name].columns) and len(rows) == 10
