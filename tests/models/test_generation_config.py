"""What keeps a generation config from being saved is found before a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GenerationConfig

from conftest import tiny
from lopt.models.generation_config import make_saveable


def test_sampling_without_do_sample_is_not_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llama")
    model.generation_config = GenerationConfig(temperature=0.1, top_k=1, num_beams=4, eos_token_id=2)
    model.generation_config.pad_token_id = 0  # as a trainer does
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.validate(strict=True)
    make_saveable(model)
    assert "has temperature, top_k, without effect where do_sample is not true" in caplog.text
    model.save_pretrained(tmp_path / "saved")
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (saved.temperature, saved.top_k, saved.num_beams, saved.eos_token_id) == (None, None, 4, 2)


def test_what_has_an_effect_stays_or_is_refused() -> None:
    model = tiny("llama")
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.1)
    make_saveable(model)
    assert model.generation_config.temperature == 0.1
    model.generation_config = GenerationConfig()
    model.generation_config.num_return_sequences = 2
    with pytest.raises(ValueError, match="is not valid and could not be saved: Greedy"):
        make_saveable(model)
