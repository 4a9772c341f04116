"""Tables and the page of `lopt eval`: what models gained and lost against their base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

from lopt.evaluation.outcomes import Evaluation, TaskOutcome, cut_prompts, task_members
from lopt.evaluation.retention import Change, Comparison, Example, compare, estimate, examples
from lopt.evaluation.statistics import Estimate
from lopt.files import finite, write_json, write_text
from lopt.reports.page import Pane, figure, figures, page, paragraph, side_by_side, table
from lopt.reports.plots import interval_plot
from lopt.reports.text import columns, number

STATISTICS = (
    "Differences are paired: every model answers the same items and is compared item by item. Intervals are "
    "95 %. Where every item is right or wrong the interval is the Wald interval with Bonett and Price's "
    "adjustment and p is McNemar's exact test, two-sided; elsewhere the interval is a bootstrap over items "
    "(10,000 resamples, expanded percentiles). An interval that contains zero settles nothing. Nothing is "
    "corrected for the number of benchmarks: of twenty that did not change, one is expected to look as if it "
    "had."
)
_PROMPT_END = 1500
"""Characters of a prompt that are shown: its end, where the question is."""


def results_table(evaluations: Mapping[str, Evaluation]) -> str:
    """Return every model's main metric on every benchmark with its 95 % interval, as text for a terminal."""
    outcomes = {label: evaluation.outcomes() for label, evaluation in evaluations.items()}
    tasks = list(dict.fromkeys(task for found in outcomes.values() for task in found))
    rows = [["task", "metric", "shots", "items", *outcomes]]
    for task in tasks:
        first = next(label for label in outcomes if task in outcomes[label])
        outcome = outcomes[first][task]
        row = [task, *_measured(evaluations[first], outcome)]
        for found in outcomes.values():
            share = outcome.higher_is_better and all(0 <= value <= 1 for value in found[task].values)
            mean, low, high = (_value(part, share) for part in estimate(found[task]))
            ends = f"{low}, {high}".replace("\u00a0%", "")
            row.append(f"{mean} [{ends}]")
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
    models = {
        label: {
            "changes": [{**asdict(change), "verdict": change.verdict} for change in comparison.changes],
            "refused": comparison.refused,
        }
        for label, comparison in comparisons.items()
    }
    today = date.today().isoformat()
    found = {"base": base, "models": models, "statistics": STATISTICS, "date": today}
    write_json(folder / "retention.json", finite(found))
    write_text(folder / "report.html", retention_page(base, evaluations, comparisons))
    tables = []
    for label, comparison in comparisons.items():
        heads = ["task", "items", base, label, "difference", "95 % interval", "gained", "lost", "p"]
        rows = [heads, *([c.task, str(c.items), *_cells(c)] for c in comparison.changes)]
        tables.append("\n".join([f"{label} against {base}:", columns(rows), *comparison.refused]))
    return "\n\n".join(tables)


def _measured(evaluation: Evaluation, outcome: TaskOutcome) -> list[str]:
    """Return metric, shots and number of items of a benchmark."""
    leaf = task_members(evaluation.results, evaluation.samples)[outcome.task][0]
    shots = evaluation.results["n-shot"].get(leaf, 0)
    return [outcome.metric.removesuffix(",none"), str(shots), str(len(outcome.values))]


def _cells(change: Change) -> list[str]:
    """Return base, tuned, difference, its interval, gained, lost and p of a change."""
    share = _is_share(change)
    means = [_value(value, share) for value in (change.base, change.tuned)]
    scale, form = (100, "+.1f") if share else (1, "+.3f")
    value, low, high = (number(scale * part, form) for part in change.difference)
    difference = [value, f"{low}\u00a0to\u00a0{high}"]
    if change.gained is None or change.lost is None or change.p_value is None:
        return [*means, *difference, "", "", ""]
    p = "<0.0001" if change.p_value < 0.0001 else f"{change.p_value:.2g}"
    return [*means, *difference, str(change.gained), str(change.lost), p]


def _is_share(change: Change) -> bool:
    return change.higher_is_better and 0 <= change.base <= 1 and 0 <= change.tuned <= 1


def _kind(change: Change) -> str:
    """Return which plot a change belongs to."""
    if _is_share(change):
        return "share"
    if change.higher_is_better:
        return "higher"
    return "loss" if change.metric == "loss,none" else "lower"


def _value(value: float, share: bool) -> str:
    return number(value, ".1%" if share else ".3f")


def retention_page(
    base: str, evaluations: Mapping[str, Evaluation], comparisons: Mapping[str, Comparison]
) -> str:
    """Return the whole report as one HTML page."""
    lede = " ".join(verdict(base, label, found.changes) for label, found in comparisons.items())
    notes = list(dict.fromkeys(r for found in comparisons.values() for r in found.refused))
    notes += [f"{name}: {remark}" for name, e in evaluations.items() if (remark := cut_prompts(e.results))]
    sections = [
        ("", paragraph(lede, "lede") + "".join(paragraph(note, "note") for note in notes)),
        ("Change against the base", _plots(comparisons) + paragraph(STATISTICS, "note")),
    ]
    for label, found in comparisons.items():
        heads = ["Benchmark", "Items", base, label, "Difference", "95 % interval", "Gained", "Lost", "p"]
        rows = [[c.task, f"{c.items:,}", *_cells(c)] for c in found.changes]
        caption = "Gained: only this model is right. Lost: only the base is. p: McNemar's exact test."
        sections.append((f"{label} against {base}", table(heads, rows, caption, numeric=range(1, 9))))
    for label, found in comparisons.items():
        shown = (
            _example(base, label, example)
            for change in found.changes
            if change.gained is not None
            for example in examples(evaluations[base], evaluations[label], change.task)
        )
        sections.append((f"What {label} gained and lost: examples", "".join(shown)))
    measured = [[n, *_measured(evaluations[base], o)] for n, o in evaluations[base].outcomes().items()]
    heads = ["Benchmark", "Metric", "Shots", "Items"]
    sections.append(("Metrics and settings", table(heads, measured, "What was measured", numeric=(2, 3))))
    names = ", ".join(comparisons)
    return page(f"Retention: {names}", sections, f"against {base} · {date.today().isoformat()}")


def verdict(base: str, label: str, changes: Sequence[Change]) -> str:
    """Return the outcome for one model in one or two sentences, for better or worse."""
    if not changes:
        return f"Nothing of {label} can be compared with {base}."
    names = {verdict: [c.task for c in changes if c.verdict == verdict] for verdict in ("better", "worse")}
    parts = [f"{verdict} than {base} on {', '.join(tasks)}" for verdict, tasks in names.items() if tasks]
    count = len(changes) - sum(map(len, names.values()))
    rest = f"on {count} of {len(changes)} benchmarks the interval contains zero"
    if not parts:
        return f"For {label}, {rest}."
    return f"{label} is {' and '.join(parts)}" + (f"; {rest}." if count else ".")


def _plots(comparisons: Mapping[str, Comparison]) -> str:
    """Return a plot of shares in points, of losses, of other scores up and down: they share no axis."""
    parts = []
    for kind, title, label in (
        ("share", "Accuracy, change against the base", "percentage points; right is better"),
        ("loss", "Loss, change against the base", "nats per token; left is better"),
        ("higher", "Other scores, change against the base", "right is better"),
        ("lower", "Other scores that fall as a model gets better", "change against the base; left is better"),
    ):
        scale = 100.0 if kind == "share" else 1.0
        found = {
            name: {
                c.task: Estimate(*(scale * v for v in c.difference))
                for c in comparison.changes
                if _kind(c) == kind
            }
            for name, comparison in comparisons.items()
        }
        tasks = list(dict.fromkeys(task for by_task in found.values() for task in by_task))
        series = {name: [by_task.get(task) for task in tasks] for name, by_task in found.items()}
        if tasks:
            svg = interval_plot(tasks, series, title=title, x_label=label)
            parts.append(figure(svg, "Dots: mean of the paired differences. Lines: 95 % interval."))
    return figures(parts)


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
