"""What the page of a training run is made from, as it lies in the run's folder.

That is the log in `trainer_state.json` (of the newest checkpoint while it trains), the settings in
`run.json`, and in `report.json` what neither of them holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lopt.files import read_json
from lopt.reliability.checkpoint import checkpoints
from lopt.reliability.record import RUN_JSON

PAGE, DATA = "report.html", "report.json"
_STATE = "trainer_state.json"

Row = Mapping[str, Any]
"""A row of a trainer's log."""

OUTCOMES = {
    "reward": "reward",
    "loss": "loss",
    "train_loss": "mean loss",
    "eval_reward": "held-out reward",
    "eval_loss": "held-out loss",
    "eval_rewards/accuracies": "held-out pairs in which the chosen answer is preferred",
}
"""Figure of the log -> its name, in the order in which they are told.

`train_loss`, the mean over all steps, is told of a run too short to have logged `loss`.
"""


@dataclass(frozen=True)
class RunData:
    """What a page of a run is made from.

    Attributes:
        name: of the run, for headings.
        history: the trainer's log.
        data: see `lopt.reports.run_callback.RunReport`.
        record: the content of `run.json`; empty for a run from Python.
    """

    name: str
    history: Sequence[Row]
    data: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    def points(self, key: str) -> list[tuple[float, float]]:
        """Return (step, value) of a figure of the log."""
        return [
            (row["step"], float(row[key]))
            for row in self.history
            if isinstance(row.get(key), int | float) and "step" in row
        ]

    def keys(self, prefix: str) -> list[str]:
        """Return the names in the log that begin so, in the order in which they appear."""
        return list(dict.fromkeys(key for row in self.history for key in row if key.startswith(prefix)))

    @property
    def steps(self) -> int:
        """The last step that the log knows."""
        return max((int(row.get("step", 0)) for row in self.history), default=0)


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Return what folders of runs hold, each named after its folder, or by its path where two are alike."""
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_run(folder: Path, name: str | None = None) -> RunData:
    """Return what a folder of a run holds.

    Args:
        name: of the run. Default: the folder's.

    Raises:
        ValueError: it is no folder of a run, or one of its files is damaged.
    """
    states = [folder / _STATE, *(path / _STATE for path in checkpoints(folder))]
    found = [path for path in states if path.is_file()]
    if not found:
        raise ValueError(
            f"{folder} holds no run of lopt sft, dpo or grpo: it has neither {_STATE} nor checkpoints"
        )
    try:
        read = [read_json(path) for path in found]
        newest = max(read, key=lambda state: state["global_step"])
        history = newest["log_history"]
        data, record = (
            read_json(folder / name) if (folder / name).is_file() else {} for name in (DATA, RUN_JSON)
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is damaged: one of its JSON files cannot be read ({error})") from error
    return RunData(name or folder.resolve().name, history, data, record)
