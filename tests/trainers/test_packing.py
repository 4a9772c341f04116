"""Rows in one sequence are as if alone, or packing is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel

from conftest import SHAPE, byte_tokenizer, tiny
from lopt import LoPTConfig, LoPTSFTTrainer
from lopt.trainers.config import LoPTSFTConfig

ROWS = [
    {"prompt": prompt, "completion": completion}
    for prompt, completion in (
        ("a the", "the the is model"), ("text a model", "is a the"), ("text is of", "learns"), ("of a", "is"),
        ("model a", "learns is"), ("a", "text learns"), ("is", "of of model"), ("the learns a", "a"),
    )
]  # fmt: skip


def trainer(
    folder: Path, model: PreTrainedModel, config: LoPTConfig | None = None, **changes: Any
) -> LoPTSFTTrainer:
    settings = dict(
        max_steps=1, learning_rate=1e-2, optim="sgd", lr_scheduler_type="constant", report_to="none"
    )
    settings |= dict(
        per_device_train_batch_size=8, max_length=256, use_cpu=True, disable_tqdm=True, logging_steps=1
    )
    return LoPTSFTTrainer(
        model,
        args=LoPTSFTConfig(output_dir=str(folder), save_strategy="no", **settings | changes),
        lopt_config=config or LoPTConfig(num_blocks=2, head_warmup_steps=0),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=byte_tokenizer(),
    )


def test_a_packed_step_is_the_step_of_the_rows_alone(tmp_path: Path) -> None:
    runs = []
    for packing in (False, True):
        run = trainer(tmp_path, tiny("qwen3", vocab_size=260, max_position_embeddings=256), packing=packing)
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        run.train()
        moved = {name: p.detach() - before[name] for name, p in run.model.named_parameters()}
        runs.append((run.state.log_history[0]["loss"], moved))
    (loss, one), (packed_loss, other) = runs
    assert packed_loss == pytest.approx(loss, rel=1e-4)
    for name, change in one.items():
        assert (other[name] - change).norm() <= 1e-3 * change.norm(), name


def gpt_oss() -> PreTrainedModel:
    torch.manual_seed(0)
    shape = SHAPE | dict(vocab_size=260, num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    return GptOssForCausalLM(GptOssConfig(**shape, layer_types=["sliding_attention", "full_attention"] * 2))


# Falcon has known the positions since transformers 5.24.
SEEING = [
    "opt",
    "lfm2",
    "gpt_oss",
    *(["falcon"] if Version(transformers.__version__) < Version("5.24") else []),
]


@pytest.mark.parametrize("name", SEEING)
def test_a_model_whose_rows_see_each_other_is_refused(tmp_path: Path, name: str) -> None:
    model = gpt_oss() if name == "gpt_oss" else tiny(name, vocab_size=260, max_position_embeddings=256)
    modes = [module.training for module in model.modules()]
    for changes in (dict(packing=True), dict(padding_free=True, max_length=None)):
        argument = next(iter(changes))
        with pytest.raises(ValueError, match=rf"^`{argument}`: .* see each other: leave it out \("):
            trainer(tmp_path, model, **changes)
    assert modes == [module.training for module in model.modules()]
    trainer(tmp_path, model)


def test_packing_of_the_evaluation_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`eval_packing` without `packing`"):
        trainer(tmp_path, tiny("llama", vocab_size=260, max_position_embeddings=256), eval_packing=True)


def test_it_runs_on_offloaded_weights(tmp_path: Path) -> None:
    config = LoPTConfig(num_blocks=2, schedule="block_major", offload="block", head_warmup_steps=1)
    run = trainer(tmp_path, tiny("llama", vocab_size=260, max_position_embeddings=256), config, packing=True)
    run.train()
    with pytest.raises(ValueError, match=r"^`packing`: OPTForCausalLM"):
        trainer(tmp_path, tiny("opt", vocab_size=260, max_position_embeddings=256), config, packing=True)
