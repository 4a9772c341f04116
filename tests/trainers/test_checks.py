"""Launchers and settings that cannot work with boundaries are refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopt import LoPTConfig
from lopt.trainers.checks import check_settings
from lopt.trainers.config import LoPTSFTConfig


def test_launchers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = LoPTSFTConfig(output_dir=str(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="does not run on DeepSpeed"):
        check_settings(args, LoPTConfig())
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="needs FSDP2"):
        check_settings(args, LoPTConfig())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each would train alone"):
        check_settings(args, LoPTConfig())
