"""How often the training path looks at the device: once per optimizer step, whatever the accumulation."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, TrainerCallback

from conftest import fixed_rollouts, tiny
from lopt import LoPTConfig, LoPTGRPOTrainer, LoPTSFTTrainer
from lopt.trainers.config import LoPTGRPOConfig, LoPTSFTConfig

LOOKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
LIBRARIES = ("/lopt/", "/trl/", "/transformers/", "/accelerate/", "/torch/optim/")


def caller() -> str:
    """The innermost frame of a library, as file:line."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if any(library in name for library in LIBRARIES):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class Looks(TorchDispatchMode):
    """Counts what would wait for a GPU in optimizer step 2 and was written in lopt, by its place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.step, self.found = 0, Counter[str]()
        for name in ("tolist", "cpu", "numpy"):  # no operator shows them on a CPU
            original = getattr(Tensor, name)
            monkeypatch.setattr(Tensor, name, self._counting(original))

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.note(caller())
            return original(*args, **kwargs)

        return call

    def note(self, place: str) -> None:
        if self.step == 2 and "/lopt/" in place:
            self.found[place] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in LOOKS or masked:
            self.note(caller())
        return func(*args, **(kwargs or {}))


class Steps(TrainerCallback):
    """Says which optimizer step is at work, from its first batch to the start of the next."""

    def __init__(self, looks: Looks) -> None:
        self.looks = looks

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.looks.step = state.global_step + 1


def sft(tokenizer: Any, settings: dict[str, Any], config: LoPTConfig) -> Any:
    rows = [{"prompt": f"Question {i} ", "completion": f"answer {i * i}"} for i in range(16)]
    model = tiny("llama", vocab_size=260, max_position_embeddings=256)
    return LoPTSFTTrainer(
        model, args=LoPTSFTConfig(**settings), lopt_config=config, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip


def grpo(tokenizer: Any, settings: dict[str, Any], config: LoPTConfig) -> Any:
    """Step 2 uses the rollouts of step 1 a second time."""
    settings |= dict(num_generations=2, num_iterations=2, max_completion_length=6)
    return LoPTGRPOTrainer(
        tiny("llama", vocab_size=260, max_position_embeddings=256),
        reward_funcs=lambda completions, **_: [float(len(c) % 5) for c in completions],
        args=LoPTGRPOConfig(**settings), lopt_config=config, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": f"Question {i}: "} for i in range(12)]),
        rollout_func=fixed_rollouts(tokenizer, lambda i, prompt: "so" * (i % 3 + 1)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "schedule"),
    [
        pytest.param(sft, "eager", id="sft"),
        pytest.param(sft, "block_major", id="sft, block-major"),
        pytest.param(grpo, "eager", id="grpo"),
    ],
)
def test_looks_at_the_device_do_not_grow_with_accumulation(
    make: Any, schedule: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for accumulation in (1, 3):
        settings: dict[str, Any] = dict(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none",
            gradient_accumulation_steps=accumulation, logging_steps=9, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        config: Any = LoPTConfig(num_blocks=3, head_warmup_steps=1, schedule=schedule)
        trainer = make(AutoTokenizer.from_pretrained(tiny_folder), settings, config)
        with monkeypatch.context() as patch, Looks(patch) as looks:
            trainer.add_callback(Steps(looks))
            trainer.throughput._on_gpu = True  # it measures memory by an operator hook of its own elsewhere
            trainer.train()
        found.append(looks.found)
    assert found[0] and found[0] == found[1]
