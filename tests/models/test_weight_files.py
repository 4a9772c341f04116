"""Tensors that a model does not use are said, and refused where they are layers of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lopt import load_model
from lopt.models.weight_files import dropped_layers


def test_tensors_that_the_model_does_not_use_are_said(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    weights = load_file(tiny_folder / "model.safetensors")
    more = {
        "value_head.weight": torch.ones(3),
        "value_head.bias": torch.ones(3),
        "model.layers.1.mask": torch.ones(2, dtype=torch.uint8),
    }
    save_file(weights | more, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    model = load_model(str(tmp_path / "model"))
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert "its files have model.layers.1.mask and 2 more, which its model does not use" in caplog.text


def test_layers_behind_those_of_the_model() -> None:
    parameters = ["model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "lm_head.weight"]
    unused = ["model.layers.2.mlp.weight", "model.layers.2.eh_proj.weight", "vision.layers.7.mlp.weight"]
    assert dropped_layers(unused, parameters, further=0) == ["model.layers.2.mlp.weight"]
    assert dropped_layers(unused, parameters, further=1) == []
