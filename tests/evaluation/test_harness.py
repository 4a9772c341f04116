"""Benchmarks against lm-evaluation-harness itself, which reads the same rows by its own configuration."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import PreTrainedModel

from conftest import tiny
from lopt import LoPTConfig, attach
from lopt.models.load import load_model, load_tokenizer
from lopt.tied_embeddings import shares_embeddings
from small_model import byte_tokenizer

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from lopt.evaluation import harness
from lopt.evaluation.harness import BENCHMARKS, Evaluation, _out_of_memory, combine, evaluate, run_task
from lopt.evaluation.tasks import LoadedTasks, load_tasks

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
    """A YAML file that includes the harness's own and names local files, `dataset_path: json`."""
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


@pytest.mark.parametrize("task", ["winogrande", "gsm8k"])
def test_batches_are_those_of_the_harness(
    task: str, model: PreTrainedModel, shared_data: Path, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    found = evaluate(
        model, tokenizer, [task], data_dir=shared_data, limit=LIMIT, batch_size=2, progress=False
    )
    expected = harness_itself(model, tokenizer, [definition_file(task, shared_data, tmp_path)], batch_size=2)
    assert_same(found, expected, task)


def test_a_model_in_training_is_left_as_it_was(shared_data: Path) -> None:
    """With boundaries, parted embeddings and a frozen part in evaluation mode; the random state included."""
    tokenizer = byte_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "right", "<eos>"
    model = tiny("llama-tied", vocab_size=len(tokenizer), max_position_embeddings=2048)
    plain = evaluate(model, tokenizer, ["winogrande"], data_dir=shared_data, limit=2, progress=False)
    lopt = attach(model, LoPTConfig(num_blocks=2))
    model.train()
    model.model.layers[0].eval()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    found = evaluate(model, tokenizer, ["winogrande"], data_dir=shared_data, limit=2, progress=False)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[n], p) for n, p in after.items())
    assert not shares_embeddings(model) and all(p.grad is None for p in after.values())
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<eos>")
    assert found.outcomes() == plain.outcomes() and len(lopt.blocks) == 2


def test_shots_are_drawn_anew_for_every_run(model: PreTrainedModel, shared_data: Path) -> None:
    """A task that is used again gives the same prompts; another seed draws others."""
    tokenizer, task = byte_tokenizer(), load_tasks(["gsm8k"], shared_data).tasks["gsm8k"]
    task.set_config("generation_kwargs", {"max_gen_toks": 1}, update=True)
    first, second, other = (
        [
            s["arguments"][0][0]
            for s in run_task(model, tokenizer, task, limit=2, progress=False, seed=seed).samples["gsm8k"]
        ]
        for seed in (None, None, 7)
    )
    assert first == second != other and first[0].count("Question:") == 6


def test_what_does_not_fit_is_said(shared_data: Path) -> None:
    tokenizer = byte_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer), max_position_embeddings=400)
    with pytest.raises(ValueError, match="ifeval lets a model generate 1280 tokens, its context is 400"):
        evaluate(model, tokenizer, ["ifeval"], data_dir=shared_data, limit=1, progress=False)
    with pytest.warns(UserWarning, match=r"cut from the left: truthfulqa_mc1 \(\d+ of \d+\)"):
        evaluate(model, tokenizer, ["truthfulqa_mc1"], data_dir=shared_data, limit=1, progress=False)
    full, lm = torch.OutOfMemoryError("full"), SimpleNamespace(batch_size=16, model=model, device="cuda:0")
    others = "`param_dtype` bfloat16, a device with more memory"
    begin = "mmlu does not fit into the memory of cuda:0: try"
    said = _out_of_memory(full, "mmlu", lm, proposes_batch=True)
    assert said == f"{begin} `batch_size` 4 (it was 16), {others}"
    assert _out_of_memory(full, "mmlu", lm, proposes_batch=False) == f"{begin} {others}"
    assert _out_of_memory(RuntimeError("a bug"), "mmlu", lm, proposes_batch=True) is None


def test_no_flag_is_proposed_that_the_caller_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lopt eval` gives `batch_size`; retention tasks and `lopt compare` do not."""

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(harness.evaluator, "evaluate", fail)
    tokenizer = byte_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    monkeypatch.setattr(harness._LiveModel, "batch_size", property(lambda self: 16))
    task = SimpleNamespace(config=SimpleNamespace(task="gsm8k"), set_fewshot_seed=lambda seed: None)
    for options, proposed in (({}, False), ({"batch_size": "auto"}, True)):
        with pytest.raises(ValueError, match="gsm8k does not fit") as error:
            run_task(model, tokenizer, task, progress=False, **options)
        assert ("batch_size" in str(error.value)) == proposed


def part(name: str, right: list[int]) -> Evaluation:
    result = {"name": name, "alias": name, "sample_len": len(right), "acc,none": sum(right) / len(right)}
    samples = [
        {"doc_id": i, "filter": "none", "acc": v, "doc_hash": f"{name}{i}"} for i, v in enumerate(right)
    ]
    whole = {"results": {name: result}, "higher_is_better": {name: {"acc": True}}, "versions": {name: 1}}
    return Evaluation({**whole, "group_subtasks": {}, "n-shot": {name: 5}}, {name: samples})


class Subject(ConfigurableTask):
    """A task that has a name and nothing else."""

    def __init__(self, name: str) -> None:
        self._config = SimpleNamespace(task=name)


def test_mmlu_is_the_mean_over_questions() -> None:
    """Not the mean over subjects: these have 3 and 1 questions."""
    mean = [{"metric": "acc", "weight_by_size": True}]
    inner = Group.from_config({"group": "mmlu_stem", "aggregate_metric_list": mean})
    outer = Group.from_config({"group": "mmlu", "aggregate_metric_list": mean})
    for name in ("mmlu_b", "mmlu_a"):
        inner.add(Subject(name))
    outer.add(inner)
    parts = {"mmlu_b": part("mmlu_b", [1, 1, 0]), "mmlu_a": part("mmlu_a", [0])}
    whole = combine(parts, LoadedTasks({}, {"mmlu": outer, "mmlu_stem": inner}))
    assert whole.results["groups"]["mmlu"]["acc,none"] == 0.5
    assert list(whole.outcomes()) == ["mmlu"] and whole.outcomes()["mmlu"].values == [1, 1, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("task", DEFINITIONS)
def test_items_of_a_real_model(task: str, shared_data: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model("gemma3-270m"), load_tokenizer("gemma3-270m")
    name = {"truthfulqa_mc1": "truthfulqa_mc", "truthfulqa_mc2": "truthfulqa_mc"}.get(task, task)
    found = evaluate(model, tokenizer, [name], data_dir=shared_data, limit=LIMIT, batch_size=2)
    assert_same(
        found, harness_itself(model, tokenizer, [definition_file(task, shared_data, tmp_path)], 2), task
    )
