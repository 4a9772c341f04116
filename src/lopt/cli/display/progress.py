"""What is shown while a model trains: a line of progress, and a table that grows by a row per log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text
from transformers import TrainerCallback

from lopt.cli.display.opening import opening
from lopt.cli.display.screen import Screen
from lopt.cli.display.table import Table, clock, figure
from lopt.evaluation.retention_callback import RetentionCallback
from lopt.instruments.memory import format_bytes
from lopt.reports.facts import Facts, run_facts

_BETWEEN_DRAWINGS = 0.1
"""Seconds: a step may take less than drawing a line."""


class Progress(TrainerCallback):
    """Shows a trainer's run in place of transformers' own callbacks, whose logs are dictionaries.

    Args:
        every: steps between rows of the table, of those that are logged.

    Attributes:
        facts: what the run does, as it was when training began.
    """

    def __init__(self, trainer: Any, screen: Screen, command: str, every: int = 1) -> None:
        self.facts: Facts = {}
        self._trainer, self._screen, self._command, self._every = trainer, screen, command, every
        self._table = Table(command, _keys(trainer))
        self._waiting: dict[str, Any] = {}
        self._last: dict[str, Any] = {}
        self._ends: deque[tuple[int, float]] = deque(maxlen=100)
        self._began = self._drawn = time.monotonic()
        self._evaluated: tuple[int, int | None] | None = None

    # -- events --------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show what is about to be done."""
        self._began = time.monotonic()
        if not state.is_world_process_zero:
            return
        self.facts, screen = run_facts(self._trainer), self._screen
        screen.event("start", command=self._command, **self.facts)
        screen.print(opening(self._command, self.facts, screen.width, ascii_only=screen.ascii_only))
        screen.print("")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the line before the first step; show what has waited for an evaluation."""
        self._flush()
        if not self._ends:
            self._ends.append((state.global_step, time.monotonic()))
            self._screen.start_line(lambda: self._draw(state))

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the line."""
        self._redraw()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the line."""
        self._ends.append((state.global_step, time.monotonic()))
        self._redraw()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add to the table; a row waits for the evaluation that follows at the same step."""
        if not state.is_world_process_zero or not logs:
            return
        row = {**logs, "step": state.global_step, "elapsed": time.monotonic() - self._began}
        self._screen.event("log", **row)
        if "train_runtime" in logs:  # the sum of the run, which is shown at its end
            return
        self._last |= row
        if state.global_step % self._every and "loss" in logs and state.global_step < state.max_steps:
            return
        if self._waiting and self._waiting["step"] != row["step"]:
            self._flush()
        self._waiting |= row
        last = state.global_step >= state.max_steps and self._trainer.eval_dataset is not None
        follows = control.should_evaluate or (last and not args.load_best_model_at_end)
        if "eval_runtime" in logs or ("loss" in logs and not follows):
            self._flush()

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Draw how far the evaluation is."""
        done = 1 if self._evaluated is None else self._evaluated[0] + 1
        try:
            count = len(eval_dataloader)
        except TypeError:  # a stream
            count = None
        self._evaluated = done, count
        self._redraw()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the steps."""
        self._evaluated = None

    def close(self) -> None:
        """Show the last row, and take the line away."""
        self._flush()
        self._screen.stop_line()

    # -- drawing -------------------------------------------------------------------------------------

    def _flush(self) -> None:
        row, self._waiting = self._waiting, {}
        if row:
            for line in self._table.lines(row, self._screen.width):
                self._screen.print(line)

    def _redraw(self) -> None:
        now = time.monotonic()
        if now - self._drawn >= _BETWEEN_DRAWINGS:
            self._drawn = now
            self._screen.draw_line()

    def _draw(self, state: Any) -> Grid:
        """Return the line, as much of it as there is room for."""
        room = self._screen.width - 1
        bar = min(24, room // 4)
        words = _fitting(self._parts(state), room - bar - 2)
        grid = Grid.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, overflow="crop")
        done = ProgressBar(state.max_steps, state.global_step, width=bar)
        grid.add_row(done, Text("  ".join(words)))
        return grid

    def _parts(self, state: Any) -> list[tuple[int, str]]:
        """Return the parts of the line in their order, each with its rank: the highest goes first."""
        last, parts = self._last, [(0, f"{state.global_step:,}/{state.max_steps:,}")]
        if self._evaluated is not None:
            done, count = self._evaluated
            parts.append((1, f"evaluating {done}" + (f"/{count}" if count else "")))
        for rank, key, name in (
            (3, "reward", "reward"),
            (2, "loss", "loss"),
            (4, "eval_loss", "held out"),
            (4, "eval_reward", "held out"),
        ):
            if key in last and (key != "eval_loss" or "eval_reward" not in last):
                parts.append((rank, f"{name} {figure(float(last[key]))}"))
        if "tokens_per_second" in last:
            parts.append((5, f"{last['tokens_per_second']:,.0f} tokens/s"))
            parts.append((6, format_bytes(round(last["peak_memory_gib"] * 2**30))))
        left = self._seconds_left(state)
        return [*parts, (1, f"ETA {'–' if left is None else clock(left)}")]

    def _seconds_left(self, state: Any) -> float | None:
        """Return how long the remaining steps take, by the last hundred; None before the first."""
        (step, begun), (last, ended) = self._ends[0], self._ends[-1]
        return (state.max_steps - last) * (ended - begun) / (last - step) if last > step else None


def _keys(trainer: Any) -> set[str]:
    """Return the names that a trainer's log will have, of those that a table may show."""
    keys = {"step", "loss", "reward", "completions/mean_length", "rewards/accuracies", "rewards/margins"}
    keys |= {"learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gib", "elapsed"}
    if trainer.eval_dataset is not None:
        keys |= {"eval_loss", "eval_reward"}
    if getattr(trainer.args, "beta", 0):
        keys.add("kl")
    if any(isinstance(callback, RetentionCallback) for callback in trainer.callback_handler.callbacks):
        keys.add("retention/change")
    last = len(trainer.lopt.blocks) - 1
    learning = range(last - trainer.lopt.learners, last)  # in a pipeline those of all processes
    return keys | {f"local_loss/block_{block + 1}" for block in learning}


def _fitting(parts: list[tuple[int, str]], width: int) -> list[str]:
    """Return the parts that fit into a line, without those of the highest rank where there is no room."""
    while len(parts) > 1 and sum(len(text) + 2 for _, text in parts) - 2 > width:
        parts.remove(max(parts, key=lambda part: part[0]))
    return [text for _, text in parts]


def say_nothing_else(trainer: Any) -> None:
    """Take transformers' own displays out of a trainer."""
    from transformers import PrinterCallback, ProgressCallback

    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)


@contextmanager
def shown(trainer: Any, screen: Screen, command: str, rows: int) -> Iterator[None]:
    """Within, show the run of a trainer that logs every step, in about so many rows."""
    trainer.args.disable_tqdm = not screen.live
    progress = show(trainer, screen, command, max(1, trainer.args.max_steps // rows))
    try:
        yield
    finally:
        progress.close()


def show(trainer: Any, screen: Screen, command: str, every: int = 1) -> Progress:
    """Let `screen` show a trainer's run; returns the callback, which is the first to be told of all."""
    say_nothing_else(trainer)
    progress = Progress(trainer, screen, command, every)
    # Before the head warm-up, which is a callback of the trainer's own.
    trainer.callback_handler.callbacks.insert(0, progress)
    return progress


def history_ends(history: list[Mapping[str, Any]], key: str) -> tuple[float, float] | None:
    """Return the first and the last value of `key` in a trainer's log; None if there is none."""
    values = [row[key] for row in history if isinstance(row.get(key), int | float)]
    return (values[0], values[-1]) if values else None
