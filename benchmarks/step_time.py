"""Time per step: LoPT beside end to end, in pairs within one process.

A machine's speed drifts, so each pair of steps is timed back to back and the median of the ratios
counts. "model" is large beside its LM head; "big head" is not, and shows what the head costs: its
work is the same in every method, so it hides what the blocks save.

    python benchmarks/step_time.py [--device cuda]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from lopt import LoPTConfig, attach
from lopt.compat import checkpoint_activations
from lopt.engine.clipping import clip_gradients
from lopt.engine.optimizer import PART_BYTES, BlockOptimizer
from lopt.engine.plain_loop import block_major
from lopt.instruments.memory import peak_memory
from small_model import flags, keep

SHAPE = dict(
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=8,
)
ACCUMULATION = 4
PREFETCH = 16 * 2**20
VOCABULARIES = {"model": 512, "big head": 32000}


def make_step(vocabulary: int, config: LoPTConfig, args: argparse.Namespace, checkpointing: bool = False):
    """One training step (forward, backwards, AdamW) and its peak in bytes: activations, everything."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=vocabulary)).to(args.device).train()
    if checkpointing:
        checkpoint_activations(model)
    handle = attach(model, config)
    optimizer = torch.optim.AdamW(handle.parameter_groups(1e-4), fused=True)
    ids = torch.randint(0, vocabulary, (args.batch, args.tokens), device=args.device)

    def forward_backward() -> None:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        cross_entropy(logits.float(), ids[:, 1:].flatten()).backward()

    steps = itertools.count()

    def step() -> None:
        handle.learns_locally = next(steps) % config.local_every == 0
        forward_backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    steps = itertools.count()  # a whole cycle of `local_every` steps is timed
    for parameter in [*model.parameters(), *handle.heads.parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    peak = peak_memory(forward_backward, model, handle.heads, optimizer=optimizer)
    optimizer.zero_grad()
    return step, {"activations": peak.activations, "peak memory": peak.total}


def make_accumulated(vocabulary: int, k: int, offload: str | None, args: argparse.Namespace):
    """An optimizer step of ACCUMULATION micro-batches, clipped by block; eager if `offload` is None."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=vocabulary)).to(args.device).train()
    config = LoPTConfig(num_blocks=k)
    if offload is not None:
        config = config.replace(schedule="block_major", offload=offload, prefetch_gib=PREFETCH / 2**30)
    handle = attach(model, config)
    handle.loss_scale = 1 / ACCUMULATION
    groups, device = handle.parameter_groups(1e-4), torch.device(args.device)
    ids = torch.randint(0, vocabulary, (ACCUMULATION, args.batch, args.tokens), device=args.device)

    def loss(slot: int) -> torch.Tensor:
        logits = model(input_ids=ids[slot], use_cache=False).logits[:, :-1].flatten(0, 1)
        return cross_entropy(logits.float(), ids[slot][:, 1:].flatten()) / ACCUMULATION

    if offload is None:
        optimizer = BlockOptimizer(groups, adamw, part_bytes=PART_BYTES)
    else:
        schedule = block_major(handle, groups, adamw, device=device, max_norm=1.0)
        optimizer = schedule.optimizer

    def step() -> None:
        if offload is not None:
            schedule.step(ACCUMULATION, loss)
            return
        for slot in range(ACCUMULATION):
            loss(slot).backward()
        clip_gradients(handle, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    peak = peak_memory(step, model, handle.heads, optimizer=optimizer)
    return step, {"activations": peak.activations, "peak memory": peak.total}


def adamw(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True)


def repeat(step: Callable[[], None], times: int) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def ratio(a: Callable[[], None], b: Callable[[], None], pairs: int) -> dict:
    """Median time of `a` over `b` in alternating pairs; that of the process on the CPU is beside it."""
    times: list[tuple[float, float]] = []
    cpu_ratios: list[float] = []
    for pair in range(pairs):
        seconds, cpu = {}, {}
        for f in (a, b) if pair % 2 else (b, a):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started, cpu_started = time.perf_counter(), time.process_time()
            f()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[f], cpu[f] = time.perf_counter() - started, time.process_time() - cpu_started
        times.append((seconds[a], seconds[b]))
        cpu_ratios.append(cpu[a] / cpu[b])
    ratios = [x / y for x, y in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    medians = [statistics.median(t[i] for t in times) for i in (0, 1)]
    return {
        "ratio": statistics.median(ratios),
        "quartiles": [low, high],
        "CPU time ratio": statistics.median(cpu_ratios),
        "seconds": medians,
        "pairs": pairs,
    }


def over(a: dict[str, int], b: dict[str, int]) -> dict[str, float]:
    return {name: a[name] / b[name] for name in a}


def main() -> None:
    parser = flags(__doc__, "step_time.json")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--only", nargs="*", default=list(VOCABULARIES), choices=list(VOCABULARIES))
    args = parser.parse_args()
    results: dict = {"on": args.device, "shape": SHAPE | {"batch": args.batch, "tokens": args.tokens}}
    e2e = LoPTConfig(method="e2e")
    for name in args.only:
        vocabulary = VOCABULARIES[name]
        plain, plain_bytes = make_step(vocabulary, e2e, args)
        cases = {f"eager k={k} / e2e": LoPTConfig(num_blocks=k) for k in (2, 4)}
        cases["frozen k=2 / e2e"] = LoPTConfig(method="frozen", num_blocks=2)
        for case, config in cases.items():
            step, peak = make_step(vocabulary, config, args)
            results[f"{name}: {case}"] = ratio(step, plain, args.pairs) | over(peak, plain_bytes)
        recomputed, recomputed_bytes = make_step(vocabulary, e2e, args, checkpointing=True)
        lopt, peak = make_step(vocabulary, LoPTConfig(num_blocks=4), args)
        results[f"{name}: e2e recomputed / eager k=4 not"] = ratio(recomputed, lopt, args.pairs) | over(
            recomputed_bytes, peak
        )
        for k in (2, 4):
            lazy, peak = make_step(vocabulary, LoPTConfig(num_blocks=k, local_every=8), args)
            for other, step, size in (
                ("", plain, plain_bytes),
                (" recomputed", recomputed, recomputed_bytes),
            ):
                cycles = ratio(repeat(lazy, 8), repeat(step, 8), max(3, args.pairs // 3))
                results[f"{name}: local_every=8 k={k} / e2e{other}"] = cycles | over(peak, size)
        for k in (2, 4):
            before, before_bytes, what = *make_accumulated(vocabulary, k, None, args), "eager"
            for offload in ("none", "optimizer", "block"):
                step, peak = make_accumulated(vocabulary, k, offload, args)
                now = "block-major" if offload == "none" else f"offload {offload}"
                both = ratio(step, before, max(3, args.pairs // 2)) | over(peak, before_bytes)
                results[f"{name}: {now} k={k} / {what} k={k}, {ACCUMULATION} micro-batches"] = both
                if offload == "none":
                    before, before_bytes, what = step, peak, now
        for case, row in results.items():
            if case.startswith(name):
                print(case.ljust(56), {k: round(row[k], 3) for k in ("ratio", "activations", "peak memory")})
    keep(args.output, results)


if __name__ == "__main__":
    main()
