"""The head warm-up of a trainer's run: its batches, its progress bar, what the other parts learn of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm


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

    Raises:
        NonFiniteError: a local loss is not finite.
    """
    lopt, first = trainer.lopt, trainer.is_world_process_zero()
    hidden = trainer.args.disable_tqdm or not first
    steps = lopt.config.head_warmup_steps
    with tqdm(total=steps, desc="Head warm-up", unit="step", disable=hidden) as bar:

        def show(step: int, losses: list[float]) -> None:
            bar.update()
            bar.set_postfix(local_loss=" ".join(f"{x:.3g}" for x in losses))
            trainer.guard.check_warm_up(step, losses)

        autocast = trainer.compute_loss_context_manager()
        with torch.random.fork_rng(), autocast, trainer.guard.during("head warm-up"):
            history = lopt.warm_up_heads(trainer.head_warm_up_batches(), progress=show)
    if trainer.reduction is not None:
        trainer.reduction.broadcast_heads()
    trainer.head_warmup_history = history
    if trainer.guard.monitor is not None:
        trainer.guard.monitor.start(lopt.learning, history)
    ends = [
        f"block {block + 1}: {before:.3g} → {after:.3g}"
        for block, before, after in zip(lopt.learning, history[0], history[-1], strict=True)
    ]
    if first:
        tqdm.write(f"Head warm-up, {len(history)} steps, local loss of " + ", ".join(ends))
