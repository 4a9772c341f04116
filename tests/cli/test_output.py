"""Nothing in an output folder is lost without being asked for."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest

from lopt.cli.output import check_apart, check_output, check_report, spare_model, start_anew
from lopt.cli.parsing import parse
from lopt.reliability.checkpoint import MANIFEST, publish, seal, staging
from lopt.reliability.record import Record


def test_new_empty_and_unrelated_folders_are_fine(tmp_path: Path) -> None:
    assert check_output(str(tmp_path / "a" / "b"), resume=None, overwrite=False) is None
    assert not (tmp_path / "a").exists()
    (tmp_path / "notes.txt").write_text("mine")
    assert check_output(str(tmp_path), resume=None, overwrite=False) is None
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwrite_removes_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="--resume"):
        check_output(str(tmp_path), resume=None, overwrite=False)
    check_output(str(tmp_path), resume=None, overwrite=True)
    assert (tmp_path / "checkpoint-4").is_dir()  # until all else is known to be right
    start_anew(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["README.md", "report.html", "run.yaml"])
def test_files_that_a_run_would_write_over_are_asked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"write over \({name}\): choose another folder"):
        check_output(str(tmp_path), resume=None, overwrite=False)
    check_output(str(tmp_path), resume=None, overwrite=True)
    Record("sft", [], {}, {}).write(tmp_path)  # of a run that was killed before its first checkpoint
    check_output(str(tmp_path), resume=None, overwrite=False)
    Record("eval", [], {}, {}).write(tmp_path)
    with pytest.raises(ValueError, match="write over"):
        check_output(str(tmp_path), resume=None, overwrite=False)


def test_results_stay_apart_from_runs(tmp_path: Path) -> None:
    check_apart(str(tmp_path / "new"), "eval")
    Record("eval", [], {}, {}).write(tmp_path)
    check_apart(str(tmp_path), "eval")
    with pytest.raises(ValueError, match=f"results of another command: choose .*{tmp_path / 'probe'}"):
        check_report(str(tmp_path), ["report.html"], "probe", overwrite=True)
    for name in ("config.json", "adapter_config.json", "trainer_state.json", "checkpoint-4"):
        folder = tmp_path / "of" / name
        folder.mkdir(parents=True)
        (folder / name).mkdir()
        with pytest.raises(ValueError, match="holds a run, a model"):
            check_apart(str(folder), "eval")


def test_the_model_is_not_written_over(tmp_path: Path) -> None:
    for inside in ("out", "out/checkpoint-3", "out/models/a"):
        (tmp_path / inside).mkdir(exist_ok=True, parents=True)
    model, out = str(tmp_path / "out"), tmp_path / "out"
    (tmp_path / "link").symlink_to(out)
    for folder in (out, out / "new", tmp_path / "link"):
        with pytest.raises(ValueError, match="would write over the model"):
            spare_model(str(folder), model)
    with pytest.raises(ValueError, match="would write over the model"):
        spare_model(str(out), str(out / "checkpoint-3"))
    with pytest.raises(ValueError, match="would write over the model"):
        spare_model(str(out), str(out / "models/a"), ("models",))
    spare_model(str(out), str(out / "models/a"))
    spare_model(str(tmp_path), model)
    spare_model(model, "org/name")


def test_resume_takes_the_newest_whole_one_and_says_so(tmp_path: Path, capsys) -> None:
    for step in (4, 12, 8, 16):
        staged = staging(tmp_path, f"checkpoint-{step}")
        staged.mkdir(parents=True)
        (staged / "trainer_state.json").write_text("{}")
        seal(staged)
        publish(staged, tmp_path / staged.name)
    (tmp_path / "checkpoint-16" / "trainer_state.json").write_text("")
    (tmp_path / "checkpoint-12" / MANIFEST).unlink()
    assert check_output(str(tmp_path), resume="auto", overwrite=False) == str(tmp_path / "checkpoint-8")
    said = capsys.readouterr().out
    assert "checkpoint-16 is passed over: trainer_state.json is empty" in said
    assert "checkpoint-12 is passed over: it has no manifest.json" in said
    assert f"going on from {tmp_path}/checkpoint-8, step 8" in said
    old = str(tmp_path / "checkpoint-12")
    assert check_output(str(tmp_path), resume=old, overwrite=False) == old
    assert "taken as it is" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is refused: trainer_state"):
        check_output(str(tmp_path), resume=str(tmp_path / "checkpoint-16"), overwrite=False)
    for step in (4, 8):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*checkpoint-4 is passed over"):
        check_output(str(tmp_path), resume="auto", overwrite=False)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for resume in (None, "auto"):
        with pytest.raises(ValueError, match=r"cannot be written to \(Read-only file system\)"):
            check_output(str(tmp_path), resume=resume, overwrite=False)


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ([], None), (["--resume"], "auto"), (["--resume", "--max_steps", "3"], "auto"),
        (["--resume", "auto"], "auto"), (["--resume", "true"], "auto"), (["--resume", "false"], None),
        (["--resume", "out/checkpoint-3"], "out/checkpoint-3"),
    ],
)  # fmt: skip
def test_the_resume_flag(flags: list[str], value: str | None) -> None:
    _, _, run, *_ = parse("sft", ["--output_dir", "x", *flags])
    assert run.resume == value


def test_a_command_that_cannot_resume_spares_a_run_and_does_not_offer_to(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="holds a run already: start anew"):
        check_output(str(tmp_path), resume=None, overwrite=False, resumable=False)
