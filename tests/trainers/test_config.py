"""The defaults of the command line."""

from __future__ import annotations

import warnings
from pathlib import Path

from lopt.trainers.config import LoPTSFTConfig


def test_defaults(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = LoPTSFTConfig(output_dir=str(tmp_path), use_cpu=True)
        asked = LoPTSFTConfig(output_dir=str(tmp_path), use_cpu=True, gradient_checkpointing=True)
    assert not config.gradient_checkpointing and asked.gradient_checkpointing
    if hasattr(config, "activation_checkpointing"):  # the flag's new name, since transformers 5.23
        assert not config.activation_checkpointing and asked.activation_checkpointing
    assert config.learning_rate == 2e-5 and config.save_total_limit == 2
