"""Benchmarks as lm-evaluation-harness defines them, their rows from the hub or from local files.

Prompts, shots and metrics are the harness's own task definitions, untouched. Local files change only where
rows come from: `<data_dir>/<folder>/<split>.jsonl`, one JSON object a line, columns as on the hub.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from datasets.exceptions import DatasetsError

from lopt.compat import build_tasks, rows_fingerprint
from lopt.evaluation.ifeval import need_punkt
from lopt.evaluation.local import find_local, read_rows, split_file
from lopt.messages import error_text
from lopt.validation import check

try:
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError('benchmarks need lm-evaluation-harness: pip install "lopt[eval]"') from error

BENCHMARKS = {
    "mmlu": ("mmlu",),
    "ifeval": ("ifeval",),
    "arc_challenge": ("arc_challenge",),
    "gsm8k": ("gsm8k",),
    "hellaswag": ("hellaswag",),
    "truthfulqa_mc": ("truthfulqa_mc1", "truthfulqa_mc2"),
    "truthfulqa_gen": ("truthfulqa_gen",),
    "winogrande": ("winogrande",),
}
"""Names a user gives -> names of the harness."""

SHOTS = {"cais/mmlu": 5}
"""Data set -> shots, where the harness's definition leaves open what the benchmark's protocol says."""

_FOLDERS_OF_TASKS = ("mmlu/default", "ifeval", "arc", "gsm8k", "hellaswag", "truthfulqa", "winogrande")


@dataclass(frozen=True)
class LoadedTasks:
    """The harness's task and group objects, by name, in the order of the request."""

    tasks: dict[str, Any]
    groups: dict[str, Any]


def load_tasks(
    tasks: Sequence[str],
    data_dir: str | Path | None = None,
    num_fewshot: Mapping[str, int] | None = None,
) -> LoadedTasks:
    """Build the harness's tasks and load their rows.

    Args:
        tasks: names of `BENCHMARKS`, or any other name of the harness.
        data_dir: folder with local rows; None for the hub.
        num_fewshot: shots by task name, where the task's own definition is not wanted. None if the caller has
            no such choice: no message proposes one.

    Raises:
        ValueError: an unknown task; rows that are missing, cannot be read or reached or have other columns;
            shots that the task does not allow or that have no file to come from.
    """
    names, manager = _resolve(tasks, num_fewshot or {})
    shots = {name: n for key, n in (num_fewshot or {}).items() for name in BENCHMARKS.get(key, (key,))}
    options: dict[str, Any] = {}
    if data_dir is not None:
        if not Path(data_dir).is_dir():
            raise ValueError(
                f"`data_dir` {data_dir} is not a folder: give one that holds <name>/<split>.jsonl"
            )
        options = {"class": LocalTask, "dataset_kwargs": {"data_dir": str(data_dir)}}
    loaded = LoadedTasks({}, {})
    with random_state_kept(), quiet_harness():
        for name in names:
            part = _load(manager, name, options)
            loaded.tasks.update(part["tasks"])
            loaded.groups.update(part["groups"])
            _set_shots(name, part["tasks"].values(), shots.get(name), optional=num_fewshot is not None)
    return loaded


def check_tasks(
    tasks: Sequence[str],
    data_dir: str | Path | None,
    num_fewshot: Mapping[str, int] | None = None,
) -> None:
    """Refuse what `load_tasks` would refuse, before a model is loaded; rows on the hub are not checked.

    Raises:
        ValueError: see `load_tasks`.
    """
    if data_dir is None:
        _resolve(tasks, num_fewshot or {})
    else:
        load_tasks(tasks, data_dir, num_fewshot)


def _resolve(tasks: Sequence[str], num_fewshot: Mapping[str, int]) -> tuple[list[str], Any]:
    """Return the harness's names of the tasks, and an index of tasks that has them all."""
    if not tasks:
        raise ValueError(f"`tasks` is empty: give some of {', '.join(BENCHMARKS)}")
    names = [name for task in tasks for name in BENCHMARKS.get(task, (task,))]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"`tasks` names {', '.join(twice)} twice: leave one out")
    for key, shots in num_fewshot.items():
        if key not in tasks and key not in names:
            raise ValueError(f"`num_fewshot` {key}={shots}: {key} is not among `tasks` ({', '.join(tasks)})")
        check(shots >= 0, "num_fewshot", f"{key}={shots}", "0 or more shots")
    manager = _manager(names)
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, [*BENCHMARKS, *manager.all_tasks], n=3)
            guess = f" Did you mean {' or '.join(dict.fromkeys(close))}?" if close else ""
            raise ValueError(
                f"`tasks` {name} does not exist: use {', '.join(BENCHMARKS)}, or any of the "
                f"{len(manager.all_tasks):,} names that `lm_eval ls tasks` prints.{guess}"
            )
    if any(name.startswith("ifeval") for name in names):
        need_punkt()
    return names, manager


def task_identity(task: Any) -> dict[str, Any]:
    """Return what identifies a task's results: shots, definition, rows."""
    config = {
        key: value for key, value in task.dump_config().items() if key not in ("metadata", "dataset_kwargs")
    }
    # A function is written with its address in memory, which differs from run to run: it is left out.
    definition = re.sub(" at 0x[0-9a-f]+", "", json.dumps(config, sort_keys=True, default=str))
    return {
        "name": task.config.task,
        "shots": task.config.num_fewshot,
        "version": str(task.VERSION),
        "definition": hashlib.sha256(definition.encode()).hexdigest()[:16],
        "rows": _rows_identity(task),
    }


def _rows_identity(task: Any) -> str:
    if isinstance(task, LocalTask):
        return task.files_hash
    splits = sorted(task.dataset.items()) if isinstance(task.dataset, dict) else []
    return " ".join(f"{name}:{rows_fingerprint(rows)}" for name, rows in splits)


class LocalTask(ConfigurableTask):
    """A task of the harness whose rows are read from `dataset_kwargs["data_dir"]`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.files_hash = ""
        self.folder = Path()
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Read every split that the task names and the folder holds."""
        config = self.config
        local = find_local(config.dataset_path, config.dataset_name)
        if local is None:
            raise ValueError(
                f"`data_dir` has no files for {config.task} (it reads {config.dataset_path}): leave "
                f"`data_dir` out for it, or use some of {', '.join(BENCHMARKS)}"
            )
        self.folder = folder = Path((dataset_kwargs or {})["data_dir"]) / local.folder
        shots, evaluated = _shots_split(self), config.test_split or config.validation_split
        self.dataset, hashes = {}, []
        for split in sorted({evaluated, shots} - {None}):
            path = split_file(folder, split)
            if split == evaluated and not path.is_file():
                raise ValueError(
                    f"`data_dir`: {path} is missing, where the questions of {config.task} are read"
                )
            if not path.is_file():
                continue
            rows, digest = read_rows(path, local.columns)
            hashes.append(f"{split}:{digest}")
            if "subject" in local.columns:
                rows = [row for row in rows if row["subject"] == config.dataset_name]
            if not rows:
                raise ValueError(f"`data_dir`: {path} has no rows for {config.task} ({config.dataset_name})")
            self.dataset[split] = Dataset.from_list(rows)
        self.files_hash = " ".join(hashes)

    def fewshot_docs(self) -> Any:
        """Return None if the file that shots come from is absent; never the questions in its place."""
        split = _shots_split(self)
        return None if split is not None and split not in self.dataset else super().fewshot_docs()


def _manager(names: Sequence[str]) -> Any:
    """Return the harness's index of tasks; of its 14,000 only the folders of `BENCHMARKS` if they suffice."""
    root = Path(lm_eval.__file__).parent / "tasks"
    ours = TaskManager(include_defaults=False, include_path=[root / f for f in _FOLDERS_OF_TASKS])
    return ours if all(name in ours.task_index for name in names) else _all_tasks()


@functools.cache
def _all_tasks() -> Any:
    return TaskManager()


def _load(manager: Any, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return one task, tag or group with its tasks; `options` override every task's definition."""
    try:
        built = build_tasks(manager, name, options)
        part = manager.load(built if isinstance(built, list) else [built])
    except ConnectionError as error:
        raise ValueError(
            f"`tasks` {name}: the hub cannot be reached ({error_text(error)}): connect, or give "
            "`data_dir` with local files"
        ) from error
    except (DatasetsError, OSError, RuntimeError) as error:
        raise ValueError(f"`tasks` {name} cannot be loaded: {error_text(error)}") from error
    return {"tasks": part["tasks"], "groups": part["groups"]}


def _shots_split(task: Any) -> str | None:
    """Return the split that shots are drawn from: the definition's own, else training or validation rows."""
    config = task.config
    given = config.fewshot_config
    if given.split is None and given.samples is not None:
        return None
    return given.split or config.training_split or config.validation_split


def _set_shots(name: str, tasks: Any, shots: int | None, *, optional: bool) -> None:
    """Set the number of shots, as `lm_eval.simple_evaluate` does, but refuse what it would ignore.

    Args:
        optional: whether the caller can give `num_fewshot`.
    """
    for task in tasks:
        own = task.config.num_fewshot
        if shots is not None and own == 0 != shots:
            raise ValueError(
                f"`num_fewshot` {name}={shots}: {task.config.task} is defined with 0 shots: leave it out"
            )
        count = (
            shots if shots is not None else own if own is not None else SHOTS.get(task.config.dataset_path, 0)
        )
        task.set_config("num_fewshot", count)
        if count == 0:
            continue
        split = _shots_split(task)
        if isinstance(task, LocalTask) and split is not None and split not in task.dataset:
            other = f"give `num_fewshot` {name}=0" if optional else f"leave {name} out"
            raise ValueError(
                f"{task.folder / split}.jsonl is missing, where the {count} shots of {task.config.task} come "
                f"from: add it, or {other}"
            )
        evaluated = task.config.test_split or task.config.validation_split
        if own is None and split == evaluated:
            raise ValueError(
                f"`num_fewshot` {name}={count}: {task.config.task} has only its questions: leave it out"
            )


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch afterwards."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Hide the harness's warnings on its own task definitions, and progress bars over rows."""
    logger, bars = logging.getLogger("lm_eval"), not datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
