"""One number per item: what a benchmark's main metric says of each answer."""

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

GSM8K counts the last number of an answer rather than only one after "####": what is asked is whether a model
still can, not whether it still writes in the form of the training set.
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
    """Results as `lm_eval` returns them, and what was asked and answered, item by item and task by task."""

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def outcomes(self) -> dict[str, TaskOutcome]:
        """The main metric of every task, item by item; a group that is a mean over its items is one task."""
        return task_outcomes(self.results, self.samples)


def merge(parts: Mapping[str, Evaluation]) -> Evaluation:
    """The results of single tasks in one."""
    whole: dict[str, Any] = {"results": {}}
    samples: dict[str, list[dict[str, Any]]] = {}
    for part in parts.values():
        samples |= part.samples
        for key, values in part.results.items():
            whole[key] = {**whole.get(key, {}), **values}
    return Evaluation(whole, samples)


def cut_prompts(results: Mapping[str, Any]) -> str:
    """A sentence on tasks whose prompts did not fit into the model's context; empty if all did."""
    tasks = [f"{name} ({c['cut']} of {c['prompts']})" for name, c in results.get("cut_prompts", {}).items()]
    more = f" and {len(tasks) - 5} more tasks" if len(tasks) > 5 else ""
    told = ", ".join(tasks[:5]) + more
    return f"prompts longer than the model's context were cut from the left: {told}" if tasks else ""


def task_outcomes(
    results: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, TaskOutcome]:
    """Outcomes of every task in `results`.

    MMLU is one task, as its mean weighs subjects by their questions: all items one after the other. Tasks
    whose metric is no mean over items (perplexities of documents) are left out.
    """
    outcomes = {}
    for name, leaves in task_members(results, samples).items():
        metric = main_metric(name, results["results"][leaves[0]])
        if metric is None:
            continue
        key, where = metric.split(",")
        rows = [sample for leaf in leaves for sample in samples[leaf] if sample["filter"] == where]
        if rows and all(isinstance(row[key], int | float | np.number | np.bool_) for row in rows):
            better = results["higher_is_better"][leaves[0]].get(key, True)
            values = [float(row[key]) * row.get("weight", 1.0) for row in rows]
            outcomes[name] = TaskOutcome(name, metric, bool(better), values)
    return outcomes


def task_members(results: Mapping[str, Any], samples: Mapping[str, Any]) -> dict[str, list[str]]:
    """Each task of `task_outcomes` -> the names its samples go by."""
    pooled: dict[str, list[str]] = {}
    subtasks = results.get("group_subtasks", {})
    for group in subtasks:
        leaves = list(_leaves(group, subtasks))
        if group in MAIN_METRIC and all(leaf in samples for leaf in leaves):
            pooled[group] = leaves
    inside = {leaf for leaves in pooled.values() for leaf in leaves}
    return {**pooled, **{name: [name] for name in samples if name not in inside}}


def main_metric(name: str, result: Mapping[str, Any]) -> str | None:
    """Main metric of a task as "metric,filter", given one result of it."""
    known = [key for key in result if "," in key and "_stderr," not in key]
    chosen = MAIN_METRIC.get(name)
    return chosen if chosen in known else next(iter(known), None)


def _leaves(group: str, subtasks: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for child in subtasks[group]:
        if child in subtasks:
            yield from _leaves(child, subtasks)
        else:
            yield child
