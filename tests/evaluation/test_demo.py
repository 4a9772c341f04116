"""The whole demo on a small random model: figures, page and model are there and agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from conftest import save_tiny
from lopt.cli.main import main

pytest.importorskip("reasoning_gym")
pytest.importorskip("matplotlib")


@pytest.mark.parametrize("method", ["lopt", "e2e"])
def test_demo(method: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = save_tiny(tmp_path / "model", "llama-tied")
    flags = {"model": model, "method": method, "steps": 4, "batch_size": 2, "held_out": 4, "num_blocks": 3}
    words = [w for k, v in flags.items() for w in (f"--{k}", str(v))]
    out = tmp_path / "out"
    assert main(["demo", *words, "--output_dir", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["before"]["total"] == results["after"]["total"] == 4
    assert [p["step"] for p in results["curve"]] == [0, 2, 4]
    assert results["curve"][0]["loss"] == results["before"]["loss"] != results["after"]["loss"]
    blocks = 3 if method == "lopt" else 1
    assert len(results["blocks"]) == blocks and len(results["train"]) == 4
    assert all(len(row["local_loss"]) == blocks - 1 for row in results["train"])
    assert all(results["memory"][part] > 0 for part in ("parameters", "activations"))
    assert len(results["head_warmup"]) == (60 if method == "lopt" else 0)
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 3 and "held-out" in page
    printed = capsys.readouterr().out
    assert "peak of live bytes" in printed and str(out / "report.html") in printed
    AutoModelForCausalLM.from_pretrained(out / "model")
    assert main(["demo", *words, "--output_dir", str(out)]) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
