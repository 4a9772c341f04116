"""Launchers and settings that cannot work with boundaries are refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopt import LoPTConfig
from lopt.trainers.checks import check_settings
from lopt.trainers.config import LoPTGRPOConfig, LoPTSFTConfig


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
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr("lopt.trainers.checks.OLDEST_FOR_FSDP2", {"accelerate": "99"})
    with pytest.raises(ImportError, match="FSDP2 needs accelerate >= 99"):
        check_settings(args, LoPTConfig(method="e2e"))
    monkeypatch.setattr("lopt.trainers.checks.OLDEST_FOR_FSDP2", {})
    check_settings(args, LoPTConfig())
    with pytest.raises(ValueError, match="`aux_loss` recon"):
        check_settings(args, LoPTConfig(aux_loss="next_token"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each would train alone"):
        check_settings(args, LoPTConfig())


BLOCK = LoPTConfig(schedule="block_major", offload="block")


def test_weights_that_travel_are_for_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = LoPTSFTConfig(output_dir=str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match="use `offload` optimizer"):
        check_settings(args, BLOCK)
    check_settings(args, BLOCK.replace(offload="optimizer"))


def test_weights_that_travel_are_not_for_vllm(tmp_path: Path) -> None:
    args = LoPTGRPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=8)
    args.use_vllm = True
    with pytest.raises(ValueError, match="weights that are not on the device"):
        check_settings(args, BLOCK)
