"""The block-major schedule in a plain loop: the eager weights for any method and any stages, and no trace left behind."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import nn

from conftest import batch_of, tiny
from lopt import LoPTConfig, attach
from lopt.engine.block_major import BlockMajor
from lopt.engine.clipping import clip_gradients
from lopt.engine.offload import Offload
from lopt.engine.optimizer import BlockOptimizer, Precision
from lopt.engine.random_state import micro_batch_seed, random_numbers
from lopt.engine.stages import Stages
from lopt.engine.updates import Updates
from lopt.instruments.memory import in_host_memory

CPU = torch.device("cpu")
BATCHES = [
    batch_of([9, 5, 2]),
    batch_of([4], seed=1),
    batch_of([3, 11], side="left", seed=2),
    batch_of([6, 6]),
]
ADAMW = functools.partial(torch.optim.AdamW, fused=True)


def eager_steps(
    model: nn.Module, config: LoPTConfig, steps: int, slots: int, max_norm: float, **optimizer: Any
):
    """Train by a plain loop; return the handle and the losses."""
    handle = attach(model, config)
    optimizer_ = BlockOptimizer(handle.parameter_groups(1e-2, 1e-3, 0.1), ADAMW, **optimizer)
    handle.loss_scale = 1 / slots
    losses = []
    for step in range(steps):
        for slot in range(slots):
            with random_numbers(CPU, micro_batch_seed(0, step, slot)):
                loss = model(**BATCHES[slot]).loss / slots
                loss.backward()
            losses.append(loss.item())
        if max_norm < math.inf:
            clip_gradients(handle, max_norm)
        optimizer_.step()
        optimizer_.zero_grad()
    return handle, losses


class Staged:
    """The block-major schedule in a plain loop."""

    def __init__(
        self, model: nn.Module, config: LoPTConfig, max_norm: float, budget: int = 4096, **optimizer: Any
    ) -> None:
        self.model, self.handle = model, attach(model, config)
        stages, offload = Stages(self.handle), None
        if config.offload != "none":
            offload = Offload(self.handle, stages, CPU, budget, weights=config.offload == "block")
        self.optimizer = BlockOptimizer(
            self.handle.parameter_groups(1e-2, 1e-3, 0.1),
            ADAMW,
            stage_of=stages.owner,
            part_bytes=max(budget // 8, 1),
            transfer=offload and offload.transfer,
            **optimizer,
        )
        if offload is not None:
            offload.optimizer = self.optimizer
        self.offload = offload
        self.updates = Updates(self.handle, stages, self.optimizer, offload, max_norm=max_norm)
        self.schedule = BlockMajor(self.handle, self.updates, offload)

    def step(self, slots: int) -> list[float]:
        self.handle.loss_scale = 1 / slots
        losses = self.schedule.step(slots, lambda slot: self.model(**BATCHES[slot]).loss / slots)
        return [loss.item() for loss in losses]


def assert_same(one: Any, other: Any, tolerance: float = 0.0) -> None:
    for handle in (one, other):
        assert all(p.grad is None for p in handle.model.parameters())
    named = [{**dict(h.model.named_parameters()), **dict(h.heads.named_parameters())} for h in (one, other)]
    assert named[0].keys() == named[1].keys()
    for name, value in named[0].items():
        if tolerance:
            error = (value - named[1][name]).norm() / value.norm().clamp(min=1e-12)
            assert error <= tolerance, (name, float(error))
        else:
            assert torch.equal(value, named[1][name]), (name, (value - named[1][name]).abs().max())


CONFIGS: dict[str, dict[str, Any]] = {
    "e2e 1": dict(method="e2e"),
    "e2e 3": dict(method="e2e", stages=3),
    "e2e all": dict(method="e2e", stages=6),
    "lopt 2": dict(num_blocks=2),
    "lopt 2 x 2": dict(num_blocks=2, stages=4),
    "lopt all": dict(num_blocks=2, stages=6),
    "lopt 4": dict(num_blocks=4),
    "next token": dict(num_blocks=2, aux_loss="next_token", stages=5),
    "frozen": dict(method="frozen", num_blocks=2, stages=4),
    "frozen block": dict(num_blocks=3, frozen_blocks=1, stages=5),
    "layers": dict(method="e2e", stage_layers=1),
    "global": dict(num_blocks=2, stages=4, clip="global"),
}


@pytest.mark.parametrize("offload", ["none", "block"])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_the_eager_ones_bit_for_bit(name: str, slots: int, offload: str) -> None:
    config = CONFIGS[name]
    model = tiny("llama")
    other = copy.deepcopy(model)
    plain = LoPTConfig(**{k: v for k, v in config.items() if k not in ("stages", "stage_layers")})
    staged = Staged(other, LoPTConfig(schedule="block_major", offload=offload, **config), 0.5)
    heads = copy.deepcopy(staged.handle.heads.state_dict())
    torch.manual_seed(0)
    handle = attach(model, plain)
    handle.heads.load_state_dict(heads)
    model2 = model
    handle.detach()
    # the eager run with the same heads
    import lopt.core.attach as core

    made = iter(range(1))
    eager = None
    real = core.LoPT.__init__

    def init(self, m, c):
        real(self, m, c)
        self.heads.load_state_dict(heads)

    core.LoPT.__init__ = init
    try:
        eager, losses = eager_steps(model2, plain, 3, slots, 0.5)
    finally:
        core.LoPT.__init__ = real
    got = [x for _ in range(3) for x in staged.step(slots)]
    print(losses, got)
    assert losses == got
    assert_same(eager, staged.handle)
