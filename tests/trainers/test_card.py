"""The model card says what was done, in metadata that huggingface_hub reads; its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, LlamaForCausalLM
from trl import DPOConfig

from conftest import save_tiny
from lopt import LoPTConfig, LoPTDPOTrainer, LoPTGRPOTrainer
from lopt.cli.main import main
from lopt.data.presets import PRESETS
from lopt.trainers.card import DataSource, model_card
from lopt.trainers.config import LoPTGRPOConfig


@pytest.mark.parametrize("method", ["lopt", "lora"])
def test_the_card_of_a_run(tmp_path: Path, sums_file: Path, method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    base, folder = save_tiny(tmp_path / "base"), tmp_path / "my run"
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: gemma\n---\n# Base\n")
    words = ["--model_name_or_path", base, "--train_file", sums_file, "--output_dir", folder]
    words += ["--method", method, "--max_steps", 2, "--head_warmup_steps", 1, "--held_out", 8]
    (tmp_path / "texts.txt").write_text("What is 2 plus 2? " * 40)
    words += ["--retention_text", tmp_path / "texts.txt", "--retention_tokens", 64]
    assert main(["sft", *map(str, words)]) == 0
    text = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert "None" not in text and "local folder (`base`), whose licence is gemma" in text
    assert (card.data.license, card.data.license_name, card.data.base_model) == ("other", "gemma", None)
    assert card.data.library_name == ("peft" if method == "lora" else "transformers")
    assert "Trained on 40 rows, from a local file: `sums.jsonl`. Evaluated on 8 rows" in text
    assert {result.metric_type for result in card.data.eval_results} == {"loss", "change"}
    if method == "lopt":
        assert "2 blocks (layers 0 to 1, 2 to 3)" in text and "arXiv:2605.04913" in text
        assert "| learning rate of earlier blocks | 2e-06 |" in text
    else:
        assert "Adapters (LoRA)" in text and "| LoRA rank | 16 |" in text and "arXiv:2605" not in text
    code = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    assert str(folder) in code
    exec(code.replace("max_new_tokens=128", "max_new_tokens=2"), {})


def test_a_packaged_model_is_named_as_on_the_hub(
    tmp_path: Path, sums_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path))
    save_tiny(tmp_path / "smollm2-135m")
    words = [
        "--model_name_or_path",
        "smollm2-135m",
        "--train_file",
        sums_file,
        "--output_dir",
        tmp_path / "out",
    ]
    words += ["--method", "frozen", "--max_steps", 1]
    assert main(["sft", *map(str, words)]) == 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (card.data.license, card.data.base_model) == ("apache-2.0", base)
    assert (
        f"[{base}](https://huggingface.co/{base}), whose licence is apache-2.0 (weights rounded to 4 bits"
        in text
    )


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_cards_of_the_other_trainers(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    model, common = (
        LlamaForCausalLM.from_pretrained(tiny_folder),
        dict(output_dir=str(tmp_path / "out"), max_steps=1, report_to="none", per_device_train_batch_size=4),
    )
    given = dict(lopt_config=LoPTConfig(), processing_class=AutoTokenizer.from_pretrained(tiny_folder))
    rows = [{"prompt": f"Question {i}: ", "chosen": "yes", "rejected": "no"} for i in range(8)]
    if name == "dpo":
        args = DPOConfig(**common, use_cpu=True, bf16=False)
        trainer = LoPTDPOTrainer(model, args=args, train_dataset=Dataset.from_list(rows), **given)
    else:
        args = LoPTGRPOConfig(**common, num_generations=4)
        prompts = Dataset.from_list(rows).select_columns("prompt")
        reward = lambda completions, **_: [0.0] * len(completions)  # noqa: E731
        trainer = LoPTGRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=prompts, **given)
    trainer.model.config.name_or_path = "someone/base"
    trainer.create_model_card(dataset_name="someone/rows", tags="mine")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.base_model == "someone/base" and card.data.datasets == ["someone/rows"]
    assert {"trl", name, "lopt"} <= set(card.data.tags) and "whose licence this card does not know" in text
    assert "Trained on 8 rows, from [someone/rows](https://huggingface.co/datasets/someone/rows)." in text
    assert f"{name.upper()} trainer" in text and "| β | " in text and "someone/base" in text
    assert ("rafailov2023" if name == "dpo" else "shao2024") in text
    assert "Nothing was measured" in str(model_card(trainer, tmp_path, "x", []))


def test_where_rows_come_from() -> None:
    gsm8k = PRESETS["gsm8k"]
    copy = DataSource.of({"dataset_preset": "gsm8k", "train_file": ["a/b.parquet"]})
    assert copy.hub_id == gsm8k.hub_id and "`b.parquet`" in copy.words and "licence: MIT" in copy.words
    assert DataSource.of({"task": "gsm8k"}).hub_id == gsm8k.hub_id
    mine = DataSource.of({"task": "gsm8k", "train_file": ["a/b.parquet"]})
    assert (mine.words, mine.hub_id) == ("from a local file: `b.parquet`", None)
    assert DataSource.of({"task": "chain_sum"}).words == "generated by the task chain_sum"
    mixed = DataSource.of({"data_mix": ["a/b.jsonl.gz:3", "gsm8k:1"], "train_file": None})
    assert mixed.words.startswith("mixed from `b.jsonl.gz` (75.0% of the rows); [") and mixed.hub_id is None
    assert mixed.name == "b.jsonl.gz, gsm8k"
    assert DataSource.of({"dataset_name": "a/b", "train_file": None}).hub_id == "a/b"
