"""What was gained and lost, from outcomes whose differences are known."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from lopt.evaluation.outcomes import Evaluation
from lopt.evaluation.retention import compare, examples
from lopt.reports.eval import results_table, verdict, write_retention
from lopt.reports.text import columns
from pages import HOSTILE


def made(values: dict[str, list[float]], **more: Any) -> Evaluation:
    """An evaluation with these outcomes; a name that starts with "text" is a loss, "g" is generated."""
    results: dict[str, Any] = {"results": {}, "n-shot": {}, "higher_is_better": {}}
    samples = {}
    for name, outcome in values.items():
        key = "loss" if name.startswith("text") else "acc"
        results["results"][name] = {"name": name, f"{key},none": sum(outcome) / len(outcome)}
        results["n-shot"][name], results["higher_is_better"][name] = 0, {key: key == "acc"}
        samples[name] = [
            {
                "doc_id": i, "doc": {}, "doc_hash": f"{name} {i}", "target": "1", "filter": "none",
                key: value,
                # The likelier option is the right one (1) or the wrong one (0).
                "arguments": [(f"Question {i}?", " no"), (f"Question {i}?", " yes")],
                "resps": [[(-2.0, False)], [(-1.0 if value else -3.0, False)]],
                "filtered_resps": [(-2.0, False), (-1.0 if value else -3.0, False)],
                **more,
            }
            for i, value in enumerate(outcome)
        ]  # fmt: skip
    return Evaluation(results, samples)


BASE = {"arc": [1] * 30 + [0] * 30, "wino": [1.0, 0.0] * 30, "text:docs": [2.0 + i / 100 for i in range(20)]}
TUNED = {
    "arc": [1] * 28 + [0] * 2 + [1] * 14 + [0] * 16,
    "wino": [1.0, 0.0] * 30,
    "text:docs": [2.3 + i / 90 for i in range(20)],
}


def test_changes() -> None:
    found = compare(made(BASE), made(TUNED))
    arc, wino, text = found.changes
    assert (arc.gained, arc.lost, arc.items, arc.interval) == (14, 2, 60, "adjusted Wald")
    assert arc.difference.value == pytest.approx(0.2) and arc.verdict == "better" and arc.p_value < 0.005
    assert (wino.gained, wino.lost, wino.p_value, wino.verdict) == (0, 0, 1.0, "open")
    assert (text.gained, text.p_value, text.interval, text.higher_is_better) == (
        None,
        None,
        "bootstrap",
        False,
    )
    assert text.verdict == "worse" and text.difference.low > 0.3
    told = verdict("base", "mine", found.changes)
    assert told == (
        "mine is better than base on arc and worse than base on text:docs; on 1 of 3 benchmarks the interval "
        "contains zero."
    )


def test_other_items_are_not_compared() -> None:
    found = compare(made(BASE), made(TUNED, doc_hash="another"))
    assert not found.changes and len(found.refused) == 3
    assert "different tokenizers" in found.refused[2] and "not asked the same items" in found.refused[0]
    assert verdict("base", "mine", found.changes) == "Nothing of mine can be compared with base."


def test_windows_weigh_as_their_tokens_do() -> None:
    evaluation = made({"text:docs": [2.0, 5.0]})
    for row, weight in zip(evaluation.samples["text:docs"], (1.5, 0.5), strict=True):
        row["weight"] = weight
    assert sum(evaluation.outcomes()["text:docs"].values) / 2 == (2.0 * 3 + 5.0) / 4


def test_examples_of_options_and_texts() -> None:
    gained, _, lost, _ = examples(made(BASE), made(TUNED), "arc")
    assert gained[:4] == ("arc", True, "Question 30?", "yes") and (gained.base, gained.tuned) == ("no", "yes")
    assert (lost.gained, lost.prompt, lost.base, lost.tuned) == (False, "Question 28?", "yes", "no")
    written = {"arguments": [("1 + 1?", {"until": []})], "resps": [["It is 2."]], "target": "#### 2"}
    example = examples(made({"gsm": [0]}, **written), made({"gsm": [1]}, **written), "gsm")[0]
    assert example[2:] == ("1 + 1?", "#### 2", "It is 2.", "It is 2.")
    inside = {"arguments": [("Ann", " ran."), ("Bob", " ran.")], "doc": {"sentence": "_ ran."}}
    example = examples(made({"wino": [0]}, **inside), made({"wino": [1]}, **inside), "wino")[0]
    assert example[2:] == ("_ ran.", "Bob", "Ann", "Bob")


def test_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    other = made({**TUNED, "text:docs": [1.0]}, arguments=[(HOSTILE, " no"), (HOSTILE, " yes")])
    told = write_retention(tmp_path, "base", {"base": made(BASE), "mine": made(TUNED), HOSTILE: other})
    assert "mine against base" in told and "−" not in told.split("\n")[2] and "14" in told
    found = json.loads((tmp_path / "retention.json").read_text(), parse_constant=pytest.fail)
    assert found["models"]["mine"]["changes"][0]["gained"] == 14 and "McNemar" in found["statistics"]
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and page.count("<svg") == 2 and "not compared" in page
    assert not list(tmp_path.glob(".*"))


def test_every_metric_is_drawn_in_its_own_direction(tmp_path: Path) -> None:
    """A score beyond 1 that is better when higher is no loss, and not every score to lower is in nats."""
    pytest.importorskip("matplotlib")
    base, tuned = (made({"arc": [0.0, 1.0], "bleu": [20.0, v], "text:a": [2.0, v]}) for v in (30.0, 35.0))
    for evaluation in (base, tuned):
        evaluation.results["results"]["brier"] = {"brier,none": 0.5}
        evaluation.results["higher_is_better"]["brier"] = {"brier": False}
        evaluation.results["n-shot"]["brier"] = 0
        evaluation.samples["brier"] = [{**row, "brier": 0.5} for row in evaluation.samples["arc"]]
    write_retention(tmp_path, "base", {"base": base, "mine": tuned})
    page = html.unescape((tmp_path / "report.html").read_text())
    for words in (
        "percentage points; right is better: mine, arc",
        "nats per token; left is better: mine, text:a",
        "Other scores, change against the base, right is better: mine, bleu",
        "change against the base; left is better: mine, brier",
    ):
        assert words in page


def test_table() -> None:
    table = results_table({"base": made(BASE), "mine": made(TUNED)})
    assert [line.split()[:4] for line in table.split("\n")[1:3]] == [
        ["arc", "acc", "0", "60"],
        ["wino", "acc", "0", "60"],
    ]
    assert "50.0\u00a0% [37.7, 62.3]" in table  # Wilson
    assert columns([["a", "b"], ["long", "1"]]) == "a     b\nlong  1"
