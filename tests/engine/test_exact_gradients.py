"""Gradients at boundaries against those of the plain model."""

from __future__ import annotations

import copy

import torch

from lopt import LoPTConfig, attach
from lopt.engine.exact_gradients import boundary_gradients
from small_model import tiny_llama


def test_they_are_those_of_the_whole_model_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    model = tiny_llama(64).eval()
    plain = copy.deepcopy(model)
    ids = torch.randint(4, 64, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :3] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    states: list[torch.Tensor] = []
    for layer in (plain.model.layers[1], plain.model.layers[2]):
        layer.register_forward_hook(lambda module, args, output: states.append(output))
    loss = plain(**batch, use_cache=False).loss
    expected = torch.autograd.grad(loss, states)

    handle = attach(model, LoPTConfig(num_blocks=4, frozen_blocks=1, aux_loss="predicted_gradient"))
    trainable = [p.requires_grad for p in model.parameters()]
    pairs, rows = boundary_gradients(handle, batch)
    for (hidden, gradient), state, exact in zip(pairs, states, expected, strict=True):
        torch.testing.assert_close(hidden, state.detach())
        torch.testing.assert_close(gradient, exact)
    assert rows.labels is labels and trainable == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    model(**batch, use_cache=False).loss.backward()  # boundaries cut as before
    assert model.model.layers[0].mlp.up_proj.weight.grad is None
