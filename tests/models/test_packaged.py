"""The packaged model: found in the cache, refused when missing, and (slow) really converted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from lopt.models.packaged import cache_folder, packaged_model


def test_cache_is_used_and_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install \"lopt\[demo\]\""):
        packaged_model()
    (tmp_path / "gemma3-270m").mkdir()
    (tmp_path / "gemma3-270m" / "config.json").write_text("{}")
    assert packaged_model() == tmp_path / "gemma3-270m"
    monkeypatch.delenv("LOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lopt"


@pytest.mark.slow
def test_the_real_model_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data.topics import topics

    from lopt.evaluation import text_loss
    from lopt.models.load import load_model, load_tokenizer

    monkeypatch.setenv("LOPT_CACHE", str(tmp_path))
    model, tokenizer = load_model("gemma3-270m"), load_tokenizer("gemma3-270m")
    assert sum(p.numel() for p in model.parameters()) == 268_098_176 and model.dtype == torch.float32
    assert text_loss(model, tokenizer, topics["assert"], tokens=256) < 4  # knows English; blind is 12.5
    assert [p.name for p in tmp_path.iterdir()] == ["gemma3-270m"]  # nothing left over
