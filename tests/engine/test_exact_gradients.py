"""Gradients at boundaries against those of the plain model."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from lopt import LoPTConfig, attach
from lopt.engine.exact_gradients import StagedGradients, exact_gradients
from lopt.engine.plain_loop import block_major
from lopt.losses.rows import Rows
from small_model import tiny_llama

WAYS: dict[str, dict[str, Any]] = {
    "eager": dict(),
    "a stage a block": dict(schedule="block_major"),
    "more stages than layers, in host memory": dict(schedule="block_major", stages=6, offload="block"),
    "host optimizer": dict(schedule="block_major", stages=5, offload="block", optimizer_device="cpu"),
}
Found = dict[tuple[int, int], tuple[Tensor, Tensor]]


@pytest.mark.parametrize("way", WAYS)
def test_they_are_those_of_the_whole_model_and_nothing_else_changes(way: str) -> None:
    torch.manual_seed(0)
    model = tiny_llama(64).eval()
    plain, batches = copy.deepcopy(model), [_batch(), _batch()]
    states: list[Tensor] = []
    for layer in plain.model.layers[1:3]:
        layer.register_forward_hook(lambda module, args, output: states.append(output))
    expected: Found = {}
    for slot, batch in enumerate(batches):
        states.clear()
        loss = plain(**batch).loss
        for block, pair in enumerate(zip(states, torch.autograd.grad(loss, states), strict=True), start=1):
            expected[block, slot] = pair

    config = LoPTConfig(num_blocks=4, frozen_blocks=1, aux_loss="predicted_gradient", **WAYS[way])
    handle = attach(model, config)
    trainable = [p.requires_grad for p in model.parameters()]
    run = functools.partial(exact_gradients, handle)
    if config.is_staged:
        make = functools.partial(torch.optim.AdamW, fused=True)
        schedule = block_major(handle, handle.parameter_groups(1e-3), make)
        run = StagedGradients(handle, schedule).run
    found: Found = {}
    run(2, lambda slot: model(**batches[slot]).loss, lambda b, slot, h, g: found.update({(b, slot): (h, g)}))
    assert found.keys() == expected.keys()
    for key, (hidden, gradient) in found.items():
        torch.testing.assert_close(hidden, expected[key][0].detach())
        torch.testing.assert_close(gradient, expected[key][1])
    assert trainable == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    for (block, slot), pair in found.items():
        batch = batches[slot]
        handle.heads[block].add(
            *pair, Rows(batch["attention_mask"], batch["input_ids"], labels=batch["labels"])
        )
        handle.heads[block].fit()
    if config.is_staged:
        assert len(schedule.step(2, lambda slot: model(**batches[slot]).loss / 2)) == 2  # as ever
        schedule.close()


def _batch() -> dict[str, Any]:
    ids = torch.randint(4, 64, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}
