"""Plots of training runs: of one over its steps, or of several over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lopt.evaluation.retention_callback import CHANGE, PREFIX, TASKS_CHANGE
from lopt.reliability.checkpoint import step_of
from lopt.reports.lines import Points, histogram_plot, line_plot
from lopt.reports.page import figure
from lopt.reports.run_data import RunData

_MOST_POINTS = 300
"""Points of a line; of more, neighbours are averaged."""


def thinned(points: Points) -> list[tuple[float, float]]:
    """Return at most `_MOST_POINTS` points, each the mean of as many neighbours as that needs."""
    size = -(-len(points) // _MOST_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]


def _plot(
    runs: Sequence[RunData],
    keys: Mapping[str, str],
    title: str,
    label: str,
    caption: str = "",
    *,
    log_y: bool = False,
) -> list[str]:
    """Return a figure with a line for every run and figure of the log; none if there is nothing to draw.

    Args:
        keys: figure of the log -> its name.
    """
    several, series, many = len(runs) > 1, {}, 0
    for run in runs:
        for key, name in keys.items():
            points = run.points(key)
            words = [run.name] * several + [name] * (len(keys) > 1 or not several)
            if points:
                series[" ".join(words)] = thinned(points)
                many = max(many, -(-len(points) // _MOST_POINTS))
    if not any(len(points) > 1 for points in series.values()):
        return []
    if many > 1:
        caption = f"{caption} Every point is the mean of {many} logs.".strip()
    marks = {} if several else _resumptions(runs[0])
    svg = line_plot(series, title=title, x_label="step", y_label=label, log_y=log_y, marks=marks)
    return [figure(svg, caption)]


def _resumptions(run: RunData) -> dict[float, str]:
    steps = [step_of(Path(str(a.get("resumed_from")))) for a in run.record.get("attempts", [])]
    return {float(step): "resumed" for step in steps if step}


def learning_plots(runs: Sequence[RunData]) -> list[str]:
    """Return plots of what is learned and how fast."""
    nats = "nats per token"
    preference = any(run.keys("rewards/margins") for run in runs)
    grpo = any(run.points("reward") for run in runs)
    losses = {"loss": "training", "eval_loss": "held out"}
    label = nats if not preference and not grpo else ""
    rates = {"learning_rate": "last block", "learning_rate_k1": "earlier blocks"}
    accuracy = {"rewards/accuracies": "training", "eval_rewards/accuracies": "held out"}
    margins = {"rewards/margins": "training", "eval_rewards/margins": "held out"}
    lengths = {"completions/mean_length": "mean", "completions/max_length": "longest"}
    return [
        *_plot(runs, {"reward": "training", "eval_reward": "held out"}, "Reward", "mean of all rewards"),
        *_plot(
            runs,
            lengths if len(runs) == 1 else {"completions/mean_length": "mean"},
            "Length of completions",
            "tokens",
        ),
        *_plot(runs, {"completions/clipped_ratio": "share"}, "Completions cut at their longest", "share"),
        *_plot(runs, losses, "Loss", label),
        *_plot(runs, accuracy, "Pairs in which the chosen answer is preferred", "share"),
        *_plot(runs, margins, "Margin between chosen and rejected answers", "difference of rewards"),
        *_plot(runs, {"kl": "KL"}, "Distance to the reference model", "KL divergence"),
        *_plot(runs, rates, "Learning rates", ""),
        *_plot(runs, {"grad_norm": "norm"}, "Norm of the gradient", "before clipping", log_y=True),
    ]


def block_plots(run: RunData) -> list[str]:
    """Return plots that have a line for every block, but the head warm-up's, which has no steps."""
    blocks = run.data.get("facts", {}).get("blocks", [])

    def named(prefix: str) -> dict[str, str]:
        found = {}
        for key in run.keys(prefix):
            index = int(key.removeprefix(prefix)) - 1 if key.removeprefix(prefix).isdigit() else -1
            layers = (
                f" ({blocks[index]['start']}-{blocks[index]['stop'] - 1})" if 0 <= index < len(blocks) else ""
            )
            found[key] = f"block {index + 1}{layers}"
        return found

    squares = "mean squared error"
    plots = []
    if warm_up := run.data.get("head_warmup"):
        series = {
            f"block {i + 1}": thinned([(step, losses[i]) for step, losses in enumerate(warm_up, start=1)])
            for i in range(len(warm_up[0]))
        }
        svg = line_plot(
            series, title="Local loss in the head warm-up", x_label="step", y_label=squares, log_y=True
        )
        plots.append(figure(svg, "Before the first step; only the heads learn here."))
    local = "Every earlier block's own loss, not weighted."
    return [
        *plots,
        *_plot([run], named("local_loss/block_"), "Local losses", squares, local, log_y=True),
        *_plot([run], named("grad_share/block_"), "Share of the gradient by block", "of its squared norm"),
        *_plot(
            *([run], named("unexplained/block_"), "Local loss against a constant's", "ratio"),
            "At 1 a head does no better than a constant would.",
        ),
    ]


def retention_plots(run: RunData) -> list[str]:
    keys = [key for key in run.keys(PREFIX) if key not in (CHANGE, TASKS_CHANGE)]
    texts = {key: key.removeprefix(PREFIX).removesuffix("_loss") for key in keys if key.endswith("_loss")}
    tasks = {key: key.removeprefix(PREFIX) for key in keys if key not in texts}
    return [
        *_plot([run], texts, "Loss on other text", "nats per token", "Higher is worse."),
        *_plot([run], tasks, "Benchmark scores", "share of items"),
    ]


def cost_plots(runs: Sequence[RunData]) -> list[str]:
    """Return plots of speed and memory."""
    return [
        *_plot(runs, {"tokens_per_second": "speed"}, "Tokens per second", "in optimizer steps"),
        *_plot(runs, {"peak_memory_gib": "peak"}, "Peak memory so far", "GiB"),
    ]


def lengths_plot(facts: Mapping[str, Any]) -> list[str]:
    """Return a histogram of the rows' lengths with the place where they are cut; none without lengths."""
    lengths, limit = facts.get("lengths"), facts.get("max_length")
    if not lengths:
        return []
    where = ""
    marks: dict[float, str] = {}
    if limit is not None and limit <= 1.1 * len(lengths["counts"]) * lengths["width"]:
        marks[float(limit)] = f"cut at {limit:,}"
    elif limit is not None:
        where = f"; all are far shorter than {limit:,}, where rows are cut"
    svg = histogram_plot(
        lengths["counts"],
        lengths["width"],
        title="Lengths of the rows",
        x_label="tokens",
        y_label="rows",
        marks=marks,
    )
    return [figure(svg, f"The longest has {lengths['longest']:,} tokens{where}.")]
