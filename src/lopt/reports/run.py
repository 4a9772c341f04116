"""The page of a training run: `report.html` in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lopt.evaluation.retention_callback import CHANGE
from lopt.files import write_text
from lopt.instruments.memory import format_bytes
from lopt.reports.page import Pane, figures, page, paragraph, side_by_side, table
from lopt.reports.run_data import OUTCOMES, PAGE, RunData
from lopt.reports.run_plots import block_plots, cost_plots, learning_plots, lengths_plot, retention_plots
from lopt.reports.text import duration, number, setting_text


def write_run_page(folder: Path, run: RunData) -> Path:
    """Write the page of a run; returns its path."""
    path = folder / PAGE
    write_text(path, run_page(run))
    return path


def run_page(run: RunData) -> str:
    """Return the page of a run as HTML."""
    facts = run.data.get("facts", {})
    sections = [
        ("", paragraph(outcome(run), "lede") + _state_note(run) + paragraph(_about(facts))),
        ("Learning", figures(learning_plots([run]))),
        ("Retention", figures(retention_plots(run))),
        ("By block", figures(block_plots(run))),
        ("Speed and memory", figures(cost_plots([run])) + _memory(run)),
        ("Rows", _rows(facts)),
        ("Sample completions", _samples(run)),
        ("Warnings", _warnings(run)),
        ("Settings", _settings(run)),
        ("Environment", _environment(run)),
    ]
    attempts = run.record.get("attempts", [])
    command = run.data.get("command", "")
    parts = [f"lopt {command}" if command else "", Path(str(facts.get("model", ""))).name]
    parts += [attempts[0]["date"][:10]] if attempts else []
    return page(run.name, sections, " · ".join(filter(None, parts)))


# -- words -------------------------------------------------------------------------------------------


def outcome(run: RunData) -> str:
    """Return what was learned, in a sentence."""
    parts = []
    for key, name in OUTCOMES.items():
        points = run.points(key)
        if "loss" in key and (run.points("reward") or run.data.get("command") == "grpo"):
            continue  # GRPO's says nothing of what is learned
        if key == "train_loss" and run.points("loss"):
            continue
        if len(points) > 1:
            parts.append(f"{name} went from {points[0][1]:.4g} to {points[-1][1]:.4g}")
        elif points:
            parts.append(f"{name} was {points[0][1]:.4g}")
    change = run.points(CHANGE)
    if change:
        parts.append(f"the loss on other text changed by {number(change[-1][1], '+.4f')}")
    steps = f"{run.steps:,} step{'s' * (run.steps != 1)}"
    return f"In {steps}, {', '.join(parts)}." if parts else f"{steps}; nothing has been logged yet."


def _state_note(run: RunData) -> str:
    last = run.data.get("facts", {}).get("steps")
    if run.data.get("ended") or not last:
        return ""
    return paragraph(
        f"The run has not ended: this is how it was after step {run.steps:,} of {last:,}.", "note"
    )


_LEARNS = {"recon loss": "local loss", "next_token loss": "local loss", "nothing": "not trained"}


def _about(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    blocks = facts["blocks"]
    spans = [f"{b['start']}\u2011{b['stop'] - 1} ({_LEARNS.get(b['learns'], b['learns'])})" for b in blocks]
    cut = f"Layers {', '.join(spans)}; no gradient crosses a boundary." if len(blocks) > 1 else ""
    kind = {"lora": "LoRA adapters learn", "frozen": "The last block learns"}.get(
        facts["method"] if len(blocks) > 1 or facts["method"] == "lora" else "", ""
    )
    words = kind or ("Each block learns by itself" if len(blocks) > 1 else "All layers learn end to end")
    trained = 100 * facts["trained"] / max(facts["parameters"], 1)
    return (
        f"{words}: {facts['trained']:,} of {facts['parameters']:,} parameters ({trained:.1f} %), "
        f"weights in {facts['dtype']}. {cut}"
    )


def _memory(run: RunData) -> str:
    memory = run.data.get("memory")
    if not memory:
        return ""
    rows = [[name, format_bytes(size)] for name, size in memory.items()]
    rows.append(["together", format_bytes(sum(memory.values()))])
    return table(["Part", "At the peak"], rows, "Memory by part: live bytes of tensors.", numeric=(1,))


# -- rows and answers --------------------------------------------------------------------------------


def _rows(facts: Mapping[str, Any]) -> str:
    if not facts.get("rows"):
        return paragraph("The rows are a stream, of which nothing is known beforehand.") if facts else ""
    names = {
        "rows": "packed sequences" if facts.get("packed") else "rows trained on",
        "held_out": "held out",
        "rows_given": "rows before any was left out",
        "dropped": "left out as too long",
        "cut": f"cut at {facts.get('max_length')} tokens",
        "tokens": "tokens",
        "labelled_tokens": "tokens with a label: what is learned",
    }
    counts = [[name, f"{facts[key]:,}"] for key, name in names.items() if facts.get(key) is not None]
    parts = [table(["Rows", "Count"], counts, "What the run is given, once over.", numeric=(1,))]
    parts.insert(0, figures(lengths_plot(facts)))
    return "".join(parts)


def _samples(run: RunData) -> str:
    samples = run.data.get("samples") or {}
    parts = []
    for name, words in (("first", "At the beginning"), ("last", "At the end")):
        found = samples.get(name)
        if not found:
            continue
        panes = [Pane(f"Reward {one['reward']:.3g}", one["completion"]) for one in found["completions"]]
        parts.append(side_by_side(panes, heading=f"{words}, step {found['step']:,}", prompt=found["prompt"]))
    return "".join(parts)


def _warnings(run: RunData) -> str:
    return "".join(
        paragraph(text + (f" ({count} times)" if count > 1 else ""))
        for text, count in (run.data.get("warnings") or {}).items()
    )


# -- settings ----------------------------------------------------------------------------------------


def _settings(run: RunData) -> str:
    changed = run.data.get("changed") or run.record.get("settings") or {}
    if not changed:
        return ""
    rows = [[name, setting_text(value)] for name, value in changed.items()]
    return table(["Flag", "Value"], rows, "Flags that were given; the others have their defaults.")


def _environment(run: RunData) -> str:
    attempts = run.record.get("attempts", [])
    if not attempts:
        return ""
    last = attempts[-1]
    starts = [
        [
            a["date"],
            a["command"] + (f" (from {Path(str(a['resumed_from'])).name})" if a.get("resumed_from") else ""),
        ]
        for a in attempts
    ]
    facts = {**{k: v for k, v in last["environment"].items() if v}, **last["versions"]}
    if seconds := run.data.get("seconds"):
        starts.append(["time in all", duration(seconds)])
    parts = table(["Started", "Command"], starts, "The run.")
    return parts + table(["", ""], [[n, setting_text(v)] for n, v in facts.items()], "Machine and versions.")
