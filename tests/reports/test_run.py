"""The page of a training run: of a resumed one, made again, of several, and one that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lopt.cli.main import main
from lopt.reports import run_callback
from lopt.reports.facts import histogram
from lopt.reports.run import outcome
from lopt.reports.run_data import RunData
from lopt.reports.run_plots import thinned
from pages import ParsedPage


def test_a_resumed_run_has_one_page(
    tiny_folder: Path, sums_file: Path, tmp_path: Path, capsys, caplog
) -> None:
    folder = tmp_path / "a run"
    words = f"sft --model_name_or_path {tiny_folder} --train_file {sums_file} --logging_steps 1 --held_out 8"
    common = [*words.split(), "--output_dir", str(folder), "--head_warmup_steps", "2", "--save_steps", "2"]
    common += ["--max_length", "40", "--hub_token", "hf_secretsecretsecret"]
    assert main([*common, "--max_steps", "2"]) == 0
    first = json.loads((folder / "report.json").read_text())
    assert main([*common, "--max_steps", "4", "--resume"]) == 0
    data = json.loads((folder / "report.json").read_text())
    assert data["ended"] and data["head_warmup"] == first["head_warmup"] and len(data["head_warmup"]) == 2
    assert data["seconds"] > first["seconds"] and sum(data["facts"]["lengths"]["counts"]) == 40
    cut = next(text for text in data["warnings"] if "rows are cut at --max_length 40" in text)
    source = (folder / "report.html").read_text(encoding="utf-8")
    seen = ParsedPage(source).seen
    for said in ("In 4 steps, loss went from", "resumed", "cut at 40", cut, "Local losses", "Memory by part",
                 "tokens with a label", f"{cut} (2 times)", "max_length", "checkpoint-2"):  # fmt: skip
        assert said in seen or said in source, said
    assert "secretsecret" not in source and "has not ended" not in source
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_text(encoding="utf-8") == source
    # A run that is at work: its log is in the checkpoint alone.
    (folder / "trainer_state.json").unlink()
    capsys.readouterr()
    other = tmp_path / "b" / "a run"
    other.mkdir(parents=True)
    (other / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": []}))
    assert main(["report", str(folder), str(other), "--output_dir", str(tmp_path / "both")]) == 0
    both = ParsedPage((tmp_path / "both" / "report.html").read_text(encoding="utf-8")).seen
    assert "2 runs, side by side" in both and str(folder) in both and str(other) in both


def test_a_page_that_cannot_be_written_costs_a_warning(
    tiny_folder: Path, sums_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(run_callback, "write_run_page", fail)
    words = f"sft --model_name_or_path {tiny_folder} --train_file {sums_file} --output_dir {tmp_path / 'out'}"
    assert main([*words.split(), "--max_steps", "2", "--save_steps", "1", "--method", "e2e"]) == 0
    said = [text for text in caplog.messages if "report.html cannot be written: No space left" in text]
    assert len(said) == 1


def test_a_run_shorter_than_its_logging_steps_has_a_mean_loss(
    tiny_folder: Path, sums_file: Path, tmp_path: Path
) -> None:
    words = f"sft --model_name_or_path {tiny_folder} --train_file {sums_file} --output_dir {tmp_path / 'out'}"
    assert main([*words.split(), "--max_steps", "1", "--method", "e2e"]) == 0
    mean = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"][-1]["train_loss"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"In 1 step, mean loss was {mean:.4g}." in ParsedPage(page).seen
    elsewhere = tmp_path / "page"
    assert main(["report", str(tmp_path / "out"), "--output_dir", str(elsewhere)]) == 0
    assert (elsewhere / "report.html").read_text(encoding="utf-8") == page
    assert main(["report", str(tmp_path / "out"), "--output_dir", str(elsewhere)]) == 2  # there is one
    rows = [{"step": 9, "loss": 2.0}, {"step": 9, "train_loss": 3.0}]
    assert outcome(RunData("a", rows)) == "In 9 steps, loss was 2."
    nothing = "9 steps; nothing has been logged yet."
    assert outcome(RunData("a", rows, {"command": "grpo"})) == nothing


def test_points_and_bins() -> None:
    points = thinned([(float(i), float(i)) for i in range(1001)])
    assert len(points) <= 300 and points[0] == (1.5, 1.5) and points[-1] == (1000.0, 1000.0)
    made = histogram(np.array([0, 1, 99, 100, 2399]))
    assert made["width"] == 100 and made["counts"][:2] == [3, 1] and len(made["counts"]) == 24
    run = RunData("a", [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": None}])
    assert run.points("loss") == [(1, 2.0)] and run.points("eval_loss") == []
