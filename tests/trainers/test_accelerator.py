"""What is changed in accelerate: DDP searches for unused parameters only where there may be some."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import DistributedDataParallelKwargs
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import tiny
from lopt.trainers.accelerator import find_unused_if_needed


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopt.trainers.accelerator.dist", SimpleNamespace(is_initialized=lambda: True))


def searches(asked: bool | None, model: Any) -> bool:
    accelerator = SimpleNamespace(ddp_handler=DistributedDataParallelKwargs(find_unused_parameters=True))
    find_unused_if_needed(accelerator, asked, model)
    return accelerator.ddp_handler.find_unused_parameters


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [("llama-tied", {}, False), ("mixtral", {}, True), ("llama", dict(layerdrop=0.1), True)],
)
def test_unused_parameters(name: str, changes: dict[str, Any], expected: bool) -> None:
    model = tiny(name, **changes)
    for given in (model, get_peft_model(model, LoraConfig(target_modules=["q_proj"]))):
        assert searches(None, given) is expected
    assert searches(True, model) is True


def test_a_part_that_text_does_not_use() -> None:
    model = tiny("llama")
    model.vision = nn.Linear(2, 2)
    assert searches(None, model) is True
    model.vision.requires_grad_(False)
    assert searches(None, model) is False
