"""`lopt data`: finding the subcommand, its mistakes, and the script that is the same."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from lopt.cli.main import main
from lopt.data import hub
from lopt.data.load import load_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list([{"query": "q", "response": "r"}] * 3)
    monkeypatch.setattr(hub, "load_dataset", lambda *args, **kwargs: rows)
    monkeypatch.setattr(hub, "_check_files", lambda *args: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path / "lopt"))
    monkeypatch.chdir(tmp_path)


def test_help_lists_the_subcommands(capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert "download" in out and "preview" in out
    assert main(["data"]) == 2


def test_the_script_is_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--dataset", "metamathqa", "--write_parquet", "--output_dir", "data"]
    monkeypatch.setattr(sys, "argv", ["download_datasets.py", *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / "download_datasets.py"), run_name="__main__")
    assert stop.value.code == 0
    assert len(load_rows("data/metamathqa.parquet", dataset_preset="metamathqa")) == 3


def test_without_parquet_only_the_cache_is_filled(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "download", "--dataset", "metamathqa"]) == 0
    assert not (tmp_path / "data").exists()
    assert "Train with --dataset_preset metamathqa" in capsys.readouterr().out


def test_colour_is_for_terminals(
    tiny_folder: Path, sums_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["data", "preview", "--model_name_or_path", str(tiny_folder), "--train_file", str(sums_file)]
    outputs = []
    for terminal, no_color in ((True, ""), (True, "1"), (False, "")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda answer=terminal: answer)
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setenv("TERM", "xterm")
        assert main(words) == 0
        outputs.append(capsys.readouterr().out)
    assert ["\x1b[" in out for out in outputs] == [True, False, False]
