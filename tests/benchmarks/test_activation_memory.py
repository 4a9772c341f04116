"""The memory that blocks save, on the 7B shape: the bars of the design."""

from __future__ import annotations

import pytest

from activation_memory import METHODS, SHAPE_7B, SHAPE_SMALL, activations


@pytest.fixture(scope="module")
def peak():
    def measure(method: str, small: bool = False) -> int:
        size = dict(batch=1, tokens=512) if small else dict(batch=4, tokens=1024)
        shape = SHAPE_SMALL if small else SHAPE_7B
        return activations(shape, METHODS[method], fake=not small, **size)["activations"]

    return measure


def test_activation_peak(peak, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda p: None)
    whole, small_whole = peak("e2e"), peak("e2e", small=True)
    for method, bar in (("k=2", 0.56), ("k=4", 0.34)):
        ratio = peak(method) / whole
        assert ratio <= bar
        assert peak(method, small=True) / small_whole == pytest.approx(ratio, abs=0.05)
