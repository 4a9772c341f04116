"""What the cells of a comparison say: measures of benchmarks, figures, and words for them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lopt.evaluation.compare.metrics import _outcomes, answer_loss
from lopt.evaluation.compare.summary import COSTS, summarise
from lopt.evaluation.outcomes import Evaluation
from lopt.evaluation.statistics import mean_interval
from lopt.reports.compare import findings


def test_right_answers() -> None:
    assert answer_loss({"target": 1, "filtered_resps": [(-3.0, False), (-0.5, True)]}) == 0.5
    assert answer_loss({"target": "7", "filtered_resps": ["7"]}) is None
    assert answer_loss({"target": "so", "filtered_resps": [(-3.0, False)]}) is None


def test_losses_of_right_answers_by_benchmark() -> None:
    """A group has those of its members in their order; items with several right answers have none."""

    def samples(*losses: float) -> list[dict[str, Any]]:
        answers = [[(-9.0, False), (-loss, False)] for loss in losses]
        return [{"filter": "none", "acc": 1.0, "target": 1, "filtered_resps": a} for a in answers]

    found = {"mmlu_b": samples(1.0, 2.0), "mmlu_a": samples(3.0)}
    found |= {f"truthfulqa_mc{i}": samples(0.5) for i in (1, 2)}
    results = {
        "results": {name: {"acc,none": 1.0} for name in found},
        "group_subtasks": {"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu_b", "mmlu_a"]},
        "higher_is_better": {name: {"acc": True} for name in found},
    }
    measures = _outcomes(Evaluation(results, found), "retention")
    assert {name: item["values"] for name, item in measures.items() if item["metric"] == "loss"} == {
        "mmlu, right answer": [1.0, 2.0, 3.0],
        "truthfulqa_mc1, right answer": [0.5],
    }
    assert {"mmlu", "truthfulqa_mc1", "truthfulqa_mc2"} < set(measures)


def summary_of(base: dict[str, Any], *runs: dict[str, Any]) -> dict[str, Any]:
    """The summary of items alone; every run is an arm of its own."""
    rest = {"adaptation": {"loss": 1.0}, "drift": None, "cost": dict.fromkeys(COSTS, 1)}
    cells = [{"arm": f"arm {i}", "seed": 0, "items": items, **rest} for i, items in enumerate(runs)]
    arms = [cell["arm"] for cell in cells]
    return summarise({"arms": arms, "base": {"items": base, **rest}, "cells": cells})


def item(values: list[float], metric: str = "loss", higher: bool = False, **more: Any) -> dict[str, Any]:
    return {"kind": "retention", "metric": metric, "higher_is_better": higher, "values": values, **more}


def test_windows_count_as_their_tokens_do() -> None:
    """Also those of older arm runs, which do not say how many they have, if any run does."""
    base, tuned = item([2.0, 2.0, 9.0]), item([2.5, 2.5, 1.0])
    for runs in ((base, tuned | {"tokens": [128, 128, 4]}), (base | {"tokens": [128, 128, 4]}, tuned)):
        summary = summary_of(*({"text:a": run} for run in runs))
        expected = (0.5 * 256 - 8.0 * 4) / 260
        assert summary["arms"]["arm 0"]["forgetting"]["value"] == pytest.approx(expected)
        differences = [part * 3 / 260 for part in (0.5 * 128, 0.5 * 128, -8.0 * 4)]
        found = [summary["items"]["arm 0"]["text:a"][end] for end in ("value", "low", "high")]
        assert found == pytest.approx(list(mean_interval(differences)))
    summary = summary_of({"text:a": base}, {"text:a": tuned})
    assert summary["arms"]["arm 0"]["forgetting"]["value"] == pytest.approx((0.5 + 0.5 - 8.0) / 3)


def test_measures_that_not_all_runs_have_are_left_out() -> None:
    base = {"arc": item([0.0, 1.0], "acc,none", True), "arc, right answer": item([3.0, 5.0])}
    older = {"arc": item([1.0, 1.0], "acc,none", True), "mmlu, right answer": item([1.0])}
    summary = summary_of(base, older, base)
    assert list(summary["measures"]) == ["loss", "arc", "retained"]
    assert summary["arms"]["arm 0"]["retained"]["value"] == 0.5
    assert set(summary["items"]["arm 0"]) == {"arc"}


def test_a_score_that_is_better_when_lower_is_kept_when_it_falls() -> None:
    base = {"a": item([0.5, 0.5], "acc,none", True), "b": item([0.8, 0.8], "brier_score,none")}
    tuned = {"a": item([0.6, 0.6], "acc,none", True), "b": item([0.5, 0.5], "brier_score,none")}
    assert summary_of(base, tuned)["arms"]["arm 0"]["retained"]["value"] == pytest.approx((0.1 + 0.3) / 2)


def test_words_for_what_is_beyond_the_noise() -> None:
    """Against the first arm of each method; the better side is the lower one, for a loss."""
    losses = {"e2e": 0.8, "e2e slow": 0.9, "lopt k=2": 1.0, "frozen k=2": 1.0}
    base = {"adaptation": {"loss": 2.0, "token_accuracy": 0.5}, "items": {}}
    cells = []
    for arm, loss in losses.items():
        for seed, noise in enumerate((0.00, 0.01, 0.02 if arm == "lopt k=2" else 0.01)):
            own = {"loss": loss + noise, "token_accuracy": 0.5}
            rest = {"items": {}, "drift": None, "cost": dict.fromkeys(COSTS, 1)}
            cells.append({"arm": arm, "seed": seed, "adaptation": own, **rest})
    results = {"arms": list(losses), "base": base, "cells": cells}
    results["summary"] = summarise(results)
    first, more = findings(results)
    assert first.startswith("e2e had the lowest held-out task loss: 0.807")
    assert more == [
        "Beyond the seeds' noise, compared with e2e: task loss worse with e2e slow, lopt k=2, frozen k=2.",
        "Beyond the seeds' noise, compared with frozen k=2: task loss better with e2e, e2e slow.",
    ]
    assert list(results["summary"]["against"]) == ["e2e", "e2e slow", "frozen k=2"]


def test_a_summary_of_nothing_but_failures() -> None:
    base = {"adaptation": {"loss": 1.0, "token_accuracy": 0.5}, "items": {}}
    cells = [{"arm": "e2e", "seed": 0, "failed": "the loss is nan"}]
    summary = summarise({"arms": ["e2e"], "base": base, "cells": cells})
    assert summary["arms"]["e2e"]["loss"]["value"] is None and summary["cost"] == {}


def test_a_text_of_one_window_has_no_interval() -> None:
    item = {"metric": "loss", "kind": "retention", "higher_is_better": False}
    base = {"adaptation": {"loss": 1.0, "pair_accuracy": 0.5}, "items": {"text:a": item | {"values": [3.0]}}}
    rest = {"items": {"text:a": {"values": [3.5]}}, "drift": None, "cost": dict.fromkeys(COSTS, 1)}
    cells = [{"arm": "e2e", "seed": 0, "adaptation": {"loss": 0.9, "pair_accuracy": 1.0}, **rest}]
    summary = summarise({"arms": ["e2e"], "base": base, "cells": cells})
    assert summary["items"]["e2e"]["text:a"] == {"value": 0.5, "low": None, "high": None}
    assert summary["measures"]["pair_accuracy"]["label"] == "held-out pair accuracy"
    json.dumps(summary, allow_nan=False)
