"""What a training run is, in numbers: what a terminal shows before it, and its page after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lopt.architectures import base_model
from lopt.data.batches import IGNORED

Facts = dict[str, Any]
"""Plain values, which JSON can hold."""

_BINS = 24
_ROUND = (1, 2, 5)  # widths of bins that are easy to read, times a power of ten


def run_facts(trainer: Any) -> Facts:
    """Return what `trainer`, a trainer with `LoPTMixin` that is about to train, will do.

    Lengths and tokens are in tokens, of the rows of this process; None is what is not known beforehand.
    """
    args, config, model = trainer.args, trainer.lopt.config, trainer.lopt.model
    base = base_model(model)
    every = {id(p): p for p in model.parameters()}.values()
    heads = {id(p) for p in trainer.lopt.heads.parameters()}
    weights = [p for p in every if id(p) not in heads]
    facts = {
        "model": str(getattr(base.config, "name_or_path", "") or type(base).__name__),
        "architecture": type(base).__name__,
        "dtype": str(next(iter(every)).dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in weights),
        "trained": sum(p.numel() for p in weights if p.requires_grad),
        "method": config.method,
        "blocks": block_facts(trainer),
        "steps": trainer.state.max_steps,
        "first_step": trainer.state.global_step,
        "epochs": trainer.state.num_train_epochs,
        "batch": [args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size],
        "learning_rate": args.learning_rate,
        "scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup_steps": args.get_warmup_steps(trainer.state.max_steps),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "max_length": getattr(args, "max_length", None),
        "output_dir": str(args.output_dir),
    }
    if config.is_local:
        facts["learning_rate_k1"] = config.early_learning_rate(args.learning_rate)
        facts |= {"lambda_aux": config.lambda_aux, "head_warmup_steps": config.head_warmup_steps}
    return facts | row_facts(trainer)


def block_facts(trainer: Any) -> list[Facts]:
    """Return the layers of every block, and what they learn from: a kind of loss, or "nothing"."""
    config, blocks = trainer.lopt.config, list(trainer.lopt.blocks)
    early = "nothing" if config.method == "frozen" else f"{config.aux_loss} loss"
    learns = ["nothing" if b.index < config.frozen_blocks else early for b in blocks[:-1]] + ["task loss"]
    return [
        {"start": b.start, "stop": b.stop, "learns": what} for b, what in zip(blocks, learns, strict=True)
    ]


def row_facts(trainer: Any) -> Facts:
    """Return how many rows and tokens there are, what `max_length` takes away, and the rows' lengths."""
    held_out = trainer.eval_dataset
    parts = held_out.values() if isinstance(held_out, Mapping) else [held_out]
    facts: Facts = {
        "rows": len(trainer.train_dataset) if isinstance(trainer.train_dataset, Sized) else None,
        "held_out": sum(len(part) for part in parts if isinstance(part, Sized)),
        "packed": bool(getattr(trainer.args, "packing", False)),
    }
    counts = getattr(trainer, "row_counts", {}).get("train")
    if counts is not None:
        facts |= {"rows_given": counts.rows, "dropped": counts.dropped, "cut": counts.cut}
    if facts["rows"]:
        facts |= _tokens(trainer.train_dataset)
        whole = getattr(trainer, "tokenized_rows", {}).get("train")
        lengths = row_lengths(trainer.train_dataset if whole is None else whole)
        if lengths is not None:
            facts["lengths"] = histogram(lengths)
    return facts


def _tables(rows: Any, names: set[str]) -> Iterator[pa.Table]:
    """Yield the columns `names` of tokenized rows, part by part; nothing of rows without such a column."""
    found = [name for name in getattr(rows, "column_names", ()) if name in names]
    if found:
        yield from rows.select_columns(found).with_format("arrow").iter(2000)


def _tokens(rows: Any) -> Facts:
    """Return the tokens of prepared rows, and how many of them have a label, where that is stored."""
    tokens, labelled, marked = 0, 0, False
    for table in _tables(rows, {"input_ids", "labels"}):
        if "input_ids" not in table.column_names:
            return {}
        tokens += pc.sum(pc.list_value_length(table["input_ids"])).as_py() or 0
        if "labels" in table.column_names:
            marked = True
            flat = pc.list_flatten(table["labels"])
            labelled += pc.sum(pc.not_equal(flat, IGNORED)).as_py() or 0
    if not tokens:
        return {}
    return {"tokens": tokens} | ({"labelled_tokens": labelled} if marked else {})


def row_lengths(rows: Any) -> np.ndarray | None:
    """Return the length of every row in tokens, of a pair that of its longer side; None without tokens."""
    found = []
    for table in _tables(rows, {"input_ids", "prompt_ids", "chosen_ids", "rejected_ids"}):
        sizes = {name: pc.list_value_length(table[name]).to_numpy() for name in table.column_names}
        if "input_ids" in sizes:
            found.append(sizes["input_ids"])
        elif len(sizes) == 3:
            answers = np.maximum(sizes["chosen_ids"], sizes["rejected_ids"])
            found.append(sizes["prompt_ids"] + answers)
    return np.concatenate(found) if found else None


def histogram(lengths: np.ndarray) -> Facts:
    """Return counts of lengths in up to 24 bins of a round `width`, from 0 on, and the longest."""
    longest = int(lengths.max())
    scale = 10 ** max(0, len(str(longest)) - 3)
    width = next(
        w for s in (scale, 10 * scale, 100 * scale) for r in _ROUND if (w := r * s) * _BINS > longest
    )
    counts = np.bincount(lengths // width, minlength=longest // width + 1)
    return {"width": width, "counts": counts.tolist(), "longest": longest, "rows": len(lengths)}
