"""One number per item: what a benchmark's main metric says of each answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def task_outcomes(
    results: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, TaskOutcome]:
    """Outcomes of every task in `results`.

    A group is one task if its mean weighs its tasks by their items, as MMLU's does: the values of all items
    one after the other. Tasks whose metric is no mean over items (perplexities of documents) are left out.
    """
    pooled = {}
    inside: set[str] = set()
    for group in _roots(results.get("group_subtasks", {})):
        leaves = list(_leaves(group, results["group_subtasks"]))
        if group in MAIN_METRIC and all(leaf in samples for leaf in leaves):
            pooled[group] = leaves
            inside.update(leaves)
    singles = {name: [name] for name in samples if name not in inside}
    outcomes = {}
    for name, leaves in {**pooled, **singles}.items():
        metric = main_metric(name, results["results"][leaves[0]])
        if metric is None:
            continue
        key, where = metric.split(",")
        items = [sample[key] for leaf in leaves for sample in samples[leaf] if sample["filter"] == where]
        if items and all(isinstance(item, int | float) for item in items):
            better = results["higher_is_better"][leaves[0]].get(key, True)
            outcomes[name] = TaskOutcome(name, metric, bool(better), [float(item) for item in items])
    return outcomes


def main_metric(name: str, result: Mapping[str, Any]) -> str | None:
    """Main metric of a task as "metric,filter", given one result of it."""
    known = [key for key in result if "," in key and "_stderr," not in key]
    chosen = MAIN_METRIC.get(name)
    return chosen if chosen in known else next(iter(known), None)


def _roots(subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    children = {child for members in subtasks.values() for child in members}
    return [group for group in subtasks if group not in children]


def _leaves(group: str, subtasks: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for child in subtasks[group]:
        if child in subtasks:
            yield from _leaves(child, subtasks)
        else:
            yield child
