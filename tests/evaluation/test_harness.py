"""Benchmarks against lm-evaluation-harness itself, which reads the same rows by its own configuration."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from conftest import tiny
from lopt import LoPTConfig, attach
from lopt.models import untie_embeddings
from small_model import byte_tokenizer

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable

from lopt.evaluation.harness import BENCHMARKS, evaluate, load_tasks

TASKS = Path(lm_eval.__file__).parent / "tasks"
# Task -> the harness's definition and the local files of its splits.
DEFINITIONS = {
    "mmlu_anatomy": ("mmlu/default/mmlu_anatomy.yaml", {"test": "mmlu/test", "dev": "mmlu/dev"}),
    "ifeval": ("ifeval/ifeval.yaml", {"train": "ifeval/train"}),
    "arc_challenge": ("arc/arc_challenge.yaml", {"test": "arc_challenge/test"}),
    "gsm8k": ("gsm8k/gsm8k.yaml", {"test": "gsm8k/test", "train": "gsm8k/train"}),
    "hellaswag": ("hellaswag/hellaswag.yaml", {"validation": "hellaswag/validation"}),
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1.yaml", {"validation": "truthfulqa_mc/validation"}),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", {"validation": "truthfulqa_mc/validation"}),
    "truthfulqa_gen": ("truthfulqa/truthfulqa_gen.yaml", {"validation": "truthfulqa_gen/validation"}),
    "winogrande": ("winogrande/default.yaml", {"validation": "winogrande/validation"}),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    changes = dict(vocab_size=len(byte_tokenizer()), max_position_embeddings=8192, num_hidden_layers=2)
    return tiny("llama", **changes)


def harness_itself(model: Any, tokenizer: Any, task: str, data: Path, folder: Path, limit: int) -> Any:
    """What `lm_eval.simple_evaluate` says of the same rows: its own YAML, loader, sampler and batches."""
    definition, files = DEFINITIONS[task]
    paths = {split: str(data / f"{file}.jsonl") for split, file in files.items()}
    if task == "mmlu_anatomy":
        for split, path in paths.items():
            rows = [line for line in Path(path).read_text().splitlines() if '"anatomy"' in line]
            (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
            paths[split] = str(folder / f"{split}.jsonl")
    config: dict[str, Any] = {"include": str(TASKS / definition), "task": task}
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": paths}}
    if task != "arc_challenge" and "train" not in paths:  # the loader knows no split without a file
        config |= {"training_split": None}
    if task == "arc_challenge":
        config |= {"training_split": None, "validation_split": None}
    if task == "mmlu_anatomy":
        config |= {"num_fewshot": 5}
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(config))
    lm = HFLM(pretrained=copy.deepcopy(model), tokenizer=copy.deepcopy(tokenizer), batch_size=2)
    return lm_eval.simple_evaluate(lm, tasks=[str(folder / f"{task}.yaml")], limit=limit, bootstrap_iters=0)


def assert_same(found: Any, expected: Any, task: str) -> None:
    """Item by item and bit by bit: prompts, log-likelihoods, generations and metrics."""
    plain = json.loads(
        json.dumps([found.samples[task], expected["samples"][task]], default=handle_non_serializable)
    )
    for mine, theirs in zip(*plain, strict=True):
        for key in theirs.keys() - {"doc", "doc_hash"}:  # a column more or less in the row is no difference
            assert mine[key] == theirs[key], (task, key)
    for key, value in expected["results"][task].items():
        if "stderr" not in key:
            assert found.results["results"][task][key] == value, (task, key)


@pytest.mark.parametrize("task", DEFINITIONS)
def test_items_are_those_of_the_harness(
    task: str, model: PreTrainedModel, shared_data: Path, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    name = {"truthfulqa_mc1": "truthfulqa_mc", "truthfulqa_mc2": "truthfulqa_mc"}.get(task, task)
    found = evaluate(model, tokenizer, [name], data_dir=shared_data, limit=2, batch_size=2, progress=False)
    assert_same(found, harness_itself(model, tokenizer, task, shared_data, tmp_path, 2), task)
