"""Retention in a run: what the model still can elsewhere, measured while it trains; a budget of forgetting.

    trainer.add_callback(RetentionCallback(trainer, {"wiki": text}, max_forgetting=0.1))

Forgetting is the mean over the texts of the loss now minus the loss at the start, in nats per token.
Benchmarks are measured and logged too but do not count as forgetting: the accuracy on a few hundred items
varies by points between two measurements, and would stop runs by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from lopt.engine import grid
from lopt.evaluation.loss import text_loss
from lopt.trainers.checks import fsdp_version

PREFIX = "retention/"
CHANGE = PREFIX + "change"
TASKS_CHANGE = PREFIX + "tasks_change"
MEASUREMENTS = 10  # in a run without evaluation steps


class RetentionCallback(TrainerCallback):
    """Logs `retention/<text>_loss`, `retention/<task>_<metric>` and their change since the start of the run.

    Measured at the start, every `every` steps and at the end, without gradients, on all ranks (rank 0's
    numbers count). Weights, random state and the trainer's own averages do not change. A resumed run
    reads the start from the log of its checkpoint.

    Args:
        trainer: a trainer of transformers, with or without boundaries.
        texts: plain text by name; `tokens` of each are read.
        tasks: benchmarks (`lopt.evaluation.harness`): the first `limit` items of each, rows from `data_dir`.
        every: steps. Default: the trainer's evaluation steps if it has any, else a tenth of the run.
        max_forgetting: stop the run, with a checkpoint if it saves any, as soon as forgetting is more.

    Attributes:
        stopped: the message on when and why `max_forgetting` ended the run; None if it did not.

    Raises:
        ValueError: nothing to measure, `max_forgetting` without texts, tasks and weights that are
            offloaded or sharded.
    """

    def __init__(
        self,
        trainer: Any,
        texts: Mapping[str, str] | None = None,
        *,
        tokens: int = 2048,
        tasks: Sequence[str] = (),
        data_dir: str | Path | None = None,
        limit: int | None = None,
        every: int | None = None,
        max_forgetting: float | None = None,
    ) -> None:
        if not texts and not tasks:
            raise ValueError("retention needs something to measure: give `texts` or `tasks`")
        if max_forgetting is not None and not texts:
            raise ValueError("`max_forgetting` is in nats per token of text: add `texts`")
        if tasks:
            check_whole_model(getattr(trainer, "weights_offloaded", False), trainer.args)
        self.trainer = trainer
        self.texts, self.tokens = dict(texts or {}), tokens
        self.tasks, self.data_dir, self.limit = list(tasks), data_dir, limit
        self.every, self.max_forgetting = every, max_forgetting
        self.stopped: str | None = None
        self._start: dict[str, float] = {}
        self._signs: dict[str, int] = {}
        self._loaded: Any = None
        self._last_step = -1
        self._steps = 1

    # -- when ------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start, or read it from the log of a resumed run."""
        self.stopped, self._last_step = None, -1
        by_eval = state.eval_steps if args.eval_strategy == "steps" else None
        self._steps = self.every or by_eval or max(1, math.ceil(state.max_steps / MEASUREMENTS))
        self._start = start_of(state.log_history)
        if self._start:
            last = [row for row in state.log_history if any(key.startswith(PREFIX) for key in row)][-1]
            self._refuse_used_up(last)
            self._last_step = last["step"]
            return
        if state.global_step:
            self._print(
                f"Retention is measured from step {state.global_step} on: the checkpoint has no start"
            )
        self._measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every so many steps and after the last; stop when the budget is used up."""
        if state.global_step % self._steps and state.global_step < state.max_steps:
            return
        change = self._measure(state)
        if self.max_forgetting is None or change is None or change <= self.max_forgetting:
            return
        if state.global_step >= state.max_steps:
            return  # the run is over anyway
        self.stopped = (
            f"Stopped at step {state.global_step} of {state.max_steps}: the loss on retention text has risen "
            f"by {change:.4g} nats per token since the start, more than max_forgetting = "
            f"{self.max_forgetting:g}."
        )
        self._print(self.stopped)
        control.should_training_stop = True
        control.should_log = True
        control.should_save = args.save_strategy in ("steps", "epoch")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the end of a run that was stopped for another reason."""
        if self._last_step != state.global_step:
            self._measure(state)

    def _refuse_used_up(self, last: Mapping[str, Any]) -> None:
        change = last.get(CHANGE)
        if change is not None and self.max_forgetting is not None and change > self.max_forgetting:
            raise ValueError(
                f"forgetting was {change:.4g} nats per token at step {last['step']}, above `max_forgetting` "
                f"{self.max_forgetting:g}: raise it to continue, or use the model as it was saved"
            )

    # -- what ------------------------------------------------------------------------------------

    def _measure(self, state: Any) -> float | None:
        """Log everything once; return forgetting in nats per token, None without texts."""
        found = [self._losses() | self._scores()]
        place = grid.current()
        if place is not None:
            found = [place.from_main(found[0])]
        elif self.trainer.args.world_size > 1:
            broadcast_object_list(found)  # otherwise a run might stop on one rank alone
        values = found[0]
        for key, value in values.items():
            self._start.setdefault(key, value)
        logs = {PREFIX + key: value for key, value in values.items()}
        rise = {key: value - self._start[key] for key, value in values.items()}
        losses = [rise[key] for key in rise if key not in self._signs]
        scores = [self._signs[key] * rise[key] for key in rise if key in self._signs]
        change = sum(losses) / len(losses) if losses else None
        if change is not None:
            logs[CHANGE] = change
        if scores:
            logs[TASKS_CHANGE] = sum(scores) / len(scores)
        self._last_step = state.global_step
        control = self.trainer.control
        wanted = control.should_log  # logging clears it, and this step's loss may still have to be logged
        # The base class's method: TRL's would reset the averages for its own next log.
        Trainer.log(self.trainer, logs)
        control.should_log = wanted
        return change

    def _losses(self) -> dict[str, float]:
        trainer = self.trainer
        size = trainer.args.per_device_eval_batch_size
        with trainer.compute_loss_context_manager(), torch.no_grad():
            return {
                f"{name}_loss": text_loss(
                    trainer.model, trainer.processing_class, text, tokens=self.tokens, batch_size=size
                )
                for name, text in self.texts.items()
            }

    def _scores(self) -> dict[str, float]:
        if not self.tasks:
            return {}
        from lopt.evaluation.harness import load_tasks, run_tasks

        self._loaded = self._loaded or load_tasks(self.tasks, self.data_dir)
        trainer, options = self.trainer, {"limit": self.limit, "progress": False}
        with trainer.compute_loss_context_manager():
            found = run_tasks(trainer.model, trainer.processing_class, self._loaded, **options)
        scores = {}
        for name, outcome in found.outcomes().items():
            key = f"{name}_{outcome.metric.split(',')[0]}"
            scores[key] = sum(outcome.values) / len(outcome.values)
            self._signs[key] = 1 if outcome.higher_is_better else -1
        return scores

    def _print(self, message: str) -> None:
        if self.trainer.is_world_process_zero():
            tqdm.write(message)


def check_whole_model(offloaded: bool, args: TrainingArguments) -> None:
    """Refuse benchmarks where no device holds the whole model.

    Raises:
        ValueError: the weights are offloaded or sharded.
    """
    name = "`offload` block" if offloaded else "FSDP" if fsdp_version(args) is not None else None
    name = "`schedule` pipeline" if grid.current() is not None else name
    if name is not None:
        raise ValueError(f"`tasks` need the whole model on a device, which {name} rules out: use `texts`")


def start_of(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the first value of every measure in a trainer's log, by its name without the prefix."""
    start: dict[str, float] = {}
    for row in history:
        for key, value in row.items():
            if key.startswith(PREFIX) and key not in (CHANGE, TASKS_CHANGE):
                start.setdefault(key.removeprefix(PREFIX), value)
    return start
