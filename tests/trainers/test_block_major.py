"""The block-major schedule is the eager one with each block stepped as soon as it is done."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from conftest import fixed_rollouts, tiny
from lopt import LoPTConfig, LoPTDPOTrainer, LoPTGRPOTrainer, LoPTSFTTrainer
from lopt.engine import pinned
from lopt.engine.host_transfer import HostTransfer
from lopt.instruments.memory import in_host_memory
from lopt.trainers import NonFiniteError
from lopt.trainers.config import LoPTGRPOConfig, LoPTSFTConfig

ROWS = [{"prompt": f"Question {i} ", "completion": "answer " * (i % 4 + 1)} for i in range(30)]
COMMON: dict[str, Any] = dict(
    max_steps=10, logging_steps=1, learning_rate=1e-2, optim="sgd", disable_tqdm=True, save_strategy="no",
    report_to="none", max_grad_norm=0.5, use_cpu=True, weight_decay=0.1,
)  # fmt: skip


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    def train(
        schedule: str,
        k: int,
        name: str = "llama-tied",
        config: dict | None = None,
        folder: str = "run",
        checkpoint: Path | None = None,
        dtype: torch.dtype = torch.float32,
        peft: bool = False,
        **changes: Any,
    ) -> tuple[dict[str, torch.Tensor], list[dict], Any]:
        trainer = LoPTSFTTrainer(
            tiny(name, dtype, vocab_size=260, max_position_embeddings=256),
            args=LoPTSFTConfig(output_dir=str(tmp_path / folder), **COMMON | changes),
            lopt_config=LoPTConfig(
                **dict(num_blocks=k, schedule=schedule, head_warmup_steps=2, lr_k1=1e-2) | (config or {})
            ),
            peft_config=LoraConfig(target_modules=["c_attn"], r=4, fan_in_fan_out=True) if peft else None,
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS[:6]),
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return state(trainer), [r for r in trainer.state.log_history if "loss" in r], trainer

    return train


def state(trainer: Any) -> dict[str, torch.Tensor]:
    heads = {f"head.{n}": p.detach() for n, p in trainer.lopt.heads.named_parameters()}
    return {n: p.detach() for n, p in trainer.model.named_parameters()} | heads


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        error = (value - b[name]).norm() / value.norm().clamp(min=1e-12)
        assert error <= tolerance, (name, float(error))


# 30 rows by 2: accumulation 4 leaves 3 micro-batches for the last step of an epoch, 7 leaves 1.
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("k", "accumulation"),
    [(2, 1), (2, 4), (4, 7), *(pytest.param(*other, marks=SLOW) for other in ((2, 7), (4, 1), (4, 4)))],
)
def test_weights_are_those_of_the_eager_schedule(run, k: int, accumulation: int) -> None:
    flags = dict(
        max_steps=5,  # of any accumulation above 1 an epoch has fewer
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
        gradient_checkpointing=accumulation == 4,
    )
    eager, eager_logs, _ = run("eager", k, **flags)
    staged, logs, _ = run("block_major", k, **flags)
    same(eager, staged)
    for offload in ("optimizer", "block"):
        travelled, _, trainer = run("block_major", k, config={"offload": offload}, **flags)
        same(eager, travelled)
        assert in_host_memory(trainer.model.get_input_embeddings().weight) == (offload == "block")
    for row, other in zip(eager_logs, logs, strict=True):
        assert other.keys() == row.keys()
        for key in row:
            if key.startswith(("loss", "local", "grad", "learning", "entropy", "mean_token")):
                assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-6), key


METHODS: dict[str, dict[str, Any]] = {
    "e2e": dict(method="e2e", stages=6),
    "lopt": dict(num_blocks=2, stages=5),
    "global": dict(num_blocks=2, stages=5, clip="global"),
    "frozen": dict(method="frozen", num_blocks=2, stages=4),
    "lora": dict(method="lora", stage_layers=1),
}
HOST = dict(offload="block", optimizer_device="cpu", prefetch_gib=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_any_method_runs_in_stages(run, tmp_path: Path, method: str) -> None:
    """Losses and weights of the eager schedule, tokens counted alike, and a resumed run is the whole one."""
    adapters = dict(peft=True) if method == "lora" else {}
    flags: dict[str, Any] = dict(
        gradient_accumulation_steps=4, per_device_train_batch_size=2, max_steps=6, save_strategy="steps",
        save_steps=2, save_total_limit=9, lr_scheduler_type="linear", **adapters,
    )  # fmt: skip
    config = METHODS[method]
    plain = {key: value for key, value in config.items() if not key.startswith("stage")}
    eager, logs, _ = run("eager", 2, "gpt2", plain, "eager", **flags)
    staged, other_logs, _ = run("block_major", 2, "gpt2", config | HOST, "staged", **flags)
    same(eager, staged)
    for row, other in zip(logs, other_logs, strict=True):
        assert other.keys() - {"host_wait_seconds"} == row.keys()
        for key in row:
            if key.startswith(("loss", "local", "grad", "learning", "num_tokens", "mean_token")):
                assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-6), key
    checkpoint = tmp_path / "staged" / "checkpoint-2"
    resumed, _, _ = run("block_major", 2, "gpt2", config | HOST, "again", checkpoint=checkpoint, **flags)
    same(staged, resumed, tolerance=0.0)


# All of them bit for bit, without a trainer: tests/engine/test_block_major.py.
@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        "opt",
        *(pytest.param(n, marks=SLOW) for n in ("qwen3", "phi", "falcon", "mistral", "gpt_neox")),
    ],
)
def test_every_architecture(run, name: str) -> None:
    flags = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=3)
    eager, _, _ = run("eager", 3, name, **flags)
    staged, _, _ = run("block_major", 3, name, **flags)
    same(eager, staged)


OFFLOADS = ["none", pytest.param("optimizer", marks=SLOW), "block"]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_local_every(run, offload: str) -> None:
    flags = dict(gradient_accumulation_steps=3, per_device_train_batch_size=2, optim="adamw_torch_fused")
    eager, _, _ = run("eager", 4, config={"local_every": 3}, **flags)
    staged, _, trainer = run("block_major", 4, config={"local_every": 3, "offload": offload}, **flags)
    same(eager, staged, tolerance=1e-4)  # AdamW makes large steps out of small differences
    steps = {float(s["step"]) for s in trainer.bare_optimizer().state.values()}
    assert steps == {10, 4}  # steps 1, 4, 7 and 10 for the earlier blocks


@pytest.mark.parametrize("offload", OFFLOADS)
def test_next_token_and_frozen_blocks(run, offload: str) -> None:
    flags = dict(gradient_accumulation_steps=3, per_device_train_batch_size=2)
    config = {"aux_loss": "next_token", "frozen_blocks": 1}
    eager, logs, trainer = run("eager", 4, config=config, **flags)
    before = tiny("llama-tied", vocab_size=260, max_position_embeddings=256).state_dict()
    for block in trainer.lopt.blocks:
        names = [n for n, p in trainer.lopt.blocks.parameters(trainer.model, block.index)]
        assert all(torch.equal(eager[n], before[n]) == (block.index == 0) for n in names if n in before)
    staged, staged_logs, _ = run("block_major", 4, config=config | {"offload": offload}, **flags)
    same(eager, staged)
    for row, other in zip(logs, staged_logs, strict=True):
        assert {k for k in row if k.startswith("local")} == {"local_loss/block_2", "local_loss/block_3"}
        for key in row:
            if key.startswith(("loss", "local", "grad")):
                assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-6), key


SETTINGS: dict[str, dict[str, Any]] = {
    "next token": dict(config={"offload": "block", "aux_loss": "next_token", "frozen_blocks": 1}),
    "offload": dict(config={"offload": "block", "prefetch_gib": 1e-5}),
    "optimizer": dict(config={"offload": "optimizer"}, optim="NAdam"),
    "bfloat16": dict(config={"offload": "block"}, dtype=torch.bfloat16, state_dtype="bfloat16"),
    "masters": dict(config={"offload": "block", "local_every": 2}, dtype=torch.bfloat16, master_weights=True),
    "low bit": dict(config={"offload": "block"}, dtype=torch.bfloat16, optim="adamw_torch_8bit"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_is_bit_for_bit_the_whole_one(run, tmp_path: Path, monkeypatch, name: str) -> None:
    if name == "low bit":
        pytest.importorskip("torchao")
    flags: dict[str, Any] = dict(
        optim="adamw_torch_fused", save_strategy="steps", save_steps=3, save_total_limit=9, max_steps=6,
        learning_rate=1e-3, gradient_accumulation_steps=4, per_device_train_batch_size=2,
        eval_strategy="steps", eval_steps=2,
    ) | SETTINGS[name]  # fmt: skip
    with torch.compiler.set_stance("force_eager"):
        whole, _, _ = run("block_major", 3, folder="whole", **flags)
        resumed, _, _ = run(
            "block_major", 3, folder="resumed", checkpoint=tmp_path / "whole" / "checkpoint-3", **flags
        )
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


def test_what_is_saved_is_what_was_trained(run, tmp_path: Path) -> None:
    flags = dict(optim="adamw_torch_fused", config={"offload": "block"}, per_device_train_batch_size=2)
    end, _, trainer = run("block_major", 3, eval_strategy="steps", eval_steps=5, **flags)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for key, value in loaded.named_parameters():
        assert torch.equal(value, end[key]), key
    other = LoPTSFTTrainer(
        loaded, args=LoPTSFTConfig(output_dir=str(tmp_path / "other"), **COMMON), lopt_config=LoPTConfig(),
        train_dataset=Dataset.from_list(ROWS), eval_dataset=Dataset.from_list(ROWS[:6]),
        processing_class=trainer.processing_class,
    )  # fmt: skip
    assert other.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)


def test_the_best_checkpoint_comes_back(run) -> None:
    flags = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, max_steps=6)
    best = dict(load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
    ends = [
        run("block_major", 3, config={"offload": offload}, folder=offload, **flags, **best)[0]
        for offload in ("none", "block")
    ]
    same(*ends, tolerance=0.0)


def test_two_trainers_in_one_process(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside each other, after each other on one model, and gone: pinned memory goes with its owners."""
    pages: dict[int, int] = {}
    monkeypatch.setattr(pinned, "_register", lambda address, nbytes: pages.update({address: nbytes}) or 0)
    monkeypatch.setattr(pinned, "_unregister", lambda address, *_: pages.pop(address))
    make = HostTransfer.__init__

    def pinning(self: HostTransfer, *args: Any) -> None:
        make(self, *args)
        self._pinned = pinned.PinnedMemory()

    monkeypatch.setattr(HostTransfer, "__init__", pinning)
    flags: dict[str, Any] = dict(config={"offload": "block"}, optim="adamw_torch_fused", max_steps=3)
    ends = [run("block_major", 2, **flags)]
    ends.append(run("block_major", 2, **flags))
    pinned_bytes = sum(pages.values())
    for _, _, trainer in ends:
        trainer.train()  # anew, from where it is
    same(state(ends[0][2]), state(ends[1][2]), tolerance=0.0)
    assert sum(pages.values()) == pinned_bytes > 0
    first = ends.pop(0)[2]
    again = LoPTSFTTrainer(
        first.lopt.detach(), args=first.args, lopt_config=first.lopt.config,
        processing_class=first.processing_class, train_dataset=Dataset.from_list(ROWS),
    )  # fmt: skip
    again.train()
    del first, again, trainer
    ends.clear()
    gc.collect()
    assert not pages


def test_each_block_is_stepped_once_and_with_its_own_gradient_only(run, monkeypatch) -> None:
    stepped: list[set[int]] = []
    real = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        stepped.append({g["block"] for g in self.param_groups for p in g["params"] if p.grad is not None})
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    run("block_major", 4, gradient_accumulation_steps=3, per_device_train_batch_size=2, max_steps=2)
    assert stepped == [{0}, {1}, {2}, {3}] * 2


@pytest.mark.parametrize(("generation", "method"), [(1, "lopt"), (2, "lopt"), (4, "lopt"), (2, "e2e")])
def test_grpo(tiny_folder: Path, tmp_path: Path, generation: int, method: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    fixed = fixed_rollouts(tokenizer, lambda i, prompt: "so be it " * (i % 3 + 1))
    ends = []
    for schedule, offload in (("eager", "none"), ("block_major", "none"), ("block_major", "block")):
        how = dict(schedule=schedule, offload=offload, head_warmup_steps=2, lr_k1=1e-2, method=method)
        trainer = LoPTGRPOTrainer(
            tiny("llama-tied", vocab_size=260, max_position_embeddings=256),
            reward_funcs=lambda completions, **_: [float(len(c) % 7) + i for i, c in enumerate(completions)],
            rollout_func=fixed,
            args=LoPTGRPOConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4,
                gradient_accumulation_steps=2, steps_per_generation=generation, loss_type="grpo",
                num_iterations=2, beta=0.0, **COMMON | {"max_steps": 4},
            ),
            lopt_config=LoPTConfig(num_blocks=3, **how, stages=5 if offload == "block" else None),
            train_dataset=Dataset.from_list([{"prompt": f"Question {i}: "} for i in range(12)]),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        ends.append(state(trainer))
    for staged in ends[1:]:
        same(ends[0], staged, tolerance=1e-5 if generation == 4 else 1e-6)


@pytest.mark.parametrize("adapters", [False, True])
def test_dpo(tiny_folder: Path, tmp_path: Path, adapters: bool) -> None:
    """With adapters the reference is the same model without them, in a whole forward beside a stage's."""
    method: dict[str, Any] = dict(method="lora") if adapters else dict(num_blocks=3)
    pairs = [{"prompt": f"Q {i}: ", "chosen": "yes " * (i % 3 + 1), "rejected": "no "} for i in range(12)]
    ends = []
    for schedule, offload in (("eager", "none"), ("block_major", "block")):
        settings = COMMON | {"max_steps": 4, "bf16": False, "gradient_checkpointing": False}
        how = dict(schedule=schedule, offload=offload, head_warmup_steps=2, lr_k1=1e-2)
        torch.manual_seed(0)
        other = tiny("llama", vocab_size=260, max_position_embeddings=256, seed=1)
        trainer = LoPTDPOTrainer(
            tiny("llama", vocab_size=260, max_position_embeddings=256),
            ref_model=None if adapters else other,
            peft_config=LoraConfig(target_modules=["q_proj"], r=4) if adapters else None,
            args=DPOConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=2,
                gradient_accumulation_steps=2, **settings,
            ),
            lopt_config=LoPTConfig(**method, **how, stages=5 if offload == "block" else None),
            train_dataset=Dataset.from_list(pairs),
            processing_class=AutoTokenizer.from_pretrained(tiny_folder),
        )  # fmt: skip
        trainer.train()
        ends.append(state(trainer))
    same(*ends)


def test_a_gradient_that_is_not_finite_stops_before_its_block_is_stepped(run, monkeypatch) -> None:
    from lopt.losses.reconstruction import ReconstructionHead

    real = ReconstructionHead.forward
    calls = []

    def spoilt(self: ReconstructionHead, *args: Any) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return real(self, *args) * (float("nan") if len(calls) > 8 else 1.0)

    monkeypatch.setattr(ReconstructionHead, "forward", spoilt)
    with pytest.raises(NonFiniteError, match="the local loss of block"):
        run("block_major", 2, gradient_accumulation_steps=2, per_device_train_batch_size=2)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [("mixtral", {}, "use `schedule` eager"), ("llama", {"fp16": True}, "use `bf16`")],
)
def test_what_cannot_work_is_refused(run, name: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("block_major", 2, name, **changes)
