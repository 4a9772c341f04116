"""Guards: what ends a run, or warns, before it goes on to no purpose, and in which words.

Numbers that are not finite, local losses that diverge and boundaries that collapse
(`lopt.reliability.divergence`), memory that is full and data-loader workers that die
(`lopt.reliability.machine_errors`): told with block, batch and what is whole on the disk. Watching costs no
synchronization: the numbers are those that are logged.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer as PlainTrainer

from lopt.core.attach import LoPT
from lopt.data.batches import told_rows, width
from lopt.instruments.hidden_states import token_spread, token_variance
from lopt.reliability.divergence import LocalWatch, Trouble
from lopt.reliability.machine_errors import (
    HOST_BY_HAND,
    Attempt,
    OutOfMemory,
    WorkerDied,
    advice,
    forget_children,
    in_use,
    is_out_of_memory,
    where,
    worker_trouble,
)
from lopt.reliability.saving import NOTE
from lopt.reliability.stop import requested

if TYPE_CHECKING:  # what the mixin is put in front of
    from lopt.reliability.stopping import Stoppable
else:
    Stoppable = object

logger = logging.getLogger(__name__)

WATCH = "watch"
_PHASES = {
    "start": "setting up",
    "data": "loading data",
    "optimizer": "the optimizer's step",
    "between": "what follows a step",
}


class NonFiniteError(ValueError):
    """A loss, gradient or weight is not a finite number; raised before the optimizer step."""


class DivergedError(ValueError):
    """A local loss or a boundary is past saving, and `--on_divergence stop` was asked for."""


class Guarded(Stoppable):
    """Part of `LoPTMixin`: looks at every number that is logged, and puts errors into sentences.

    Attributes:
        watch: follows local losses and boundaries; None with `--on_divergence ignore`.
        doing: the phase of the run, for messages.
    """

    model: Any
    lopt: LoPT
    block_major: Any
    share: float
    micro_batch: int
    _metrics: Any
    _batches: list[Any]
    watch: LocalWatch | None = None
    doing: str = "start"
    _sums: dict[int, list[tuple[float, float]]]  # shares and local losses of a step's micro-batches, by block
    _seen: dict[tuple[int, str], Tensor]  # at the boundaries, on the device
    _shares: dict[int, dict[str, float]]  # the same, by block and name

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train.

        Raises:
            NonFiniteError: a number is not finite, in the model as it was loaded or in a step.
            DivergedError: with `--on_divergence stop`.
            OutOfMemory, WorkerDied: the machine gave up.
        """
        self.doing, self._batches = "start", []
        self._sums, self._seen, self._shares = {}, {}, {}
        with self.told():
            checkpoint = self.whole_checkpoint(resume_from_checkpoint)
            self.watch = self._new_watch(checkpoint)
            if checkpoint is None:
                check_weights(self.model)
            return super().train(checkpoint, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; raises `OutOfMemory` and `WorkerDied` as `train` does."""
        with self.told(), self.phase("evaluation"):
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """In here the run is at `name`; after an error it stays there, to be told."""
        before, self.doing = self.doing, name
        yield
        self.doing = before

    # -- numbers that are not finite -------------------------------------------------------------

    def check_norms(self, norms: Tensor) -> None:
        """Stop before the step at a gradient that is not finite; a float16 scaler skips such a step."""
        values = norms.tolist()
        if all(map(math.isfinite, values)) or self.args.fp16:
            return
        bad = [
            f"the gradient norm of block {b} is {v}"
            for b, v in enumerate(values, start=1)
            if not math.isfinite(v)
        ]
        raise NonFiniteError(self._where("; ".join(bad), self._batches))

    def check_warm_up(self, step: int, losses: list[float]) -> None:
        """Stop a head warm-up whose local losses are not finite."""
        bad = [
            f"the local loss of block {block + 1} is {loss}"
            for block, loss in zip(self.lopt.learning, losses, strict=True)
            if not math.isfinite(loss)
        ]
        if bad:
            raise NonFiniteError(
                f"head warm-up, step {step}: {'; '.join(bad)}; no weight of the model has been changed. "
                "Lower --head_warmup_lr, or leave the warm-up out with --head_warmup_steps 0"
            )

    def log_losses(self, local: dict[int, Tensor], loss: Tensor | None = None, inputs: Any = None) -> None:
        """Note the local losses of a micro-batch by block (from 0); they and `loss` must be finite.

        They are means over ranks by their shares, so that all of them see the same and stop together; whether
        any rank was told to stop travels with them, and so does what was seen at the boundaries.
        """
        named = {f"the local loss of block {block + 1}": value for block, value in local.items()}
        if loss is not None:
            named["the loss"] = loss
        seen, self._seen = self._seen, {}
        own = torch.stack([value.float() for value in [*named.values(), *seen.values()]])
        told = requested() is not None
        if self.args.world_size > 1:
            parts = torch.cat([own * self.share, own.new_tensor([self.share, float(told)])])
            *sums, share, count = self.accelerator.reduce(parts, "sum").tolist()
            values, told = [value / share for value in sums], count > 0
        else:
            values, share = own.tolist(), self.share
        self.note_stop(told)
        bad = [f"{n} is {v}" for n, v in zip(named, values, strict=False) if not math.isfinite(v)]
        if bad:
            finite_here = bool(own[: len(named)].isfinite().all())
            raise NonFiniteError(self._where("; ".join(bad), [inputs], finite_here))
        for block, value in zip(local, values, strict=False):
            self._metrics["train"][f"local_loss/block_{block + 1}"].append(value)
            self._sums.setdefault(block, []).append((share, value))
        for (block, name), value in zip(seen, values[len(named) :], strict=True):
            self._note_figure(block, name, value)

    def _where(self, what: str, batches: list[Any], finite_here: bool = False) -> str:
        """The step, the batch with its rows, what is not finite, what has been stepped, what to do.

        With several ranks the rows are those of the ranks whose numbers they are.
        """
        rows = None if finite_here else told_rows(self.train_dataset, self.processing_class, batches)
        if self.args.world_size > 1:
            found = gather_object([None if finite_here else rows or ""])
            told = [f"rank {rank}: {r}".removesuffix(": ") for rank, r in enumerate(found) if r is not None]
            rows = "; ".join(told)
        count = self.current_gradient_accumulation_steps
        batch = f"batch {self.micro_batch} of {count}" if len(batches) == 1 else f"batches 1 to {count}"
        text = f"step {self.state.global_step + 1}, {batch}: {what}"
        if rows:
            text += f" ({rows})"
        spoiled = spoiled_weights(self.model)
        if spoiled:
            text += f"; the weights hold such numbers already: {spoiled}"
        stepped = [] if self.block_major is None else self.block_major.stepped
        if stepped:
            names = " and ".join(str(block + 1) for block in stepped)
            text += f"; stopped in the midst of the step, block {names} had been stepped"
        else:
            text += "; stopped before the optimizer step"
        return (
            f"{text}; {self.on_disk()}. Look at those rows, or start again with a lower --learning_rate or "
            "--max_grad_norm"
        )

    # -- local losses and boundaries -------------------------------------------------------------

    def _new_watch(self, checkpoint: str | None) -> LocalWatch | None:
        if self._on_divergence == "ignore" or not self.lopt.heads:
            return None
        watch = LocalWatch(
            getattr(self.args, "divergence_factor", 3.0), getattr(self.args, "divergence_steps", 50)
        )
        note = Path(checkpoint or "") / NOTE
        if checkpoint is not None and note.is_file():
            state = json.loads(note.read_text(encoding="utf-8")).get(WATCH)
            if state is not None:
                watch.load(state)
        return watch

    @property
    def _on_divergence(self) -> str:
        return getattr(self.args, "on_divergence", "warn")  # TRL's own configs have no such flag

    def _note(self) -> dict[str, Any]:
        return super()._note() | {WATCH: None if self.watch is None else self.watch.state()}

    def begin_guarded_step(self) -> None:
        """An optimizer step begins: forget the last one; look at the boundaries if it is time to."""
        self.doing, self._sums, self._seen, self._shares = "step", {}, {}, {}
        due = self.watch is not None and self.watch.is_due(self.state.global_step)
        self.lopt.on_boundary = self._see if due else None

    def _see(self, block: int, hidden: Tensor, target: Tensor, mask: Tensor | None) -> None:
        """In the first micro-batch of a step; on the device, `log_losses` brings the numbers over."""
        if block not in self._shares:
            self._shares[block] = {}
            self._seen[block, "spread"] = token_spread(hidden, mask)
            if self.lopt.config.aux_loss == "recon":
                self._seen[block, "unexplained"] = token_variance(target, mask)

    def _note_figure(self, block: int, name: str, value: float) -> None:
        """What was seen at a boundary, once its local loss is known."""
        if name == "unexplained":
            value = self._sums[block][-1][1] / max(value, 1e-30)
        self._shares[block][name] = value
        self._metrics["train"][f"{name}/block_{block + 1}"].append(value)

    def end_guarded_step(self) -> None:
        """An optimizer step has been done: warn, or stop, if something is wrong with a block.

        Raises:
            DivergedError: it is, and `--on_divergence stop` was asked for.
        """
        self.doing, self.lopt.on_boundary = "between", None
        sums, self._sums = self._sums, {}
        shares, self._shares = self._shares, {}
        if self.watch is None or not sums:
            return
        step = self.state.global_step
        losses = {
            block: sum(share * value for share, value in pairs) / (sum(share for share, _ in pairs) or 1.0)
            for block, pairs in sums.items()
        }
        found = self.watch.see(step, losses)
        if shares:
            kinds = ("unexplained", "spread")
            by_kind = [{b: s[kind] for b, s in shares.items() if kind in s} for kind in kinds]
            found += self.watch.look(step - 1, *by_kind)
        new = [trouble for trouble in found if self.watch.first_time(trouble)]
        if found and self._on_divergence == "stop":
            raise DivergedError(
                f"{self._advice(step, found)}; stopped, {self.on_disk()} (with the learning rates it has: to "
                "lower them, start again)"
            )
        if new:
            self._warn(step, new)

    def _warn(self, step: int, new: list[Trouble]) -> None:
        if self.is_world_process_zero():
            logger.warning(
                "%s. --on_divergence stop would end the run here, ignore would not look",
                self._advice(step, new),
            )
        wanted = self.control.should_log  # logging clears it, and this step's loss may be due
        # Trainer's own: TRL's would end the averages that its next log of the loss is made of.
        PlainTrainer.log(
            self, {f"guard/{trouble.kind}/block_{trouble.block + 1}": trouble.value for trouble in new}
        )
        self.control.should_log = wanted

    def _advice(self, step: int, found: list[Trouble]) -> str:
        rate = self.lopt.config.early_learning_rate(self.args.learning_rate)
        what = "; ".join(trouble.text for trouble in found)
        return (
            f"step {step}: {what}. Try a lower --lr_k1 (it is {rate:g}), --max_grad_norm (it is "
            f"{self.args.max_grad_norm:g}) with --clip block, or more --head_warmup_steps (they are "
            f"{self.lopt.config.head_warmup_steps})"
        )

    # -- the machine -----------------------------------------------------------------------------

    @contextmanager
    def told(self) -> Iterator[None]:
        """Memory that is full and workers that died are sentences in here."""
        try:
            yield
        except Exception as error:  # a worker's error keeps its type, whatever that is; all else goes on
            worker = worker_trouble(error)
            if worker is not None:
                forget_children()
                raise WorkerDied(f"{self._phase()}: {worker}; {self.on_disk()}") from error
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(self._memory_sentence(error)) from error

    def _memory_sentence(self, error: BaseException) -> str:
        device = where(error, self.args.device)
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        used = in_use(device, self.model, optimizer)
        clear_frames(error.__traceback__)  # what they hold is needed no more
        if self.doing == "evaluation":
            size = self.args.per_device_eval_batch_size
            helps = f"What helps: a smaller --per_device_eval_batch_size (it is {size})"
        elif self.doing == "generation":
            helps = "What helps: a smaller --steps_per_generation or --max_completion_length"
        elif device != self.args.device:
            helps = HOST_BY_HAND
        else:
            helps = advice(self._attempt)
        kept = f"{self.on_disk()}; " if self._began else ""
        full = "host memory" if device != self.args.device else "memory"
        return f"out of {full} in {self._phase()}: {used}; {kept}{helps}"

    def _attempt(self) -> Attempt:
        rollouts = getattr(self, "_buffered_inputs", None) or []  # GRPO's micro-batches
        widths = [width(batch) for batch in [*self._batches, *rollouts]]
        longest = max((w for w in widths if w), default=getattr(self.args, "max_length", None))
        weight = next(self.model.parameters())
        config: Any = self.accelerator.unwrap_model(self.model).config
        return Attempt(config, self.args, self.lopt.config, longest, weight.dtype, self.args.device)

    def _phase(self) -> str:
        if self.doing not in ("step", "optimizer"):
            return _PHASES.get(self.doing, f"the {self.doing}")
        step = f"step {self.state.global_step + 1}"
        at = (
            ""
            if self.lopt.current_block is None
            else f", block {self.lopt.current_block + 1} of {len(self.lopt.blocks)}"
        )
        if self.doing == "optimizer":
            return f"{step}, the optimizer's step" + (at if self.lopt.active_block is not None else "")
        return f"{step}, batch {self.micro_batch} of {self.current_gradient_accumulation_steps}{at}"


def check_weights(model: nn.Module) -> None:
    """One pass over the weights of a model that was just loaded.

    Raises:
        NonFiniteError: some are not finite.
    """
    spoiled = spoiled_weights(model)
    if spoiled:
        raise NonFiniteError(
            f"the model holds numbers that are not finite before any training: {spoiled}. Its files are "
            "damaged, or the run that wrote them had diverged: take another copy of it"
        )


@torch.no_grad()
def spoiled_weights(model: nn.Module) -> str:
    """Which weights are not finite, in words; "" if all are. Takes one pass and no memory."""
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    found: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        local = getattr(weight, "to_local", lambda weight=weight: weight)()  # FSDP2: this rank's part
        if local.dtype in kinds and local.numel() and not local.is_meta:
            low, high = torch.aminmax(local)  # NaN goes through both
            found[name] = low.isfinite() & high.isfinite()
    names = [name for name, finite in found.items() if not finite]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
