"""Where a result comes from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from datasets import Dataset

from lopt.reliability.provenance import environment, fingerprint, git_state, git_states, versions


def test_a_fingerprint_is_that_of_the_rows_in_their_order() -> None:
    rows = [{"b": "ü", "a": 1}, {"b": "x", "a": 2}]
    assert (
        fingerprint(rows)
        == fingerprint(Dataset.from_list(rows))
        == fingerprint([dict(sorted(r.items())) for r in rows])
    )
    assert len({fingerprint(rows), fingerprint(rows[::-1]), fingerprint(rows[:1])}) == 3


def test_the_state_of_a_repository(tmp_path: Path) -> None:
    """Also of one whose settings name a program to run: it is not run."""
    assert git_state(tmp_path) is None and git_state(tmp_path / "missing") is None
    marker = tmp_path / "ran"

    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "a.txt").write_text("a")
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-m", "m")
    state = git_state(tmp_path)
    assert state is not None and state["changed_files"] == 0 and len(state["commit"]) == 40
    hook = tmp_path / "hook.sh"
    hook.write_text(f"#!/bin/sh\ntouch {marker}\n")
    hook.chmod(0o755)
    git("config", "core.fsmonitor", str(hook))
    assert git_state(tmp_path) == {"commit": state["commit"], "changed_files": 1}  # the hook itself is new
    assert not marker.exists()


def test_what_is_recorded_is_plain_and_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    told = json.dumps([environment(), git_states(), versions()])
    assert "hf_secret" not in told and {"lopt", "torch", "transformers", "trl"} <= versions().keys()
