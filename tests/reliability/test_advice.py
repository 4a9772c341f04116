"""What is advised when memory has run out, by method and schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from lopt import LoPTConfig
from lopt.planning.plan import Planner
from lopt.reliability.advice import Attempt, advice
from lopt.trainers.config import LoPTDPOConfig, LoPTSFTConfig

MODEL = LlamaConfig(
    hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=4, vocab_size=1024,
)  # fmt: skip


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with plenty of memory."""
    monkeypatch.setattr("lopt.reliability.advice.free_memory", lambda device: 2**40)
    monkeypatch.setattr("lopt.reliability.advice.used_memory", lambda device: 0)


def told(kind: Any = LoPTSFTConfig, batch: int = 1, precompute: bool = False, **options: Any) -> str:
    """What is said of a run that did not fit."""
    args = kind(
        output_dir="unused", per_device_train_batch_size=batch, max_length=64, use_cpu=True, bf16=False
    )
    args.precompute_ref_log_probs = precompute
    config = LoPTConfig(**options)
    return advice(lambda: Attempt(MODEL, args, config, 64, torch.float32, torch.device("cuda")))


@pytest.mark.parametrize(
    "options",
    [
        dict(method="e2e"),
        dict(method="frozen", num_blocks=2, stages=3, schedule="block_major"),
        dict(method="e2e", schedule="block_major", stage_layers=3, clip="global"),
        dict(num_blocks=2, schedule="block_major", stages=4, offload="block", optimizer_device="cpu"),
    ],
)
def test_a_proposal_fits_better_than_the_run(options: dict[str, Any]) -> None:
    text = told(**options)
    assert text.startswith("By `lopt plan` this would fit: `"), text
    if options.get("method") in ("e2e", "frozen"):  # what learns the same comes first
        assert "`method`" not in text and "`stages` " in text
    assert "`num_blocks`" not in text or options.get("method") != "e2e"
    if "stage_layers" in options:
        assert "`stage_layers` left out" in text


@pytest.mark.parametrize("precompute", [False, True])
def test_preferences_are_planned_as_such(precompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a pair, the reference model, and where the model is cut."""
    planned: list[Any] = []
    plan = Planner.plan

    def watch(self: Planner, setting: Any, *more: Any) -> Any:
        planned.append((self.run, setting))
        return plan(self, setting, *more)

    monkeypatch.setattr(Planner, "plan", watch)
    cut = dict(block_boundaries=[1, 3, 5], tied_embeddings="freeze")
    text = told(LoPTDPOConfig, batch=4, precompute=precompute, **cut)
    (run, setting), (smaller, same) = planned[:2]
    assert (run.batch, smaller.batch, smaller.accumulation) == (8, 4, 2 * run.accumulation)
    assert run.reference == smaller.reference == (not precompute) and run.tied_embeddings == "freeze"
    assert setting == same and setting.num_blocks == 4 and setting.block_boundaries == (1, 3, 5)
    assert "`per_device_train_batch_size` 2 `gradient_accumulation_steps` " in text
    assert "`block_boundaries` left out" in text and "`num_blocks` " in text
    assert run.accumulation == LoPTDPOConfig(output_dir="unused", use_cpu=True).gradient_accumulation_steps
    told(batch=4)
    assert planned[-1][0].batch == 4 and not planned[-1][0].reference


def test_what_cannot_be_planned_gets_advice_that_is_true() -> None:
    lora = told(method="lora", schedule="block_major", stages=3)
    assert lora.startswith("What helps: ") and lora.endswith("more `stages`")
    assert told(method="lora").endswith("`schedule` block_major with several `stages`")
    assert advice(lambda: {}["unknown"]).endswith("more `num_blocks`")
