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


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = save_tiny(tmp_path / "model", "llama-tied")
    flags = {"model": model, "steps": 4, "batch_size": 2, "held_out": 4, "num_blocks": 3}
    words = [w for k, v in flags.items() for w in (f"--{k}", str(v))]
    out = tmp_path / "out"
    assert main(["demo", *words, "--output_dir", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    arms = {arm["name"]: arm for arm in results["arms"]}
    assert list(arms) == ["lopt k=3", "e2e", "frozen k=3"] and results["before"]["total"] == 4
    for name, arm in arms.items():
        assert [p["step"] for p in arm["curve"]] == [0, 2, 4] and len(arm["train"]) == 4
        assert arm["curve"][0]["loss"] == results["before"]["loss"] != arm["after"]["loss"]
        blocks = 1 if name == "e2e" else 3
        assert len(arm["blocks"]) == blocks
        assert all(len(row["local_loss"]) == 2 * (name == "lopt k=3") for row in arm["train"])
        assert all(arm["memory"][part] > 0 for part in ("parameters", "activations"))
        assert len(arm["head_warmup"]) == (60 if name == "lopt k=3" else 0)
    # The same rows in the same order: nothing has moved in the first step.
    assert len({arm["train"][0]["loss"] for arm in arms.values()}) == 1
    assert [a["by"] for a in results["samples"][0]["answers"]] == ["before", *arms]
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 6 and "held-out" in page
    printed = capsys.readouterr().out
    assert "peak of live bytes" in printed and str(out / "report.html") in printed
    AutoModelForCausalLM.from_pretrained(out / "model")
    assert main(["demo", *words, "--output_dir", str(out)]) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err


def test_the_demo_of_one_method(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = save_tiny(tmp_path / "model", "llama-tied")
    words = f"--methods e2e --steps 1 --batch_size 1 --held_out 1 --output_dir {tmp_path / 'out'}".split()
    assert main(["demo", "--model", str(model), *words]) == 0
    assert [arm["name"] for arm in json.loads((tmp_path / "out" / "results.json").read_text())["arms"]] == [
        "e2e"
    ]
    assert "Model (e2e)" in capsys.readouterr().out
