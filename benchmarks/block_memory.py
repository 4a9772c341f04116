"""Peak device memory of whole optimizer steps, by shape, schedule and offload; exact, without a GPU.

Fake tensors have shapes and no data, so a 72B model is trained here as it would be on a GPU: the same
model code, schedule, offload and optimizer, every tensor counted while it lives, host memory apart.
Weights and gradients in bfloat16, updated in float32 and rounded stochastically; AdamW state in float32 or
bfloat16; 4 x 1,024 tokens a micro-batch, 8 micro-batches an optimizer step; TRL's fused LM head, which makes
float32 copies of tiles on a CPU; rows "as on a GPU" count what its Triton kernels allocate. The second
optimizer step is measured, when the state is there.

    python benchmarks/block_memory.py [--only qwen2.5-7b]
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils
from trl.trainer.utils import add_fused_lm_head

from lopt import LoPTConfig, attach, compat
from lopt.compat import checkpoint_activations, replaced
from lopt.engine.clipping import clip_gradients
from lopt.engine.optimizer import BlockOptimizer, Precision
from lopt.engine.plain_loop import block_major
from lopt.instruments.memory import MemoryPeak, MemoryTracker
from lopt.losses.lm_head import lean_fused_head
from lopt.models import shapes
from small_model import flags, keep

SHAPES = shapes.SHAPES | {
    "qwen2.5-14b": shapes.SHAPES["qwen2.5-32b"] | dict(intermediate_size=13824, num_hidden_layers=48),
    "qwen2.5-72b": shapes.SHAPES["qwen2.5-32b"]
    | dict(hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64),
}


class Loop:
    """Optimizer steps of one setting."""

    def __init__(
        self, shape: dict, args: argparse.Namespace, setting: dict[str, Any], device: str = "cpu"
    ) -> None:
        s = dict(method="lopt", k=2, schedule="eager", offload="none", checkpointing=False) | setting
        options = dict(shape)
        if "layers" in s:
            options["num_hidden_layers"] = s["layers"]
        model_type = options.pop("model_type")
        config = AutoConfig.for_model(model_type, **options, attn_implementation="sdpa")
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(
                config, dtype=s.get("dtype", torch.bfloat16)
            ).train()
        add_fused_lm_head(self.model)
        if s["checkpointing"]:
            checkpoint_activations(self.model)
        names = ("schedule", "stages", "offload", "optimizer_device")
        residency = {name: s[name] for name in names if name in s}
        method = LoPTConfig(
            method=s["method"], num_blocks=s["k"], prefetch_gib=s.get("prefetch", 2.0), **residency
        )
        self.handle = attach(self.model, method)
        groups = self.handle.parameter_groups(1e-5)
        precision = Precision(masters=s.get("masters", False), state_dtype=s.get("state", torch.float32))
        self.schedule = None
        if s["schedule"] == "block_major":
            self.schedule = block_major(
                self.handle,
                groups,
                adamw,
                device=torch.device(device),
                max_norm=s.get("max_norm", 1.0),
                precision=precision,
                threads=0,  # a tracker follows one thread
            )
            self.optimizer = self.schedule.optimizer
        else:
            self.optimizer = BlockOptimizer(groups, adamw, precision=precision)
        self.ids = torch.ones(args.batch, args.tokens, dtype=torch.long, device=device)
        self.mask = torch.ones_like(self.ids) if s.get("mask") else None

    def forward(self) -> torch.Tensor:
        with lean_fused_head(self.ids.device):
            rows = dict(input_ids=self.ids, labels=self.ids, attention_mask=self.mask)
            return self.model(**rows, fused_lm_head=True).loss

    def step(self, micro_batches: int) -> None:
        """An optimizer step of so many micro-batches."""
        if self.schedule is not None:
            self.schedule.step(micro_batches, lambda slot: self.forward())
            return
        for _ in range(micro_batches):
            self.forward().backward()
        clip_gradients(self.handle, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True)


def peak(shape: dict, args: argparse.Namespace, fake: bool = True, **setting: Any) -> MemoryPeak:
    """The peak of the second optimizer step."""
    # transformers reads position_ids to find out whether rows are packed, which fake tensors cannot
    # answer; it would then build a mask that a real run does not have.
    gc.collect()  # host memory of an earlier measurement counts as long as it lives
    no_packing = replaced(masking_utils, find_packed_sequence_indices=lambda position_ids: None)
    if setting.get("mask"):  # as trainers give it; nothing of one row is padded
        no_packing = compat.masks_by_shape(args.batch)
    as_on_gpu = compat.fused_head_as_on_a_gpu(_product_in_place) if setting.get("gpu_head") else nullcontext()
    with no_packing, as_on_gpu, FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
        loop = Loop(shape, args, setting)
        loop.step(1)
        with MemoryTracker(loop.model, loop.handle.heads, optimizer=loop.optimizer) as tracker:
            loop.step(args.micro_batches)
    return tracker.peak


def _product_in_place(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Allocate what CUDA does to add a product to a float32 sum: no temporary."""
    torch.mm(a, b, out=total if total.dtype == a.dtype else total.view(a.dtype)[:, ::2])


def staged(k: int, offload: str, **more: Any) -> dict[str, Any]:
    return dict(k=k, schedule="block_major", offload=offload, **more)


BF16 = dict(state=torch.bfloat16)
SMALL = {
    "end to end": dict(method="e2e"),
    "end to end, checkpointed": dict(method="e2e", checkpointing=True),
    "eager k=4": dict(k=4),
    "block-major k=4": staged(4, "none"),
    "block-major k=4, optimizer offload": staged(4, "optimizer"),
    "block-major k=4, block offload": staged(4, "block"),
    "block-major k=4, block offload, checkpointed": staged(4, "block", checkpointing=True),
    "block-major k=4, block offload, bfloat16 state": staged(4, "block", **BF16),
    "block-major k=4, block offload, bfloat16 state, checkpointed": staged(
        4, "block", checkpointing=True, **BF16
    ),
}
LARGE = {
    "end to end, checkpointed": SMALL["end to end, checkpointed"],
    "block-major k=4, block offload": staged(4, "block"),
    "block-major k=4, block offload, checkpointed": staged(4, "block", checkpointing=True),
    "block-major k=8, block offload": staged(8, "block"),
    "block-major k=8, block offload, checkpointed": staged(8, "block", checkpointing=True),
}


def deeper(per_block: int, *depths: int) -> dict[str, dict[str, Any]]:
    """Blocks of the same size at several depths."""
    return {
        f"{n} layers, k={n // per_block}": staged(n // per_block, "block", layers=n, checkpointing=True)
        for n in depths
    }


def streamed(shape: str, *methods: str) -> dict[str, dict[str, Any]]:
    """Layers, embedding and LM head as stages of their own; float32 masters, stepped on the host."""
    most = dict(stages=SHAPES[shape]["num_hidden_layers"] + 2, optimizer_device="cpu", masters=True)
    settings = {
        "end to end": dict(k=1, method="e2e"),
        "LoPT k=2": dict(k=2),
        "frozen k=2": dict(k=2, method="frozen"),
    }
    name = "{}, all stages, host optimizer".format
    rows = {name(m): staged(offload="block", **settings[m], **most) for m in methods}
    as_on_gpu = {f"{name(m)}, LM head as on a GPU": rows[name(m)] | dict(gpu_head=True) for m in methods[:1]}
    return rows | as_on_gpu


EVERY = ("end to end", "LoPT k=2", "frozen k=2")
FEW = ("end to end", "end to end, checkpointed", "block-major k=4, block offload")
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2.5-7b": SMALL | streamed("qwen2.5-7b", *EVERY),
    "qwen2.5-14b": streamed("qwen2.5-14b", "end to end"),
    "qwen2.5-32b": LARGE | deeper(8, 16, 32) | streamed("qwen2.5-32b", *EVERY),
    "qwen3-4b": {label: SMALL[label] for label in FEW},
    "llama3.1-8b": {label: SMALL[label] for label in FEW},
    "qwen2.5-72b": deeper(5, 20, 40, 80) | streamed("qwen2.5-72b", *EVERY),
}


def main() -> None:
    parser = flags(__doc__, "block_memory.json")
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--micro_batches", type=int, default=8)
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for name in args.only:
        results.setdefault(name, {})
        for label, setting in RUNS[name].items():
            if label in results[name]:  # goes on where it was interrupted
                continue
            started = time.perf_counter()
            found = peak(SHAPES[name], args, **setting)
            row = {"total": found.total} | vars(found)
            results[name][label] = {part: round(size / 2**30, 2) for part, size in row.items()}
            print(
                f"{name:12} {label:60} {results[name][label]}  ({time.perf_counter() - started:.0f} s)",
                flush=True,
            )
        results |= {
            "unit": "GiB, at the peak of the second optimizer step; host is not part of the total",
            "micro-batches": f"{args.micro_batches} of {args.batch} x {args.tokens} tokens",
        }
        keep(args.output, results)


if __name__ == "__main__":
    main()
