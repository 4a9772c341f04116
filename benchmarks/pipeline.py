"""A block on each process: how busy they are, beside one process and beside 1F1B end to end.

- "simulated": devices whose compute is a sleep, so that the cores of this machine do not matter. Each of
  `--ranks` processes has one layer; its forward takes a unit of time and its backward two. Busy is the share
  of the time after a process's first optimizer step in which it computes.
- "measured": two processes of one thread each over one process of one thread, and over 1F1B of
  `torch.distributed.pipelining` end to end on the same split, in pairs, tokens per second.

    python benchmarks/pipeline.py [--only simulated measured]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from transformers import LlamaConfig, LlamaForCausalLM

from lopt import LoPTConfig, attach
from lopt.engine.pipeline import pipeline
from lopt.engine.plain_loop import block_major
from small_model import flags, keep

CPU = torch.device("cpu")
ADAMW = functools.partial(torch.optim.AdamW, fused=True)
UNIT = 0.1
"""Seconds of a simulated forward of one layer."""


def main() -> None:
    parser = flags(__doc__, "pipeline.json")
    parser.add_argument("--only", nargs="*", default=["simulated", "measured"])
    parser.add_argument("--ranks", type=int, default=8, help="of the simulation")
    parser.add_argument("--micro-batches", type=int, default=4, help="of an optimizer step of the simulation")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    cases = {"simulated": simulated_case, "measured": measured_case}
    for name in args.only:
        results[name] = cases[name](args)
        print(name, json.dumps(results[name], indent=1), flush=True)
        keep(args.output, results)


def run_ranks(ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `work(*args)` in so many forked processes of one thread each; return what each returned."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (ranks, folder, work, args), nprocs=ranks, start_method="fork")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: str, work: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    found = work(*args)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def llama(layers: int, hidden: int, vocabulary: int = 64) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(count: int, rows: int, tokens: int, vocabulary: int = 64) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, vocabulary, (count, rows, tokens), generator=torch.Generator().manual_seed(1))
    return [dict(input_ids=row, labels=row) for row in ids]


# -- simulated -------------------------------------------------------------------------------------


class Sleep(torch.autograd.Function):
    """Take the time of a device: so many seconds in the forward, and so many in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        time.sleep(ctx.seconds)
        return gradient, None, None


def simulated_rank(steps: int, micro_batches: int) -> dict[str, float]:
    """Train one layer of the model; return how busy this process was."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("pipeline",))
    model = llama(size, 16)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, args, output: Sleep.apply(output, UNIT, 2 * UNIT))
    handle = attach(model, LoPTConfig(num_blocks=size, schedule="block_major"))
    schedule = pipeline(handle, handle.parameter_groups(1e-3), ADAMW, mesh, device=CPU)
    link, data = schedule.link, batches(micro_batches, 1, 8)
    assert link is not None
    began = 0.0
    dist.barrier()
    for step in range(steps + 1):
        link.expect([(1, 8)] * micro_batches)
        schedule.step(micro_batches, lambda slot: model(**data[slot]).loss)
        if step == 0:  # the pipeline is full from here on
            began = time.perf_counter()
    seconds = time.perf_counter() - began
    link.flush()
    return {"busy": steps * micro_batches * 3 * UNIT / seconds, "seconds": seconds}


def simulated_case(args: argparse.Namespace) -> dict[str, Any]:
    """Return the busy share of each process, and what 1F1B could reach."""
    found = run_ranks(args.ranks, simulated_rank, args.steps, args.micro_batches)
    bound = args.micro_batches / (args.micro_batches + args.ranks - 1)
    busy = [rank["busy"] for rank in found]
    settings = {"ranks": args.ranks, "micro-batches": args.micro_batches, "steps": args.steps}
    return settings | {"busy": busy, "least busy": min(busy), "bound of 1F1B": bound}


# -- measured --------------------------------------------------------------------------------------

SHAPE = dict(layers=8, hidden=256, vocabulary=64)
ROWS, TOKENS, MICRO_BATCHES, STEPS = 2, 128, 8, 3


def measured_case(args: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second of one process, of a pipeline of two, and of 1F1B on two."""
    ways = {"one process": (1, lopt_rank), "pipeline": (2, lopt_rank), "1F1B end to end": (2, rank_of_1f1b)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.pairs):
        for name, (ranks, work) in ways.items():
            seconds = max(run_ranks(ranks, work))
            rates[name].append(STEPS * MICRO_BATCHES * ROWS * TOKENS / seconds)
    ratios = {
        f"pipeline over {name}": statistics.median(
            a / b for a, b in zip(rates["pipeline"], rates[name], strict=True)
        )
        for name in ("one process", "1F1B end to end")
    }
    return {"tokens/s": rates, "cores": torch.get_num_threads()} | ratios


def timed(step: Callable[[], None], end: Callable[[], None]) -> float:
    step()
    end()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    end()
    return time.perf_counter() - began


def lopt_rank() -> float:
    """LoPT k = 2, in one process or in two; seconds of the steps."""
    model = llama(**SHAPE)
    handle = attach(model, LoPTConfig(num_blocks=2, schedule="block_major"))
    groups, data = handle.parameter_groups(1e-3), batches(MICRO_BATCHES, ROWS, TOKENS)
    if dist.get_world_size() == 1:
        schedule = block_major(handle, groups, ADAMW)
    else:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pipeline",))
        schedule = pipeline(handle, groups, ADAMW, mesh, device=CPU)
    link = schedule.link

    def step() -> None:
        if link is not None:
            link.expect([(ROWS, TOKENS)] * MICRO_BATCHES)
        schedule.step(MICRO_BATCHES, lambda slot: model(**data[slot]).loss)

    return timed(step, link.flush if link is not None else lambda: None)


class Half(nn.Module):
    """Half of the layers, with the embedding or with norm and LM head."""

    def __init__(self, model: Any, first: bool) -> None:
        super().__init__()
        base = model.model
        middle = len(base.layers) // 2
        self.embedding = base.embed_tokens if first else None
        self.layers = base.layers[:middle] if first else base.layers[middle:]
        self.rotary = base.rotary_emb
        self.norm, self.head = (None, None) if first else (base.norm, model.lm_head)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.embedding is not None:
            hidden = self.embedding(hidden)
        places = torch.arange(hidden.shape[1])[None]
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=self.rotary(hidden, places))
        return hidden if self.norm is None else self.head(self.norm(hidden))


def rank_of_1f1b() -> float:
    """The same model end to end by 1F1B; seconds of the steps."""
    first = dist.get_rank() == 0
    half = Half(llama(**SHAPE), first)
    optimizer = torch.optim.AdamW(half.parameters(), fused=True)
    data = torch.cat([batch["input_ids"] for batch in batches(MICRO_BATCHES, ROWS, TOKENS)])

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    schedule = Schedule1F1B(PipelineStage(half, dist.get_rank(), 2, CPU), MICRO_BATCHES, loss)

    def step() -> None:
        schedule.step(data) if first else schedule.step(target=data)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, lambda: None)


if __name__ == "__main__":
    main()
