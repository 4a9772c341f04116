"""What is changed in accelerate: DDP searches for unused parameters only where there may be some."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import tiny
from lopt.trainers.accelerator import find_unused_if_needed


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopt.trainers.accelerator.dist", SimpleNamespace(is_initialized=lambda: True))


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [("llama-tied", {}, False), ("mixtral", {}, None), ("llama", dict(layerdrop=0.1), None)],
)
def test_unused_parameters(name: str, changes: dict[str, Any], expected: bool | None) -> None:
    model = tiny(name, **changes)
    for given in (model, get_peft_model(model, LoraConfig(target_modules=["q_proj"]))):
        args = SimpleNamespace(ddp_find_unused_parameters=None)
        find_unused_if_needed(args, given)
        assert args.ddp_find_unused_parameters is expected
    chosen = SimpleNamespace(ddp_find_unused_parameters=True)
    find_unused_if_needed(chosen, model)
    assert chosen.ddp_find_unused_parameters is True


def test_a_part_that_text_does_not_use() -> None:
    model = tiny("llama")
    model.vision = nn.Linear(2, 2)
    args = SimpleNamespace(ddp_find_unused_parameters=None)
    find_unused_if_needed(args, model)
    assert args.ddp_find_unused_parameters is None
    model.vision.requires_grad_(False)
    find_unused_if_needed(args, model)
    assert args.ddp_find_unused_parameters is False
