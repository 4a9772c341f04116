"""Checks that stop a run, or warn, when going on is useless, and the messages that explain it.

Numbers that are not finite, local losses that diverge and boundaries that collapse
(`lopt.reliability.divergence`), memory that is full and data-loader workers that die
(`lopt.reliability.machine_errors`): each is reported with block, batch and the newest whole checkpoint.
Guarding waits for the device once per optimizer step, for the numbers that are logged, whatever the number of
micro-batches (`lopt.reliability.step_values`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer

from lopt.data.batches import describe_rows, width
from lopt.files import read_json
from lopt.instruments.hidden_states import token_spread, token_variance
from lopt.reliability.divergence import Divergence, DivergenceMonitor, joined
from lopt.reliability.finite import NonFiniteError, check_weights, non_finite, non_finite_weights
from lopt.reliability.machine_errors import (
    HOST_ADVICE,
    OutOfMemory,
    WorkerDied,
    full_device,
    ignore_children,
    is_out_of_memory,
    memory_in_use,
    worker_error,
)
from lopt.reliability.saving import NOTE
from lopt.reliability.step_values import Key, MicroBatch, StepValues

if TYPE_CHECKING:
    from lopt.reliability.advice import Attempt

logger = logging.getLogger(__name__)

MONITOR = "watch"
"""Key of the divergence monitor's state in a checkpoint's note."""
_LOCAL, _TASK = "the local loss", "the loss"
_PHASES = {
    "start": "setting up",
    "data": "loading data",
    "optimizer": "the optimizer's step",
    "between": "what follows a step",
}


class DivergedError(ValueError):
    """A local loss or a boundary has diverged, and `on_divergence="stop"` was asked for."""


class Guard:
    """Checks the numbers of a trainer's run and explains errors of the machine.

    Args:
        trainer: a trainer with `LoPTMixin`, whose state this class reads.

    Attributes:
        phase: what the run is at: "start", "data", "step", "optimizer", "between" or a name given to
            `during`.
        monitor: follows local losses and boundaries; None where nothing can diverge, or with
            `on_divergence="ignore"`.
    """

    def __init__(self, trainer: Any) -> None:
        self.phase = "start"
        self.monitor: DivergenceMonitor | None = None
        self._trainer = trainer
        self._forget_step()

    def start(self, checkpoint: str | None) -> None:
        """Begin a run, new or from `checkpoint`.

        Raises:
            NonFiniteError: weights of a new run are not finite.
        """
        self._forget_step()
        self.monitor = self._new_monitor(checkpoint)
        if checkpoint is None:
            check_weights(self._trainer.model)

    def _forget_step(self) -> None:
        self._step = StepValues()
        self._at_boundary: dict[Key, Tensor] = {}  # in the micro-batch at work
        self._measured: set[int] = set()  # blocks that have been measured at in this step
        # By block: share and local loss of each micro-batch; numbers at its boundary by name.
        self._losses: dict[int, list[tuple[float, float]]] = {}
        self._boundaries: dict[int, dict[str, float]] = {}

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name the phase of the run inside; after an error it stays, for the message."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    # -- numbers that are not finite -----------------------------------------------------------------

    def check_norms(self, norms: Tensor) -> None:
        """Stop before an optimizer step whose gradients are not finite; a float16 scaler skips such a step.

        Args:
            norms: (k,) of the blocks' gradients.
        """
        names = [f"the gradient norm of block {number}" for number in range(1, len(norms) + 1)]
        bad = non_finite(names, norms.tolist())
        if bad and not self._trainer.args.fp16:
            raise NonFiniteError(self._step_message(bad, self._trainer.batches))

    def check_warm_up(self, step: int, losses: list[float]) -> None:
        """Stop a head warm-up whose local losses, or hidden states for the next process, are not finite."""
        names = [f"the local loss of block {block + 1}" for block in self._trainer.lopt.learning]
        names = [*names[: len(losses)], "a hidden state that this rank computes for the next one"]
        if bad := non_finite(names, [*losses, self._largest_sent()]):
            raise NonFiniteError(
                f"head warm-up, step {step}: {bad}; no weight of the model has been changed. "
                "Lower `head_warmup_lr`, or leave the warm-up out with `head_warmup_steps` 0"
            )

    def note_losses(self, local: dict[int, Tensor], loss: Tensor | None = None, inputs: Any = None) -> None:
        """Keep the losses of a micro-batch and what was measured at the boundaries, until `look`.

        Args:
            local: local losses by block, from 0.
            loss: the task loss, if the micro-batch has been through the last block.
            inputs: the micro-batch, for messages.
        """
        trainer = self._trainer
        own: dict[Key, Tensor] = {(_LOCAL, block): value for block, value in local.items()}
        if loss is not None:
            own[_TASK, len(trainer.lopt.blocks) - 1] = loss
        at_boundary, self._at_boundary = self._at_boundary, {}
        self._step.add(MicroBatch(trainer.micro_batch, trainer.share, own | at_boundary, inputs))

    def look(self) -> None:
        """Log what was kept, and stop if a loss is not finite; once before each optimizer step.

        Values are means over ranks by their shares, so that all ranks see the same and stop together.

        Raises:
            NonFiniteError: one of them is not finite.
        """
        trainer = self._trainer
        sent = self._largest_sent()
        for batch in self._step.take(trainer.accelerator):
            losses = [key for key in batch.own if key[0] in (_LOCAL, _TASK)]
            named = [f"{kind} of block {block + 1}" if kind == _LOCAL else kind for kind, block in losses]
            if bad := non_finite(named, [batch.values[key] for key in losses]):
                here = all(batch.is_finite_here(key) for key in losses)
                raise NonFiniteError(self._step_message(bad, [batch.inputs], batch.number, here))
            for (kind, block), value in batch.values.items():
                self._log_value(kind, block, value, batch.share)
        if bad := non_finite(["a hidden state that this rank computes for the next one"], [sent]):
            raise NonFiniteError(self._step_message(bad, trainer.batches))

    def _largest_sent(self) -> float:
        """Return the largest number that was sent to the next process of a pipeline since the last look.

        Raises:
            RankError: The process before has sent numbers that are not finite, with what it says of them.
        """
        trainer = self._trainer
        if trainer.grid is None:
            return 0.0
        largest = trainer.block_major.schedule.link.largest()
        received, sent = trainer.accelerator.reduce(largest, "sum").tolist()  # replicas look together
        if not math.isfinite(received):
            trainer.grid.wait_for_failure()
        return sent

    def _log_value(self, kind: str, block: int, value: float, share: float) -> None:
        if kind == _LOCAL:
            self._losses.setdefault(block, []).append((share, value))
            self._trainer.average(f"local_loss/block_{block + 1}", value)
        elif kind != _TASK:
            if kind == "unexplained":  # the variance until now
                value = self._losses[block][-1][1] / max(value, 1e-30)
            self._boundaries.setdefault(block, {})[kind] = value
            self._trainer.average(f"{kind}/block_{block + 1}", value)

    def _step_message(
        self, what: str, batches: list[Any], number: int | None = None, finite_here: bool = False
    ) -> str:
        """Return the step, the batch and its rows, what is not finite, what has been stepped, what to do.

        With several ranks the rows are those of the ranks whose numbers they are.
        """
        trainer = self._trainer
        rows = (
            None if finite_here else describe_rows(trainer.train_dataset, trainer.processing_class, batches)
        )
        if trainer.args.world_size > 1:
            found = gather_object([None if finite_here else rows or ""])
            rows = "; ".join(
                f"rank {rank}: {own}".removesuffix(": ") for rank, own in enumerate(found) if own is not None
            )
        count = trainer.current_gradient_accumulation_steps
        batch = f"batch {number or 1} of {count}" if len(batches) == 1 else f"batches 1 to {count}"
        text = f"step {trainer.state.global_step + 1}, {batch}: {what}"
        if rows:
            text += f" ({rows})"
        if bad := non_finite_weights(trainer.model):
            text += f"; the weights hold such numbers already: {bad}"
        if trainer.block_major is not None and trainer.block_major.stepped:
            names = " and ".join(str(block + 1) for block in trainer.block_major.stepped)
            text += f"; stopped in the midst of the step, block {names} had been stepped"
        else:
            text += "; stopped before the optimizer step"
        return (
            f"{text}; {trainer.checkpoints.newest()}. Look at those rows, or start again with a lower "
            "`learning_rate` or `max_grad_norm`"
        )

    # -- divergence ----------------------------------------------------------------------------------

    def _new_monitor(self, checkpoint: str | None) -> DivergenceMonitor | None:
        args = self._trainer.args
        if self._on_divergence == "ignore" or not self._trainer.lopt.heads:
            return None
        monitor = DivergenceMonitor(
            getattr(args, "divergence_factor", 3.0), getattr(args, "divergence_steps", 50)
        )
        note = Path(checkpoint or "") / NOTE
        if checkpoint is not None and note.is_file() and (state := read_json(note).get(MONITOR)):
            monitor.load(state)
        return monitor

    @property
    def _on_divergence(self) -> str:
        return getattr(self._trainer.args, "on_divergence", "warn")  # TRL's own configs have no such field

    def note(self, of_all_ranks: Callable[[Any], list[Any]]) -> dict[str, Any]:
        """Return what a checkpoint's note says of the monitor, of which each rank gives what it knows."""
        own = None if self.monitor is None else self.monitor.state()
        in_pipeline = self._trainer.grid is not None and own is not None
        return {MONITOR: joined(of_all_ranks(own)) if in_pipeline else own}

    def begin_step(self) -> None:
        """Begin an optimizer step; measure at the boundaries in it if that is due."""
        self._forget_step()
        self.phase = "step"
        due = self.monitor is not None and self.monitor.is_due(self._trainer.state.global_step)
        self._trainer.lopt.on_boundary = self._measure if due else None

    def _measure(self, block: int, hidden: Tensor, target: Tensor, mask: Tensor | None) -> None:
        """Measure at a boundary in the first micro-batch of a step."""
        if block not in self._measured:
            self._measured.add(block)
            self._at_boundary["spread", block] = token_spread(hidden, mask)
            if self._trainer.lopt.config.aux_loss == "recon":
                self._at_boundary["unexplained", block] = token_variance(target, mask)

    def end_step(self) -> None:
        """End an optimizer step: warn, or stop, if a block has diverged.

        Raises:
            DivergedError: it has, and `on_divergence` is "stop".
        """
        self.phase, self._trainer.lopt.on_boundary = "between", None
        losses, boundaries = self._losses, self._boundaries
        self._forget_step()
        if self.monitor is None or not losses:
            return
        step = self._trainer.state.global_step
        means = {
            block: sum(share * value for share, value in pairs) / (sum(share for share, _ in pairs) or 1.0)
            for block, pairs in losses.items()
        }
        if self._trainer.lopt.config.aux_loss == "predicted_gradient":
            means = {}  # the size of a gradient, which may rise and fall
        found = self.monitor.add_losses(step, means)
        if boundaries:
            kinds = ("unexplained", "spread")
            by_kind = [{b: v[kind] for b, v in boundaries.items() if kind in v} for kind in kinds]
            found += self.monitor.add_boundaries(step - 1, *by_kind)
        new = [divergence for divergence in found if self.monitor.first_time(divergence)]
        if found and self._on_divergence == "stop":
            raise DivergedError(
                f"{self._divergence_message(step, found)}; stopped, {self._trainer.checkpoints.newest()} "
                "(with the learning rates it has: to lower them, start again)"
            )
        if new:
            self._warn(step, new)

    def _warn(self, step: int, new: list[Divergence]) -> None:
        trainer = self._trainer
        if trainer.is_world_process_zero():
            logger.warning(
                "%s. `on_divergence` stop would end the run here, ignore would not check",
                self._divergence_message(step, new),
            )
        wanted = trainer.control.should_log  # logging clears it, and this step's loss may be due
        # Trainer's own: TRL's would end the averages that its next log of the loss is made of.
        Trainer.log(trainer, {f"guard/{found.kind}/block_{found.block + 1}": found.value for found in new})
        trainer.control.should_log = wanted

    def _divergence_message(self, step: int, found: list[Divergence]) -> str:
        args, config = self._trainer.args, self._trainer.lopt.config
        what = "; ".join(divergence.text for divergence in found)
        return (
            f"step {step}: {what}. Try a lower `lr_k1` (it is "
            f"{config.early_learning_rate(args.learning_rate):g}), `max_grad_norm` (it is "
            f"{args.max_grad_norm:g}) with `clip` block, or more `head_warmup_steps` (they are "
            f"{config.head_warmup_steps})"
        )

    # -- the machine ---------------------------------------------------------------------------------

    @contextmanager
    def machine_errors(self) -> Iterator[None]:
        """Explain errors of the machine inside.

        Raises:
            WorkerDied: a data-loader worker was killed or failed.
            OutOfMemory: the device or the host has no memory left.
        """
        try:
            yield
        except Exception as error:  # a worker's error keeps its type, whatever that is; all else goes on
            restore = ignore_children()
            if worker := worker_error(error):
                message = f"{self._where()}: {worker}; {self._trainer.checkpoints.newest()}"
                raise WorkerDied(message) from error
            restore()
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(self._memory_message(error)) from error

    def _memory_message(self, error: BaseException) -> str:
        trainer = self._trainer
        args = trainer.args
        device = full_device(error, args.device)
        used = memory_in_use(device, trainer.model, trainer.bare_optimizer())
        clear_frames(error.__traceback__)  # the planner needs the memory that they hold
        if self.phase == "evaluation":
            size = args.per_device_eval_batch_size
            helps = f"What helps: a smaller `per_device_eval_batch_size` (it is {size})"
        elif self.phase == "generation":
            helps = "What helps: a smaller `steps_per_generation` or `max_completion_length`"
        elif device != args.device:
            helps = HOST_ADVICE
        else:
            from lopt.reliability.advice import advice

            helps = advice(self._attempt)
        kept = f"{trainer.checkpoints.newest()}; " if trainer.stops.began else ""
        full = "host memory" if device != args.device else "memory"
        return f"out of {full} in {self._where()}: {used}; {kept}{helps}"

    def _attempt(self) -> Attempt:
        from lopt.reliability.advice import Attempt

        trainer = self._trainer
        widths = [width(batch) for batch in [*trainer.batches, *trainer.rollouts()]]
        longest = max((w for w in widths if w), default=getattr(trainer.args, "max_length", None))
        config: Any = trainer.accelerator.unwrap_model(trainer.model).config
        dtype = next(trainer.model.parameters()).dtype
        return Attempt(config, trainer.args, trainer.lopt.config, longest, dtype, trainer.args.device)

    def _where(self) -> str:
        """Return the phase of the run in words."""
        if self.phase not in ("step", "optimizer"):
            return _PHASES.get(self.phase, f"the {self.phase}")
        trainer, lopt = self._trainer, self._trainer.lopt
        step = f"step {trainer.state.global_step + 1}"
        block = (
            "" if lopt.current_block is None else f", block {lopt.current_block + 1} of {len(lopt.blocks)}"
        )
        if self.phase == "optimizer":
            return f"{step}, the optimizer's step" + (block if lopt.active_block is not None else "")
        return f"{step}, batch {trainer.micro_batch} of {trainer.current_gradient_accumulation_steps}{block}"
