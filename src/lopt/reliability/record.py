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

from lopt.files import differences, read_json, write_json, write_text
from lopt.reliability.provenance import environment, fingerprint, git_states, versions
from lopt.reliability.secrets import is_secret_name, known_secrets, redacted, redacted_words
from lopt.version import __version__

RUN_YAML, RUN_JSON = "run.yaml", "run.json"
_OF_ONE_START = ("resume", "resume_from_checkpoint", "overwrite_output_dir", "max_time")
_IN_THE_CHECKPOINT = ("learning_rate", "lr_k1", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_GROW = ("eval", "compare", "compare dpo")  # commands that add to what their folder holds
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
    def of(
        cls,
        command: str,
        arguments: Sequence[str],
        settings: Mapping[str, Any],
        changed: Mapping[str, Any],
    ) -> Record:
        """Return the record of a command line and the settings it was parsed to, without secrets."""
        secrets = known_secrets(arguments)
        every, kept = (
            redacted({name: value for name, value in values.items() if not is_secret_name(name)}, secrets)
            for values in (settings, changed)
        )
        return cls(command, redacted_words(arguments, secrets), every, kept)

    def write(
        self,
        folder: Path,
        data: Mapping[str, Any] | None = None,
        resumed_from: str | None = None,
        template: str | None = None,
    ) -> None:
        """Write both files; a resumed run adds an attempt, and prints what has changed since the last one.

        Args:
            data: what was trained on, from `data_facts`.
            resumed_from: the checkpoint.
            template: of the rows, where there is no chat template: a kind of `lopt.data.columns.Format`.
        """
        path, before = folder / RUN_JSON, {}
        if path.is_file() and (resumed_from is not None or self.command in _GROW):
            before = read_json(path)
        attempt = {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": shlex.join(["lopt", self.command, *self.arguments]),
            "working_folder": str(Path.cwd()),
            "resumed_from": resumed_from,
            "versions": versions(),
            "git": git_states(),
            "environment": environment(),
        }
        if before and resumed_from is not None:
            for change in _changes(before, self.settings, data, attempt):
                print(f"Resume: {change}")
        attempts = [*before.get("attempts", []), attempt]
        written = {"settings": self.settings, "data": data, "template": template, "attempts": attempts}
        write_json(path, written, default=str)
        write_text(folder / RUN_YAML, self.run_yaml(folder))

    def run_yaml(self, folder: Path) -> str:
        """Return the content of `run.yaml`, whose output folder is another: nothing is overwritten."""
        kept = {name: value for name, value in self.changed.items() if name not in _OF_ONE_START}
        if "seed" in self.settings:
            kept["seed"] = self.settings["seed"]
        kept["output_dir"] = f"{folder}-rerun"
        head = _HEADER.format(
            command=self.command, path=folder / RUN_YAML, json=RUN_JSON, version=__version__
        )
        return head + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def command_in(folder: Path) -> str | None:
    """Return the command that made a folder, such as `sft`; None if no `run.json` of `lopt` says it."""
    try:
        words = shlex.split(read_json(folder / RUN_JSON)["attempts"][-1]["command"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return words[1] if words[:1] == ["lopt"] and len(words) > 1 else None


def data_facts(rows: Mapping[str, Iterable[Any] | None]) -> dict[str, Any]:
    """Return number and fingerprint of each set of rows by name; nothing is known of a stream beforehand."""
    facts: dict[str, Any] = {}
    for name, part in rows.items():
        if part is not None:
            sized = hasattr(part, "__len__")
            facts[name] = {"rows": len(part), "sha256": fingerprint(part)} if sized else "streamed"  # type: ignore[arg-type]
    return facts


def _changes(
    before: Mapping[str, Any], settings: Mapping[str, Any], data: Any, attempt: Mapping[str, Any]
) -> list[str]:
    """Return in what a resumed run differs from the run it goes on with."""
    changes = []
    was = {k: v for k, v in before["settings"].items() if k not in (*_OF_ONE_START, "config")}
    now = {k: v for k, v in json.loads(json.dumps(settings, default=str)).items() if k in was}
    for what, old, new in (
        ("settings", was, now),
        ("versions", before["attempts"][-1]["versions"], attempt["versions"]),
    ):
        if found := differences(old, new):
            changes.append(f"other {what} than before: {'; '.join(found)}")
    kept = [name for name in _IN_THE_CHECKPOINT if was.get(name) != now.get(name)]
    if kept:
        changes.append(f"the checkpoint's own {', '.join(kept)} go on: start anew to change that")
    if before["data"] != json.loads(json.dumps(data)):
        changes.append("the rows are not those that the run began with, so it is not the same run")
    return changes
