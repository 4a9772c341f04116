"""Nothing in an output folder is lost without being asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopt.cli.output import prepare_output


def test_new_empty_and_unrelated_folders_are_fine(tmp_path: Path) -> None:
    assert prepare_output(str(tmp_path / "a" / "b"), resume=False, overwrite=False) is None
    (tmp_path / "notes.txt").write_text("mine")
    assert prepare_output(str(tmp_path), resume=False, overwrite=False) is None
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwrite_removes_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="--resume"):
        prepare_output(str(tmp_path), resume=False, overwrite=False)
    prepare_output(str(tmp_path), resume=False, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_resume_takes_the_newest(tmp_path: Path) -> None:
    for step in (4, 12, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert prepare_output(str(tmp_path), resume=True, overwrite=False) == str(tmp_path / "checkpoint-12")
