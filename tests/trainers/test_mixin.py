"""The mixin on a real TRL trainer: stops, mixture of experts, clipping, single process."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from conftest import save_tiny, tiny
from lopt import LoPTConfig
from lopt.trainers import LoPTSFTTrainer, NonFiniteError
from lopt.trainers.config import LoPTSFTConfig


@pytest.fixture
def make_trainer(tiny_folder: Path, tmp_path: Path):
    def make(model=None, config: LoPTConfig | None = None, **changes) -> LoPTSFTTrainer:
        rows = [{"prompt": f"Question {i} ", "completion": f"answer {i * i}"} for i in range(16)]
        settings = dict(
            output_dir=str(tmp_path),
            max_steps=4,
            logging_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            disable_tqdm=True,
            save_strategy="no",
        )
        return LoPTSFTTrainer(
            model or tiny("llama", vocab_size=260, max_position_embeddings=256),
            args=LoPTSFTConfig(**{**settings, **changes}),
            lopt_config=config or LoPTConfig(head_warmup_steps=2),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tiny_folder),
        )

    return make


class Poison(TrainerCallback):
    """Spoils a weight before step 3."""

    def __init__(self, parameter: torch.nn.Parameter, value: float) -> None:
        self.parameter, self.value = parameter, value
        self.steps: list[int] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            self.parameter.data.fill_(self.value)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self.steps.append(state.global_step + 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lm_head.weight", ["step 3, batch 1 of 2", "the loss is nan", "Question"]),
        ("model.layers.0.mlp.up_proj.weight", ["step 3", "the local loss of block 1 is nan"]),
    ],
)
def test_a_non_finite_number_stops_before_the_optimizer_step(
    make_trainer, name: str, words: list[str]
) -> None:
    trainer = make_trainer()
    poison = Poison(trainer.model.get_parameter(name), float("nan"))
    trainer.add_callback(poison)
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    assert all(word in str(error.value) for word in words), error.value
    assert poison.steps == [1, 2]


def test_mixture_of_experts(make_trainer) -> None:
    trainer = make_trainer(tiny("mixtral", vocab_size=260, max_position_embeddings=256))
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters() if "gate" in n)
    assert "aux_loss" in trainer.state.log_history[0]


def test_heads_are_trained_and_their_gradients_do_not_pile_up(make_trainer) -> None:
    trainer = make_trainer()
    before = [p.clone() for p in trainer.lopt.heads.parameters()]
    trainer.train()
    heads = list(trainer.lopt.heads.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, heads, strict=True))
    assert all(p.grad is None for p in heads)


def test_the_first_run_of_random_numbers_is_the_trainers(make_trainer) -> None:
    """Heads and their warm-up leave no trace in the random state: all methods see the same order."""
    states = []
    for method in ("lopt", "e2e", "frozen"):
        trainer = make_trainer(config=LoPTConfig(method=method, head_warmup_steps=2))
        trainer.train()
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


def test_mistakes(make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="`num_blocks` must be <= 4"):
        make_trainer(config=LoPTConfig(num_blocks=9))
    with pytest.raises(ValueError, match="use_reentrant"):
        make_trainer(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr("lopt.trainers.checks.OLDEST_FOR_FSDP2", {})
    with pytest.raises(ValueError, match="FSDP needs GPUs"):
        make_trainer()


def test_a_bare_folder_name_works_as_in_trl(make_trainer, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "by_name")
    trainer = make_trainer(str(folder), model_init_kwargs={"dtype": "float32"})
    trainer.train()
    assert trainer.state.global_step == 4


def test_of_offloaded_models_only_the_trained_one_keeps_its_place(
    make_trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a reference model is moved there; the policy's weights stay in host memory."""
    placed: list[tuple[torch.nn.Module, bool | None]] = []
    prepare = Accelerator.prepare_model

    def record(self, model, device_placement=None, evaluation_mode=False):
        placed.append((model, device_placement))
        return prepare(self, model, device_placement, evaluation_mode)

    monkeypatch.setattr(Accelerator, "prepare_model", record)
    trainer = make_trainer(config=LoPTConfig(schedule="block_major", offload="block", head_warmup_steps=2))
    reference = torch.nn.Linear(2, 2)
    trainer.accelerator.prepare_model(reference, evaluation_mode=True)
    trainer.train()
    assert placed[0] == (reference, None)
    assert [place for model, place in placed if model is trainer.model] == [False]


@pytest.mark.parametrize("head_warmup_steps", [0, 20])
def test_a_batch_size_is_found_after_an_error(make_trainer, head_warmup_steps: int) -> None:
    """The gradients of the batch that did not fit are not stepped, and do not end the run.

    Heads go on from where they are, there and in a second run.
    """
    model = tiny("llama", vocab_size=260, max_position_embeddings=256)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1000)  # a factor too much would show
    histories: list[list[list[float]]] = []
    trainer = make_trainer(
        model,
        config=LoPTConfig(head_warmup_steps=head_warmup_steps),
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
        max_steps=2,
    )
    layer = trainer.lopt.blocks.layers[-1]

    def fail(module, args, output) -> None:
        if len(output) > 2:
            histories.append(trainer.head_warmup_history)
            raise RuntimeError("CUDA out of memory.")

    layer.register_forward_hook(fail)
    for _ in range(2):
        trainer.train()
        assert trainer.state.global_step == 2
        histories.append(trainer.head_warmup_history)
    if head_warmup_steps:
        assert len(histories) >= 3
        for before, after in itertools.pairwise(histories):
            assert after[-1][0] < after[0][0] < 1.1 * before[-1][0]


def test_the_head_warm_up_runs_in_the_precision_of_training(make_trainer) -> None:
    """Attention kernels that know bfloat16 alone would fail on what float32 weights make."""
    trainer = make_trainer(bf16=True, max_steps=1)
    seen: dict[str, set[torch.dtype]] = {}

    def record(module, args, output) -> None:
        seen.setdefault(trainer.guard.phase, set()).add(output.dtype)

    trainer.lopt.blocks.layers[0].self_attn.v_proj.register_forward_hook(record)
    trainer.train()
    assert seen == {"head warm-up": {torch.bfloat16}, "step": {torch.bfloat16}}


def test_the_loss_is_of_the_lean_head(make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, seen = make_trainer(max_steps=1), []
    step = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        loss = step(*args, **kwargs)
        nodes = [loss.grad_fn]
        while nodes:
            node = nodes.pop()
            seen.append(node.name())
            nodes += [n for n, _ in node.next_functions if n is not None and len(seen) < 9]
        return loss

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    trainer.train()
    assert "LeanHeadBackward" in seen and "ChunkedLogProbFunctionBackward" not in seen
