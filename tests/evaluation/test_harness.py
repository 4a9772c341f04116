"""Benchmarks against lm-evaluation-harness itself, which reads the same rows by its own configuration."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel

from conftest import tiny
from small_model import byte_tokenizer

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from lopt.evaluation.harness import BENCHMARKS, evaluate

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


LIMIT = 2


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Small, with room for any prompt, and with many end-of-text tokens so that answers end."""
    changes = dict(vocab_size=len(byte_tokenizer()), max_position_embeddings=8192, num_hidden_layers=2)
    model = tiny("llama", **changes)
    model.generation_config.eos_token_id = [2, *range(3, 259, 8)]
    return model


def definition_file(task: str, data: Path, folder: Path) -> str:
    """A YAML file that includes the harness's own and names local files as it does, `dataset_path: json`."""
    definition, files = DEFINITIONS[task]
    paths = {split: str(data / f"{file}.jsonl") for split, file in files.items()}
    if task == "mmlu_anatomy":
        for split, path in paths.items():
            rows = [line for line in Path(path).read_text().splitlines() if '"anatomy"' in line]
            (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
            paths[split] = str(folder / f"{split}.jsonl")
    config: dict[str, Any] = {"include": str(TASKS / definition), "task": task, "dataset_path": "json"}
    config |= {"dataset_name": None, "dataset_kwargs": {"data_files": paths}}
    config |= {
        f"{kind}_split": None for kind in ("training", "validation") if f"{kind[:5]}" not in str(paths)
    }
    config |= {"num_fewshot": 5} if task == "mmlu_anatomy" else {}
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(config))
    return str(folder / f"{task}.yaml")


def harness_itself(model: Any, tokenizer: Any, tasks: list[str], batch_size: int) -> Any:
    """What `lm_eval.simple_evaluate` says: its own loader, sampler, batches and scores."""
    lm = HFLM(pretrained=copy.deepcopy(model), tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    with pytest.MonkeyPatch.context() as patch:  # it asks pip for every version, which takes seconds
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        manager = TaskManager(include_defaults=False)
        return lm_eval.simple_evaluate(lm, tasks=tasks, limit=LIMIT, bootstrap_iters=0, task_manager=manager)


def assert_same(found: Any, expected: Any, task: str) -> None:
    """Item by item and bit by bit: prompts, log-likelihoods, generations and metrics."""
    pair = [found.samples[task], expected["samples"][task]]
    mine, theirs = json.loads(json.dumps(pair, default=handle_non_serializable))
    assert len(mine) == len(theirs) >= LIMIT
    for ours, other in zip(mine, theirs, strict=True):
        for key in other.keys() - {"doc", "doc_hash"}:  # a column more or less in a row is no difference
            assert ours[key] == other[key], (task, key)
    for key, value in expected["results"][task].items():
        assert "stderr" in key or found.results["results"][task][key] == value, (task, key)


@pytest.fixture(scope="module")
def both(model: PreTrainedModel, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer, folder = byte_tokenizer(), tmp_path_factory.mktemp("tasks")
    names = ["mmlu_anatomy", *(name for name in BENCHMARKS if name != "mmlu")]
    found = evaluate(model, tokenizer, names, data_dir=shared_data, limit=LIMIT, batch_size=1, progress=False)
    files = [definition_file(task, shared_data, folder) for task in DEFINITIONS]
    return found, harness_itself(model, tokenizer, files, batch_size=1)


@pytest.mark.parametrize("task", DEFINITIONS)
def test_items_are_those_of_the_harness(task: str, both: Any) -> None:
    assert_same(*both, task)


@pytest.mark.parametrize("task", ["winogrande", "truthfulqa_gen"])
def test_batches_are_those_of_the_harness(
    task: str, model: PreTrainedModel, shared_data: Path, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    found = evaluate(
        model, tokenizer, [task], data_dir=shared_data, limit=LIMIT, batch_size=2, progress=False
    )
    expected = harness_itself(model, tokenizer, [definition_file(task, shared_data, tmp_path)], batch_size=2)
    assert_same(found, expected, task)
