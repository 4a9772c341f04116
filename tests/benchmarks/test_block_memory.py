"""Real tensors hold what fake ones say; blocks of one size need one size of device at any depth."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from block_memory import BF16, peak, staged

SHAPE: dict[str, Any] = dict(
    model_type="qwen2", hidden_size=112, intermediate_size=592, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=1, vocab_size=1024, tie_word_embeddings=False,
)  # fmt: skip
ARGS = argparse.Namespace(batch=1, tokens=192, micro_batches=2)
PREFETCH = dict(prefetch=1e-3)
SETTINGS: dict[str, dict[str, Any]] = {
    "eager k=4": dict(k=4),
    "optimizer": staged(4, "optimizer", **PREFETCH),
    "block": staged(4, "block", **PREFETCH),
    "end to end in stages": staged(1, "block", method="e2e", stages=10, **PREFETCH),
    "the same, host optimizer": staged(
        1, "block", method="e2e", stages=10, optimizer_device="cpu", masters=True, **PREFETCH
    ),
    "block, bfloat16 state, checkpointed": staged(4, "block", checkpointing=True, **BF16, **PREFETCH),
}
BARS = dict(zip(SETTINGS, (0.87, 0.49, 0.43, 0.33, 0.33, 0.38), strict=True))


@pytest.fixture(scope="module")
def end_to_end() -> tuple[int, int]:
    return tuple(peak(SHAPE, ARGS, fake, method="e2e").total for fake in (True, False))


@pytest.mark.parametrize("name", SETTINGS)
def test_real_tensors_have_the_ratio_of_fake_ones(end_to_end: tuple[int, int], name: str) -> None:
    fake, real = (peak(SHAPE, ARGS, fake, **SETTINGS[name]) for fake in (True, False))
    ratios = fake.total / end_to_end[0], real.total / end_to_end[1]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.05)
    assert fake.host == pytest.approx(real.host, rel=0.05)
    assert ratios[1] < BARS[name]


def test_depth_costs_host_memory_only() -> None:
    deep, shallow = (peak(SHAPE, ARGS, **staged(n // 2, "block", layers=n, **PREFETCH)) for n in (12, 6))
    assert deep.total <= 1.01 * shallow.total
    assert deep.host > 1.7 * shallow.host
