"""A pipeline of blocks at scale, by the planner alone: where it pays, and where it stops paying.

Shapes of 70 B and 405 B parameters in 4 to 64 blocks, a GPU for each, through links from a data centre to the
internet; beside it end to end with 1F1B, with a zero-bubble schedule and with FSDP2 on as many GPUs. Nothing
is run. Figures: tokens per second of a GPU.

    python benchmarks/pipeline_scale.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig

from lopt.files import write_text
from lopt.planning.devices import Machine, machine_of
from lopt.planning.end_to_end import rivals
from lopt.planning.pipeline import PipelinePlanner
from lopt.planning.plan import Planner
from lopt.planning.run import Run, Setting
from lopt.reports.plots import bar_plot, standalone
from small_model import flags, keep

SHAPES = {  # of the published config.json files
    "70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    ),
    "405B": LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, vocab_size=128256,
    ),
}  # fmt: skip
BLOCKS = (4, 8, 16, 32, 64)
LINKS = {  # GB/s each way, and milliseconds one way
    "400 Gbit/s, 0.01 ms": (50.0, 0.01),
    "10 Gbit/s, 0.1 ms": (1.25, 0.1),
    "1 Gbit/s, 20 ms": (0.125, 20.0),
    "100 Mbit/s, 50 ms": (0.0125, 50.0),
}
ROWS, TOKENS, MICRO_BATCHES = 1, 4096, 32
DEVICE = "h100"


def main() -> None:
    parser = flags(__doc__, "pipeline_scale.json")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for name, config in SHAPES.items():
        run = Run(config, ROWS, TOKENS, MICRO_BATCHES, torch.bfloat16, state_dtype=torch.bfloat16)
        planner, of_shape = Planner(run), results.setdefault(name, {})
        for link, (rate, latency) in LINKS.items():
            machine = machine_of(DEVICE, link_gbps=[rate], latency_ms=latency)
            of_shape[link] = {str(blocks): case(planner, blocks, machine) for blocks in BLOCKS}
            for blocks, row in of_shape[link].items():
                print(f"{name:6}{link:22}{blocks:>3}", {k: show(v) for k, v in row.items()}, flush=True)
    results |= {
        "assumed": f"{DEVICE}, weights and Adam state in bfloat16, activations recomputed, "
        f"{MICRO_BATCHES} micro-batches of {ROWS} x {TOKENS} tokens, pipeline_depth 8",
        "unit": "tokens/s of all devices; GiB of the device that needs most",
    }
    keep(args.output, results)
    for name in SHAPES:
        series = {f"LoPT, {link}": per_device(results[name][link], "tokens/s") for link in LINKS}
        for link in list(LINKS)[:3:2]:
            series[f"1F1B, {link}"] = per_device(results[name][link], "1F1B tokens/s")
        groups = [f"{blocks} blocks" for blocks in BLOCKS]
        title = f"{name} in a pipeline: tokens/s of a GPU, predicted"
        svg = bar_plot(groups, series, title=title, x_label=title, value="{:,.0f}".format)
        write_text(args.output.with_name(f"pipeline_scale_{name}.svg"), standalone(svg) + "\n")


def case(planner: Planner, blocks: int, machine: Machine) -> dict[str, Any]:
    """Return tokens per second and memory of a pipeline, and of what it is compared with."""
    pipelines, setting = PipelinePlanner(planner), Setting("lopt", blocks, "pipeline", True, pipeline_depth=8)
    plan = pipelines.plan(pipelines.balanced(setting, machine))
    hides = plan.hidden_from(machine)
    row: dict[str, Any] = {
        "tokens/s": plan.tokens / plan.time(machine).seconds,
        "without a link": plan.tokens / plan.work(machine),
        "busy": sum(r.seconds(machine, MICRO_BATCHES) for r in plan.ranks)
        / (blocks * plan.time(machine).seconds),
        "GiB": max(rank.peak.total for rank in plan.ranks) / 2**30,
        "hides from GB/s": None if math.isinf(hides) else hides,
    }
    for other in rivals(planner, blocks, 1, machine, checkpointing=True):
        row[f"{other.name} tokens/s"] = other.tokens / other.seconds
        row[f"{other.name} GiB"] = other.peak.total / 2**30
    return row


def per_device(rows: Mapping[str, Mapping[str, float]], name: str) -> list[float]:
    return [row[name] / int(blocks) for blocks, row in rows.items()]


def show(value: float | None) -> str:
    return "never" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    main()
