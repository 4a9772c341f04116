"""One arm trained with one seed, and everything that is measured on the result."""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback

from lopt.evaluation.compare.arms import LORA_KEYS, Arm
from lopt.evaluation.compare.metrics import Metrics
from lopt.instruments.flops import FlopCounter
from lopt.models.load import save_model
from lopt.reliability.finite import NonFiniteError
from lopt.trainers import LoPTDPOTrainer, LoPTSFTTrainer
from lopt.trainers.config import LoPTDPOConfig, LoPTSFTConfig
from lopt.trainers.lora import lora_config
from lopt.trainers.throughput import COUNTED_STEPS


@dataclass
class Setup:
    """What all arm runs of a study share.

    Attributes:
        load: loads the base model; called once for every arm run.
        args: training arguments, of pairs or of rows with one answer; arms change some of them.
        train, held_out, tokenizer: the rows, formatted and not yet tokenized.
        lora: `r`, `lora_alpha` and `target_modules` of arms that train adapters.
        metrics: what is measured beside the held-out rows.
        cycle: optimizer steps over which FLOPs are averaged, enough for every arm's `local_every`.
        keep_models: folder of the trained models, one folder per arm run; None keeps none.
    """

    load: Callable[[], PreTrainedModel]
    args: LoPTSFTConfig | LoPTDPOConfig
    train: Any
    held_out: Any
    tokenizer: Any
    lora: Mapping[str, Any]
    metrics: Metrics
    cycle: int = 1
    keep_models: Path | None = None

    def trainer(self, arm: Arm, seed: int, folder: Path) -> Any:
        """Return a trainer for `arm` on a fresh model; rows and their order depend on the seed alone."""
        gc.collect()  # the model before and its handle point at each other, and each is gigabytes
        args = copy.deepcopy(self.args)
        changes = {key: value for key, value in arm.changes.items() if key not in LORA_KEYS}
        if "gradient_checkpointing" in changes and hasattr(args, "activation_checkpointing"):  # since 5.23
            changes["activation_checkpointing"] = changes["gradient_checkpointing"]
        fixed = dict(output_dir=str(folder), seed=seed, save_strategy="no", eval_strategy="no")
        vars(args).update(fixed, logging_strategy="steps", logging_steps=1, **changes)
        kind: Any = LoPTDPOTrainer if isinstance(args, LoPTDPOConfig) else LoPTSFTTrainer
        trainer = kind(
            self.load(),
            args=args,
            lopt_config=arm.config,
            train_dataset=self.train,
            eval_dataset=self.held_out,
            processing_class=self.tokenizer,
            peft_config=adapters(arm, self.lora),
        )
        trainer.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            trainer.add_callback(_Progress)
        return trainer


def adapters(arm: Arm, lora: Mapping[str, Any]) -> Any:
    """Return PEFT's config of an arm's adapters, None without.

    Args:
        lora: `r`, `lora_alpha` and `target_modules` of arms that do not say their own.
    """
    if arm.config.method != "lora":
        return None
    own = {key.removeprefix("lora_"): value for key, value in arm.changes.items() if key in LORA_KEYS}
    r, alpha = own.get("r", lora["r"]), own.get("alpha", lora["lora_alpha"])
    return lora_config(r, alpha, lora["target_modules"])


def measure_base(setup: Setup, arm: Arm, folder: Path) -> dict[str, Any]:
    """Return the base model's figures, by the same metrics as those of the trained models.

    Raises:
        NonFiniteError: one of them is not finite.
    """
    trainer = setup.trainer(arm, setup.args.seed, folder)
    rows, adaptation = _rows(trainer), _held_out(trainer)
    result = {"rows": rows, "adaptation": adaptation, "items": setup.metrics.items(_plain(trainer))}
    _check_finite(result, "the base model")
    return result


def run_arm(setup: Setup, arm: Arm, seed: int, folder: Path, name: str) -> dict[str, Any]:
    """Train `arm` with `seed` and return its figures as plain data.

    Raises:
        NonFiniteError: a number in training, or one of the figures, is not finite.
        DivergedError: a block has diverged, with `on_divergence="stop"`.
    """
    trainer = setup.trainer(arm, seed, folder)
    flops = _Flops(setup.cycle)
    trainer.add_callback(flops)
    trainer.add_callback(_PeakOfSteps(trainer))
    started = time.perf_counter()
    with flops.stack:  # an error in a step ends the counting too
        trainer.train()
    seconds = time.perf_counter() - started
    cost = _cost(trainer, flops) | {"train_seconds": seconds}
    adaptation = _held_out(trainer)
    _check_finite({"adaptation": adaptation}, "the trained model")  # before benchmarks, which take long
    model, starts = _plain(trainer), [block.start for block in trainer.lopt.blocks[1:]]
    result = {
        "arm": arm.name,
        "seed": seed,
        "config": asdict(arm.config),
        "changes": dict(arm.changes),
        "learning_rate": trainer.args.learning_rate,
        "blocks": [[block.start, block.stop] for block in trainer.lopt.blocks],
        "adaptation": adaptation,
        "items": setup.metrics.items(model),
        "drift": setup.metrics.drift(model, starts),
        "cost": cost,
        "curve": _curve(trainer),
    }
    _check_finite(result, "the trained model")
    if setup.keep_models is not None:
        save_model(model, setup.keep_models / name, setup.tokenizer)
    return result


def _check_finite(result: Mapping[str, Any], of: str) -> None:
    if bad := next(_not_finite(result), None):
        raise NonFiniteError(f"of {of}, {bad}")


def _not_finite(value: Any, name: str = "") -> Iterator[str]:
    """Yield "name is nan" for every number of a tree of plain values that is not finite."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _not_finite(part, f"{name} {key}".lstrip())
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _not_finite(part, name)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name} is {value}"


def _held_out(trainer: Any) -> dict[str, float]:
    """Return the task loss on the held-out rows, in nats per token or pair, and the share that is right.

    That is of tokens, or of pairs whose chosen answer has gained more than its rejected one.
    """
    metrics = trainer.evaluate()
    if isinstance(trainer.args, LoPTDPOConfig):
        return {"loss": metrics["eval_loss"], "pair_accuracy": metrics["eval_rewards/accuracies"]}
    return {"loss": metrics["eval_loss"], "token_accuracy": metrics["eval_mean_token_accuracy"]}


def _rows(trainer: Any) -> dict[str, int]:
    """Return the number of rows after those that do not fit have been dropped."""
    sets: dict[str, Any] = {"train": trainer.train_dataset, "held_out": trainer.eval_dataset}
    return {name: len(rows) for name, rows in sets.items()}


def _plain(trainer: Any) -> nn.Module:
    """Return the model that would be saved, adapters merged, on the device; nothing is trained afterwards."""
    if trainer.block_major is not None:
        trainer.block_major.schedule.close()  # all that is offloaded is in host memory now
    model: Any = trainer.lopt.detach().to(trainer.args.device)
    return model.merge_and_unload() if trainer.lopt.config.method == "lora" else model


def _cost(trainer: Any, flops: _Flops) -> dict[str, Any]:
    peak = trainer.throughput.peak
    heads = sum(p.numel() for p in trainer.lopt.heads.parameters())
    rows = [row for row in trainer.state.log_history if "seconds_per_step" in row]
    # Steps in which bytes or operations were counted are slower than the others.
    timed = [r for r in rows if r["step"] > COUNTED_STEPS and r["step"] not in flops.counted] or rows
    return {
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "head_parameters": heads,
        "peak_bytes": torch.cuda.max_memory_allocated() if peak is None else peak.total,
        "peak_by_part": {} if peak is None else asdict(peak),
        "seconds_per_step": median(row["seconds_per_step"] for row in timed),
        "flops_per_step": flops.mean,
    }


def _curve(trainer: Any) -> dict[str, list[float | None]]:
    """Return training loss and local losses by step; None in steps without a local loss (`local_every`)."""
    rows = [row for row in trainer.state.log_history if "seconds_per_step" in row]
    names = ["loss", *sorted({key for row in rows for key in row if key.startswith("local_loss/")})]
    return {name: [row.get(name) for row in rows] for name in names}


class _Progress(ProgressCallback):
    """Shows a bar with an ETA but no line per step: the curves are on the page."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print nothing."""


class _PeakOfSteps(TrainerCallback):
    """Leaves out of a GPU's peak what comes before the first optimizer step.

    The head warm-up runs whole models, which takes offloaded weights in if there is room.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and torch.cuda.is_available():
            self._trainer.synchronize_weights()
            torch.cuda.reset_peak_memory_stats()


class _Flops(TrainerCallback):
    """Counts the operations of `cycle` whole optimizer steps, the last ones of the run."""

    def __init__(self, cycle: int) -> None:
        self.cycle = cycle
        self.counted: list[int] = []
        self.counter = FlopCounter()
        self.stack = ExitStack()

    @property
    def mean(self) -> float:
        return self.counter.total / max(1, len(self.counted))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps - self.cycle:
            self.stack.enter_context(self.counter)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > state.max_steps - self.cycle:
            self.counted.append(state.global_step)
        self.stack.close()
