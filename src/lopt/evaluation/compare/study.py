"""All cells of a comparison: run once each, kept on disk as they finish, summed up at the end."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from lopt.evaluation.compare.arm_run import Bench, measure_base, run_cell
from lopt.evaluation.compare.arms import Arm
from lopt.evaluation.compare.summary import summarise
from lopt.files import write_text
from lopt.reliability.guards import NonFiniteError
from lopt.reliability.machine_errors import OutOfMemory
from lopt.reliability.provenance import device, versions
from lopt.reports.compare import pareto, write_page
from lopt.reports.plots import standalone


@dataclass
class Study:
    """Arms × seeds on one bench.

    Attributes:
        setting: what all cells share, as plain data; a folder belongs to one setting.
        folder: holds `base.json`, `cells/`, and at the end `compare.json` and `report.html`.
    """

    bench: Bench
    arms: Sequence[Arm]
    seeds: Sequence[int]
    setting: Mapping[str, Any]
    folder: Path

    def run(self) -> dict[str, Any]:
        """Run what is not there yet, then write and return the results."""
        self.check_folder()
        base = self._once(self.folder / "base.json", self._base)
        todo = [(arm, seed) for arm, seed in self._cells() if not self._path(arm, seed).exists()]
        total = len(self.arms) * len(self.seeds)
        if len(todo) < total:
            print(f"{total - len(todo)} of {total} cells are there already and are not run again")
        if todo and self.bench.yardsticks.drift_texts:
            self.bench.yardsticks.prepare(self.bench.load())
        for number, (arm, seed) in enumerate(todo, start=1):
            print(f"\nCell {number} of {len(todo)}: {arm.name}, seed {seed}", flush=True)
            self._once(self._path(arm, seed), lambda arm=arm, seed=seed: self._run(arm, seed))
        return self.write(base)

    def check_folder(self) -> None:
        """Refuse a folder that belongs to another setting; arms and seeds may be added to it.

        Raises:
            ValueError: with what differs.
        """
        path = self.folder / "setting.json"
        mine = json.loads(json.dumps(self.setting))
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            differs = sorted(key for key in mine.keys() | there.keys() if mine.get(key) != there.get(key))
            if differs:
                raise ValueError(
                    f"--output_dir {self.folder} holds a comparison with other settings "
                    f"({', '.join(differs)}): choose another folder, or start anew with "
                    "--overwrite_output_dir"
                )
        else:
            _write(path, mine)

    def write(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """`compare.json`, `report.html` and `pareto.svg` from the cells on disk."""
        cells = [_read(self._path(arm, seed)) for arm, seed in self._cells()]
        results = {
            "title": "Comparison",
            "setting": dict(self.setting),
            "arms": [arm.name for arm in self.arms],
            "seeds": list(self.seeds),
            "base": base,
            "cells": cells,
        }
        results["summary"] = summarise(results)
        _write(self.folder / "compare.json", results)
        write_page(results, self.folder / "report.html")
        for svg in pareto(results)[:1]:
            write_text(self.folder / "pareto.svg", standalone(svg) + "\n")
        return results

    def _cells(self) -> Iterator[tuple[Arm, int]]:
        """Seed by seed, so that a study cut short has whole rounds."""
        return ((arm, seed) for seed in self.seeds for arm in self.arms)

    def _path(self, arm: Arm, seed: int) -> Path:
        return self.folder / "cells" / f"{_slug(arm.name)}-seed{seed}.json"

    def _base(self) -> dict[str, Any]:
        print("The model as it comes", flush=True)
        return measure_base(self.bench, self.arms[0], self.folder / "runs" / "base") | _where()

    def _run(self, arm: Arm, seed: int) -> dict[str, Any]:
        name = self._path(arm, seed).stem
        try:
            return run_cell(self.bench, arm, seed, self.folder / "runs" / name, name) | _where()
        except NonFiniteError as error:  # an outcome of this arm, not of the study
            print(f"{arm.name}, seed {seed} failed: {error}", flush=True)
            return {"arm": arm.name, "seed": seed, "failed": str(error)} | _where()
        except (torch.OutOfMemoryError, OutOfMemory) as error:
            raise ValueError(
                f"{arm.name} does not fit into the device's memory: leave it out of --methods, lower "
                "--per_device_train_batch_size or --max_length, or ask `lopt plan --fit` what would; "
                "finished cells are kept"
            ) from error

    def _once(self, path: Path, make: Any) -> dict[str, Any]:
        if not path.exists():
            _write(path, make())
        return _read(path)


def _where() -> dict[str, Any]:
    """Where and when a result was made."""
    packages = ("lopt", "torch", "transformers", "trl", "peft", "lm_eval")
    return {"device": device(), "date": date.today().isoformat(), "versions": versions(packages)}


def _slug(name: str) -> str:
    """A file name: letters of `name`, and a few of its hash so that no two arms share one."""
    plain = re.sub(r"[^a-z0-9.]+", "-", name.replace("λ", "lambda").lower()).strip("-")
    return f"{plain[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
