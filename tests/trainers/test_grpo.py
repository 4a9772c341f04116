"""GRPO: what runs without gradients sees a plain model, and λ weighs the same however batches are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import GRPOTrainer
from trl.trainer import grpo_trainer

from conftest import fixed_rollouts, save_tiny, tiny
from lopt import LoPTConfig, LoPTGRPOTrainer
from lopt.trainers.config import LoPTGRPOConfig
from lopt.trainers.heads import save_heads

TEXTS = ("yes", "no, it is not", "well", "perhaps so")


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c) % 5) for c in completions]


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    fixed = fixed_rollouts(tokenizer, lambda i, prompt: TEXTS[i % 4])

    def build(
        config: LoPTConfig | None = None,
        plain: bool = False,
        sampled: bool = False,
        reward: Any = length_reward,
        **changes: Any,
    ):
        settings = dict(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            learning_rate=1e-3,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            loss_type="grpo",
            optim="sgd",
            max_grad_norm=0.0,
        )
        trainer = GRPOTrainer if plain else LoPTGRPOTrainer
        return trainer(
            LlamaForCausalLM.from_pretrained(tiny_folder),
            reward_funcs=reward,
            args=LoPTGRPOConfig(**settings | changes),
            train_dataset=Dataset.from_list([{"prompt": f"Question {i}: "} for i in range(12)]),
            processing_class=tokenizer,
            rollout_func=None if sampled else fixed,
            **({} if plain else {"lopt_config": config or LoPTConfig(head_warmup_steps=3)}),
        )

    return build


def early_gradients(trainer: LoPTGRPOTrainer) -> dict[str, torch.Tensor]:
    """The summed gradient of block 1 that the first optimizer step takes."""
    taken: dict[str, torch.Tensor] = {}

    def grab(*args: Any, **kwargs: Any) -> None:
        for name, parameter in trainer.lopt.blocks.parameters(trainer.model, 0):
            taken[name] = parameter.grad.clone()

    trainer.create_optimizer().register_step_pre_hook(grab)
    trainer.train()
    return taken


@pytest.mark.parametrize(
    ("loss_type", "aux_loss"), [("grpo", "recon"), ("dapo", "recon"), ("dapo", "next_token")]
)
def test_lambda_weighs_the_same_for_accumulation_1_and_8(make, loss_type: str, aux_loss: str) -> None:
    flags = dict(
        config=LoPTConfig(head_warmup_steps=3, aux_loss=aux_loss), loss_type=loss_type, num_generations=4
    )
    whole = early_gradients(make(per_device_train_batch_size=8, **flags))
    parts = early_gradients(make(per_device_train_batch_size=1, gradient_accumulation_steps=8, **flags))
    halves = early_gradients(
        make(per_device_train_batch_size=4, gradient_accumulation_steps=2, steps_per_generation=4, **flags)
    )
    assert whole.keys() == parts.keys() and len(whole) > 5
    for name, gradient in whole.items():
        assert gradient.norm() > 0
        assert (parts[name] - gradient).norm() < 1e-5 * gradient.norm(), name
        # Other prompts in the first step, but of the same size.
        assert 0.5 < halves[name].norm() / gradient.norm() < 2, name


def test_shares_of_an_optimizer_step_add_up_to_one(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that end inside, at and beyond a generation batch, with two iterations over each."""
    for accumulation, generation in ((2, 2), (2, 4), (4, 2), (4, 1)):
        trainer = make(
            gradient_accumulation_steps=accumulation, steps_per_generation=generation,
            per_device_train_batch_size=4, num_iterations=2, max_steps=4,
        )  # fmt: skip
        shares: list[float] = []
        real = trainer.loss_share
        monkeypatch.setattr(trainer, "loss_share", lambda x, real=real, s=shares: s.append(real(x)) or s[-1])
        trainer.train()
        sums = [sum(shares[i : i + accumulation]) for i in range(0, len(shares), accumulation)]
        assert len(sums) == 4 and sums == pytest.approx([1.0] * 4)


def test_rewards_that_never_differ_are_said_at_the_end(make, caplog: pytest.LogCaptureFixture) -> None:
    def constant(value: float | None) -> Any:
        def reward(completions: list[str], **_: Any) -> list[float | None]:
            return [value] * len(completions)

        return reward

    # 0.1 is no sum of powers of two, so that its mean differs from it; None is a row without a reward.
    for reward in (constant(0.1), constant(None), length_reward):
        caplog.clear()
        config = LoPTConfig(head_warmup_steps=0)
        batch = dict(per_device_train_batch_size=6, num_generations=3, max_steps=2)
        trainer = make(config, reward=reward, logging_steps=1, **batch)
        trainer.train()
        said = [message for message in caplog.messages if message.startswith("nothing was learned")]
        assert bool(said) == (reward is not length_reward)
        assert all("each of the 4 groups" in message and "`temperature`" in message for message in said)
        assert len(said) <= 1
        sample = trainer.sample_completions(2)  # for the page of the run
        text, prompt = sample["completions"][0]["completion"], sample["prompt"]
        assert len(sample["completions"]) == 2 and isinstance(text, str) and isinstance(prompt, str)
        expected = reward(completions=[text])[0] or 0.0
        assert sample["completions"][0]["reward"] == pytest.approx(expected)


@pytest.mark.parametrize("side", ["ours first", "plain first"])
def test_rollouts_old_and_reference_log_probabilities_are_the_plain_models(make, side: str) -> None:
    """The first generation batch of TRL's trainer and of ours, bit for bit."""
    flags = dict(
        sampled=True, beta=0.1, num_iterations=2, gradient_accumulation_steps=1, steps_per_generation=2
    )
    seen = {}
    for plain in (side == "plain first", side != "plain first"):
        trainer = make(plain=plain, **flags)
        trainer.train()
        seen[plain] = trainer._buffered_inputs
    for ours, theirs in zip(seen[False], seen[True], strict=True):
        assert {"old_per_token_logps", "ref_per_token_logps", "completion_ids"} <= ours.keys()
        for key in (
            "prompt_ids",
            "completion_ids",
            "old_per_token_logps",
            "ref_per_token_logps",
            "advantages",
        ):
            assert torch.equal(ours[key], theirs[key]), key


def test_end_to_end_is_trls_own_run(make) -> None:
    runs = []
    for plain in (True, False):
        trainer = make(
            LoPTConfig(method="e2e"), plain=plain, sampled=True, max_steps=3, beta=0.05, logging_steps=1
        )
        trainer.train()
        runs.append(dict(trainer.model.named_parameters()))
    for name, parameter in runs[0].items():
        torch.testing.assert_close(runs[1][name], parameter, rtol=1e-5, atol=1e-7)


def test_a_mixture_of_experts_samples_from_padded_prompts(tmp_path: Path, tiny_folder: Path) -> None:
    """Its config asks for router logits, as after SFT, with which transformers generates from none."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    trainer = LoPTGRPOTrainer(
        tiny("mixtral", vocab_size=len(tokenizer), max_position_embeddings=512),
        reward_funcs=length_reward,
        args=LoPTGRPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=2,
            max_completion_length=4, disable_tqdm=True, save_strategy="no", report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": "Question " + "?" * i} for i in range(6)]),
        processing_class=tokenizer,
        lopt_config=LoPTConfig(head_warmup_steps=2),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.model.config.output_router_logits


@pytest.mark.parametrize("k", [2, 4])
def test_every_parameter_moves_and_the_reference_does_not(make, k: int) -> None:
    trainer = make(
        LoPTConfig(num_blocks=k, head_warmup_steps=3),
        sampled=True,
        beta=0.1,
        max_steps=3,
        optim="adamw_torch",
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    reference = {n: p.detach().clone() for n, p in trainer.ref_model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    assert all(torch.equal(reference[n], p) for n, p in trainer.ref_model.named_parameters())
    assert not any(m._forward_hooks for m in trainer.ref_model.modules())


def test_vllm_gets_the_models_own_weight_names(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[list[str]] = []

    class FakeVLLM:
        def __init__(self, model: Any, **kwargs: Any) -> None:
            self.model = model

        def sync_weights(self) -> None:
            names.append([n for n, _ in self.model.named_parameters()])

        def generate(self, prompts: Any, num_generations: int, **kwargs: Any) -> tuple:
            ids = [[7, 8, 2] for _ in prompts]
            return prompts, ids, [[[-1.0]] * 3 for _ in prompts], None

    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", FakeVLLM)
    monkeypatch.setattr(grpo_trainer, "is_vllm_available", lambda: True, raising=False)
    monkeypatch.setattr("lopt.trainers.vllm.find_spec", lambda name: name)
    trainer = make(sampled=True, use_vllm=True, vllm_mode="colocate")
    plain = [n for n, _ in trainer.model.named_parameters()]
    trainer.train()
    assert names and names[0] == plain


def test_vllm_with_a_tied_head_is_refused(
    make, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lopt.trainers.vllm.find_spec", lambda name: name)
    tied = save_tiny(tmp_path / "tied", "llama-tied")
    with pytest.raises(ValueError, match="`tied_embeddings` freeze"):
        LoPTGRPOTrainer(
            LlamaForCausalLM.from_pretrained(tied),
            reward_funcs=length_reward,
            args=LoPTGRPOConfig(output_dir=str(tmp_path), use_vllm=True, report_to="none"),
            train_dataset=Dataset.from_list([{"prompt": "Question"}]),
            processing_class=AutoTokenizer.from_pretrained(tiny_folder),
        )


def test_groups_that_do_not_fit(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Spread over micro-batches of one optimizer step where that is possible, refused where it is not."""
    flags = dict(output_dir=str(tmp_path), per_device_train_batch_size=2, num_generations=4)
    args = LoPTGRPOConfig(**flags, gradient_accumulation_steps=8, steps_per_generation=1)
    assert args.steps_per_generation == 2 and "`steps_per_generation` 1" in caplog.text
    for impossible in (
        dict(gradient_accumulation_steps=1, steps_per_generation=1),
        dict(gradient_accumulation_steps=3),
        dict(gradient_accumulation_steps=4, num_generations=3),
    ):
        with pytest.raises(ValueError, match="`num_generations`"):
            LoPTGRPOConfig(**flags | impossible)


def test_unused_rollouts_of_another_number_of_processes_are_refused(make, tmp_path: Path) -> None:
    trainer = make()
    save_heads(trainer.lopt, tmp_path)
    for rank in range(2):
        (tmp_path / f"rollouts_{rank}.pt").touch()
    with pytest.raises(ValueError, match=r"unused rollouts of 2 processes: resume it .* \(these are 1\)"):
        trainer.load_own_state(tmp_path)
