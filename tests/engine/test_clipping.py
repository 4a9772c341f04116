"""Clipping where gradients are whole or lie on different device meshes, which no single operation spans."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from lopt.engine.clipping import clip_gradients


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_norm_over_all_meshes(process_group: None) -> None:
    meshes = [None, init_device_mesh("cpu", (1,)), init_device_mesh("cpu", (1, 1))]
    parameters = []
    for size, mesh in enumerate(meshes, start=1):
        values = [torch.zeros(size, 2), torch.full((size, 2), float(size))]
        value, gradient = values if mesh is None else [distribute_tensor(x, mesh) for x in values]
        parameter = nn.Parameter(value)
        parameter.grad = gradient
        parameters.append(parameter)
    handle: Any = SimpleNamespace(
        blocks=[SimpleNamespace(index=0)], block_parameters=lambda index: parameters,
        device=torch.device("cpu"), config=SimpleNamespace(clip="block"),
    )  # fmt: skip
    before = (2 * 1**2 + 4 * 2**2 + 6 * 3**2) ** 0.5
    assert clip_gradients(handle, 0.5).tolist() == pytest.approx([before])
    assert clip_gradients(handle).tolist() == pytest.approx([0.5], rel=1e-4)
