"""What becomes of rows and learning rate where a run is resumed with another batch or another length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lopt.files import read_json
from lopt.reliability.saving import ARGUMENTS


def resumed_otherwise(trainer: Any, checkpoint: str) -> str | None:
    """Return in a sentence how many rows are skipped or repeated, and what the learning rate becomes.

    Call it when optimizer and schedule are loaded, before the first step.

    Returns:
        None if the run goes on as it would have.
    """
    parts = [part for part in (_rows(trainer, Path(checkpoint)), _learning_rate(trainer)) if part]
    return "; ".join(parts) or None


def _rows(trainer: Any, checkpoint: Path) -> str | None:
    path = checkpoint / ARGUMENTS
    if not path.is_file():
        return None
    before = read_json(path)
    ranks = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))  # one file for each of several
    old, new = _rows_per_step(before, ranks), _rows_per_step(vars(trainer.args), trainer.args.world_size)
    step = trainer.state.global_step
    if old == new or not step or trainer.args.ignore_data_skip:
        return None
    count = step * abs(new - old)
    what = "skipped, which the run has not seen" if new > old else "repeated, which it has seen"
    return (
        f"a step had {old} rows and has {new}, so after {step} steps the run goes on at row {step * new} "
        f"where it had come to row {step * old}: {count} rows are {what}"
    )


def _rows_per_step(args: Any, ranks: int) -> int:
    """Return the rows of an optimizer step: in GRPO the prompts, each of which is answered several times."""
    rows = args["per_device_train_batch_size"] * args["gradient_accumulation_steps"] * ranks
    return rows // (args.get("num_generations") or 1)


def _learning_rate(trainer: Any) -> str | None:
    schedule = trainer.lr_scheduler
    factors = getattr(schedule, "lr_lambdas", None)
    if not factors:
        return None
    group = max(range(len(schedule.base_lrs)), key=lambda index: schedule.base_lrs[index])
    before = schedule.get_last_lr()[group]
    after = schedule.base_lrs[group] * factors[group](schedule.last_epoch)
    if abs(after - before) <= 1e-6 * schedule.base_lrs[group]:
        return None
    return (
        f"the learning rate goes from {before:.3g} to {after:.3g} after the next step, as the schedule now "
        f"has {trainer.state.max_steps} steps"
    )
