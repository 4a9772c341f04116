"""Results of an evaluation, and its outcomes: one number per item, by the benchmark's main metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MAIN_METRIC = {
    "mmlu": "acc,none",
    "ifeval": "prompt_level_strict_acc,none",
    "arc_challenge": "acc_norm,none",
    "gsm8k": "exact_match,flexible-extract",
    "hellaswag": "acc_norm,none",
    "truthfulqa_mc1": "acc,none",
    "truthfulqa_mc2": "acc,none",
    "truthfulqa_gen": "bleu_acc,none",
    "winogrande": "acc,none",
}
"""Main metric and filter of each benchmark; other tasks: the first of their own list.

GSM8K counts the last number of an answer rather than only one after "####": the question is whether a model
is still able to solve it, not whether it still writes in the form of the training set.
"""


@dataclass(frozen=True)
class TaskOutcome:
    """A task's main metric, one value per item in the order of doc_id (MMLU: subject by subject)."""

    task: str
    metric: str
    higher_is_better: bool
    values: list[float]


@dataclass
class Evaluation:
    """Results as `lm_eval` returns them, and per task the sample of every item: prompt, answers, metrics."""

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def outcomes(self) -> dict[str, TaskOutcome]:
        """Return the main metric of every task, item by item.

        MMLU is one task, as its mean weighs subjects by their questions: all items one after the other. Tasks
        whose metric is no mean over items (perplexities of documents) are left out.
        """
        results, outcomes = self.results, {}
        for name, leaves in task_members(results, self.samples).items():
            metric = main_metric(name, results["results"][leaves[0]])
            if metric is None:
                continue
            key, where = metric.split(",")
            rows = [sample for leaf in leaves for sample in self.samples[leaf] if sample["filter"] == where]
            if rows and all(isinstance(row[key], int | float | np.number | np.bool_) for row in rows):
                better = results["higher_is_better"][leaves[0]].get(key, True)
                values = [float(row[key]) * row.get("weight", 1.0) for row in rows]
                outcomes[name] = TaskOutcome(name, metric, bool(better), values)
        return outcomes


def merge(parts: Mapping[str, Evaluation]) -> Evaluation:
    """Return the results of single tasks as one."""
    whole: dict[str, Any] = {"results": {}}
    samples: dict[str, list[dict[str, Any]]] = {}
    for part in parts.values():
        samples |= part.samples
        for key, values in part.results.items():
            whole[key] = {**whole.get(key, {}), **values}
    return Evaluation(whole, samples)


def cut_prompts(results: Mapping[str, Any]) -> str:
    """Return a remark on tasks whose prompts did not fit into the model's context; '' if all did."""
    tasks = [f"{name} ({c['cut']} of {c['prompts']})" for name, c in results.get("cut_prompts", {}).items()]
    more = f" and {len(tasks) - 5} more tasks" if len(tasks) > 5 else ""
    names = ", ".join(tasks[:5]) + more
    return f"prompts longer than the model's context were cut from the left: {names}" if tasks else ""


def task_members(results: Mapping[str, Any], samples: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of the samples of each task of `Evaluation.outcomes`."""
    pooled: dict[str, list[str]] = {}
    subtasks = results.get("group_subtasks", {})
    for group in subtasks:
        leaves = list(_leaves(group, subtasks))
        if group in MAIN_METRIC and all(leaf in samples for leaf in leaves):
            pooled[group] = leaves
    inside = {leaf for leaves in pooled.values() for leaf in leaves}
    return {**pooled, **{name: [name] for name in samples if name not in inside}}


def main_metric(name: str, result: Mapping[str, Any]) -> str | None:
    """Return the main metric of a task as "metric,filter", given one result of it."""
    known = [key for key in result if "," in key and "_stderr," not in key]
    chosen = MAIN_METRIC.get(name)
    return chosen if chosen in known else next(iter(known), None)


def _leaves(group: str, subtasks: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for child in subtasks[group]:
        if child in subtasks:
            yield from _leaves(child, subtasks)
        else:
            yield child
