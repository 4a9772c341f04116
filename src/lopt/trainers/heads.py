"""Reconstruction heads in a trainer's run: their warm-up and their part of a checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.utils import AutocastKwargs
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from lopt.core.attach import LoPT
from lopt.core.warmup import boundary_states
from lopt.engine.grid import Grid
from lopt.files import save_tensors
from lopt.trainers.parts import file_of, files_of

HEADS_NAME = "reconstruction_heads.safetensors"


def warm_up_batches(trainer: Any, batch_size: int, collate: Callable[[list[Any]], Any]) -> DataLoader:
    """Return a loader of training rows in an order of their own, the same on all ranks."""
    return DataLoader(
        trainer.train_dataset,
        batch_size=batch_size,
        shuffle=not isinstance(trainer.train_dataset, IterableDataset),
        generator=torch.Generator().manual_seed(trainer.args.seed),
        collate_fn=collate,
    )


def warm_up_heads(trainer: Any) -> None:
    """Let the heads learn, with a progress bar; what they reached is in `head_warmup_history`.

    In a pipeline each process lets those of its blocks learn, and passes hidden states on.

    Raises:
        NonFiniteError: a local loss is not finite.
    """
    lopt, first = trainer.lopt, trainer.is_world_process_zero()
    hidden = trainer.args.disable_tqdm or not first
    steps = lopt.config.head_warmup_steps
    history: list[list[float]] = []
    with tqdm(total=steps, desc="Head warm-up", unit="step", disable=hidden) as bar:

        def show(step: int, losses: list[float]) -> None:
            bar.set_postfix(local_loss=" ".join(f"{x:.3g}" for x in losses), refresh=False)
            bar.update()
            trainer.guard.check_warm_up(step, losses)

        # Each weight is used once per forward, so that a cache of casts would be a second model.
        autocast = trainer.accelerator.autocast(AutocastKwargs(cache_enabled=False))
        with torch.random.fork_rng(), autocast, trainer.guard.during("head warm-up"):
            if lopt.learning:
                history = lopt.warm_up_heads(trainer.head_warm_up_batches(), progress=show)
            else:
                batches = itertools.islice(itertools.cycle(trainer.head_warm_up_batches()), steps)
                for step, batch in enumerate(batches, start=1):
                    boundary_states(lopt, batch)
                    bar.update()
                    trainer.guard.check_warm_up(step, [])
    if trainer.reduction is not None:
        trainer.reduction.broadcast_heads()
    trainer.head_warmup_history = history
    if trainer.guard.monitor is not None:
        trainer.guard.monitor.start(lopt.learning, history)
    reached = [
        [block, *pair] for block, *pair in zip(lopt.learning, *history[:1], *history[-1:], strict=True)
    ]
    if trainer.grid is not None:
        reached = [row for rows in trainer.grid.gather(reached)[:: trainer.grid.replicas] for row in rows]
    ends = [f"block {block + 1}: {before:.3g} → {after:.3g}" for block, before, after in reached]
    if first:
        tqdm.write(f"Head warm-up, {steps} steps, local loss of " + ", ".join(ends))


def save_heads(lopt: LoPT, folder: Path, grid: Grid | None = None) -> None:
    """Write the weights of the heads into a checkpoint, in a pipeline those of this process's blocks."""
    own = {name: value for name, value in lopt.heads.state_dict().items() if not value.is_meta}
    save_tensors(own, folder / file_of(HEADS_NAME, grid))


def load_heads(lopt: LoPT, folder: Path) -> None:
    """Read what `save_heads` wrote, in one process or in several.

    Raises:
        ValueError: the checkpoint has no heads.
    """
    paths = files_of(HEADS_NAME, folder)
    if not paths:
        raise ValueError(
            f"{folder / HEADS_NAME} is missing: this checkpoint cannot be resumed with `method` lopt"
        )
    saved = {name: value for path in paths for name, value in safetensors.torch.load_file(path).items()}
    own = {name for name, value in lopt.heads.state_dict().items() if not value.is_meta}
    if own - saved.keys():
        raise ValueError(f"{folder} has heads of another `aux_loss`: resume with that of the run")
    lopt.heads.load_state_dict({name: saved[name] for name in own}, strict=False)
