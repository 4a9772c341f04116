"""`lopt probe`: from folders to a table, a page and JSON, and what it says of mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from conftest import save_tiny
from lopt import load_model
from lopt.cli.main import main

TEXT = "Some text that has nothing to do with sums, read by two models.\n" * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a model cut at layer 3 whose layer 3 and untied head moved, one that was not touched."""
    root = tmp_path_factory.mktemp("probe")
    base = save_tiny(root / "base", "llama-tied")
    (root / "text.txt").write_text(TEXT)
    model = load_model(str(base))
    model.save_pretrained(root / "same")
    model.lm_head.weight = torch.nn.Parameter(1.5 * model.lm_head.weight.detach())
    model.config.tie_word_embeddings = False
    model.model.layers[3].mlp.up_proj.weight.data *= 2
    model.save_pretrained(root / "cut")
    (root / "cut" / "lopt_config.json").write_text('{"block_boundaries": [3]}')
    for name in ("same", "cut"):
        AutoTokenizer.from_pretrained(base).save_pretrained(root / name)
    save_tiny(root / "wide", hidden_size=16)
    save_tiny(root / "reader", "llama-tied")
    words = json.loads((root / "reader" / "tokenizer.json").read_text())
    words["model"]["vocab"] = dict(
        zip(words["model"]["vocab"], reversed(words["model"]["vocab"].values()), strict=True)
    )
    (root / "reader" / "tokenizer.json").write_text(json.dumps(words))
    return root


def probe(folder: Path, *flags: object) -> int:
    files = ("--base", folder / "base", "--text", folder / "text.txt", "--output_dir", folder / "out")
    return main(["probe", *map(str, (*files, *flags))])


def test_two_models_in_one_report(folder: Path, capsys: pytest.CaptureFixture) -> None:
    models = [folder / "cut", folder / "same"]
    assert probe(folder, "--model_name_or_path", *models, "--tokens", 100) == 0
    out = capsys.readouterr().out
    assert "layer 3 (block 2)" in out and "cut, 100 tokens" in out
    found = json.loads((folder / "out" / "probe.json").read_text())
    cut, same = found["models"]["cut"], found["models"]["same"]
    assert cut["boundaries"] == [3] and cut["path"] == str(folder / "cut")
    assert [layer["relative_l2"] > 0 for layer in cut["layers"]] == [False] * 4 + [True]
    assert cut["weights"]["head"] == pytest.approx(0.5) and cut["weights"]["block 1"] == 0
    assert same["boundaries"] == [] and set(same["weights"].values()) == {0.0}
    page = (folder / "out" / "report.html").read_text()
    assert page.count("<svg") == 7 and "same has not moved" in page and not re.search("nan|inf", page)
    assert not list((folder / "out").glob("*.part"))
    assert probe(folder, "--model_name_or_path", folder / "cut", "--num_blocks", 2) == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    more = ("--num_blocks", 2, "--overwrite_output_dir", "true")
    assert probe(folder, "--model_name_or_path", folder / "cut", *more) == 0
    assert json.loads((folder / "out" / "probe.json").read_text())["models"]["cut"]["boundaries"] == [2]


def test_adapters(folder: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load_model(str(folder / "base")), peft.LoraConfig(target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter.data)
    model.save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "adapter")
    out = folder / "adapter_out"
    assert probe(folder, "--model_name_or_path", folder / "adapter", "--output_dir", out) == 0
    weights = json.loads((out / "probe.json").read_text())["models"]["adapter"]["weights"]
    assert weights["layer 0"] > 0 and weights["embedding"] == 0
