"""A trainer's process in a pipeline: its place, what it reads and writes, and what all of them report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lopt.core.config import LoPTConfig
from lopt.engine import grid
from lopt.engine.grid import Grid
from lopt.engine.pipeline import Part, check_pipeline, write_index, write_part

WAITS = ("input_wait_seconds", "output_wait_seconds")
"""Of an optimizer step: how long a process has waited for hidden states, and for the next to take its own."""


def join_pipeline(config: LoPTConfig, use_cpu: bool = False) -> Grid:
    """Take this process's place in the pipeline that `config` asks for.

    Call it before the trainer's arguments are made, which set up torch.distributed.

    Args:
        config: The trainer's.
        use_cpu: As of the trainer's arguments.

    Raises:
        ValueError: The method has no boundaries, or the launcher's processes cannot be dealt out so.
    """
    size = config.block_count if config.pipeline_size is None else config.pipeline_size
    check_pipeline(config, size)
    return grid.join(size, use_cpu)


def leave_pipeline() -> None:
    """Leave the pipeline at the end of a script; waits in the first process until all others have left.

    Without it, a process that ends early looks like one that was killed to those still at work.
    """
    grid.leave()


def take_place(config: LoPTConfig) -> Grid | None:
    """Return the place of this process; None if the run is no pipeline.

    Raises:
        ValueError: It is one and the process has not joined it.
    """
    if config.schedule != "pipeline":
        return None
    place = grid.current()
    if place is None:
        raise ValueError(
            "`schedule` pipeline: this process has joined none. The commands of lopt do it; in Python call "
            "join_pipeline(lopt_config), from lopt.trainers.pipeline, before the arguments are made"
        )
    return place


def write_model(trainer: Any, folder: Path | str) -> None:
    """Write the model of a pipeline into `folder`, each process its own blocks; all call this."""
    place: Grid = trainer.grid
    own = write_part(trainer.lopt, trainer.block_major.schedule, Path(folder)) if place.replica == 0 else None
    parts = [Part(*part) for part in place.gather(own) if part is not None]
    if place.is_main:
        write_index(trainer.lopt, parts, Path(folder))
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)


class Reports:
    """Brings together in the main process what the processes of a pipeline measure.

    Nobody else waits for it: the others leave their figures in the store.

    Args:
        place: Of this process.
    """

    def __init__(self, place: Grid) -> None:
        self._place = place
        self._norms: list[list[float]] = []

    def add_norms(self, norms: list[float]) -> None:
        """Keep the norms (k,) of an optimizer step, which are 0 for blocks of other processes."""
        self._norms.append(norms)

    def merged(self, logs: dict[str, float]) -> dict[str, float]:
        """Return a training log, in the main process with the figures of all processes."""
        place, norms = self._place, self._norms
        self._norms = []
        reports = place.hand_in([logs, norms])
        if not reports:
            return logs
        more = {name: value for name, value in logs.items() if name not in WAITS}
        for rank, (figures, _) in enumerate(reports):
            seconds = figures["seconds_per_step"]
            waits = [figures[name] for name in WAITS]
            more[f"busy_share/rank_{rank}"] = max(0.0, 1 - sum(waits) / max(seconds, 1e-9))
            more |= {f"{name}/rank_{rank}": wait for name, wait in zip(WAITS, waits, strict=True)}
            more[f"peak_memory_gib/rank_{rank}"] = figures["peak_memory_gib"]
            if rank % place.replicas == 0:
                more |= {name: value for name, value in figures.items() if "/block_" in name}
        return more | self._shares([norms for _, norms in reports[:: place.replicas]])

    def _shares(self, by_position: list[list[list[float]]]) -> dict[str, float]:
        """Return the norm of the last step's gradient, and each block's mean share of its square."""
        steps = [
            [math.hypot(*of_block) for of_block in zip(*own, strict=True)]
            for own in zip(*by_position, strict=True)
        ]
        if not steps:
            return {}
        squares = [[(norm / max(math.hypot(*norms), 1e-30)) ** 2 for norm in norms] for norms in steps]
        shares = [sum(block) / len(steps) for block in zip(*squares, strict=True)]
        named = {f"grad_share/block_{number}": share for number, share in enumerate(shares, start=1)}
        return {"grad_norm": math.hypot(*steps[-1])} | named

    def evaluated(self, output: Any) -> Any:
        """Return the output of an evaluation with the figures of the main process; all call this."""
        own = {name: float(value) for name, value in (output.metrics or {}).items()}
        return output._replace(metrics=self._place.from_main(own))
