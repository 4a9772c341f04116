"""What tells one model from another."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest

from lopt.evaluation.store import model_identity


def test_a_model_of_the_hub_is_known_by_its_commit(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(commit)
    shutil.copytree(tiny_folder, cached / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert (
        model_identity("org/tiny")
        == model_identity("org/tiny", "main")
        == {"hub": "org/tiny", "commit": commit}
    )
