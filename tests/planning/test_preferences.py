"""Plans of DPO against live bytes of its trainer."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig

from lopt import LoPTDPOTrainer
from lopt.compat import replaced
from lopt.engine import plain_loop
from lopt.instruments.memory import MemoryPeak
from lopt.planning.calibrate import measured
from lopt.planning.plan import Planner
from lopt.planning.run import Run, Setting
from lopt.trainers.config import LoPTDPOConfig

CONFIG = LlamaConfig(
    hidden_size=128, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=6,
    vocab_size=512,
)  # fmt: skip
STAGED = dict(schedule="block_major", stages=8, offload="block", optimizer_device="cpu")


class PairsOfTokens(LoPTDPOTrainer):
    """Takes two rows of tokens as a pair."""

    def __init__(self, model: Any, train_dataset: Any, **options: Any) -> None:
        rows = train_dataset["input_ids"]
        pairs = {
            "chosen_ids": [row[1:] for row in rows[::2]],
            "rejected_ids": [row[1:] for row in rows[1::2]],
        }
        pairs |= {"prompt_ids": [row[:1] for row in rows[::2]]}
        made, reference = Dataset.from_dict(pairs), copy.deepcopy(model)
        super().__init__(model, ref_model=reference, train_dataset=made, **options)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


@pytest.mark.parametrize(
    "setting",
    [
        Setting("lopt", 2, **STAGED),
        pytest.param(Setting("e2e", 1), marks=pytest.mark.slow),
        pytest.param(Setting("e2e", 1, "block_major", stages=5), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_reference_model(setting: Setting) -> None:
    run = Run(
        CONFIG, 4, 64, 2, torch.float32, autocast=False, device="cpu", reference=True, prefetch=3 * 10**5
    )
    gc.collect()

    def settings(**options: Any) -> LoPTDPOConfig:
        return LoPTDPOConfig(**options | {"per_device_train_batch_size": run.batch // 2})

    with replaced(plain_loop, step_threads=lambda *_: 0):  # a tracker follows one thread
        real = measured(run, setting, PairsOfTokens, settings)
    planner = Planner(run)
    plan = planner.plan(setting)
    assert isinstance(real.peak, MemoryPeak)
    assert plan.total == pytest.approx(real.peak.total, rel=0.015) and plan.host == real.host
    without = Planner(replace(run, reference=False), planner).plan(setting)
    weights = 4 * planner.sizes.model + planner.sizes.buffers
    assert (
        weights <= plan.total - without.total < 1.03 * weights
    )  # its forward may be larger than the backward
    assert plan.flops > 1.15 * without.flops  # a forward more
