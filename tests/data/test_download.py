"""Downloads: what is written, what is left alone, and what one failure does to the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from lopt.cli.main import main
from lopt.data import hub
from lopt.data.download import choose_presets, download
from lopt.data.load import load_rows
from lopt.data.presets import PRESETS


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


def command(names: str, folder: Path, *more: str) -> int:
    words = ["--dataset", *names.split(), "--write_parquet", "--output_dir", str(folder), *more]
    return main(["data", "download", *words])


def test_a_file_is_written_that_the_printed_flags_read(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "some" / "data"
    assert command("alpaca", folder, "--revision", "v1") == 0
    assert [path.name for path in folder.iterdir()] == ["alpaca.parquet"]
    licence, use = capsys.readouterr().out.strip().splitlines()
    assert "CC BY-NC 4.0" in licence
    assert use.endswith(f"--dataset_preset alpaca --train_file {folder / 'alpaca.parquet'}")
    rows = load_rows(folder / "alpaca.parquet", dataset_preset="alpaca")
    assert rows.to_list() == [dict.fromkeys(PRESETS["alpaca"].columns, "tatsu-lab/alpaca v1")] * 5
    assert "id" in load_rows(folder / "alpaca.parquet").column_names


def test_a_file_is_replaced_only_when_told(tmp_path: Path, capsys) -> None:
    path = tmp_path / "gsm8k.parquet"
    path.write_text("mine")
    assert command("gsm8k", tmp_path) == 0
    assert path.read_text() == "mine" and "left alone (--overwrite" in capsys.readouterr().out
    assert command("gsm8k", tmp_path, "--overwrite") == 0
    assert len(load_rows(path)) == 5


def test_one_failure_does_not_lose_the_others(tmp_path: Path, capsys) -> None:
    assert command("all", tmp_path / "data") == 2
    shown = capsys.readouterr()
    assert "not downloaded: tulu3 (" in shown.err
    assert "tulu3: failed." in shown.out and "cannot reach the Hub" in shown.out
    assert {path.stem for path in (tmp_path / "data").iterdir()} == PRESETS.keys() - {"tulu3"}


def test_a_broken_download_leaves_nothing_behind(tmp_path: Path, monkeypatch) -> None:
    def fail(self: Dataset, path: Path) -> None:
        Path(path).write_text("half a fi")
        raise OSError("No space left on device")

    path = tmp_path / "data" / "gsm8k.parquet"
    path.parent.mkdir()
    path.write_text("mine")
    monkeypatch.setattr(Dataset, "to_parquet", fail)
    with pytest.raises(OSError, match="No space left"):
        download(PRESETS["gsm8k"], path)
    assert command("gsm8k", path.parent, "--overwrite") == 2
    assert [path.read_text() for path in path.parent.iterdir()] == ["mine"]


def test_presets_are_chosen_by_name() -> None:
    assert choose_presets(["gsm8k", "alpaca", "gsm8k"]) == [PRESETS["gsm8k"], PRESETS["alpaca"]]
    assert choose_presets(["gsm8k", "all"]) == list(PRESETS.values())


def test_mistakes(tmp_path: Path, capsys) -> None:
    for names, words in (
        ([], "`dataset` is missing"),
        (["gsm8k", "gsm9k"], r"`dataset` must be one of all, .* \(got gsm9k\)"),
    ):
        with pytest.raises(ValueError, match=words):
            choose_presets(names)
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/inside"):
        assert command("gsm8k", tmp_path / folder) == 2
        assert "--output_dir" in capsys.readouterr().err
