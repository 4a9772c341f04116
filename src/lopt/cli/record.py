"""What made an output folder: `run.yaml`, to run it again, and `run.json`, to know how it came about."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from lopt.cli.parsing import settings
from lopt.evaluation.store import differences
from lopt.files import write_text
from lopt.reliability.provenance import environment, fingerprint, git_states, versions
from lopt.reliability.secrets import is_secret_name, known_secrets, redacted, redacted_words
from lopt.version import __version__

RUN_YAML, RUN_JSON = "run.yaml", "run.json"
_OF_ONE_START = ("resume", "overwrite_output_dir", "max_time")
_IN_THE_CHECKPOINT = ("learning_rate", "lr_k1", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_GROW = ("eval", "compare")  # commands that add to what their folder holds
_HEADER = """\
# How this folder was made. To make it again, from the same working folder:
#
#     lopt {command} --config {path}
#
# Flags on the command line win. What is not here is the default of lopt {version}; {json} has every value.
"""


@dataclass(frozen=True)
class Record:
    """A command as it was given.

    Attributes:
        settings: the value of every flag.
        changed: those that differ from their defaults.
    """

    command: str
    arguments: list[str]
    settings: dict[str, Any]
    changed: dict[str, Any]

    @classmethod
    def of(cls, command: str, arguments: Sequence[str]) -> Record:
        """The record of arguments that `lopt.cli.parsing.parse` has accepted; secrets are left out."""
        secrets = known_secrets(arguments)
        every, changed = (
            redacted({k: v for k, v in values.items() if not is_secret_name(k)}, secrets)
            for values in settings(command, arguments)
        )
        return cls(command, redacted_words(arguments, secrets), every, changed)

    def write(
        self, folder: Path, data: Mapping[str, Any] | None = None, resumed_from: str | None = None
    ) -> None:
        """Write both files; one more attempt at a run that is resumed, saying what has changed since.

        Args:
            data: what was trained on, from `data_facts`.
            resumed_from: the checkpoint.
        """
        path, before = folder / RUN_JSON, {}
        if path.is_file() and (resumed_from is not None or self.command in _GROW):
            before = json.loads(path.read_text(encoding="utf-8"))
        attempt = self._attempt(resumed_from)
        if before and resumed_from is not None:
            for sentence in _changes(before, self.settings, data, attempt):
                print(f"Resume: {sentence}")
        content = {
            "settings": self.settings,
            "data": data,
            "attempts": [*before.get("attempts", []), attempt],
        }
        write_text(path, json.dumps(content, indent=1, default=str) + "\n")
        write_text(folder / RUN_YAML, self._yaml(folder))

    def _attempt(self, resumed_from: str | None) -> dict[str, Any]:
        return {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(["lopt", self.command, *self.arguments]),
            "working_folder": str(Path.cwd()),
            "resumed_from": resumed_from,
            "versions": versions(),
            "git": git_states(),
            "environment": environment(),
        }

    def _yaml(self, folder: Path) -> str:
        kept = {k: v for k, v in self.changed.items() if k not in _OF_ONE_START}
        if "seed" in self.settings:
            kept["seed"] = self.settings["seed"]
        kept["output_dir"] = f"{folder}-rerun"  # what is there is not overwritten
        head = _HEADER.format(
            command=self.command, path=folder / RUN_YAML, json=RUN_JSON, version=__version__
        )
        return head + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def data_facts(rows: Mapping[str, Iterable[Any] | None]) -> dict[str, Any]:
    """Number and fingerprint of each set of rows by name; of a stream nothing is known beforehand."""
    facts: dict[str, Any] = {}
    for name, part in rows.items():
        if part is not None:
            sized = hasattr(part, "__len__")
            facts[name] = {"rows": len(part), "sha256": fingerprint(part)} if sized else "streamed"  # type: ignore[arg-type]
    return facts


def _changes(
    before: Mapping[str, Any], settings: Mapping[str, Any], data: Any, attempt: Mapping[str, Any]
) -> list[str]:
    """What a resumed run does otherwise than the run it goes on with."""
    told = []
    was = {k: v for k, v in before["settings"].items() if k not in (*_OF_ONE_START, "config")}
    now = {k: v for k, v in json.loads(json.dumps(settings, default=str)).items() if k in was}
    for what, old, new in (
        ("settings", was, now),
        ("versions", before["attempts"][-1]["versions"], attempt["versions"]),
    ):
        if found := differences(old, new):
            told.append(f"other {what} than before: {'; '.join(found)}")
    kept = [name for name in _IN_THE_CHECKPOINT if was.get(name) != now.get(name)]
    if kept:
        told.append(f"the checkpoint's own {', '.join(kept)} go on: start anew to change that")
    if before["data"] != json.loads(json.dumps(data)):
        told.append("the rows are not those that the run began with, so it is not the same run")
    return told
