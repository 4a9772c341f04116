"""What turns a TRL trainer into a LoPT trainer: `class MyTrainer(LoPTMixin, trl.SomeTrainer)`.

The trainer keeps its own loop, loss and data. `LoPTMixin` holds every method of the trainer that is
overridden, a few lines each, and hands over to a part that knows the matter:

    lopt          core          boundaries, heads, local losses
    block_major   trainers      the block-major schedule
    offload       engine        weights and optimizer state in host memory
    reduction     engine        gradients of earlier blocks, averaged over ranks
    checkpoints   reliability   whole checkpoints, the choice of one to resume from
    stops         reliability   signals and time limits, obeyed where nothing is lost
    guard         reliability   numbers that are not finite, divergence, errors of the machine
    throughput    trainers      speed and peak memory

One optimizer step: `get_batch_samples` fetches its micro-batches; for each, `training_step` runs
`_prepare_inputs` (which sets the scale of the local losses), `compute_loss` (local backwards inside) and the
task backward; then the gradients are clipped block by block (`clip`) and stepped. `LoopEvents` tells
the parts of what happens between.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lopt.compat import labelled_positions_only
from lopt.core.attach import LoPT, attach
from lopt.core.boundaries import BoundaryReached
from lopt.core.config import LoPTConfig
from lopt.data.batches import padded_tokens
from lopt.engine.offload import Offload
from lopt.engine.reduction import GradientReduction
from lopt.losses.lm_head import lean_fused_head
from lopt.reliability.guards import Guard
from lopt.reliability.saving import Checkpoints
from lopt.reliability.stop import Stopped
from lopt.reliability.stopping import Stops
from lopt.reliability.watch import watching
from lopt.trainers.accelerator import adapt_accelerator
from lopt.trainers.block_major import BlockMajorSteps, loss_context
from lopt.trainers.checks import check_before, check_settings, fsdp_version
from lopt.trainers.events import LoopEvents
from lopt.trainers.heads import warm_up_batches
from lopt.trainers.optimizer import add_heads, bare_optimizer, block_optimizer
from lopt.trainers.packing import check_packing
from lopt.trainers.pipeline import Reports, take_place
from lopt.trainers.positions import check_rows
from lopt.trainers.predicted_gradients import PredictedGradients
from lopt.trainers.saves import WritesCheckpoints
from lopt.trainers.throughput import Throughput
from lopt.trainers.tokens import StepTokens

if TYPE_CHECKING:  # what the mixin is put in front of
    from transformers import Trainer
else:
    Trainer = object


class LoPTMixin(WritesCheckpoints, Trainer):
    """Goes in front of a TRL trainer class and takes one argument more, `lopt_config`.

    Attributes:
        lopt: the handle on the attached model.
        throughput: speed and peak memory.
        batches: the micro-batches of the current optimizer step.
        micro_batch: number of the current micro-batch in its optimizer step, from 1.
        share: the part of the optimizer step that it counts for (`loss_share`), by its `tokens`.
        reduction: averages gradients over ranks; None without a launcher.
        block_major: the block-major schedule; None in the eager one.
        offload: moves weights or optimizer state between host memory and the device; None if nothing moves.
        weights_offloaded: whether weights are in host memory but for the stage at work.
        head_warmup_history: the local losses of every step of the head warm-up.
        checkpoints, stops, guard: see `lopt.reliability`.
        grid: the place of this process in a pipeline; None outside of one.
        reports: what its processes measure, brought together; None outside of a pipeline.
    """

    args: Any
    model: Any
    processing_class: Any
    train_dataset: Any

    def __init__(self, model: Any, *args: Any, lopt_config: LoPTConfig | None = None, **kwargs: Any) -> None:
        config = lopt_config or LoPTConfig()
        # Before the trainer spends time on data:
        check_before((*args, *kwargs.values()), config, model, kwargs.get("peft_config"))
        self.weights_offloaded = config.offload == "block"
        self.grid = take_place(config)
        super().__init__(model, *args, **kwargs)
        check_settings(self.args, config, self.model)  # again: it may have been a name, or without adapters
        if fsdp_version(self.args) is not None and not self.is_fsdp_enabled:
            raise ValueError("FSDP needs GPUs, on CPUs accelerate would run DDP: leave FSDP out")
        check_packing(self)
        check_rows(self)
        with torch.random.fork_rng():  # heads start the same, whatever ran before
            torch.manual_seed(self.args.seed)
            self.lopt: LoPT = attach(self.model, config)
        self.lopt.heads.to(self.args.device)
        self.lopt.router_coefficient = getattr(self, "router_aux_loss_coef", None)  # TRL's, for its own loss
        self.checkpoints, self.stops, self.guard = Checkpoints(self), Stops(self), Guard(self)
        self.lopt.hooks.append(self.model.register_forward_pre_hook(self.stops.before_forward))
        self.block_major = BlockMajorSteps(self) if config.is_staged else None
        self.reduction: GradientReduction | None = None
        if dist.is_initialized() and self.lopt.heads:  # a launcher's single process is in DDP as well
            eager = self.block_major is None
            self.reduction = GradientReduction(self.lopt, self._is_last_micro_batch, in_backward=eager)
        self.offload: Offload | None = self.block_major.offload if self.block_major else None
        self.batches: list[Any] = []
        self.micro_batch = 0
        self.share = 1.0
        self.tokens = StepTokens(self)
        self._scale = 1.0  # the gradient scaler's in the current optimizer step
        self._averages: defaultdict[str, list[float]] = defaultdict(list)
        self.reports = None if self.grid is None else Reports(self.grid)
        self.throughput = Throughput(self.args.device, in_stages=self.block_major is not None)
        self.head_warmup_history: list[list[float]] = []
        predicts = bool(self.lopt.learners) and config.aux_loss == "predicted_gradient"
        self.predicted_gradients = PredictedGradients(self) if predicts else None
        self.add_callback(LoopEvents(self))

    # -- a run ---------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint of the output folder, or one of them.

        Raises:
            CheckpointError: there is no whole checkpoint to resume from, or one cannot be written.
            NonFiniteError: a number is not finite, in the model as it was loaded or in a step.
            DivergedError: a block has diverged, with `on_divergence="stop"`.
            OutOfMemory: the device or the host has no memory left.
            WorkerDied: a data-loader worker was killed or failed.
            Stopped: a stop was requested; a checkpoint is on the disk if there was anything to save.
        """
        self.batches, self.guard.phase = [], "start"
        with watching(self.grid), self.guard.machine_errors():
            checkpoint = self.checkpoints.find(resume_from_checkpoint)
            self.guard.start(checkpoint)
            self.resumed_from = checkpoint
            self.stops.start(checkpoint)
            self.synchronize_weights()  # a checkpoint is loaded into the weights in host memory
            try:
                return super().train(checkpoint, *args, **kwargs)
            except Stopped as stop:
                raise Stopped(stop.reason, self.stops.leave(checkpoint)) from None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.stops.enter_epoch(kwargs):
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        place: dict[str, Any] = dict(trial=trial, ignore_keys_for_eval=None, start_time=start_time)
        self.stops.do_what_is_left(None, epoch=int(self.state.epoch or 0), **place)  # of the last step
        self.stops.begin_following(None)
        self.synchronize_weights()  # the best checkpoint may be loaded
        return super()._finalize_training(trial, num_train_samples, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate.

        Raises:
            OutOfMemory: the device or the host has no memory left.
            WorkerDied: a data-loader worker was killed or failed.
        """
        with watching(self.grid), self.guard.machine_errors(), self.guard.during("evaluation"):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate, or predict, batch by batch; in a pipeline all processes return the last one's figures."""
        output = super().evaluation_loop(*args, **kwargs)
        return output if self.reports is None else self.reports.evaluated(output)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run one batch of an evaluation; its loss is 0 where another process has the last block."""
        if not self.stops.alone:
            self.stops.obey()
        if self.runs_task:
            return super().prediction_step(*args, **kwargs)
        with suppress(BoundaryReached):
            super().prediction_step(*args, **kwargs)
        return torch.zeros((), device=self.args.device), None, None

    @property
    def runs_task(self) -> bool:
        """Whether this process runs the model to its end, as all do outside of a pipeline."""
        return self.grid is None or self.grid.is_last

    def is_world_process_zero(self) -> bool:
        """Return whether this process reports and writes; in a pipeline it is one with the last block."""
        return super().is_world_process_zero() and self.runs_task

    def is_local_process_zero(self) -> bool:
        """Return whether this process prints; in a pipeline it is the one that reports."""
        return super().is_local_process_zero() if self.grid is None else self.grid.is_main

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with speed, peak memory and the earlier blocks' learning rate and local losses in training."""
        if self.model.training:
            if "loss" in logs and "learning_rate" in logs:
                figures = self.throughput.report()
                speed = torch.tensor(figures["tokens_per_second"], device=self.args.device)
                figures["tokens_per_second"] = self.accelerator.reduce(speed, "sum").item()
                logs.update(figures)
                if self.lopt.heads and self.args.learning_rate:
                    early = self.lopt.config.early_learning_rate(self.args.learning_rate)
                    logs["learning_rate_k1"] = logs["learning_rate"] * early / self.args.learning_rate
            logs.update({name: sum(values) / len(values) for name, values in self._averages.items()})
            self._averages.clear()
            if self.reports is not None and "seconds_per_step" in logs:
                logs = self.reports.merged(logs)
        super().log(logs, *args, **kwargs)

    def average(self, name: str, value: float) -> None:
        """Average `value` into the next training log."""
        self._averages[name].append(value)

    # -- optimizer -----------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer that `optim` names, over the handle's parameter groups."""
        if self.optimizer is None:
            self.optimizer = block_optimizer(self)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the schedule that `lr_scheduler_type` names, over all blocks."""
        if self.is_fsdp_enabled:
            add_heads(self)
        return super().create_scheduler(num_training_steps, optimizer)

    def bare_optimizer(self) -> Any:
        """Return the optimizer without accelerate's wrapper, which may skip steps."""
        return bare_optimizer(self.optimizer)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, which clips as the blocks need it and leaves offloaded weights in place."""
        super().create_accelerator_and_postprocess()
        adapt_accelerator(self)

    # -- one optimizer step --------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Return the micro-batches of one optimizer step; count their real tokens, all in one look."""
        get = super().get_batch_samples
        self.guard.phase = "data"
        batches, items = self.stops.fetch(lambda: get(*args, **kwargs))
        if self.drop_repeated_rows(batches):
            batches, items = get(iter(batches), len(batches), self.args.device)
        self.tokens.count(batches)
        self.micro_batch, self.batches = 0, batches
        if self.predicted_gradients is not None:
            self.predicted_gradients.begin_step(batches)
        if self.block_major is not None:
            self.block_major.begin_step()
        return batches, items

    def drop_repeated_rows(self, batches: list[Any]) -> bool:
        """Remove rows that only fill up the last batch of an epoch; return whether there were any.

        Several ranks need batches of one size. A trainer whose loss is a mean over tokens can leave such rows
        out (`LoPTSFTTrainer`).
        """
        return False

    def loss_share(self, tokens: int | None) -> float:
        """Return the share of the optimizer step's mean of a micro-batch of `tokens` tokens, times the ranks.

        By tokens, as in the task loss: λ does not grow with accumulation, and one batch of 4 is four of 1.
        Gradients are averaged over ranks afterwards, hence the factor.
        """
        return self.tokens.share(tokens)

    def real_tokens(self, inputs: Any) -> int | None:
        """Return the number of real tokens of the current micro-batch; None if it has no token rows."""
        return self.tokens.current()

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the forward with the local backwards inside, then the task backward of the last block."""
        self.micro_batch += 1
        with self.throughput.micro_batch(padded_tokens(inputs), self.model, self.optimizer):
            if self.block_major is not None and self.micro_batch == 1:
                self.block_major.run_to_last_stage(self.batches, num_items_in_batch)
            loss = torch.zeros((), device=self.args.device)  # where another process has the last block
            if self.runs_task:
                loss = super().training_step(model, inputs, num_items_in_batch)
                if self.reduction is not None:
                    self.reduction.wait()
                local = dict(zip(self.lopt.learning, self.lopt.local_losses(), strict=False))
                self.guard.note_losses(local, loss, inputs)
            else:
                self.skip_micro_batches(1)
            if self._is_last_micro_batch():
                self.guard.look()
                if self.block_major is not None and self.runs_task:
                    self.block_major.run_back()
        self.stops.obey_within_step()
        return loss

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = self.block_major.inputs() if self.block_major and self.model.training else None
        if prepared is not None:
            return prepared
        inputs = super()._prepare_inputs(inputs)
        if self.model.training:
            if self.accelerator.scaler is not None and self.micro_batch == 1:
                self._scale = self.accelerator.scaler.get_scale()
            tokens = self.real_tokens(inputs)
            self.share = self.loss_share(tokens)
            self.lopt.loss_scale = self.share * self._scale
            if self.predicted_gradients is not None:
                self.lopt.loss_scale = self.predicted_gradients.share(inputs) * self._scale
            self.throughput.count(tokens or 0)
        return inputs

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the trainer's loss; on a CPU the LM head scores only the positions that have a label."""
        on_cpu = self.args.device.type == "cpu"
        labelled = labelled_positions_only() if on_cpu else nullcontext()
        with loss_context(self), lean_fused_head(self.args.device), labelled:
            return super().compute_loss(model, *args, **kwargs)

    def _has_mixed_mesh_grads(self, model: nn.Module) -> bool:
        return False  # or Trainer would clip by itself, and not by blocks

    def _is_last_micro_batch(self) -> bool:
        return self.accelerator.gradient_state.sync_gradients

    # -- offloaded weights ---------------------------------------------------------------------------

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.weights_offloaded and self.grid is None:
            super()._move_model_to_device(model, device)

    def synchronize_weights(self) -> None:
        """Wait until host memory holds all that is offloaded."""
        if self.offload is not None:
            self.offload.synchronize()

    # -- rollouts, which some trainers keep over several steps ---------------------------------------

    def rollouts(self) -> list[Any]:
        """Return the micro-batches of the current generation batch; none in a trainer that generates none."""
        return getattr(self, "_buffered_inputs", None) or []

    def rollout_state(self) -> Any:
        """Return where the trainer is in its rollouts, and those; None in a trainer without any."""
        return None

    def set_rollout_state(self, state: Any) -> None:
        """Restore what `rollout_state` returned."""

    def skip_micro_batches(self, count: int) -> None:
        """Move on by `count` micro-batches in the rollouts, or back if it is negative."""
        if hasattr(self, "_step"):  # TRL's on-policy trainers find their rollouts by it
            self._step += count

    # -- heads ---------------------------------------------------------------------------------------

    def head_warm_up_batches(self) -> Iterable[Mapping[str, Any]]:
        """Return batches for the head warm-up: training rows in an order of their own, the same on all ranks.

        Rows per batch as in an optimizer step, up to 8 (a micro-batch if that is more).
        """
        rows = self.args.per_device_train_batch_size
        step = rows * self.args.world_size * self.args.gradient_accumulation_steps
        return warm_up_batches(self, max(rows, min(8, step)), self.data_collator)
