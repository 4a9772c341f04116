"""`lopt data download` and `lopt data preview`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from lopt.cli.parsing import parse
from lopt.validation import check_number


def main(arguments: Sequence[str]) -> None:
    """Find the subcommand and run it."""
    subcommands = {"download": _download, "preview": _preview}
    name, *rest = arguments or ["none"]
    if name not in subcommands:
        raise ValueError(f"the subcommand must be {' or '.join(subcommands)} (got {name})")
    subcommands[name](rest)


def _download(arguments: Sequence[str]) -> None:
    from lopt.data.download import choose, download

    (args,) = parse("data download", arguments)
    presets = choose(args.dataset)
    if args.revision is not None and len(presets) > 1:
        raise ValueError("`revision` belongs to one data set: name one with `dataset`")
    folder = args.output_dir if args.write_parquet else None
    download(presets, folder, revision=args.revision, overwrite=args.overwrite)


def _preview(arguments: Sequence[str]) -> None:
    from lopt.cli.rows import sft_rows  # TRL takes seconds, which a download need not wait for
    from lopt.cli.sft import check
    from lopt.data import preview

    # Every flag of `lopt sft`, so that a command can be previewed as it is.
    preview_args, model_args, data_args, _, _, _, args = parse("data preview", arguments)
    check_number("rows", preview_args.rows, minimum=1)
    if data_args.streaming:
        args.max_steps = max(args.max_steps, 1)  # where the run ends does not matter here
    check(model_args, data_args, args)
    args.report_to, args.eval_strategy = [], "no"
    rows = sft_rows(model_args, data_args, args)
    with tempfile.TemporaryDirectory() as scratch:
        args.output_dir = scratch  # a trainer makes its folder, and this one leaves nothing
        trainer = preview.stand_in_trainer(rows.train, rows.tokenizer, args)
        shown = preview.sequences(trainer, preview_args.rows)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
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


def _print(text: str) -> None:
    """Print, with an escape for characters that the terminal's encoding does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))
