"""Results on disk, task by task, so that what is finished is not run again and nothing is mixed up.

    <folder>/results.json               in the form of lm-evaluation-harness
    <folder>/samples_<task>.jsonl       every item: question, prompt, answer, metrics
    <folder>/finished/<task>.json       a task's results, and what they were made from and with

A task is finished when its file under `finished` is there: it is written last, and at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import try_to_load_from_cache

from lopt.evaluation.names import file_name
from lopt.evaluation.outcomes import Evaluation
from lopt.files import differences, read_json, write_json, write_text
from lopt.models.load import read_config

_MODEL_FILES = (
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
            raise ValueError(f"{folder} is a file: choose another `output_dir`")
        if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
            raise ValueError(f"{folder} holds a model: choose another `output_dir`")
        if (folder / "results.json").exists() and not (folder / "finished").is_dir():
            raise ValueError(f"{folder} holds a run of another kind already: choose another `output_dir`")
        self.stale: set[str] = set()
        for path in self._records():
            self._refuse(path, differences(read_json(path)["settings"], self.settings))

    def finished(self, name: str, task: Mapping[str, Any]) -> bool:
        """Return whether `name` has results that were made from `task` (shots, definition, rows).

        Raises:
            ValueError: it has results made from another, and not `overwrite`.
        """
        path = self._record(name)
        if not path.is_file() or path.name in self.stale:
            return False
        self._refuse(path, differences(read_json(path)["task"], task))
        return path.name not in self.stale

    def save(self, name: str, task: Mapping[str, Any], part: Evaluation) -> None:
        """Keep the results of one task."""
        rows = (json.dumps(plain_sample(row), default=plain) for row in part.samples[name])
        write_text(self._samples(name), "".join(row + "\n" for row in rows))
        record = {"settings": self.settings, "task": dict(task), "results": part.results}
        write_json(self._record(name), record, default=plain)
        self.stale.discard(self._record(name).name)

    def read(self, name: str) -> Evaluation:
        """Return the results of one finished task."""
        return Evaluation(
            read_json(self._record(name))["results"], {name: _read_samples(self._samples(name))}
        )

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
                f"{self.folder} holds results made with other settings ({path.stem}: {'; '.join(other[:3])}):"
                " choose another `output_dir`, or replace them with `overwrite_output_dir`"
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
    """Return what `lopt eval` wrote for one model: `results.json` and the samples of every task.

    Raises:
        ValueError: there is no results.json.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no results of lopt eval: results.json is missing")
    results = read_json(path)
    files = {name: Path(folder) / f"samples_{file_name(name)}.jsonl" for name in results["configs"]}
    return Evaluation(results, {n: _read_samples(file) for n, file in files.items() if file.is_file()})


def model_identity(
    path: str, revision: str | None = None, trust_remote_code: bool = False, *, whole: bool = False
) -> dict[str, str]:
    """Return what identifies a model: hashes of its files by name, or its name and commit on the hub.

    Small files are hashed by their content, weights by size and time of change.

    Args:
        whole: hash weights by their content too, which is the same for a copy on another machine.
    """
    folder = Path(path)
    if not folder.is_dir():
        read_config(path, revision=revision, trust_remote_code=trust_remote_code)  # into the cache
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
        return {"hub": path, "commit": Path(cached).parent.name if isinstance(cached, str) else str(revision)}
    files: dict[str, str] = {}
    for pattern in _MODEL_FILES:
        for file in sorted(folder.glob(pattern)):
            state = file.stat()
            if whole or state.st_size <= _SMALL:
                with file.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256")
            else:
                digest = hashlib.sha256(f"{state.st_size} {state.st_mtime_ns}".encode())
            files[file.name] = digest.hexdigest()[:16]
    return files


def plain_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample in the form that the harness writes to disk; one in that form stays as it is."""
    if isinstance(sample.get("arguments"), dict) or "arguments" not in sample:
        return dict(sample)
    arguments = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(argument)}
        for i, argument in enumerate(sample["arguments"])
    }
    return {**sample, "arguments": arguments, "target": str(sample["target"])}


def plain(value: Any) -> Any:
    """Return a value that JSON has no type for as one that it has a type for."""
    if isinstance(value, np.generic):
        return value.item()
    return sorted(value) if isinstance(value, set) else str(value)


def _read_samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
