"""Streamed against eager weights on a GPU: the first thing to run on a new device.

A small model with random weights, dropout in its attention, AdamW, clipped, takes a few optimizer steps
eagerly and in stages with its weights in host memory, with the optimizer on the device and on the host;
end to end, LoPT and frozen, in float32 (TF32 off) and bfloat16. "resume" stops after half of the steps, gives
weights and optimizer state to a new model, and goes on. The largest relative difference of a weight
tensor is kept, and whether all are equal bit for bit.

    python benchmarks/gpu_parity.py [--device cpu]

It ends with exit code 1 if a difference is larger than 1e-5 in float32, or 1e-2 in bfloat16.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from gpu_training import adamw, random_model
from lopt import LoPTConfig, attach
from lopt.engine.clipping import clip_gradients
from lopt.engine.optimizer import BlockOptimizer, Precision
from lopt.engine.plain_loop import block_major
from lopt.engine.random_state import micro_batch_seed, random_numbers
from small_model import flags, keep

SHAPE: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=512, tie_word_embeddings=False, attention_dropout=0.1,
)  # fmt: skip
METHODS = {
    "e2e": dict(method="e2e", stages=6),
    "lopt": dict(num_blocks=2, stages=6),
    "frozen": dict(method="frozen", num_blocks=2, stages=6),
}
PLACES = {
    "device optimizer": dict(offload="block"),
    "host optimizer": dict(offload="block", optimizer_device="cpu"),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
STEPS, MICRO_BATCHES, TOKENS = 4, 3, 64


class Run:
    """Optimizer steps of one model.

    Args:
        model: is trained.
        config: of the method, and of the stages if any.
    """

    def __init__(self, model: Any, config: dict[str, Any], device: torch.device) -> None:
        torch.manual_seed(7)  # the same heads
        self.model, self.device = model, device
        self.handle = attach(model, LoPTConfig(**config))
        self.handle.loss_scale = 1 / MICRO_BATCHES
        groups = self.handle.parameter_groups(1e-3, 1e-4, 0.1)
        precision = Precision(masters=True)
        self.schedule: Any = None
        if config.get("schedule") == "block_major":
            options = dict(device=device, max_norm=0.5, precision=precision)
            self.schedule = block_major(self.handle, groups, adamw, **options)
            self.optimizer = self.schedule.optimizer
        else:
            self.optimizer = BlockOptimizer(groups, adamw, precision=precision)

    def steps(self, numbers: range) -> None:
        """Take optimizer steps of these numbers."""
        for step in numbers:
            ids = tokens(step).to(self.device)

            def loss(slot: int, ids: Tensor = ids) -> Tensor:
                return self.model(input_ids=ids[slot], labels=ids[slot], use_cache=False).loss / MICRO_BATCHES

            if self.schedule is not None:
                seeds = [micro_batch_seed(0, step, slot) for slot in range(MICRO_BATCHES)]
                self.schedule.passes.seed_of = seeds.__getitem__
                self.schedule.step(MICRO_BATCHES, loss)
                continue
            for slot in range(MICRO_BATCHES):
                with random_numbers(self.device, micro_batch_seed(0, step, slot)):
                    value = loss(slot)
                    value.backward()
            clip_gradients(self.handle, 0.5)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Return copies of weights, heads and optimizer state in host memory."""
        if self.schedule is not None:
            self.schedule.synchronize()
        modules = (self.model, self.handle.heads)
        weights = [{n: p.detach().cpu().clone() for n, p in m.named_parameters()} for m in modules]
        return weights[0], weights[1], copy.deepcopy(self.optimizer.state_dict())

    def close(self) -> None:
        """Let go of pinned memory."""
        if self.schedule is not None:
            self.schedule.close()


def tokens(step: int) -> Tensor:
    """Return (micro-batches, rows, tokens) of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, SHAPE["vocab_size"], (MICRO_BATCHES, 2, TOKENS), generator=generator)


def difference(expected: Run, found: Run) -> dict[str, Any]:
    """Compare weights and heads."""
    pairs = [
        (value, other[name])
        for whole, other in zip(expected.state()[:2], found.state()[:2], strict=True)
        for name, value in whole.items()
    ]
    errors = [float((a.float() - b.float()).norm() / a.float().norm().clamp(min=1e-12)) for a, b in pairs]
    worst = max(errors)
    return {"largest difference": worst, "equal": all(torch.equal(a, b) for a, b in pairs)}


def parity(device: torch.device, report: Any = print) -> dict[str, Any]:
    """Return the differences of all cases; each is reported as it is found."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # so that differences are ours
    try:
        rows = _cases(device, report)
    finally:
        torch.use_deterministic_algorithms(False)
    rows["met"] = all(row["met"] for row in rows.values())
    return rows


def _cases(device: torch.device, report: Any) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for dtype, (method, how) in itertools.product(TOLERANCE, METHODS.items()):
        torch.manual_seed(1)
        start = random_model(AutoConfig.for_model("llama", **SHAPE), device, dtype, copies=True)
        eager = {name: value for name, value in how.items() if name != "stages"}
        expected = Run(copy.deepcopy(start), eager, device)
        expected.steps(range(STEPS))
        for place, where in PLACES.items():
            staged = dict(schedule="block_major", prefetch_gib=0.0005) | how | where
            name = f"{method}, {place}, {str(dtype).removeprefix('torch.')}"
            began = time.perf_counter()
            try:
                run = Run(copy.deepcopy(start), staged, device)
                run.steps(range(STEPS))
                row = difference(expected, run)
                row["resume"] = resumed(run, start, staged, device)
                run.close()
                rest = row["resume"]["largest difference"]
                row["met"] = max(row["largest difference"], rest) <= TOLERANCE[dtype]
            except Exception as error:
                row = {"error": f"{type(error).__name__}: {error}"[:500], "met": False}
            rows[name] = row | {"seconds": time.perf_counter() - began}
            report(name.ljust(40), row)
    return rows


def resumed(expected: Run, start: Any, config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Compare with a run that is stopped halfway and goes on in a new model."""
    first = Run(copy.deepcopy(start), config, device)
    first.steps(range(STEPS // 2))
    weights, heads, optimizer = first.state()
    first.close()
    model = copy.deepcopy(start)
    model.load_state_dict(weights)
    second = Run(model, config, device)
    with torch.no_grad():
        for name, parameter in second.handle.heads.named_parameters():
            parameter.copy_(heads[name])
    second.optimizer.load_state_dict(optimizer)
    second.steps(range(STEPS // 2, STEPS))
    found = difference(expected, second)
    second.close()
    return found


def main() -> None:
    parser = flags(__doc__, "gpu_parity.json")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    results = parity(torch.device(args.device))
    keep(args.output, results, ("torch", "transformers", "accelerate"))
    if not results["met"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
