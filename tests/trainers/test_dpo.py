"""DPO: the mixin on a trainer it was not written for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from conftest import tiny
from lopt import LoPTConfig, LoPTDPOTrainer, LoPTMixin

PAIRS = [
    {"prompt": f"Question {i}: ", "chosen": "yes " * (i % 3 + 1), "rejected": "no, " * (i % 2 + 1)}
    for i in range(16)
]


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path):
    def train(trainer_class, config: LoPTConfig | None = None, **changes):
        settings = dict(
            output_dir=str(tmp_path), max_steps=4, logging_steps=1, per_device_train_batch_size=4,
            learning_rate=1e-3, disable_tqdm=True, save_strategy="no", report_to="none", bf16=False,
            gradient_checkpointing=False, use_cpu=True,
        )  # fmt: skip
        trainer = trainer_class(
            LlamaForCausalLM.from_pretrained(tiny_folder),
            args=DPOConfig(**settings | changes),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=AutoTokenizer.from_pretrained(tiny_folder),
            **({"lopt_config": config} if config else {}),
        )
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return losses, dict(trainer.model.named_parameters()), trainer

    return train


@pytest.mark.parametrize("k", [2, 4])
def test_dpo_learns_and_every_parameter_moves(run, tiny_folder: Path, k: int) -> None:
    losses, weights, trainer = run(
        LoPTDPOTrainer, LoPTConfig(num_blocks=k, head_warmup_steps=3, lr_k1=1e-3), max_steps=12
    )
    before = dict(LlamaForCausalLM.from_pretrained(tiny_folder).named_parameters())
    assert all(not torch.equal(before[name], weight) for name, weight in weights.items())
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the reference is the plain model
    assert losses[-1] < 0.6
    assert trainer.state.log_history[0]["local_loss/block_1"] > 0


def test_end_to_end_is_trls_own_run(run) -> None:
    plain_losses, plain, _ = run(DPOTrainer)
    losses, ours, _ = run(LoPTDPOTrainer, LoPTConfig(method="e2e"))
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    for name, parameter in plain.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-3, atol=1e-5)


def test_accumulation_is_the_same_run(run) -> None:
    """Pairs of one length: DPO's loss is a mean over pairs, the local loss one over tokens."""
    config = LoPTConfig(num_blocks=2, head_warmup_steps=3)
    whole, weights, _ = run(LoPTDPOTrainer, config, optim="sgd")
    parts, others, _ = run(
        LoPTDPOTrainer, config, optim="sgd", per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert parts == pytest.approx(whole, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-5)


def test_the_two_lines_of_the_readme_make_any_trainer_one(tiny_folder: Path, tmp_path: Path) -> None:
    class LoPTKTOTrainer(LoPTMixin, KTOTrainer):
        pass

    rows = [
        {"prompt": p["prompt"], "completion": p["chosen"], "label": i % 2 == 0} for i, p in enumerate(PAIRS)
    ]
    trainer = LoPTKTOTrainer(
        LlamaForCausalLM.from_pretrained(tiny_folder),
        args=KTOConfig(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, disable_tqdm=True,
            save_strategy="no", report_to="none", bf16=False, use_cpu=True, logging_steps=1,
        ),
        lopt_config=LoPTConfig(head_warmup_steps=3),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


@pytest.mark.parametrize("coefficient", [0.0, 50.0])
def test_every_block_balances_its_routers_by_the_trainers_coefficient(
    tiny_folder: Path, tmp_path: Path, coefficient: float
) -> None:
    """As two models whose config says so; the config of the trained one stays as it is."""
    moved: list[dict[str, torch.Tensor]] = []
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for given, own in ((coefficient, 0.1), (None, coefficient)):
        model = tiny(
            "mixtral", vocab_size=len(tokenizer), max_position_embeddings=256, router_aux_loss_coef=own
        )
        trainer = LoPTDPOTrainer(
            model,
            args=DPOConfig(
                output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-3,
                optim="sgd", max_grad_norm=0, disable_tqdm=True, save_strategy="no", report_to="none",
                bf16=False, use_cpu=True, precompute_ref_log_probs=True, gradient_checkpointing=False,
                router_aux_loss_coef=given,
            ),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=tokenizer,
            lopt_config=LoPTConfig(head_warmup_steps=0, lr_k1=1e-3, lambda_aux=0),
        )  # fmt: skip
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        trainer.train()
        assert model.config.router_aux_loss_coef == own
        moved.append({n: p.detach() - before[n] for n, p in model.named_parameters() if "gate.weight" in n})
    assert len(moved[0]) == 4
    for name, change in moved[0].items():
        assert torch.equal(change, moved[1][name]), name
        assert change.any() or (
            coefficient == 0 and trainer.lopt.blocks.owner(model.get_parameter(name)) == 0
        )


def test_predicting_rejected_answers_is_refused(run) -> None:
    with pytest.raises(ValueError, match=r"`aux_loss` next_token .* `aux_loss` recon"):
        run(LoPTDPOTrainer, LoPTConfig(aux_loss="next_token"))


def test_arguments_may_come_by_position(tiny_folder: Path, tmp_path: Path) -> None:
    args = DPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    with pytest.raises(ValueError, match="use_reentrant=true gives no gradient"):
        LoPTDPOTrainer(model, None, args)


def test_lora_without_adapters_is_refused(run) -> None:
    with pytest.raises(
        ValueError, match="`method` lora needs adapters, without which all weights would learn"
    ):
        run(LoPTDPOTrainer, LoPTConfig(method="lora"))


def test_no_rows_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="`train_dataset` or `eval_dataset` has no rows: give it some"):
        LoPTDPOTrainer(LlamaForCausalLM.from_pretrained(tiny_folder), train_dataset=Dataset.from_list([]))


def test_a_misspelt_column_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs the columns `chosen` and `rejected`.*rejcted"):
        LoPTDPOTrainer(
            LlamaForCausalLM.from_pretrained(tiny_folder),
            args=DPOConfig(str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejcted": "c"}]),
            processing_class=AutoTokenizer.from_pretrained(tiny_folder),
        )
