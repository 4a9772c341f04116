"""Writes the page of a run while it trains: at every checkpoint, and when told at its end.

    trainer.add_callback(RunReport(trainer))

`lopt sft`, `dpo` and `grpo` do that by themselves.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lopt.files import finite, read_json, write_json
from lopt.messages import error_text
from lopt.reliability.record import RUN_JSON
from lopt.reports.facts import Facts, run_facts
from lopt.reports.run import write_run_page
from lopt.reports.run_data import DATA, PAGE, RunData

logger = logging.getLogger(__name__)

_SHARE = 0.01
"""Of a run's time, at most, for pages; a page that would take more waits for a later checkpoint."""


class RunReport(TrainerCallback):
    """Keeps what a run's log does not hold, and writes `report.html` and `report.json` into its folder.

    A page is made for people: if it cannot be written, a warning says why, once, and the run goes on.

    Args:
        trainer: a trainer with `LoPTMixin`.
        command: that trains, for the page.
        changed: the flags that were given.
        warnings: messages that were printed, with how often; whoever makes them adds to it.
        facts: returns those of `run_facts`, if they are known when training begins.
    """

    def __init__(
        self,
        trainer: Any,
        command: str = "",
        changed: Mapping[str, Any] | None = None,
        warnings: Counter[str] | None = None,
        facts: Callable[[], Facts] | None = None,
    ) -> None:
        self._trainer, self._warnings = trainer, warnings if warnings is not None else Counter()
        self._facts = facts or (lambda: run_facts(trainer))
        self._folder = Path(str(trainer.args.output_dir))
        self._data: dict[str, Any] = {"command": command, "changed": dict(changed or {})}
        self._before: dict[str, Any] = {}
        self._began = time.monotonic()
        self._spent = self._last = 0.0
        self._failed = self._ended = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note what the run does; a resumed one goes on with the page of the run before."""
        if not state.is_world_process_zero:
            return
        path = self._folder / DATA
        if getattr(self._trainer, "resumed_from", None) and path.is_file():
            try:
                self._before = read_json(path)
            except ValueError:  # written by hand, or of another program: the page begins anew
                self._before = {}
        self._data["facts"] = self._facts()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep completions of the first and of the last generation."""
        make = getattr(self._trainer, "sample_completions", None)
        if make is None or not state.is_world_process_zero or not logs or "reward" not in logs:
            return
        if (found := make()) is not None:
            found = {"step": state.global_step, **found}
            samples = self._data.setdefault("samples", {**self._before.get("samples", {})})
            samples.setdefault("first", found)
            samples["last"] = found

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the page, unless that would take more than its share of the run's time."""
        if self._spent + self._last <= _SHARE * (time.monotonic() - self._began):
            self.write()

    def write(self, *, ended: bool = False) -> None:
        """Write the page of the run as it is now, unless that of its end is written.

        Args:
            ended: whether the run has come to its end.
        """
        if self._ended or not self._trainer.is_world_process_zero() or "facts" not in self._data:
            return
        self._ended = ended
        started = time.monotonic()
        try:
            self._write(ended)
        except Exception as error:  # whatever a page trips over, the run is worth more
            if not self._failed:
                logger.warning("%s cannot be written: %s", self._folder / PAGE, error_text(error))
            self._failed = True
        self._last = time.monotonic() - started
        self._spent += self._last

    def _write(self, ended: bool) -> None:
        trainer, before = self._trainer, self._before
        data = {**self._data, "ended": ended}
        data["warnings"] = dict(Counter(before.get("warnings", {})) + self._warnings)
        data["head_warmup"] = trainer.head_warmup_history or before.get("head_warmup", [])
        data["seconds"] = time.monotonic() - self._began + before.get("seconds", 0.0)
        peak = trainer.throughput.peak
        data["memory"] = {n: size for n, size in asdict(peak).items() if n != "host"} if peak else {}
        if "samples" not in data and "samples" in before:
            data["samples"] = before["samples"]
        history = finite(trainer.state.log_history)
        path = self._folder / RUN_JSON
        record = read_json(path) if path.is_file() else {}
        write_json(self._folder / DATA, finite(data), default=str)
        write_run_page(self._folder, RunData(self._folder.resolve().name, history, data, record))
