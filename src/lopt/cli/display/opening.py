"""What is shown before training: the model, how it is cut, the rows, the steps, and where the run goes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from lopt.cli.display.screen import PLAIN_WIDTH
from lopt.reports.page import clean

LABEL = 12
"""Columns of the names on the left."""
_LOSSES = {
    "task loss": ("█", "#", "task loss"),
    "recon loss": ("▒", "+", "local loss (reconstruction)"),
    "next_token loss": ("▒", "+", "local loss (next token)"),
    "predicted_gradient loss": ("▒", "+", "predicted gradient of the task"),
    "nothing": ("·", ".", "not trained"),
}
"""What a block learns from -> its sign in the picture, the same in ASCII, and its name."""
_METHODS = {"lopt": "LoPT", "frozen": "frozen early blocks", "e2e": "end to end", "lora": "LoRA"}


def opening(command: str, facts: Mapping[str, Any], width: int, *, ascii_only: bool = False) -> Text:
    """Return the block that is shown before training.

    Args:
        command: the name of the command.
        facts: from `lopt.reports.facts.run_facts`.
        width: columns of the terminal.
        ascii_only: whether nothing but ASCII can be printed.
    """
    picture, legend = block_picture(facts["blocks"], width - LABEL - 2, ascii_only=ascii_only)
    count = len(facts["blocks"])
    method = _METHODS[facts["method"]] + (f", {count} blocks" if count > 1 else "")
    if facts["method"] == "lopt" and count == 1:
        method = "end to end: one block has no boundary"
    rows = [
        ("model", f"{_short(facts['model'])} ({facts['architecture']}, {facts['dtype']})"),
        ("parameters", _parameters(facts)),
        ("method", method),
        ("layers", picture),
        ("", legend),
        ("rows", _rows(facts)),
        ("tokens", _token_words(facts)),
        ("steps", _steps(facts, "completions" if command == "grpo" else "rows")),
        ("learning", _learning(facts)),
        ("output", facts["output_dir"]),
    ]
    return lay_out(f"lopt {command}", [(n, v) for n, v in rows if v], width, ascii_only=ascii_only)


def lay_out(title: str, rows: Iterable[tuple[str, str]], width: int, *, ascii_only: bool = False) -> Text:
    """Return named lines below a title; long values go on below themselves."""
    rule = "-" if ascii_only else "─"
    text = Text(no_wrap=True)
    text.append(f"{rule * 2} ", style="dim")
    text.append(title, style="bold")
    text.append(f" {rule * max(2, min(width, PLAIN_WIDTH) - len(title) - 5)}", style="dim")
    for name, value in rows:
        # Paths and commands are not broken within a word, so that they can be copied.
        lines = textwrap.wrap(
            clean(value), max(width - LABEL - 2, 20), break_long_words=False, break_on_hyphens=False
        )
        for number, line in enumerate(lines):
            text.append(f"\n  {name if not number else '':{LABEL}}", style="cyan")
            text.append(line)
    return text


def block_picture(blocks: list[dict[str, Any]], width: int, *, ascii_only: bool = False) -> tuple[str, str]:
    """Return the layers as a line of signs, cut at boundaries, and a line that says what the signs mean."""
    depth, which = blocks[-1]["stop"], 1 if ascii_only else 0
    room = max(width - len(blocks), len(blocks))
    scale = max(1, min(room, 40) // depth)
    parts, kinds = [], dict[str, list[str]]()
    for block in blocks:
        layers = block["stop"] - block["start"]
        signs = layers * scale if depth * scale <= room else max(1, layers * room // depth)
        parts.append(_LOSSES[block["learns"]][which] * signs)
        kinds.setdefault(block["learns"], []).append(_layers(block))
    legend = [
        f"{_LOSSES[kind][which]} {_LOSSES[kind][2]}: layers {', '.join(spans)}"
        for kind, spans in kinds.items()
    ]
    return ("|" if ascii_only else "┃").join(parts), "; ".join(legend)


def _layers(block: Mapping[str, Any]) -> str:
    first, last = block["start"], block["stop"] - 1
    return str(first) if first == last else f"{first}-{last}"


def _short(model: str) -> str:
    """Return a hub id as it is, and of a folder its last name."""
    return Path(model).name if Path(model).is_absolute() else model


def amount(count: float) -> str:
    """Return a large number such as "268.1 M"."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return f"{count:,.0f}"


def share(part: float, whole: float) -> str:
    """Return a share in percent; what is neither nothing nor all does not look so."""
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "less than 0.1 %"
    digits = 0 if percent in (0, 100) else 1
    return f"{min(percent, 99.9) if part < whole else 100:.{digits}f} %"


def _parameters(facts: Mapping[str, Any]) -> str:
    every, trained = facts["parameters"], facts["trained"]
    words = "all trained" if every == trained else f"{amount(trained)} trained ({share(trained, every)})"
    return f"{amount(every)}, {words}"


def _rows(facts: Mapping[str, Any]) -> str:
    if facts["rows"] is None:
        return "a stream"
    packed = facts["packed"]
    words = [f"{facts['rows']:,} {'packed sequences' if packed else 'rows'}"]
    if packed and "rows_given" in facts:
        words[0] += f" of {facts['rows_given'] - facts['dropped']:,} rows"
    if facts["held_out"]:
        words.append(f"{facts['held_out']:,} held out")
    if facts.get("dropped"):
        words.append(f"{facts['dropped']:,} dropped as too long")
    if facts.get("cut"):
        words.append(f"{facts['cut']:,} cut at {facts['max_length']:,} tokens")
    return ", ".join(words)


def _token_words(facts: Mapping[str, Any]) -> str:
    if "tokens" not in facts:
        return ""
    words = [amount(facts["tokens"])]
    if "labelled_tokens" in facts:
        masked = facts["tokens"] - facts["labelled_tokens"]
        words.append(f"{share(masked, facts['tokens'])} masked" if masked else "none masked")
    if not facts["packed"] and "lengths" in facts:
        words.append(f"longest row {facts['lengths']['longest']:,}")
    return ", ".join(words)


def _steps(facts: Mapping[str, Any], what: str) -> str:
    rows, accumulated, ranks = facts["batch"]
    parts = [f"{rows} a micro-batch"]
    if accumulated > 1:
        parts.append(f"{accumulated} micro-batches")
    if ranks > 1:
        parts.append(f"{ranks} processes")
    count = rows * accumulated * ranks
    words = f"{facts['steps']:,}, each of {count} {what.removesuffix('s') if count == 1 else what}"
    if len(parts) > 1:
        words += f" ({' × '.join(parts)})"
    if facts["first_step"]:
        words += f"; resumed after step {facts['first_step']:,}"
    return words


def _learning(facts: Mapping[str, Any]) -> str:
    words = f"rate {facts['learning_rate']:.3g}"
    if "learning_rate_k1" in facts:
        words += f", of earlier blocks {facts['learning_rate_k1']:.3g}"
    words += f"; {facts['scheduler']}"
    if facts["warmup_steps"]:
        words += f" after {facts['warmup_steps']:,} step{'s' * (facts['warmup_steps'] > 1)} of warm-up"
    return f"{words}; {facts['optimizer']}"
