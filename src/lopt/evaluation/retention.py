"""What a model kept, gained and lost against its base: paired differences, benchmark by benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lopt.evaluation.outcomes import Evaluation, TaskOutcome, task_members
from lopt.evaluation.statistics import Estimate, mcnemar, mean_interval, paired_difference, wilson_interval
from lopt.evaluation.store import plain_sample


@dataclass(frozen=True)
class Change:
    """One benchmark of one model against the base; `difference` is tuned - base.

    `gained`, `lost` and `p_value` (McNemar's exact test) are None where outcomes are not right or wrong.
    """

    task: str
    metric: str
    higher_is_better: bool
    items: int
    base: float
    tuned: float
    difference: Estimate
    interval: str
    gained: int | None
    lost: int | None
    p_value: float | None

    @property
    def verdict(self) -> str:
        """Return "better", "worse", or "open" if the interval contains zero."""
        if not (self.difference.low > 0 or self.difference.high < 0):
            return "open"
        return "better" if (self.difference.value > 0) == self.higher_is_better else "worse"


class Comparison(NamedTuple):
    """Changes by benchmark, and for each benchmark that cannot be compared the reason."""

    changes: list[Change]
    refused: list[str]


def compare(base: Evaluation, tuned: Evaluation) -> Comparison:
    """Return paired differences on every benchmark that both models were evaluated on, item by item.

    The interval is Bonett and Price's adjusted Wald interval where every item is right or wrong, else the
    bootstrap over items. Outcomes of other items than the base's are refused: above all the loss per token
    under another tokenizer, which predicts other tokens.
    """
    before, after = base.outcomes(), tuned.outcomes()
    changes, refused = [], []
    for task in before:
        if task not in after:
            continue
        old, new = before[task], after[task]
        if _items(base, task) != _items(tuned, task):
            refused.append(_refusal(task))
        elif old.metric != new.metric:
            refused.append(f"{task}: measured by {old.metric} and by {new.metric}")
        else:
            changes.append(_change(old, new))
    return Comparison(changes, refused)


def _change(old: TaskOutcome, new: TaskOutcome) -> Change:
    binary = is_binary(old) and is_binary(new)
    test = mcnemar(old.values, new.values) if binary else None
    count = len(old.values)
    return Change(
        task=old.task,
        metric=old.metric,
        higher_is_better=old.higher_is_better,
        items=count,
        base=sum(old.values) / count,
        tuned=sum(new.values) / count,
        difference=paired_difference(old.values, new.values),
        interval="adjusted Wald" if binary else "bootstrap",
        gained=test.gained if test else None,
        lost=test.lost if test else None,
        p_value=test.p_value if test else None,
    )


def is_binary(outcome: TaskOutcome) -> bool:
    """Return whether every item is right (1) or wrong (0)."""
    return all(value in (0.0, 1.0) for value in outcome.values)


def estimate(outcome: TaskOutcome) -> Estimate:
    """Return a model's mean with its 95 % interval: Wilson's for shares, else Student's t over items."""
    values = outcome.values
    if not is_binary(outcome):
        return mean_interval(values)
    return Estimate(sum(values) / len(values), *wilson_interval(int(sum(values)), len(values)))


def _items(evaluation: Evaluation, task: str) -> list[str]:
    """Return the hash of every item's question."""
    return [str(row.get("doc_hash")) for row in _rows(evaluation, task)]


def _rows(evaluation: Evaluation, task: str) -> Iterator[dict[str, Any]]:
    where = evaluation.outcomes()[task].metric.split(",")[1]
    for leaf in task_members(evaluation.results, evaluation.samples)[task]:
        yield from (row for row in evaluation.samples[leaf] if row["filter"] == where)


def _refusal(task: str) -> str:
    if task.startswith("text:"):
        return (
            f"{task} is not compared: the models have different tokenizers, and a loss per token of one says "
            "nothing about a loss per token of the other; accuracies can be compared"
        )
    return f"{task} is not compared: the models were not asked the same items"


class Example(NamedTuple):
    """An item that one model got right and the other wrong: its prompt, and the answers."""

    task: str
    gained: bool
    prompt: str
    reference: str
    base: str
    tuned: str


def examples(base: Evaluation, tuned: Evaluation, task: str, count: int = 2) -> list[Example]:
    """Return the first `count` items gained and the first `count` lost of a task of right or wrong items."""
    metric = base.outcomes()[task].metric.split(",")[0]
    found: dict[bool, list[Example]] = {True: [], False: []}
    for old, new in zip(_rows(base, task), _rows(tuned, task), strict=True):
        gained = bool(new[metric] > old[metric])
        if new[metric] == old[metric] or len(found[gained]) == count:
            continue
        old, new = plain_sample(old), plain_sample(new)
        answers = answer(old, metric), answer(new, metric)
        found[gained].append(Example(task, gained, *question(old, answers[gained]), *answers))
    return found[True] + found[False]


def question(sample: Mapping[str, Any], right: str) -> tuple[str, str]:
    """Return an item's prompt and its reference answer; `right` is an answer known to be right."""
    arguments = _arguments(sample)
    prompt = str(arguments[0].get("arg_0", ""))
    if _options(arguments) is None:
        return prompt, str(sample["target"])
    if len({argument["arg_0"] for argument in arguments}) > 1:  # the options are in the prompts
        prompt = str(sample["doc"].get("sentence", arguments[0]["arg_1"])).strip()
    return prompt, right


def answer(sample: Mapping[str, Any], metric: str) -> str:
    """Return a model's answer: the text it generated, or the option it finds likeliest under `metric`."""
    arguments = _arguments(sample)
    options = _options(arguments)
    if options is None:
        return str(sample["resps"][0][0])
    scores = [float(response[0]) for response in sample["filtered_resps"]]
    if metric == "acc_norm":  # per character, without the space that joins the option to its question
        scores = [s / max(1, len(a["arg_1"].strip())) for s, a in zip(scores, arguments, strict=True)]
    return options[max(range(len(scores)), key=scores.__getitem__)]


def _arguments(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(plain_sample(sample).get("arguments", {"": {}}).values())


def _options(arguments: list[dict[str, Any]]) -> list[str] | None:
    """Return the options of a multiple-choice item, None for an item with a generated answer."""
    if not all(isinstance(argument.get("arg_1"), str) for argument in arguments):
        return None
    if len({argument["arg_0"] for argument in arguments}) > 1:
        return [str(argument["arg_0"]) for argument in arguments]
    return [argument["arg_1"].strip() for argument in arguments]
