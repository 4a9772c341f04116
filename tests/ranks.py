"""One process of `tests/engine/test_reduction.py`: trains tiny models and writes what came out.

    torchrun --nproc_per_node N ranks.py FOLDER {ddp,fsdp2} CASE...

A case is TRAINER-METHOD, for example `sft-lopt2`, `grpo-e2e`; the global batch does not depend on N.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from fsdp2 import FSDP, allow_fsdp_on_cpu
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, TrainerCallback

from conftest import fixed_rollouts, tiny
from lopt import LoPTConfig, LoPTGRPOTrainer, LoPTSFTTrainer
from lopt.compat import replaced
from lopt.evaluation.retention_callback import RetentionCallback
from lopt.reliability import saving
from lopt.reliability.saving import Checkpoints
from lopt.reliability.stop import Stopped, obeying
from lopt.trainers import NonFiniteError
from lopt.trainers.config import LoPTGRPOConfig, LoPTSFTConfig

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
# What `accelerate config` writes for FSDP2 if all questions are answered by Enter: what its launcher sets
LAUNCHER = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}


@contextmanager
def launcher_defaults() -> Iterator[None]:
    """Within, the process counts as launched with accelerate's default config for FSDP2."""
    before = dict(os.environ)
    os.environ.update(LAUNCHER | {"LOPT_TEST_LAUNCHER": "1"})
    yield
    os.environ.clear()
    os.environ.update(before)


def settings(folder: Path, sharded: bool, **changes: Any) -> dict[str, Any]:
    common = dict(
        output_dir=str(folder),
        max_steps=5,
        logging_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="sgd",  # Adam turns the rounding of a small gradient into a full step
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
    )
    own = sharded and RANKS > 1 and "LOPT_TEST_LAUNCHER" not in os.environ
    return common | ({"fsdp": True, "fsdp_config": FSDP} if own else {}) | changes


def sft(
    folder: Path,
    config: LoPTConfig,
    tokenizer: Any,
    sharded: bool,
    rows: int = 11,
    model: str = "llama-tied",
    **changes: Any,
) -> LoPTSFTTrainer:
    """11 rows in batches of 4: the last batch of an epoch has 3, so rank 0 gets 2 and rank 1 gets 1."""
    data = [{"prompt": f"Question {i} ", "completion": "answer " * (i % 4 + 1)} for i in range(rows)]
    sizes = dict(per_device_train_batch_size=4 // RANKS)
    made = tiny(model, vocab_size=260, max_position_embeddings=256)
    if "LOPT_TEST_LAUNCHER" in os.environ and RANK:
        for parameter in made.parameters():
            parameter.data.zero_()  # rank 0's weights count
    return LoPTSFTTrainer(
        made,
        args=LoPTSFTConfig(**settings(folder, sharded, **sizes | changes)),
        lopt_config=config,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
    )


def sft_empty(folder: Path, config: LoPTConfig, tokenizer: Any, sharded: bool) -> LoPTSFTTrainer:
    """As `sft`, with accumulation, and in the last batch nothing is left for rank 1."""
    return sft(folder, config, tokenizer, sharded, rows=10, gradient_accumulation_steps=2)


def lfm2(folder: Path, config: LoPTConfig, tokenizer: Any, sharded: bool) -> LoPTSFTTrainer:
    """As `sft`, with a model whose final norm has a name of its own."""
    return sft(folder, config, tokenizer, sharded, model="lfm2")


def grpo(folder: Path, config: LoPTConfig, tokenizer: Any, sharded: bool, **changes: Any) -> LoPTGRPOTrainer:
    rows = [{"prompt": f"Question {i}: "} for i in range(12)]

    def text(i: int, prompt: str) -> str:
        number = RANK * (4 // RANKS) + i  # in the batch of all ranks
        return f"{number % 4 * len(prompt)} is so" * (number % 3 + 1)

    return LoPTGRPOTrainer(
        tiny("llama-tied", vocab_size=260, max_position_embeddings=256),
        reward_funcs=lambda completions, **_: [float(len(c) % 7) for c in completions],
        rollout_func=fixed_rollouts(tokenizer, text),
        args=LoPTGRPOConfig(
            **settings(
                folder, sharded, **dict(
                    per_device_train_batch_size=4 // RANKS, gradient_accumulation_steps=2, num_generations=4,
                    steps_per_generation=1, loss_type="grpo", beta=0.0,
                ) | changes,
            )
        ),
        lopt_config=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip


MAKE = {"sft": sft, "sft_empty": sft_empty, "grpo": grpo, "lfm2": lfm2}


def resume(folder: Path, tokenizer: Any, sharded: bool) -> dict[str, torch.Tensor]:
    """A run that goes on from its checkpoint at step 2 ends where the whole run ended, bit for bit: returned.

    Both watch retention, whose start is that of the whole run and whose values all ranks share.
    """
    ends, curves = [], []
    for checkpoint in (None, str(folder / "resume" / "checkpoint-2")):
        changes: dict[str, Any] = dict(save_strategy="steps", save_steps=2, max_steps=4)
        changes |= dict(optim="adamw_torch_fused", lr_scheduler_type="linear")
        config = LoPTConfig(num_blocks=2, head_warmup_steps=3)
        trainer = sft(
            folder / "resume", config, tokenizer, sharded, rows=24, per_device_train_batch_size=8, **changes
        )
        trainer.add_callback(RetentionCallback(trainer, {"rain": "It rains. " * 9}, every=1))
        trainer.train(resume_from_checkpoint=checkpoint)
        ends.append(weights_of(trainer))
        changes = [row["retention/change"] for row in trainer.state.log_history if "retention/change" in row]
        curves.append(trainer.accelerator.gather(torch.tensor([changes])).tolist())
    check_bytes(trainer, folder / "resume" / "checkpoint-4")
    assert len(curves[0][0]) == 5 and curves[0] == curves[1] == [curves[0][0]] * RANKS
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    return ends[0]


def check_bytes(trainer: Any, checkpoint: Path) -> None:
    """The disk needs room for the whole of every tensor, sharded or not, twice for weights in two files."""
    weights, heads = list(trainer.model.parameters()), list(trainer.lopt.heads.parameters())
    copies = 1 + (checkpoint / "pytorch_model_fsdp.bin").is_file()
    state = [t for s in trainer.bare_optimizer().state.values() for t in s.values()]
    counted = trainer.checkpoints._bytes()
    assert counted == sum(t.numel() * t.element_size() for t in [*copies * weights, *heads, *state])
    assert counted < sum(path.stat().st_size for path in checkpoint.rglob("*"))


class SignalToTheLast(TrainerCallback):
    """SIGTERM to the last rank alone, in step 3."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and RANK == RANKS - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stop(folder: Path, tokenizer: Any, sharded: bool, end: dict[str, torch.Tensor]) -> None:
    """All ranks stop when one is told to; resumed, the end is the same, and the saved model is that one."""
    place, changes = folder / f"stop-{RANKS}-{sharded}", dict[str, Any](max_steps=4)
    changes |= dict(optim="adamw_torch_fused", lr_scheduler_type="linear")
    for first in (True, False):
        AcceleratorState._reset_state(reset_partial_state=False)
        config = LoPTConfig(num_blocks=2, head_warmup_steps=3)
        trainer = sft(place, config, tokenizer, sharded, rows=24, per_device_train_batch_size=8, **changes)
        if not first:
            trainer.train(resume_from_checkpoint=True)
            break
        trainer.add_callback(SignalToTheLast())
        try:
            with obeying():
                trainer.train()
        except Stopped as stopped:
            assert "after step 3 of 4" in str(stopped), stopped
        else:
            raise AssertionError("nobody stopped")
    check_bytes(trainer, place / "checkpoint-3")
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    saved = load_file(place / "model.safetensors")
    whole = weights_of(trainer)
    for name, value in end.items():
        assert torch.equal(value, whole[name]), name
        assert name.startswith("head.") or torch.equal(value, saved[name]), name


def guard(folder: Path, tokenizer: Any, sharded: bool) -> None:
    """A loss that is not finite on the last rank alone stops all of them, who all know whose rows it was."""
    AcceleratorState._reset_state(reset_partial_state=False)
    trainer = sft(
        folder / "guard", LoPTConfig(num_blocks=2, head_warmup_steps=3), tokenizer, sharded, rows=24
    )

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        bad = RANK == RANKS - 1 and trainer.state.global_step == 2
        return output * float("nan") if bad else output

    trainer.lopt.blocks.layers[-1].register_forward_hook(spoil)
    try:
        trainer.train()
    except NonFiniteError as error:
        where = f"(rank {RANKS - 1}: rows " if RANKS > 1 else "(rows "
        assert "step 3, batch 1 of 1: the loss is nan " + where in str(error), error
        assert "rank 0: " not in str(error) and trainer.state.global_step == 2, error
    else:
        raise AssertionError("nobody stopped")


def one_root_and_clipped(folder: Path, tokenizer: Any) -> None:
    """A training forward of FSDP2 stays one, and every block's gradient is clipped, its head's included.

    Where the local backward ends the forward, each layer behind it begins one and gathers no weights ahead.
    """
    AcceleratorState._reset_state(reset_partial_state=False)
    config = LoPTConfig(num_blocks=3, head_warmup_steps=3)
    trainer = sft(folder / "root", config, tokenizer, True, max_steps=1, max_grad_norm=1e-3)
    norms: list[float] = []

    def measure(*_: Any) -> None:
        for block in trainer.lopt.blocks:
            gradients = [p.grad for p in trainer.lopt.block_parameters(block.index) if p.grad is not None]
            whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
            norms.append(float(torch.cat([g.flatten() for g in whole]).norm()))

    step = trainer.training_step
    profiles = []

    def profiled(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.profiler.profile() as profile:
            loss = step(*args, **kwargs)
        profiles.append([event.name for event in profile.events()])
        return loss

    trainer.training_step = profiled
    trainer.create_optimizer().register_step_pre_hook(measure)
    trainer.train()
    (names,) = profiles
    assert names.count("FSDP::root_pre_forward") == 1
    assert len(norms) == 3 and all(abs(norm / 1e-3 - 1) < 0.01 for norm in norms), norms


def checkpoints(folder: Path, tokenizer: Any) -> None:
    """Offloaded state of Adam and unused rollouts are resumed bit for bit.

    Optimizer state is never read onto the device as a whole. No rank flushes before all have written, and
    none waits for that in a collective, which would end in a timeout.
    """
    loaded: list[tuple[str, Any]] = []
    load, settle, save, name_best = torch.load, saving.settle, Checkpoints.save, Checkpoints._name_best

    def spying(path: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.append((Path(path).name, kwargs.get("map_location")))
        return load(path, *args, **kwargs)

    def slow(self: Checkpoints, staged: Path, final: Path) -> None:
        name_best(self, staged, final)
        if RANK == 0:  # the others are ready
            time.sleep(0.1)
            (staged.parent / "written").touch()

    def settled(staged: Path, *args: Any) -> Any:
        assert (staged.parent / "written").exists(), "rank 0 is still writing"
        return settle(staged, *args)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective over the writing of a checkpoint")

    def without_barriers(self: Checkpoints, *args: Any) -> None:
        with replaced(torch.distributed, barrier=refuse):
            save(self, *args)

    changes = dict(save_strategy="steps", save_steps=1, max_steps=3, optim="adamw_torch", save_total_limit=9)
    rollouts = dict(num_iterations=2, steps_per_generation=2)
    for make, method, more in ((sft, "staged3", {}), (grpo, "lopt2", rollouts)):
        ends, place = [], folder / f"checkpoints-{method}"
        for checkpoint in (None, str(place / "checkpoint-1")):
            AcceleratorState._reset_state(reset_partial_state=False)
            trainer = make(place, config_of(method), tokenizer, False, **changes | more)
            with (
                replaced(torch, load=spying),
                replaced(Checkpoints, _name_best=slow, save=without_barriers),
                replaced(saving, settle=settled),
            ):
                trainer.train(resume_from_checkpoint=checkpoint)
            ends.append(weights_of(trainer))
        for name, value in ends[0].items():
            assert torch.equal(value, ends[1][name]), (method, name)
        unused = sorted(path.name for path in (place / "checkpoint-1").glob("rollouts_*"))
        assert unused == ([f"rollouts_{rank}.pt" for rank in range(RANKS)] if make is grpo else []), unused
    assert loaded.count(("optimizer.pt", "cpu")) == 2, loaded
    assert torch.device("cpu", 0) not in [where for _, where in loaded]


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Whole weights of model and heads."""
    whole = {
        n.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for n, p in trainer.model.named_parameters()
    }
    return whole | {f"head.{n}": p.detach().clone() for n, p in trainer.lopt.heads.named_parameters()}


def config_of(method: str) -> LoPTConfig:
    if method == "e2e":
        return LoPTConfig(method="e2e")
    kind, k = method[:-1], int(method[-1])
    settings: dict[str, dict[str, Any]] = {
        "staged": dict(schedule="block_major", offload="optimizer"),
        "host": dict(schedule="block_major", stages=6, offload="block", optimizer_device="cpu"),
        "next": dict(aux_loss="next_token"),
    }
    return LoPTConfig(num_blocks=k, head_warmup_steps=3, lr_k1=1e-3, **settings.get(kind, {}))


def main() -> None:
    folder, mode, *cases = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    if mode == "fsdp2":
        allow_fsdp_on_cpu()
    for case in cases:
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        if case == "resume":
            with launcher_defaults() if mode == "fsdp2" else nullcontext():
                end = resume(Path(folder), tokenizer, mode == "fsdp2")
            stop(Path(folder), tokenizer, mode == "fsdp2", end)
            if mode == "fsdp2":
                one_root_and_clipped(Path(folder), tokenizer)
            guard(Path(folder), tokenizer, mode == "fsdp2")
            if mode == "ddp" and RANKS > 1:
                checkpoints(Path(folder), tokenizer)
            (Path(folder) / f"resume.{mode}").touch()
            continue
        name, method = case.removesuffix(".launcher").split("-")
        with launcher_defaults() if case.endswith(".launcher") else nullcontext():
            trainer = MAKE[name](Path(folder) / "run", config_of(method), tokenizer, mode == "fsdp2")
            trainer.train()
        sharded = [isinstance(p, DTensor) for p in trainer.model.parameters()]
        assert all(sharded) if mode == "fsdp2" and RANKS > 1 else not any(sharded)
        whole = weights_of(trainer)
        if RANK == 0:
            stem = Path(folder) / f"{case}.{mode}.{RANKS}"
            save_file(whole, f"{stem}.safetensors")
            logs = [row for row in trainer.state.log_history if "loss" in row]
            Path(f"{stem}.json").write_text(json.dumps(logs))
        print("done", case, mode, RANKS, flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
