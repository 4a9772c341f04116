"""Every wrong value is named with its field."""

from __future__ import annotations

import dataclasses
import math

import pytest

from lopt import LoPTConfig


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("method", ["sgd"]),
        ("num_blocks", [0, -1]),
        ("aux_loss", ["next"]),
        ("frozen_blocks", [-1]),
        ("frozen_top", [-1]),
        ("lambda_aux", [-1.0, math.nan, math.inf]),
        ("lr_k1", [-1e-5, math.nan]),
        ("head_warmup_steps", [-1]),
        ("head_warmup_lr", [-1.0, math.inf]),
        ("tied_embeddings", ["keep"]),
        ("clip", ["none"]),
        ("block_boundaries", [[0, 4], [6, 4], [4, 4], [-2]]),
    ],
)
def test_wrong_values_name_their_field(name: str, values: list) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must be "):
            LoPTConfig(**{name: value})


def test_defaults_and_alias() -> None:
    config = LoPTConfig(method="ll")
    assert config == LoPTConfig() and config.method == "lopt"
    assert config.early_learning_rate(2e-5) == pytest.approx(2e-6)
    assert LoPTConfig(aux_loss="next_token").early_learning_rate(2e-5) == 2e-5
    assert LoPTConfig(lr_k1=2e-5).early_learning_rate(1.0) == 2e-5
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_blocks = 3  # type: ignore[misc]
    assert all("help" in f.metadata for f in dataclasses.fields(LoPTConfig))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(method="frozen", frozen_blocks=1), "`frozen_blocks` needs `method` lopt"),
        (dict(method="lora", frozen_top=1), "`frozen_top` has no effect with `method` lora"),
        (dict(offload="block"), "`offload` block needs `schedule` block_major"),
        (dict(stages=4), "`stages` 4 needs `schedule` block_major"),
        (dict(schedule="block_major", stages=2, stage_layers=2), "give one of them"),
        (dict(schedule="block_major", num_blocks=4, stages=3), "`stages` must be >= 4, the number of blocks"),
        (dict(schedule="block_major", optimizer_device="cpu"), "add `offload` block"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoPTConfig(**settings)
