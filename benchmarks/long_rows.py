"""Peak device memory of optimizer steps on long rows, counted on fake tensors, beside the planner's.

Qwen2.5-7B's shape in 30 stages (embedding, each layer, LM head), weights in bfloat16 with float32 masters
and AdamW state in host memory, one row a micro-batch, LM head as on a GPU: end to end, LoPT k=2 and frozen
k=2, with and without activation checkpointing inside a stage. The second optimizer step is counted, as in
`block_memory.py`.

    python benchmarks/long_rows.py [--tokens 4096 16384 32768]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoConfig

from block_memory import SHAPES, peak
from lopt.instruments.memory import MemoryPeak
from lopt.planning.plan import Plan, Planner
from lopt.planning.run import Run, Setting
from small_model import flags, keep

SHAPE = "qwen2.5-7b"
MICRO_BATCHES = 2
METHODS: dict[str, tuple[Any, int]] = {
    "end to end": ("e2e", 1),
    "LoPT k=2": ("lopt", 2),
    "frozen k=2": ("frozen", 2),
}
ROWS = [(name, checkpointing) for name in METHODS for checkpointing in (False, True)]


def setting_of(shape: dict[str, Any], name: str, checkpointing: bool) -> Setting:
    method, k = METHODS[name]
    stages = shape["num_hidden_layers"] + 2
    return Setting(
        method, k, "block_major", checkpointing, offload="block", stages=stages, optimizer_device="cpu"
    )


def planner(shape: dict[str, Any], tokens: int, prefetch: float = 2.0) -> Planner:
    options = dict(shape)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    run = Run(
        config, 1, tokens, MICRO_BATCHES, torch.bfloat16, autocast=False, prefetch=int(prefetch * 2**30)
    )
    return Planner(run)


def counted(shape: dict[str, Any], tokens: int, setting: Setting, prefetch: float = 2.0) -> MemoryPeak:
    """Return what is live on fake tensors."""
    args = argparse.Namespace(batch=1, tokens=tokens, micro_batches=MICRO_BATCHES)
    names = ("method", "schedule", "checkpointing", "offload", "stages", "optimizer_device")
    options = {name: getattr(setting, name) for name in names}
    return peak(
        shape,
        args,
        k=setting.num_blocks,
        masters=True,
        mask=True,
        gpu_head=True,
        prefetch=prefetch,
        **options,
    )


def row(plan: Plan, live: MemoryPeak) -> dict[str, float]:
    """Return GiB, counted and planned."""
    part = {name: getattr(plan.peak, name) for name in ("activations", "head_and_loss", "transfers")}
    both = {"counted": live.total, "planned": plan.total} | part
    return {name: round(size / 2**30, 2) for name, size in both.items()} | {
        "off": round(plan.total / live.total - 1, 4)
    }


def main() -> None:
    parser = flags(__doc__, "long_rows.json")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768])
    args = parser.parse_args()
    shape, results = SHAPES[SHAPE], dict[str, Any]()
    for tokens in args.tokens:
        plans = planner(shape, tokens)
        for name, checkpointing in ROWS:
            began, setting = time.perf_counter(), setting_of(shape, name, checkpointing)
            found = row(plans.plan(setting), counted(shape, tokens, setting))
            label = name + ", checkpointed" * checkpointing
            results.setdefault(f"{tokens:,} tokens", {})[label] = found
            print(f"{tokens:7,} {label:26} {found}  ({time.perf_counter() - began:.0f} s)", flush=True)
    results["unit"] = "GiB at the peak of the second optimizer step; off: planned over counted, less 1"
    results["set up"] = f"{SHAPE} in 30 stages, host optimizer, {MICRO_BATCHES} micro-batches of one row"
    keep(args.output, results)


if __name__ == "__main__":
    main()
