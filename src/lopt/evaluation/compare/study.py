"""All arm runs of a comparison: each is run once and kept on disk, and all are summed up at the end."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lopt.evaluation.compare.arm_run import Setup, measure_base, run_arm
from lopt.evaluation.compare.arms import Arm
from lopt.evaluation.compare.summary import shared_items, summarise
from lopt.evaluation.names import hashed_file_name
from lopt.files import differences, read_json, write_json
from lopt.reliability.finite import NonFiniteError
from lopt.reliability.guards import DivergedError
from lopt.reliability.machine_errors import OutOfMemory
from lopt.reliability.provenance import device, versions


@dataclass
class Study:
    """Arms × seeds under one setup.

    Attributes:
        setting: what all arm runs share, as plain data; a folder belongs to one setting.
        folder: holds `setting.json`, `base.json`, one file per arm run in `cells/`, and at the end
            `compare.json`. Where only that one is there, the others are made of it.
    """

    setup: Setup
    arms: Sequence[Arm]
    seeds: Sequence[int]
    setting: Mapping[str, Any]
    folder: Path

    def run(self) -> dict[str, Any]:
        """Run what is not on disk yet, then write `compare.json` and return its content.

        Several processes with one folder share the work: each takes what no other has taken.

        Raises:
            ValueError: see `check_folder`; an arm does not fit into memory.
        """
        self.check_folder()
        todo = [(arm, seed) for arm, seed in self._pairs() if not self._path(arm.name, seed).exists()]
        total = len(self.arms) * len(self.seeds)
        if len(todo) < total:
            print(f"{total - len(todo)} of {total} arm runs are finished already and are not run again")
        if todo and self.setup.metrics.drift_texts:
            base: Any = self.setup.load()
            self.setup.metrics.prepare(base.to(self.setup.args.device))
            del base  # from the device
        parts = {self.folder / "base.json": self._base}
        for number, (arm, seed) in enumerate(todo, start=1):
            title = f"\nArm run {number} of {len(todo)}: {arm.name}, seed {seed}"
            parts[self._path(arm.name, seed)] = functools.partial(self._run, arm, seed, title)
        share(parts)
        files = [self.folder / "base.json", *(self._path(arm.name, seed) for arm, seed in self._pairs())]
        base, *cells = shared_items([read_json(path) for path in files])
        results: dict[str, Any] = {
            "title": "Comparison",
            "setting": dict(self.setting),
            "arms": [arm.name for arm in self.arms],
            "seeds": list(self.seeds),
            "base": base,
            "cells": cells,
        }
        results["summary"] = summarise(results)
        _write(self.folder / "compare.json", results)
        return results

    def check_folder(self) -> None:
        """Refuse a folder that belongs to another setting; arms and seeds may be added to it.

        All that the setting on disk has must be the same. It may lack keys of `setting`, those that an older
        version did not write; they are added to it.

        Raises:
            ValueError: the setting on disk differs.
        """
        path = self.folder / "setting.json"
        if not path.exists() and (self.folder / "compare.json").exists():
            self._unpack(read_json(self.folder / "compare.json"))
        if not path.exists():
            _write(path, self.setting)
            return
        there = read_json(path)
        if differ := [key for key in sorted(there) if differences(there[key], self.setting.get(key))]:
            raise ValueError(
                f"`output_dir` {self.folder} holds a comparison with other settings ({', '.join(differ)}): "
                "choose another folder, or start anew with `overwrite_output_dir`"
            )
        if there.keys() < self.setting.keys():
            _write(path, self.setting)

    def _unpack(self, results: Mapping[str, Any]) -> None:
        """Write the parts that `compare.json` was made of; last the setting, which marks the folder."""
        _write(self.folder / "base.json", results["base"])
        for cell in results["cells"]:
            _write(self._path(cell["arm"], cell["seed"]), cell)
        _write(self.folder / "setting.json", results["setting"])

    def _pairs(self) -> Iterator[tuple[Arm, int]]:
        """Yield seed by seed, so that an interrupted study has whole rounds."""
        return ((arm, seed) for seed in self.seeds for arm in self.arms)

    def _path(self, arm: str, seed: int) -> Path:
        return self.folder / "cells" / f"{hashed_file_name(arm)}-seed{seed}.json"

    def _base(self) -> dict[str, Any]:
        print("The base model", flush=True)
        return measure_base(self.setup, self.arms[0], self.folder / "runs" / "base") | _provenance()

    def _run(self, arm: Arm, seed: int, title: str) -> dict[str, Any]:
        print(title, flush=True)
        name = self._path(arm.name, seed).stem
        try:
            return run_arm(self.setup, arm, seed, self.folder / "runs" / name, name) | _provenance()
        except (NonFiniteError, DivergedError) as error:  # a result of this arm, not an error of the study
            print(f"{arm.name}, seed {seed} failed: {error}", flush=True)
            return {"arm": arm.name, "seed": seed, "failed": str(error)} | _provenance()
        except (torch.OutOfMemoryError, OutOfMemory) as error:
            raise ValueError(
                f"{arm.name} does not fit into the device's memory: leave it out of `methods`, lower "
                "`per_device_train_batch_size` or `max_length`, or ask `lopt plan --fit` what would; "
                "finished arm runs are kept"
            ) from error


def share(parts: Mapping[Path, Callable[[], dict[str, Any]]]) -> None:
    """Make and write what is missing of `parts`, together with other processes that have the same.

    First what no other process works on, then what one has not finished, because it was stopped.
    """
    for wait in (False, True):
        for path, make in parts.items():
            _once(path, make, wait)


def _once(path: Path, make: Callable[[], dict[str, Any]], wait: bool) -> None:
    """Make the content of `path` and write it, unless it is there or another process makes it.

    Args:
        wait: for the other process; what it has not made when it ends is made here.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    place = path.with_suffix(".lock")
    lock = FileLock(place)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            return
        print(f"Waiting for {path.stem}, which another process runs", flush=True)
        lock.acquire()
    try:
        if not path.exists():
            _write(path, make())
        with contextlib.suppress(OSError):  # Windows keeps what is open
            place.unlink()  # who waited for it finds the content
    finally:
        lock.release()


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_json(path, content, ensure_ascii=False, allow_nan=False)


def _provenance() -> dict[str, Any]:
    packages = ("lopt", "torch", "transformers", "trl", "peft", "lm_eval")
    return {"device": device(), "date": date.today().isoformat(), "versions": versions(packages)}
