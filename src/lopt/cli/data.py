"""`lopt data download` and `lopt data preview`."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopt.cli.caches import cache_problem
from lopt.cli.flag_names import with_flags
from lopt.cli.folder import for_pairs
from lopt.cli.parsing import check_effect, parse
from lopt.messages import error_text
from lopt.validation import check_number


def main(arguments: Sequence[str]) -> None:
    """Find the subcommand and run it."""
    subcommands = {"download": _download, "preview": _preview}
    name, *rest = arguments or ["none"]
    if name not in subcommands:
        raise ValueError(f"the subcommand must be {' or '.join(subcommands)} (got {name})")
    subcommands[name](rest)


def _download(arguments: Sequence[str]) -> None:
    from lopt.cli.output import check_writable  # these imports take seconds
    from lopt.data.download import choose_presets, download

    (args,) = parse("data download", arguments)
    check_effect(args, write_parquet=("output_dir", "overwrite"))
    presets = choose_presets(args.dataset)
    if args.revision is not None and len(presets) > 1:
        raise ValueError("`revision` belongs to one data set: name one with `dataset`")
    folder = Path(args.output_dir) if args.write_parquet else None
    if folder is not None:
        check_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
    failed = []
    for preset in presets:
        path = folder / f"{preset.name}.parquet" if folder is not None else None
        if path is not None and path.exists() and not args.overwrite:
            print(f"{preset.name}: {path} is there already and left alone (--overwrite replaces it)")
            continue
        try:
            rows = download(preset, path, revision=args.revision)
        except (ValueError, OSError) as error:
            failed.append(preset.name)
            problem = cache_problem(error) or error_text(error, limit=1000)
            reason = with_flags(problem, ("dataset", "dataset_split", "train_file"))
            print(f"{preset.name}: failed. {reason}")
            continue
        sft = f"--dataset_preset {preset.name}"
        flags = {
            "sft": sft,
            "dpo": f"{sft} (lopt dpo)",
            "grpo": f"--task {preset.name} (lopt grpo) or {sft} (lopt sft)",
        }[preset.use]
        if path is None:
            print(f"{preset.name}: {rows:,} rows are in the cache. Train with {flags}")
        else:
            print(f"{preset.name}: {rows:,} rows. Train with {flags} --train_file {path}")
    if failed:
        raise ValueError(f"not downloaded: {', '.join(failed)} (the reasons are above); try these again")


def _preview(arguments: Sequence[str]) -> None:
    from lopt.cli.display.screen import bars_on_a_terminal
    from lopt.cli.rows import dpo_rows, sft_rows  # TRL takes seconds, which a download need not wait for
    from lopt.cli.sft import check
    from lopt.data import preview

    # Every flag of the command, so that one can be previewed as it is.
    command, words = for_pairs("data preview", arguments)
    preview_args, model_args, data_args, *_, args = parse(command, words)
    pairs = command.endswith(" dpo")
    check_number("rows", preview_args.rows, minimum=1)
    if data_args.streaming:
        args.max_steps = max(args.max_steps, 1)  # where the run ends does not matter here
    check(model_args, data_args, args)
    args.report_to, args.eval_strategy = [], "no"
    with bars_on_a_terminal(), tempfile.TemporaryDirectory() as scratch:
        rows = (dpo_rows if pairs else sft_rows)(model_args, data_args, args)
        args.output_dir = scratch  # a trainer makes its folder, and this one leaves nothing
        trainer = _stand_in_trainer(rows, args, str(model_args.model_name_or_path))
        count = preview_args.rows * (2 if pairs else 1)
        shown = preview.first_sequences(trainer.get_train_dataloader(), count)
        longer = _longer(trainer, args)
        if longer is not None:
            shown = preview.mark_cut(shown, longer, args.max_length, args.truncation_mode == "keep_start")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    _print(preview.legend(colour))
    for place, sequence in enumerate(shown):
        number = f"{place // 2 + 1}. {('chosen', 'rejected')[place % 2]}:" if pairs else f"{place + 1}."
        _print(f"\n{number} {_figures(sequence, args.max_length)}")
        _print(preview.render(sequence, rows.tokenizer, colour))
    _print("\n" + _totals(rows, trainer, args, longer))


def _longer(trainer: Any, args: Any) -> Any:
    """Return the tokenized rows that `--max_length` cuts, or those of pairs; None if nothing is known."""
    from datasets import Dataset

    from lopt.data.preview import pair_rows
    from lopt.trainers.sft import longer_rows

    if args.max_length is None or not isinstance(trainer.train_dataset, Dataset):
        return None
    if hasattr(trainer, "whole_rows"):
        whole = trainer.whole_rows.get("train")
        return None if whole is None else longer_rows(whole, args.max_length)
    return [row for row in pair_rows(trainer.train_dataset) if len(row["input_ids"]) > args.max_length]


def _stand_in_trainer(rows: Any, args: Any, name: str) -> Any:
    """Return the trainer of a run in all that touches its data, on a model of no size.

    Args:
        name: The model whose tokens stop generation.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from lopt.core.config import LoPTConfig
    from lopt.models.names import resolve_model
    from lopt.trainers import LoPTDPOTrainer, LoPTSFTTrainer
    from lopt.trainers.config import LoPTDPOConfig

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig()
    with contextlib.suppress(OSError, ValueError):  # a model may have none
        model.generation_config = GenerationConfig.from_pretrained(resolve_model(name))
    pairs = isinstance(args, LoPTDPOConfig)
    kind: Any = LoPTDPOTrainer if pairs else LoPTSFTTrainer
    if pairs:
        args.precompute_ref_log_probs = args.sync_ref_model = False
    return kind(
        model,
        args=args,
        **({"ref_model": copy.deepcopy(model)} if pairs else {}),
        lopt_config=LoPTConfig(method="e2e"),
        train_dataset=rows.train,
        processing_class=rows.tokenizer,
    )


def _figures(shown: Any, max_length: int | None) -> str:
    parts = [f"{len(shown.tokens)} tokens, {shown.trained} of them trained on"]
    if shown.padding:
        parts.append(f"{shown.padding} of padding")
    if shown.cut:
        parts.append(f"cut at --max_length {max_length}")
    return ", ".join(parts)


def _totals(rows: Any, trainer: Any, args: Any, longer: Any) -> str:
    if rows.read is None:
        return "Rows of a stream are not counted."
    held_out = len(rows.held_out) if rows.held_out is not None else 0
    used = len(rows.train)
    parts = [f"{rows.read:,} rows"]
    if hasattr(trainer, "row_counts"):
        parts.append(f"{rows.read - used - held_out:,} dropped, their completion is empty")
    if held_out:
        parts.append(f"{held_out:,} held out")
    if not hasattr(trainer, "row_counts"):
        left = len(trainer.train_dataset)
        parts.append(f"{used - left:,} dropped, their prompt alone reaches --max_length {args.max_length}")
        parts.append(f"{left:,} pairs trained on, {len(longer or ()):,} of their answers cut")
        return "; ".join(parts)
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
