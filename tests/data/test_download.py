"""Downloads: what is written, what is left alone, and what one failure does to the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from lopt.data import PRESETS, hub, load_rows
from lopt.data.download import choose, download


@pytest.fixture(autouse=True)
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that holds 5 rows of every preset but tulu3."""

    def load(name: str, config: str | None, *, split: str, revision: str | None) -> Dataset:
        preset = next(preset for preset in PRESETS.values() if preset.hub_id == name)
        assert (config, split) == (preset.config, preset.split)
        if preset.name == "tulu3":
            raise ConnectionError("Couldn't reach it")
        text = f"{name} {revision}"
        return Dataset.from_list([{**dict.fromkeys(preset.columns, text), "id": i} for i in range(5)])

    monkeypatch.setattr(hub, "load_dataset", load)
    monkeypatch.setattr(hub, "_check_files", lambda *args: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path / "lopt"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def test_a_file_is_written_that_the_printed_flags_read(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "some" / "data"
    download(choose(["alpaca"]), folder, revision="v1")
    assert [path.name for path in folder.iterdir()] == ["alpaca.parquet"]
    licence, use = capsys.readouterr().out.strip().splitlines()
    assert "CC BY-NC 4.0" in licence
    assert use.endswith(f"--dataset_preset alpaca --train_file {folder / 'alpaca.parquet'}")
    rows = load_rows(folder / "alpaca.parquet", preset="alpaca")
    assert rows.to_list() == [dict.fromkeys(PRESETS["alpaca"].columns, "tatsu-lab/alpaca v1")] * 5
    assert "id" in load_rows(folder / "alpaca.parquet").column_names


def test_a_file_is_replaced_only_when_told(tmp_path: Path, capsys) -> None:
    path = tmp_path / "gsm8k.parquet"
    path.write_text("mine")
    download(choose(["gsm8k"]), tmp_path)
    assert path.read_text() == "mine" and "left alone (--overwrite" in capsys.readouterr().out
    download(choose(["gsm8k"]), tmp_path, overwrite=True)
    assert len(load_rows(path)) == 5


def test_one_failure_does_not_lose_the_others(tmp_path: Path, capsys) -> None:
    with pytest.raises(ValueError, match=r"not downloaded: tulu3 \("):
        download(choose(["all"]), tmp_path / "data")
    assert "tulu3: failed. --dataset tulu3: cannot reach the Hub" in capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "data").iterdir()} == PRESETS.keys() - {"tulu3"}


def test_a_broken_download_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    def fail(self: Dataset, path: Path) -> None:
        Path(path).write_text("half a fi")
        raise OSError("No space left on device")

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gsm8k.parquet").write_text("mine")
    monkeypatch.setattr(Dataset, "to_parquet", fail)
    with pytest.raises(ValueError, match="not downloaded: gsm8k"):
        download(choose(["gsm8k"]), tmp_path / "data", overwrite=True)
    assert [path.read_text() for path in (tmp_path / "data").iterdir()] == ["mine"]


def test_mistakes(tmp_path: Path) -> None:
    for names, words in (([], "--dataset is missing"), (["gsm8k", "gsm9k"], "--dataset gsm9k is unknown")):
        with pytest.raises(ValueError, match=words):
            choose(names)
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/inside"):
        with pytest.raises(ValueError, match="--output_dir"):
            download(choose(["gsm8k"]), tmp_path / folder)
