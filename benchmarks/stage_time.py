"""Time of an optimizer step in stages, in pairs within one process, beside the FLOPs that it computes.

Alternating pairs of steps, each an optimizer step of a few micro-batches, clipped, AdamW; the median of the
ratios counts. Three ratios have a bar:

- end to end in 8 stages over eager end to end with activation checkpointing: both compute each layer twice
  forward and once backward, so the rest is what the schedule costs. At most 1.08.
- LoPT k=2 in 8 stages over end to end in 8 stages: at most 1.05 times the ratio of their FLOPs.
- frozen k=2 over LoPT k=2, both in 8 stages: within 10 % of the ratio of their FLOPs.

"host" is the same with all weights in host memory and a host optimizer; on a CPU its copies are real and done
at once, which no bar is about.

    OMP_NUM_THREADS=1 python benchmarks/stage_time.py [--pairs 11]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from lopt import LoPTConfig, attach
from lopt.compat import checkpoint_activations
from lopt.engine.clipping import clip_gradients
from lopt.engine.optimizer import BlockOptimizer
from lopt.engine.plain_loop import block_major
from lopt.instruments.flops import FlopCounter
from small_model import flags, keep
from step_time import SHAPE, adamw, ratio

VOCABULARY = 512
STAGES = dict(schedule="block_major", stages=8)
HOST = STAGES | dict(offload="block", optimizer_device="cpu")
CASES: dict[str, dict[str, Any]] = {
    "eager, checkpointed": dict(method="e2e"),
    "e2e": dict(method="e2e", **STAGES),
    "lopt": dict(num_blocks=2, **STAGES),
    "frozen": dict(method="frozen", num_blocks=2, **STAGES),
    "e2e, host": dict(method="e2e", **HOST),
    "lopt, host": dict(num_blocks=2, **HOST),
}
PAIRS = {  # what is divided by what -> the smallest and largest ratio, as multiples of that of their FLOPs
    ("e2e", "eager, checkpointed"): None,
    ("lopt", "e2e"): (0.0, 1.05),
    ("frozen", "lopt"): (0.9, 1.1),
    ("e2e, host", "e2e"): None,
    ("lopt, host", "lopt"): None,
}


def make_step(config: LoPTConfig, args: argparse.Namespace) -> Callable[[], None]:
    """Return what runs an optimizer step; without stages, with activation checkpointing."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=VOCABULARY)).train()
    handle = attach(model, config)
    handle.loss_scale = share = 1 / args.micro_batches
    groups = handle.parameter_groups(1e-4)
    ids = torch.randint(0, VOCABULARY, (args.micro_batches, args.batch, args.tokens))

    def loss(slot: int) -> torch.Tensor:
        logits = model(input_ids=ids[slot], use_cache=False).logits[:, :-1].flatten(0, 1)
        return cross_entropy(logits.float(), ids[slot][:, 1:].flatten()) * share

    if config.schedule == "block_major":
        schedule = block_major(handle, groups, adamw, max_norm=1.0)
        return lambda: schedule.step(args.micro_batches, loss) and None

    checkpoint_activations(model)
    optimizer = BlockOptimizer(groups, adamw)

    def step() -> None:
        for slot in range(args.micro_batches):
            loss(slot).backward()
        clip_gradients(handle, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = flags(__doc__, "stage_time.json")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--micro_batches", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=11)
    args = parser.parse_args()
    shape = SHAPE | {"batch": args.batch, "tokens": args.tokens, "micro-batches": args.micro_batches}
    results: dict[str, Any] = {"shape": shape | {"vocab_size": VOCABULARY}, "FLOPs": {}, "ratios": {}}
    steps = {}
    for name, config in CASES.items():
        steps[name] = make_step(LoPTConfig(**config), args)
        with FlopCounter() as counter:
            steps[name]()
        results["FLOPs"][name] = counter.total
        steps[name]()
    for (a, b), bars in PAIRS.items():
        flops = results["FLOPs"][a] / results["FLOPs"][b]
        row = ratio(steps[a], steps[b], args.pairs) | {"FLOP ratio": flops}
        if a == "e2e":
            row |= {"bar": 1.08, "met": row["ratio"] <= 1.08}
        if bars is not None:
            low, high = (bar * flops for bar in bars)
            row |= {"bar": [low, high], "met": low <= row["ratio"] <= high}
        results["ratios"][f"{a} / {b}"] = row
        print(f"{a} / {b}".ljust(32), {k: v for k, v in row.items() if k != "pairs"}, flush=True)
    keep(args.output, results)


if __name__ == "__main__":
    main()
