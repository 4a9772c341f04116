"""What is shown after training: what was learned, what it cost, the files, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from rich.text import Text

from lopt.cli.display.opening import amount, lay_out
from lopt.cli.display.progress import history_ends
from lopt.cli.display.screen import Screen
from lopt.cli.display.table import figure
from lopt.instruments.memory import format_bytes
from lopt.reliability.checkpoint import checkpoints
from lopt.reliability.record import Record
from lopt.reports.page import clean
from lopt.reports.text import duration

_LEARNED = {
    "loss": "loss",
    "train_loss": "mean loss",
    "eval_loss": "held out",
    "reward": "reward",
    "eval_reward": "reward, held out",
    "eval_rewards/accuracies": "chosen preferred, held out",
    "retention/change": "loss elsewhere",
}
"""Figure of the log -> its name."""
_FILES = {"report.html": "curves and settings", "README.md": "model card", "run.yaml": "to run it again"}


def closing(command: str, trainer: Any, base: str, seconds: float, width: int, *, ascii_only: bool) -> Text:
    """Return the block that is shown after training.

    Args:
        command: the name of the command.
        trainer: that has trained and saved its model.
        base: the model that it started from, as it was named.
        seconds: that the command has taken.
    """
    history, folder = trainer.state.log_history, Path(str(trainer.args.output_dir))
    arrow = "->" if ascii_only else "→"
    learned = []
    for key, name in _LEARNED.items():
        ends = history_ends(history, key)
        moved = sum(key in row for row in history) > 1
        if command == "grpo" and "loss" in key:
            continue  # it says nothing of what is learned
        if key == "train_loss" and history_ends(history, "loss") is not None:
            continue  # which a run shorter than `logging_steps` has not logged
        if key == "retention/change" and ends is not None:
            learned.append(f"{name} {ends[1]:+.4f}")
        elif ends is not None:
            learned.append(
                f"{name} {figure(ends[0])} {arrow} {figure(ends[1])}"
                if moved
                else f"{name} {figure(ends[1])}"
            )
    rows = [
        ("learned", "; ".join(learned)),
        ("cost", "; ".join(_cost(trainer, history, seconds))),
        ("files", _files(folder)),
    ]
    text = lay_out(
        f"lopt {command}: step {trainer.state.global_step:,} of {trainer.state.max_steps:,}",
        [(name, value) for name, value in rows if value],
        width,
        ascii_only=ascii_only,
    )
    text.append("\n  next", style="cyan")
    adapters, pushed = trainer.lopt.config.method == "lora", bool(trainer.args.push_to_hub)
    for line in next_commands(base, folder, adapters=adapters, pushed=pushed):
        text.append(f"\n    {clean(line)}")  # in one line however long, so that it can be pasted
    return text


def show_end(trainer: Any, screen: Screen, record: Record, seconds: float) -> None:
    """Show what a run has come to; `seconds` is what the command has taken."""
    history, folder = trainer.state.log_history, str(trainer.args.output_dir)
    base = str(record.settings["model_name_or_path"])
    ends = {key: history_ends(history, key) for key in _LEARNED}
    screen.event(
        "end",
        command=record.command,
        step=trainer.state.global_step,
        seconds=seconds,
        first_and_last={key: found for key, found in ends.items() if found},
        output_dir=folder,
    )
    text = closing(record.command, trainer, base, seconds, screen.width, ascii_only=screen.ascii_only)
    screen.print("")
    screen.print(text)


def next_commands(base: str, folder: Path, *, adapters: bool, pushed: bool) -> list[str]:
    """Return the three commands that one would run next.

    Args:
        base: the model that the run started from.
        folder: the run's.
        adapters: whether it has made LoRA adapters.
        pushed: whether it is on the hub already.
    """
    made, start = shlex.quote(str(folder)), shlex.quote(base)
    target = shlex.quote(f"YOUR_NAME/{folder.resolve().name}")
    proposals = (
        f"lopt chat {made}",
        f"lopt eval --base {start} --model_name_or_path {made} --tasks arc_challenge --limit 200",
        f"lopt merge {made}" if adapters else "",
        "" if pushed else f"hf upload {target} {made} . --exclude 'checkpoint-*'",
        f"lopt report {made}",
    )
    return [line for line in proposals if line][:3]


def _cost(trainer: Any, history: list[Mapping[str, Any]], seconds: float) -> list[str]:
    words = [duration(seconds)]
    tokens = history_ends(history, "num_tokens")
    if tokens is not None:
        words.append(f"{amount(tokens[1])} tokens")
    speeds = [row["tokens_per_second"] for row in history if "tokens_per_second" in row]
    if speeds:
        words.append(f"{mean(speeds):,.0f} tokens/s")
    memory = history_ends(history, "peak_memory_gib")
    if memory is not None:
        words.append(f"{format_bytes(round(memory[1] * 2**30))} of memory at the peak")
    return words


def _files(folder: Path) -> str:
    weights = [*folder.glob("*.safetensors")]
    words = [f"{folder}: model ({format_bytes(sum(path.stat().st_size for path in weights))})"]
    words += [f"{name} ({what})" for name, what in _FILES.items() if (folder / name).is_file()]
    kept = checkpoints(folder)
    if kept:
        words.append(f"{kept[-1].name} (to go on with --resume)")
    return ", ".join(words)
