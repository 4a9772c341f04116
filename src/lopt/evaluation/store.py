"""Results on disk, task by task, so that what is finished is not run again and nothing is mixed up.

    <folder>/results.json               in the form of lm-evaluation-harness
    <folder>/samples_<task>.jsonl       every item: question, prompt, answer, metrics
    <folder>/finished/<task>.json       a task's results, and what they were made from and with

A task is finished when its file under `finished` is there: it is written last, and at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import try_to_load_from_cache

from lopt.evaluation.outcomes import Evaluation
from lopt.files import write_text
from lopt.models.load import read_config

_OF_A_MODEL = (
    *("config.json", "generation_config.json", "adapter_config.json", "*.safetensors*", "*.jinja"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json"),
)
_SMALL = 16 * 2**20


class Store:
    """The results of one model under one set of settings.

    Args:
        folder: holds this model's results and nothing else.
        settings: what all tasks share: model, precision, limit, versions. Plain JSON values.
        overwrite: replace results that were made with other settings.

    Raises:
        ValueError: the folder holds something else, or results of other settings and not `overwrite`.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
        self.folder, self.settings, self.overwrite = folder, dict(settings), overwrite
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: choose another --output_dir")
        if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
            raise ValueError(f"{folder} holds a model: choose another --output_dir")
        if (folder / "results.json").exists() and not (folder / "finished").is_dir():
            raise ValueError(f"{folder} holds a run of another kind already: choose another --output_dir")
        self.stale: set[str] = set()
        for path in self._records():
            other = differences(json.loads(path.read_text(encoding="utf-8"))["settings"], self.settings)
            self._refuse(path, other)

    def finished(self, name: str, task: Mapping[str, Any]) -> bool:
        """Whether `name` has results, made from `task` (shots, definition, rows).

        Raises:
            ValueError: it has results made from another, and not `overwrite`.
        """
        path = self._record(name)
        if not path.is_file() or path.name in self.stale:
            return False
        self._refuse(path, differences(json.loads(path.read_text(encoding="utf-8"))["task"], task))
        return path.name not in self.stale

    def save(self, name: str, task: Mapping[str, Any], part: Evaluation) -> None:
        """Keep the results of one task."""
        rows = (json.dumps(plain_sample(row), default=plain) for row in part.samples[name])
        write_text(self._samples(name), "".join(row + "\n" for row in rows))
        record = {"settings": self.settings, "task": dict(task), "results": part.results}
        write_text(self._record(name), json.dumps(record, indent=1, default=plain) + "\n")
        self.stale.discard(self._record(name).name)

    def read(self, name: str) -> Evaluation:
        """The results of one finished task."""
        record = json.loads(self._record(name).read_text(encoding="utf-8"))
        return Evaluation(record["results"], {name: _read_samples(self._samples(name))})

    def drop_stale(self) -> None:
        """Remove results of other settings, before the first result of these is written."""
        for name in self.stale:
            path = self.folder / "finished" / name
            path.unlink(missing_ok=True)
            (self.folder / f"samples_{path.stem}.jsonl").unlink(missing_ok=True)
        if self.stale and not self._records():
            (self.folder / "results.json").unlink(missing_ok=True)
        self.stale.clear()

    def _refuse(self, path: Path, other: list[str]) -> None:
        if other and not self.overwrite:
            raise ValueError(
                f"{self.folder} holds results that were made otherwise ({path.stem}: {'; '.join(other[:3])}):"
                " choose another --output_dir, or replace them with --overwrite_output_dir"
            )
        if other:
            self.stale.add(path.name)

    def _records(self) -> list[Path]:
        return sorted((self.folder / "finished").glob("*.json"))

    def _record(self, name: str) -> Path:
        return self.folder / "finished" / f"{file_name(name)}.json"

    def _samples(self, name: str) -> Path:
        return self.folder / f"samples_{file_name(name)}.jsonl"


def read_results(folder: str | Path) -> Evaluation:
    """What `lopt eval` wrote for one model: `results.json` and the samples of every task.

    Raises:
        ValueError: there is no results.json.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no results of lopt eval: results.json is missing")
    results = json.loads(path.read_text(encoding="utf-8"))
    names = [
        name for name in results["configs"] if (Path(folder) / f"samples_{file_name(name)}.jsonl").is_file()
    ]
    samples = {name: _read_samples(Path(folder) / f"samples_{file_name(name)}.jsonl") for name in names}
    return Evaluation(results, samples)


def model_identity(path: str, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, str]:
    """What tells one model from another: for a folder its files, on the hub its commit.

    Small files count by their content, weights by size and time of change.
    """
    folder = Path(path)
    if not folder.is_dir():
        read_config(path, revision=revision, trust_remote_code=trust_remote_code)  # into the cache
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
        return {"hub": path, "commit": Path(cached).parent.name if isinstance(cached, str) else str(revision)}
    files: dict[str, str] = {}
    for pattern in _OF_A_MODEL:
        for file in sorted(folder.glob(pattern)):
            state = file.stat()
            small = state.st_size <= _SMALL
            told = file.read_bytes() if small else f"{state.st_size} {state.st_mtime_ns}".encode()
            files[file.name] = hashlib.sha256(told).hexdigest()[:16]
    return files


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two trees of plain values differ, as "name: old there, new now"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*new, *(key for key in old if key not in new)]
        return [
            d for key in keys for d in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if json.loads(json.dumps(new)) == old else [f"{name} was {_brief(old)} and is {_brief(new)}"]


def _brief(value: Any) -> str:
    told = json.dumps(value)
    return told if len(told) < 60 else told[:57] + "..."


def plain_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample in the form that the harness writes to disk; one that has it already stays as it is."""
    if isinstance(sample.get("arguments"), dict) or "arguments" not in sample:
        return dict(sample)
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(argument)}
        for i, argument in enumerate(sample["arguments"])
    }
    return {**sample, "arguments": arguments, "target": str(sample["target"])}


def plain(value: Any) -> Any:
    """What JSON has no word for, in words that it has."""
    if isinstance(value, np.generic):
        return value.item()
    return sorted(value) if isinstance(value, set) else str(value)


def finite(value: Any) -> Any:
    """A tree of values in which numbers that JSON does not know are None."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def file_name(name: str) -> str:
    """A task's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name)


def _read_samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
