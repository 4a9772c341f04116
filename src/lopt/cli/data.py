"""`lopt data download` and `lopt data preview`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lopt.cli.arguments import DataArguments, ModelArguments, RetentionArguments, RunArguments
from lopt.cli.parsing import parse
from lopt.core.config import LoPTConfig
from lopt.data.download import choose, download
from lopt.data.presets import PRESETS

SUBCOMMANDS = {
    "download": "fetch public data sets into the cache or into Parquet files",
    "preview": "show what `lopt sft` with the same flags trains on, token by token",
}
USAGE = "usage: lopt data SUBCOMMAND [--flag value ...]   (lopt data SUBCOMMAND --help lists the flags)\n\n"


@dataclass
class DownloadArguments:
    """What to fetch, and where to."""

    dataset: list[str] = field(
        default_factory=list, metadata={"help": f"One or more of {', '.join(PRESETS)}, or all."}
    )
    write_parquet: bool = field(
        default=False, metadata={"help": "Write NAME.parquet too; without it the cache is filled only."}
    )
    output_dir: str = field(default="data", metadata={"help": "Folder of the Parquet files."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit, of one data set."})
    overwrite: bool = field(default=False, metadata={"help": "Replace files that are there already."})


@dataclass
class PreviewArguments:
    """How much to show."""

    rows: int = field(default=3, metadata={"help": "How many sequences to show."})


def main(arguments: Sequence[str]) -> None:
    """Find the subcommand and run it."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE + "\n".join(f"  {name:10} {what}" for name, what in SUBCOMMANDS.items()))
        if not arguments:
            raise ValueError(f"name a subcommand: {' or '.join(SUBCOMMANDS)}")
        return
    name, *rest = arguments
    if name not in SUBCOMMANDS:
        raise ValueError(f"there is no subcommand {name!r}: use {' or '.join(SUBCOMMANDS)}")
    {"download": _download, "preview": _preview}[name](rest)


def _download(arguments: Sequence[str]) -> None:
    (args,) = parse("data download", (DownloadArguments,), arguments)
    presets = choose(args.dataset)
    if args.revision is not None and len(presets) > 1:
        raise ValueError("--revision belongs to one data set: name one with --dataset")
    folder = args.output_dir if args.write_parquet else None
    download(presets, folder, revision=args.revision, overwrite=args.overwrite)


def _preview(arguments: Sequence[str]) -> None:
    from lopt.cli.rows import sft_rows  # these imports take seconds, which a download need not wait for
    from lopt.cli.sft import check
    from lopt.data import preview
    from lopt.trainers.config import LoPTSFTConfig

    # Every flag of `lopt sft`, so that a command can be previewed as it is.
    run_groups = (ModelArguments, DataArguments, RunArguments, RetentionArguments, LoPTConfig, LoPTSFTConfig)
    model_args, data_args, _, _, _, args, preview_args = parse(
        "data preview",
        (*run_groups, PreviewArguments),
        arguments,
    )
    if preview_args.rows < 1:
        raise ValueError(f"--rows {preview_args.rows} shows nothing: use 1 or more")
    if data_args.streaming:
        args.max_steps = max(args.max_steps, 1)  # where the run ends does not matter here
    check(model_args, data_args, args)
    args.report_to, args.eval_strategy = [], "no"
    rows = sft_rows(model_args, data_args, args)
    with tempfile.TemporaryDirectory() as scratch:
        args.output_dir = scratch  # a trainer makes its folder, and this one leaves nothing
        trainer = preview.stand_in_trainer(rows.train, rows.tokenizer, args)
        shown = preview.sequences(trainer, preview_args.rows)
    colour = _colour()
    _print(preview.legend(colour))
    for number, sequence in enumerate(shown, start=1):
        _print(f"\n{number}. {_figures(sequence, args.max_length)}")
        _print(preview.render(sequence, rows.tokenizer, colour))
    _print("\n" + _totals(rows, trainer, args))


def _figures(shown: Any, max_length: int | None) -> str:
    parts = [f"{len(shown.tokens)} tokens, {shown.trained} of them trained on"]
    if shown.padding:
        parts.append(f"{shown.padding} of padding")
    if shown.cut:
        parts.append(f"cut at --max_length {max_length}")
    return ", ".join(parts)


def _totals(rows: Any, trainer: Any, args: Any) -> str:
    if rows.read is None:
        return "Rows of a stream are not counted."
    held_out = len(rows.held_out) if rows.held_out is not None else 0
    used = len(rows.train)
    parts = [f"{rows.read:,} rows", f"{rows.read - used - held_out:,} dropped, their completion is empty"]
    if held_out:
        parts.append(f"{held_out:,} held out")
    counts = trainer.row_counts.get("train")
    if counts is not None:
        why = "they are longer than" if args.drop_long_rows else "their prompt alone reaches"
        parts.append(f"{counts.dropped:,} dropped, {why} --max_length {args.max_length}")
        parts.append(f"{counts.rows - counts.dropped:,} trained on, {counts.cut:,} of them cut")
    if args.packing:
        parts.append(f"packed into {len(trainer.train_dataset):,} sequences")
    return "; ".join(parts)


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _print(text: str) -> None:
    """Print, with an escape for what the terminal's encoding does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
