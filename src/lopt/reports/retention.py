"""Tables, figures and the page on what models gained and lost against their base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

from lopt.evaluation.outcomes import Evaluation, TaskOutcome, cut_prompts, task_members
from lopt.evaluation.retention import Change, Comparison, Example, compare, estimate, examples
from lopt.evaluation.statistics import Estimate
from lopt.evaluation.store import finite
from lopt.files import write_text
from lopt.reports.page import Pane, figure, page, paragraph, side_by_side, table
from lopt.reports.plots import interval_plot

STATISTICS = (
    "Differences are paired: every model answers the same items and is compared item by item. Intervals are "
    "95 %. Where every item is right or wrong the interval is the Wald interval with Bonett and Price's "
    "adjustment and p is McNemar's exact test, two-sided; elsewhere the interval is a bootstrap over items "
    "(10,000 resamples, expanded percentiles). An interval that holds zero settles nothing. Nothing is "
    "corrected for the number of benchmarks: of twenty that did not change, one is expected to look as if it "
    "had."
)
_PROMPT_END = 1500
"""Characters of a prompt that are shown: its end, where the question is."""


def results_table(evaluations: Mapping[str, Evaluation]) -> str:
    """Every model's main metric on every benchmark with its 95 % interval, as text for a terminal."""
    outcomes = {label: evaluation.outcomes() for label, evaluation in evaluations.items()}
    tasks = list(dict.fromkeys(task for found in outcomes.values() for task in found))
    rows = [["task", "metric", "shots", "items", *outcomes]]
    for task in tasks:
        first = next(label for label in outcomes if task in outcomes[label])
        outcome = outcomes[first][task]
        row = [task, *_measured(evaluations[first], outcome)]
        for found in outcomes.values():
            share = outcome.higher_is_better and all(0 <= value <= 1 for value in found[task].values)
            row.append(_with_interval(estimate(found[task]), share))
        rows.append(row)
    return columns(rows)


def write_retention(folder: Path, base: str, evaluations: Mapping[str, Evaluation]) -> str:
    """Compare every model with `base`; writes retention.json and report.html, returns text for a terminal.

    Raises:
        ImportError: matplotlib is not installed.
    """
    comparisons = {
        label: compare(evaluations[base], evaluation)
        for label, evaluation in evaluations.items()
        if label != base
    }
    found = {
        "base": base,
        "models": {
            label: {
                "changes": [{**asdict(change), "verdict": change.verdict} for change in comparison.changes],
                "refused": comparison.refused,
            }
            for label, comparison in comparisons.items()
        },
        "statistics": STATISTICS,
        "date": date.today().isoformat(),
    }
    write_text(folder / "retention.json", json.dumps(finite(found), indent=1) + "\n")
    write_text(folder / "report.html", retention_page(base, evaluations, comparisons))
    return "\n\n".join(_told(base, label, comparison) for label, comparison in comparisons.items())


def _measured(evaluation: Evaluation, outcome: TaskOutcome) -> list[str]:
    """Metric, shots and number of items of a benchmark."""
    leaf = task_members(evaluation.results, evaluation.samples)[outcome.task][0]
    shots = evaluation.results["n-shot"].get(leaf, 0)
    return [outcome.metric.removesuffix(",none"), str(shots), str(len(outcome.values))]


def _with_interval(mean: Estimate, share: bool) -> str:
    low, high = (_value(end, share).replace("\u00a0%", "") for end in (mean.low, mean.high))
    return f"{_value(mean.value, share)} [{low}, {high}]"


def _cells(change: Change) -> list[str]:
    """Base, tuned, difference, its interval, gained, lost, p."""
    share = _is_share(change)
    means = [_value(value, share) for value in (change.base, change.tuned)]
    value, low, high = (_signed(part, share) for part in change.difference)
    difference = [value, f"{low}\u00a0to\u00a0{high}"]
    if change.gained is None or change.lost is None or change.p_value is None:
        return [*means, *difference, "", "", ""]
    p = "<0.0001" if change.p_value < 0.0001 else f"{change.p_value:.2g}"
    return [*means, *difference, str(change.gained), str(change.lost), p]


def _is_share(change: Change) -> bool:
    return change.higher_is_better and 0 <= change.base <= 1 and 0 <= change.tuned <= 1


def _value(value: float, share: bool) -> str:
    return f"{100 * value:.1f}\u00a0%" if share else f"{value:.3f}"


def _signed(value: float, share: bool) -> str:
    return (f"{100 * value:+.1f}" if share else f"{value:+.3f}").replace("-", "−")


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows as aligned text; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _told(base: str, label: str, comparison: Comparison) -> str:
    rows = [["task", "items", base, label, "difference", "95 % interval", "gained", "lost", "p"]]
    rows += [[c.task, str(c.items), *_cells(c)] for c in comparison.changes]
    return "\n".join([f"{label} against {base}:", columns(rows), *comparison.refused])


def retention_page(
    base: str, evaluations: Mapping[str, Evaluation], comparisons: Mapping[str, Comparison]
) -> str:
    """The whole report as one HTML page."""
    lede = " ".join(sentence(base, label, found.changes) for label, found in comparisons.items())
    refused = list(dict.fromkeys(r for found in comparisons.values() for r in found.refused))
    refused += [f"{name}: {told}" for name, e in evaluations.items() if (told := cut_prompts(e.results))]
    sections = [("", paragraph(lede, "lede") + "".join(paragraph(r, "note") for r in refused))]
    sections.append(("Change against the base", _figures(comparisons) + paragraph(STATISTICS, "note")))
    for label, found in comparisons.items():
        heads = ["Benchmark", "Items", base, label, "Difference", "95 % interval", "Gained", "Lost", "p"]
        rows = [[c.task, f"{c.items:,}", *_cells(c)] for c in found.changes]
        caption = "Gained: only this model is right. Lost: only the base is. p: McNemar's exact test."
        sections.append((f"{label} against {base}", table(heads, rows, caption, numeric=range(1, 9))))
    for label, found in comparisons.items():
        shown = [
            example
            for change in found.changes
            if change.gained is not None
            for example in examples(evaluations[base], evaluations[label], change.task)
        ]
        if shown:
            body = "".join(_example(base, label, example) for example in shown)
            sections.append((f"What {label} gained and lost: examples", body))
    sections.append(("Metrics and settings", _facts(base, evaluations)))
    names = ", ".join(comparisons)
    return page(f"Retention: {names}", sections, f"against {base} · {date.today().isoformat()}")


def sentence(base: str, label: str, changes: Sequence[Change]) -> str:
    """The outcome for one model in one or two sentences, whichever way it went."""
    if not changes:
        return f"Nothing of {label} can be compared with {base}."
    names = {verdict: [c.task for c in changes if c.verdict == verdict] for verdict in ("better", "worse")}
    parts = [f"{verdict} than {base} on {', '.join(tasks)}" for verdict, tasks in names.items() if tasks]
    count = len(changes) - sum(map(len, names.values()))
    rest = f"on {count} of {len(changes)} benchmarks the interval holds zero"
    if not parts:
        return f"For {label}, {rest}."
    return f"{label} is {' and '.join(parts)}" + (f"; {rest}." if count else ".")


def _figures(comparisons: Mapping[str, Comparison]) -> str:
    """One figure of shares, in points, and one of losses: they have no axis in common."""
    every = [change for found in comparisons.values() for change in found.changes]
    parts = []
    for share, title, label, word in (
        (True, "Accuracy, change against the base", "percentage points; right is better", "points"),
        (False, "Loss, change against the base", "nats per token; left is better", "nats"),
    ):
        tasks = list(dict.fromkeys(c.task for c in every if _is_share(c) == share))
        scale = 100.0 if share else 1.0
        series, told = {}, []
        for name, found in comparisons.items():
            by_task = {c.task: Estimate(*(scale * v for v in c.difference)) for c in found.changes}
            series[name] = [by_task.get(task) for task in tasks]
            told += [f"{name}, {t}: {e.value:+.3g} {word}" for t, e in by_task.items() if t in tasks]
        if tasks:
            alt = f"{title}: {'; '.join(told)}."
            svg = interval_plot(tasks, series, title=title, x_label=label, alt=alt)
            parts.append(figure(svg, "Dots: mean of the paired differences. Lines: 95 % interval."))
    return f'<div class="figures">\n{"".join(parts)}</div>'


def _example(base: str, label: str, example: Example) -> str:
    panes = [
        Pane("Reference", example.reference),
        Pane(base, example.base, not example.gained),
        Pane(label, example.tuned, example.gained),
    ]
    prompt = example.prompt
    if len(prompt) > _PROMPT_END:
        prompt = "… " + prompt[-_PROMPT_END:]
    what = "gained" if example.gained else "lost"
    return side_by_side(panes, heading=f"{example.task}, {what}", prompt=prompt)


def _facts(base: str, evaluations: Mapping[str, Evaluation]) -> str:
    outcomes = evaluations[base].outcomes()
    rows = [[name, *_measured(evaluations[base], outcome)] for name, outcome in outcomes.items()]
    return table(["Benchmark", "Metric", "Shots", "Items"], rows, "What was measured", numeric=(2, 3))
