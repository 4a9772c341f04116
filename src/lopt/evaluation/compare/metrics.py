"""What a comparison measures on every model beside the held-out rows: benchmarks, text losses and drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lopt.evaluation.compare.summary import ANSWERS
from lopt.evaluation.drift import Reference
from lopt.evaluation.loss import completion_losses, text_losses
from lopt.evaluation.outcomes import task_members

DRIFT_TOKENS = 1024
SEVERAL_RIGHT = ("truthfulqa_mc2",)
"""Benchmarks whose items have several right answers: the loss of one of them is no measure."""


@dataclass
class Metrics:
    """Benchmarks, plain texts and the base model that hidden states are compared with.

    Attributes:
        tokenizer: of all models.
        retention: benchmarks that have nothing to do with the task.
        adaptation: benchmarks of the task itself.
        texts: plain texts by name, for the loss in nats per token.
        rows: prompts with their answers by name, for the loss of the answers in nats per token.
        drift_texts: what hidden states are compared on.
        text_tokens: tokens of each text that count.
        data_dir, limit: as in `lopt.evaluation.harness.evaluate`.
    """

    tokenizer: Any
    retention: Sequence[str] = ()
    adaptation: Sequence[str] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    text_tokens: int = 2048
    drift_texts: Sequence[str] = ()
    data_dir: Path | None = None
    limit: int | None = None
    _reference: Reference | None = None

    def prepare(self, base: PreTrainedModel) -> None:
        """Record the base model's hidden states."""
        if self.drift_texts:
            self._reference = Reference.of(base, self.tokenizer, self.drift_texts, tokens=DRIFT_TOKENS)

    def drift(self, model: nn.Module, boundaries: Sequence[int]) -> dict[str, Any]:
        """Return how far hidden states, and the weights of each block, have moved from the base model.

        Args:
            boundaries: layers (from 0) at which blocks 2..k start.
        """
        if self._reference is None:
            return {}
        return self._reference.drift(model, boundaries=boundaries).to_dict()

    def items(self, model: Any) -> dict[str, dict[str, Any]]:
        """Return the outcomes of all items by measure: `metric`, `higher_is_better`, `kind` and `values`.

        The items of a text are windows; `tokens` says how many each predicts, for the mean over tokens.
        A benchmark whose choices are answers, one of them right, gives two measures: its own metric, and the
        loss of the right answer, which changes in a small model long before its choice does.
        """
        measures: dict[str, dict[str, Any]] = {}
        if self.adaptation or self.retention:
            from lopt.evaluation.harness import evaluate  # which needs lopt[eval]
        for kind, tasks in (("adaptation", self.adaptation), ("retention", self.retention)):
            if tasks:
                result = evaluate(
                    model, self.tokenizer, list(tasks), data_dir=self.data_dir, limit=self.limit
                )
                measures |= _outcomes(result, kind)
        for name, text in self.texts.items():
            windows = text_losses(model, self.tokenizer, text, tokens=self.text_tokens)
            measure = _measure("retention", "loss", False, [window.loss for window in windows])
            measures[f"text:{name}"] = measure | {"tokens": [window.tokens for window in windows]}
        for name, pairs in self.rows.items():
            losses = completion_losses(model, self.tokenizer, pairs)
            measures[f"rows:{name}"] = _measure("retention", "loss", False, losses)
        return measures


def _measure(kind: str, metric: str, higher: bool, values: Sequence[float]) -> dict[str, Any]:
    rounded = [round(float(value), 5) for value in values]
    return {"kind": kind, "metric": metric, "higher_is_better": higher, "values": rounded}


def _outcomes(result: Any, kind: str) -> dict[str, dict[str, Any]]:
    measures = {}
    members = task_members(result.results, result.samples)
    for name, outcome in result.outcomes().items():
        measures[name] = _measure(kind, outcome.metric, outcome.higher_is_better, outcome.values)
        where = outcome.metric.split(",")[1]
        samples = [s for leaf in members[name] for s in result.samples[leaf] if s["filter"] == where]
        found = [loss for loss in map(answer_loss, samples) if loss is not None]
        if found and len(found) == len(samples) and name not in SEVERAL_RIGHT:
            measures[name + ANSWERS] = _measure(kind, "loss", False, found)
    return measures


def answer_loss(sample: Mapping[str, Any]) -> float | None:
    """Return the negative log-likelihood of the right answer in nats; None if the item has no options."""
    target, answers = sample.get("target"), sample.get("filtered_resps")
    try:
        return -float(answers[int(target)][0])  # type: ignore[index,arg-type]
    except (TypeError, ValueError, IndexError):
        return None
