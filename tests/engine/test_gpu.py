"""What runs on a GPU first: `pytest -m gpu`, or benchmarks/gpu_parity.py where pytest is missing."""

from __future__ import annotations

import pytest
import torch

import gpu_parity


@pytest.mark.gpu
def test_streamed_weights_are_the_eager_ones_on_a_gpu() -> None:
    found = gpu_parity.parity(torch.device("cuda"))
    assert found["met"], {name: row for name, row in found.items() if row is not True and not row["met"]}


def test_parity_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script itself; every operation is the same there, so all weights are equal bit for bit."""
    for name, less in {
        "METHODS": {"lopt": gpu_parity.METHODS["lopt"]},
        "TOLERANCE": {torch.bfloat16: 0.0},
        "STEPS": 2,
        "TOKENS": 8,
    }.items():
        monkeypatch.setattr(gpu_parity, name, less)
    found = gpu_parity.parity(torch.device("cpu"))
    assert len(found) == 3 and found["met"]
    for name in ("device optimizer", "host optimizer"):
        row = found[f"lopt, {name}, bfloat16"]
        assert row["equal"] and row["resume"]["equal"]
