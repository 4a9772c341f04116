"""What turns a TRL trainer into a LoPT trainer: `class MyTrainer(LoPTMixin, trl.SomeTrainer)`.

The trainer keeps its own loop, loss and data. Added are: the boundaries, the head warm-up, one
learning rate per kind of block, clipping that knows the blocks, gradients of earlier blocks averaged
over ranks, heads in checkpoints, a stop at the first non-finite number, and what a LoPT run should
log.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers import TrainerCallback

from lopt.compat import labelled_positions_only
from lopt.core.attach import LoPT, attach
from lopt.core.blocks import Blocks
from lopt.core.config import LoPTConfig
from lopt.data.batches import real_tokens, size
from lopt.engine.offload import Offload
from lopt.engine.optimizer import clip_block, clip_gradients
from lopt.engine.reduction import GradientReduction, heads_apart, load_heads_optimizer, save_heads_optimizer
from lopt.reliability.guards import Guarded
from lopt.reliability.saving import WholeCheckpoints
from lopt.reliability.stopping import Stoppable
from lopt.trainers.block_major import BlockMajorSteps
from lopt.trainers.checks import check_settings, fsdp_version
from lopt.trainers.offload import TravellingWeights
from lopt.trainers.optimizer import block_optimizer, optimizer_factory
from lopt.trainers.throughput import Throughput

if TYPE_CHECKING:  # what the mixin is put in front of
    from transformers import Trainer
else:
    Trainer = object

HEADS_NAME = "reconstruction_heads.safetensors"


class LoPTMixin(Guarded, Stoppable, WholeCheckpoints, TravellingWeights, Trainer):
    """Goes in front of a TRL trainer class and takes one argument more, `lopt_config`.

    Attributes:
        lopt: the handle on the attached model.
        throughput: speed and peak memory.
        micro_batch: number of the current micro-batch in its optimizer step, from 1.
        share: the part of the optimizer step that it counts for (`loss_share`).
        reduction: averages gradients over ranks; None without a launcher.
        block_major: the block-major schedule; None in the eager one.
        head_warmup_history: the local losses of every step of the head warm-up.
    """

    model: Any
    processing_class: Any
    train_dataset: Any
    _metrics: Any  # TRL's: what is averaged into the next log

    def __init__(self, model: Any, *args: Any, lopt_config: LoPTConfig | None = None, **kwargs: Any) -> None:
        config = lopt_config or LoPTConfig()
        # Before the trainer spends time on data:
        settings = args[0] if args else kwargs.get("args")
        if settings is not None:
            check_settings(settings, config, model)
        if isinstance(model, nn.Module):
            Blocks(model, config)
        self.weights_travel = config.offload == "block"
        self.proven = set()
        super().__init__(model, *args, **kwargs)
        if fsdp_version(self.args) is not None and not self.is_fsdp_enabled:
            raise ValueError("FSDP needs GPUs, on CPUs accelerate would run DDP: leave FSDP out")
        with torch.random.fork_rng():  # heads start the same, whatever ran before
            torch.manual_seed(self.args.seed)
            self.lopt: LoPT = attach(self.model, config)
        self.lopt.heads.to(self.args.device)
        self.lopt.hooks.append(self.model.register_forward_pre_hook(self.before_forward))
        self.reduction: GradientReduction | None = None
        if dist.is_initialized() and self.lopt.heads:  # a launcher's single process is in DDP as well
            self.reduction = GradientReduction(self.lopt, is_last=self._is_last_micro_batch)
        staged = config.schedule == "block_major" and self.lopt.heads
        if staged and config.offload != "none":
            ahead = int(config.prefetch_gib * 2**30)
            self.offload = Offload(self.lopt, self.args.device, ahead, weights=self.weights_travel)
        self.block_major = BlockMajorSteps(self) if staged else None
        self._step_tokens = 0
        self.micro_batch = 0
        self.share = 1.0
        self.throughput = Throughput(self.args.device)
        self.head_warmup_history: list[list[float]] = []
        self.add_callback(_LoopHooks(self))

    # -- optimizer -------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer `--optim` names, over the handle's parameter groups."""
        if self.optimizer is None and self.lopt.config.method != "lora":
            make = optimizer_factory(self)
            if self.is_fsdp_enabled:
                # FSDP2 replaces the parameters it knows, so the heads join when it is done.
                self.optimizer = make([g for g in self._parameter_groups() if not g["heads"]])
            else:
                self.optimizer = block_optimizer(self, self._parameter_groups(), make)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule `--lr_scheduler_type` names, over all blocks."""
        if self.is_fsdp_enabled and not any(g.get("heads") for g in self.bare_optimizer().param_groups):
            for group in self._parameter_groups():
                if group["heads"]:
                    self.bare_optimizer().add_param_group(group)
        return super().create_scheduler(num_training_steps, optimizer)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return self.lopt.parameter_groups(self.args.learning_rate, weight_decay=self.args.weight_decay)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self._clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor | float:
        return super()._get_grad_norm(model, self._clip(math.inf) if grad_norm is None else grad_norm)

    def _clip(self, max_norm: float) -> Tensor:
        self.accelerator.unscale_gradients()
        if self.block_major is not None and self.block_major.norms:  # stepped already, but for the last
            last = clip_block(self.lopt, len(self.lopt.blocks) - 1, max_norm)
            norms = torch.stack([*self.block_major.norms, last])
        else:
            norms = clip_gradients(self.lopt, max_norm)
        self.check_norms(norms)
        total = torch.linalg.vector_norm(norms)
        if len(norms) > 1:
            share = (norms / total.clamp(min=1e-30)).square().tolist()
            for block, value in enumerate(share, start=1):
                self._metrics["train"][f"grad_share/block_{block}"].append(value)
        return total

    # -- one micro-batch -------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """All micro-batches of one optimizer step; counts their real tokens on all ranks."""
        get = super().get_batch_samples
        self.doing = "data"
        batches, items = self.fetch(lambda: get(*args, **kwargs))
        if self.drop_repeated_rows(batches):
            items = self._get_num_items_in_batch(batches, self.args.device)
        tokens = [real_tokens(batch) for batch in batches]
        if None not in tokens:
            self._step_tokens = int(self._sum(sum(t for t in tokens if t is not None)))
        self.micro_batch = 0
        self._batches = batches
        if self.block_major is not None:
            self.block_major.begin_step()
        return batches, items

    def drop_repeated_rows(self, batches: list[Any]) -> bool:
        """Take out rows that only fill up the last batch of an epoch; says whether it did.

        Several ranks need batches of one size, so the data loader repeats rows at the end of an
        epoch. A trainer whose loss is a mean over tokens can leave them out (`LoPTSFTTrainer`).
        """
        return False

    def loss_share(self, tokens: int | None) -> float:
        """The part of the optimizer step's mean that a micro-batch of so many tokens is, times the ranks.

        It counts by tokens, as in the task loss: λ does not grow with accumulation, and one batch of
        4 is four of 1. Gradients are averaged over ranks afterwards, hence the factor.
        """
        if tokens is None or not self._step_tokens:
            return 1 / self.current_gradient_accumulation_steps
        return tokens / self._step_tokens * self.args.world_size

    def real_tokens(self, inputs: Any) -> int | None:
        """Real tokens of a prepared micro-batch; None if it is not made of token rows."""
        return real_tokens(inputs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        if self.block_major is not None and self.model.training:
            prepared = self.block_major.inputs()
            if prepared is not None:
                return prepared
        inputs = super()._prepare_inputs(inputs)
        if self.model.training:
            scaler = self.accelerator.scaler
            tokens = self.real_tokens(inputs)
            self.share = self.loss_share(tokens)
            self.lopt.loss_scale = self.share * (scaler.get_scale() if scaler is not None else 1.0)
            self.throughput.count(tokens or 0)
        return inputs

    def _is_last_micro_batch(self) -> bool:
        if self.block_major is not None and self.lopt.active_block is not None:
            return self.block_major.is_last_micro_batch()
        return self.accelerator.gradient_state.sync_gradients

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's loss; on a CPU the LM head scores only the positions that have a label."""
        stage = nullcontext() if self.block_major is None else self.block_major.stage()
        with stage, labelled_positions_only() if self.args.device.type == "cpu" else nullcontext():
            return super().compute_loss(model, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward with the local backwards inside, then the task backward of the last block."""
        self.micro_batch += 1
        with self.throughput.micro_batch(size(inputs), self.model, self.optimizer):
            if self.block_major is not None and self.micro_batch == 1:
                self.block_major.run_early_blocks(self._batches, num_items_in_batch)
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.reduction is not None:
            self.reduction.wait()
        self.log_losses(dict(zip(self.lopt.learning, self.lopt.local_losses(), strict=False)), loss, inputs)
        self.obey_noted()
        return loss

    def _sum(self, value: float) -> float:
        """Sum over ranks."""
        if self.args.world_size == 1:
            return value
        return self.accelerator.reduce(torch.tensor(value, device=self.args.device), "sum").item()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds tokens per second, peak memory and the earlier blocks' rate to a training log."""
        if "loss" in logs and "learning_rate" in logs and self.model.training:
            figures = self.throughput.report()
            figures["tokens_per_second"] = self._sum(figures["tokens_per_second"])
            logs.update(figures)
            if self.lopt.heads and self.args.learning_rate:
                early = self.lopt.config.early_learning_rate(self.args.learning_rate)
                logs["learning_rate_k1"] = logs["learning_rate"] * early / self.args.learning_rate
        super().log(logs, *args, **kwargs)

    # -- heads -----------------------------------------------------------------------------------

    def head_warm_up_batches(self) -> Iterable[Mapping[str, Any]]:
        """Batches for the head warm-up: training rows in an order of their own, the same on all ranks.

        Rows per batch as in an optimizer step, up to 8 (a micro-batch if that is more).
        """
        rows = self.args.per_device_train_batch_size
        step = rows * self.args.world_size * self.args.gradient_accumulation_steps
        return self.warm_up_loader(max(rows, min(8, step)), self.data_collator)

    def warm_up_loader(self, batch_size: int, collate: Callable[[list[Any]], Any]) -> DataLoader:
        """Training rows in an order of their own, the same on all ranks."""
        return DataLoader(
            self.train_dataset,
            batch_size=batch_size,
            shuffle=not isinstance(self.train_dataset, IterableDataset),
            generator=torch.Generator().manual_seed(self.args.seed),
            collate_fn=collate,
        )

    def warm_up_heads(self) -> None:
        """Let the heads learn, with a progress bar; what they reached is in `head_warmup_history`."""
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        with tqdm(
            total=self.lopt.config.head_warmup_steps, desc="Head warm-up", unit="step", disable=hidden
        ) as bar:

            def show(step: int, losses: list[float]) -> None:
                bar.update()
                bar.set_postfix(local_loss=" ".join(f"{x:.3g}" for x in losses))
                self.check_warm_up(step, losses)

            with torch.random.fork_rng(), self.compute_loss_context_manager(), self.phase("head warm-up"):
                history = self.lopt.warm_up_heads(self.head_warm_up_batches(), progress=show)
        if self.reduction is not None:
            self.reduction.broadcast_heads()
        self.head_warmup_history = history
        if self.watch is not None:
            self.watch.start(self.lopt.learning, history)
        ends = [
            f"block {b + 1}: {a:.3g} → {z:.3g}"
            for b, a, z in zip(self.lopt.learning, history[0], history[-1], strict=True)
        ]
        if self.is_world_process_zero():
            tqdm.write(f"Head warm-up, {len(history)} steps, local loss of " + ", ".join(ends))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.lopt.heads and self.args.should_save:
            safetensors.torch.save_file(self.lopt.heads.state_dict(), Path(output_dir) / HEADS_NAME)
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer = self.bare_optimizer()
        if self.lopt.heads and self.args.should_save:
            save_heads_optimizer(optimizer, output_dir)
        with heads_apart(optimizer):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.lopt.heads:
            return super()._load_optimizer_and_scheduler(checkpoint)
        path = Path(checkpoint) / HEADS_NAME
        if not path.is_file():
            raise ValueError(f"{path} is missing: this checkpoint cannot be resumed with --method lopt")
        self.lopt.heads.load_state_dict(safetensors.torch.load_file(path))
        if not self.is_fsdp_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer = self.bare_optimizer()
        with heads_apart(optimizer):
            super()._load_optimizer_and_scheduler(checkpoint)
        load_heads_optimizer(optimizer, checkpoint)

    def bare_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself, which steps whenever it is told to."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper


class _LoopHooks(TrainerCallback):
    """What has to happen between the steps of a loop that does not know the heads."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lopt: LoPT = self.trainer.lopt
        # A resumed run has warm heads.
        if lopt.heads and lopt.config.head_warmup_steps and state.global_step == 0:
            self.trainer.warm_up_heads()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_epoch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lopt: LoPT = self.trainer.lopt
        lopt.learns_locally = state.global_step % lopt.config.local_every == 0
        self.trainer.throughput.begin_step()
        self.trainer.begin_guarded_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.doing = "optimizer"

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.lopt.heads.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.block_major is not None:
            self.trainer.block_major.end_step()
        self.trainer.throughput.end_step()
        self.trainer.begin_after("step")
        self.trainer.end_guarded_step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_after("epoch")
