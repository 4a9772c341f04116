"""What one GPU shows: peaks against the plan, speed with and without offload, LoPT at equal memory.

Random weights of the real shape, in bfloat16, 4 x 1,024 tokens a micro-batch.

- "peak": k=4 in block-major order with everything offloaded, float32 AdamW state: `max_memory_allocated`
  beside what `lopt plan` says.
- "offload": the same with bfloat16 state and 16 micro-batches, tokens per second beside no offload,
  several times in turn, since both do not fit at once.
- "equal memory": end to end with recompute against eager LoPT k=4 without, a smaller shape, in pairs.

    python benchmarks/gpu.py [--device cpu --shape tiny --tokens 32]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from typing import Any

import torch
from transformers import AutoConfig

from block_memory import BF16, SHAPES, Loop, staged
from lopt.instruments.memory import MemoryTracker
from lopt.planning.plan import Planner
from lopt.planning.run import Run, Setting
from small_model import flags, keep

TINY: dict[str, Any] = dict(
    model_type="qwen2", hidden_size=64, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False,
)  # fmt: skip
MIDDLE: dict[str, Any] = SHAPES["qwen2.5-7b"] | dict(
    hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2
)  # Qwen2.5-1.5B, untied


def main() -> None:
    parser = flags(__doc__, "gpu.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="qwen2.5-7b", choices=["tiny", *SHAPES])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prefetch", type=float, default=10.0, help="GiB, for the offload case")
    parser.add_argument("--only", nargs="*", default=["peak", "offload", "equal memory"])
    args = parser.parse_args()
    results: dict[str, Any] = {
        "on": args.device,
        "shape": args.shape,
        "bandwidth, GB/s": bandwidth(args.device),
    }
    shape = TINY if args.shape == "tiny" else SHAPES[args.shape]
    cases = {"peak": peak_case, "offload": offload_case, "equal memory": equal_memory_case}
    for name in args.only:
        results[name] = cases[name](shape, args)
        print(name, json.dumps(results[name], indent=1), flush=True)
        keep(args.output, results)


def bandwidth(device: str) -> dict[str, float]:
    """Host to device and back, from pinned memory."""
    if not device.startswith("cuda"):
        return {}
    host, there = (
        torch.empty(2**30, dtype=torch.uint8, pin_memory=True),
        torch.empty(2**30, dtype=torch.uint8),
    )
    there = there.to(device)
    rates = {}
    for name, copy in (("in", lambda: there.copy_(host)), ("out", lambda: host.copy_(there))):
        copy()
        rates[name] = 5 * 2**30 / seconds(lambda copy=copy: [copy() for _ in range(5)], device) / 1e9
    return rates


def seconds(function: Any, device: str) -> float:
    """Wall time of a call, the GPU's queue empty before and after."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measured(
    shape: dict, args: argparse.Namespace, setting: dict, micro_batches: int, steps: int = 2
) -> dict:
    """Seconds of each step after the first two, and the peak of the last."""
    gc.collect()
    loop = Loop(shape, args, setting, args.device)
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()
    loop.step(1)
    loop.step(micro_batches)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        times = [seconds(lambda: loop.step(micro_batches), args.device) for _ in range(steps)]
        peak = torch.cuda.max_memory_allocated()
    else:
        times = [seconds(lambda: loop.step(micro_batches), args.device) for _ in range(steps)]
        with MemoryTracker(loop.model, loop.handle.heads, optimizer=loop.optimizer) as tracker:
            loop.step(micro_batches)
        peak = tracker.peak.total
    if loop.schedule is not None:
        loop.schedule.close()
    tokens = micro_batches * args.batch * args.tokens
    return {"seconds": times, "tokens/s": tokens / statistics.median(times), "peak GiB": peak / 2**30}


def peak_case(shape: dict, args: argparse.Namespace) -> dict:
    """Peak beside the plan, with little memory for what is on its way."""
    options = dict(shape)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    rows = {}
    for checkpointing in (False, True):
        setting = staged(4, "block", checkpointing=checkpointing)
        found = measured(shape, args, setting, 8)
        run = Run(
            config, args.batch, args.tokens, accumulation=8, autocast=False, device=args.device.split(":")[0]
        )
        plan = Planner(run).plan(
            Setting(num_blocks=4, schedule="block_major", offload="block", checkpointing=checkpointing)
        )
        found |= {
            "planned GiB": plan.total / 2**30,
            "measured over planned": found["peak GiB"] * 2**30 / plan.total,
        }
        rows["checkpointed" if checkpointing else "not checkpointed"] = found
    return rows


def offload_case(shape: dict, args: argparse.Namespace) -> dict:
    """Speed with the block offloaded beside nothing offloaded, at 16 micro-batches."""
    settings = {
        "none": staged(4, "none", **BF16),
        "block": staged(4, "block", prefetch=args.prefetch, **BF16),
    }
    rows: dict[str, Any] = {name: [] for name in settings}
    for _ in range(args.rounds):
        for name, setting in settings.items():
            rows[name].append(measured(shape, args, setting, 16))
    rates = {name: statistics.median(row["tokens/s"] for row in found) for name, found in rows.items()}
    return rows | {"block over none": rates["block"] / rates["none"]}


def equal_memory_case(shape: dict, args: argparse.Namespace) -> dict:
    """End to end with recompute over LoPT k=4 without, pair by pair."""
    smaller = TINY if shape is TINY else MIDDLE
    loops = {
        "e2e, checkpointed": Loop(smaller, args, dict(method="e2e", checkpointing=True), args.device),
        "eager k=4": Loop(smaller, args, dict(k=4), args.device),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop.step(1)
    for _ in range(3 * args.rounds):
        for name, loop in loops.items():
            times[name].append(seconds(lambda loop=loop: loop.step(4), args.device))
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    del loops
    peaks = {
        name: measured(smaller, args, setting, 4)["peak GiB"]
        for name, setting in (
            ("e2e, checkpointed", dict(method="e2e", checkpointing=True)),
            ("eager k=4", dict(k=4)),
        )
    }
    return {"seconds": times, "e2e over LoPT": statistics.median(ratios), "peak GiB": peaks}


if __name__ == "__main__":
    main()
