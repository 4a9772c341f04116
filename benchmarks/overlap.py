"""Steps in host memory beside a device whose computation is a sleep: what the device waits for.

Each layer of a small model sleeps in its forward and backward, so that the process's thread has the core to
itself as it has beside a GPU. The host optimizer is the real one, in its thread, with a pause after each
stage that stands for a model with more parameters. Its wait in a step (`host_wait_seconds` in a trainer's
log) is measured for end to end, LoPT k=2 and frozen k=2, clipped, and compared with what the planner's
timeline (`lopt.planning.timeline`) makes of how long each stage computes and is stepped:

- Blocks are stepped in the order in which the next step needs them. LoPT's block 1 is stepped while block 2
  computes, block 2 while block 1 of the next step does: nothing waits.
- End to end the norm is known when the backward ends. The next forward needs stage 1 at once, which waits for
  its step; stage i waits if i steps take longer than what the device has done since.

    OMP_NUM_THREADS=1 python benchmarks/overlap.py
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lopt import LoPTConfig, attach
from lopt.engine.plain_loop import block_major
from lopt.planning.devices import Machine
from lopt.planning.plan import Planner
from lopt.planning.run import PREFETCH, Run, Setting
from lopt.planning.timeline import StepTime, Update, Work, step_time
from small_model import flags, keep
from step_time import adamw

LAYERS, MICRO_BATCHES, STEPS, TOKENS = 6, 4, 9, 8
FORWARD, BACKWARD = 0.010, 0.020
"""Seconds that a layer sleeps for a micro-batch."""
HOST = 0.060
"""Seconds that a stage's step pauses in host memory, beside the step itself."""
METHODS: dict[str, dict[str, Any]] = {
    "end to end": dict(method="e2e"),
    "LoPT k=2": dict(method="lopt", num_blocks=2),
    "frozen k=2": dict(method="frozen", num_blocks=2),
}
CONFIG = LlamaConfig(
    hidden_size=128, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4,
    num_hidden_layers=LAYERS, vocab_size=128,
)  # fmt: skip
STAGED: dict[str, Any] = dict(schedule="block_major", stages=LAYERS, offload="block", optimizer_device="cpu")
Spans = list[tuple[str, float, float]]


class Sleep(torch.autograd.Function):
    """Passes a tensor on, and sleeps in forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, spans: Spans) -> Tensor:
        ctx.spans = spans
        _timed(spans, "forward", lambda: time.sleep(FORWARD))
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        _timed(ctx.spans, "backward", lambda: time.sleep(BACKWARD))
        return gradient, None


def _timed(spans: Spans, name: str, function: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    found = function()
    spans.append((name, began, time.perf_counter()))
    return found


def run(method: dict[str, Any]) -> dict[str, Any]:
    """Return waits and times of steps, and what happened when in the last two."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).train()
    handle = attach(model, LoPTConfig(**method, **STAGED))
    handle.loss_scale = share = 1 / MICRO_BATCHES
    schedule = block_major(handle, handle.parameter_groups(1e-4), adamw, max_norm=1.0, threads=1)
    spans: Spans = []
    for layer in model.model.layers:
        # Not the layer, whose hooks are called where it is skipped, too.
        layer.mlp.register_forward_hook(lambda mlp, args, output: Sleep.apply(output, spans))
    _watch(schedule, spans)
    ids = torch.randint(0, 128, (MICRO_BATCHES, 1, TOKENS))

    def loss(slot: int) -> Tensor:
        return model(input_ids=ids[slot], labels=ids[slot], use_cache=False).loss * share

    steps, waits = [], []
    for _ in range(STEPS):
        before, began = schedule.waited, time.perf_counter()
        schedule.step(MICRO_BATCHES, loss)
        steps.append((began, time.perf_counter()))
        waits.append(schedule.waited - before)
    schedule.synchronize()
    start, end = steps[-2][0], steps[-1][1]
    shown = [(name, a - start, b - start) for name, a, b in spans if a >= start and b <= end + HOST]
    taken = [b - a for name, a, b in spans if name == "host"]
    expected = predicted(method, [_turns(spans, *step) for step in steps[1:]], statistics.median(taken))
    return {
        "seconds": statistics.median(b - a for a, b in steps[1:]),
        "wait": statistics.median(waits[1:]),
        "stage on the host": statistics.median(taken),
        "predicted seconds": expected.seconds,
        "predicted wait": expected.host,
        "steps began": [steps[-2][0] - start, steps[-1][0] - start],
        "spans": shown,
    }


def _watch(schedule: Any, spans: Spans) -> None:
    """Note copies, steps in host memory (with their pause) and waits for them."""
    offload = schedule.updates._offload
    transfer, optimizer = offload.transfer, offload.host.optimizer
    step_stage, wait, enter = optimizer.step_stage, transfer.wait_until_final, offload.enter

    def slow_step(*args: Any) -> None:
        _timed(spans, "host", lambda: (step_stage(*args), time.sleep(HOST)))

    def watched_wait(group: Any) -> None:
        pending = group.pending is not None and not group.pending.done()
        _timed(spans if pending else [], "wait", lambda: wait(group))

    optimizer.step_stage, transfer.wait_until_final = slow_step, watched_wait
    offload.enter = lambda *args, **more: _timed(spans, "turn", lambda: enter(*args, **more))
    for name, kind in (("_copy_in", "in"), ("_copy_out", "out")):
        move = getattr(transfer, name)
        setattr(
            transfer,
            name,
            lambda *args, move=move, kind=kind: _timed(spans, kind, lambda: move(*args)),
        )


def _turns(spans: Spans, began: float, ended: float) -> list[float]:
    """Return how long the device computes each time it has turned to a stage, in one step."""
    turns = [(a, b) for name, a, b in spans if name == "turn" and began <= a <= ended]
    return [after - b for (_, b), (after, _) in itertools.pairwise([*turns, (ended, ended)])]


def predicted(method: dict[str, Any], steps: list[list[float]], on_host: float) -> StepTime:
    """Return what the planner's timeline says of a device that computes as long as this one.

    Args:
        steps: Seconds of each turn, of several steps.
        on_host: Seconds in which a stage is stepped.
    """
    setting = Setting(method["method"], method.get("num_blocks", 1), **STAGED)
    run = Run(CONFIG, 1, TOKENS, MICRO_BATCHES, torch.float32, autocast=False, device="cpu")
    work = Planner(run).plan(setting).work
    seconds = [statistics.median(turn) for turn in zip(*steps, strict=True)]
    turns = [replace(t, flops=s, head_flops=0.0) for t, s in zip(work.turns, seconds, strict=True)]
    updates = [[Update(1)] if own else [] for own in work.updates]
    one = Machine((1e-12,) * 3, (math.inf,) * 2, memory_gbps=1e-9, host_gbps=1e-9 / on_host)
    return step_time(Work(turns, work.weights, updates, work.stepped_by), one, PREFETCH)


# -- the figure ----------------------------------------------------------------------------------------

LANES = {"device": ("forward", "backward", "wait"), "copies": ("in", "out"), "host": ("host",)}
COLOURS = {
    "forward": "#2a7fd4", "backward": "#0b9a73", "wait": "#d55e00", "in": "#94790a", "out": "#b9519f",
    "host": "#7d7f88",
}  # fmt: skip
MEANING = {
    "forward": "forward", "backward": "backward", "wait": "waits for the host", "in": "weights in",
    "out": "gradients out", "host": "AdamW on the host",
}  # fmt: skip


def draw(results: dict[str, Any], path: Path, methods: tuple[str, ...] = ("end to end", "LoPT k=2")) -> None:
    """Draw two steps of each method: device, copies and host over time."""
    ink, left, width, lane = "#7a7f87", 74, 640, 18
    longest = max(b for method in methods for _, _, b in results[method]["spans"])
    parts, y = [], 6
    for method in methods:
        found = results[method]
        parts.append(f'<text x="0" y="{y + 12}" font-weight="bold">{escape(method)}, two steps</text>')
        y += 20
        for name, kinds in LANES.items():
            parts.append(f'<text x="0" y="{y + 13}">{name}</text>')
            for kind, a, b in found["spans"]:
                if kind in kinds:
                    x, size = left + width * a / longest, max(width * (b - a) / longest, 0.8)
                    box = f'x="{x:.1f}" y="{y}" width="{size:.1f}" height="{lane - 3}"'
                    parts.append(f'<rect {box} fill="{COLOURS[kind]}"/>')
            y += lane
        for began in found["steps began"]:
            x = left + width * began / longest
            line = f'x1="{x:.1f}" x2="{x:.1f}" y1="{y - 3 * lane - 3}" y2="{y}"'
            parts.append(f'<line {line} stroke="{ink}" stroke-dasharray="3 2"/>')
        y += 10
    x = left
    for kind, meaning in MEANING.items():
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 14}" y="{y + 9}">{meaning}</text>')
        x += 32 + 6 * len(meaning)
    waits = ", ".join(f"{method} {results[method]['wait'] * 1000:.0f} ms" for method in methods)
    title = f"Device, copies and host over two optimizer steps; wait a step: {waits}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 6} {y + 18}" width="100%" '
    head += f'role="img" aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="11" '
    picture = [f'{head}fill="{ink}"><title>{escape(title)}</title>', *parts, "</svg>"]
    path.write_text("\n".join(picture) + "\n", encoding="utf-8")


def main() -> None:
    args = flags(__doc__, "overlap.json").parse_args()
    results: dict[str, Any] = {}
    for name, method in METHODS.items():
        found = results[name] = run(method)
        print(name.ljust(12), {k: round(v, 4) for k, v in found.items() if isinstance(v, float)}, flush=True)
    draw(results, args.output.with_suffix(".svg"))
    for name in METHODS:
        del results[name]["spans"], results[name]["steps began"]
    results["set up"] = {
        "layers and stages": LAYERS, "micro-batches": MICRO_BATCHES, "forward, s": FORWARD,
        "backward, s": BACKWARD, "pause of a stage on the host, s": HOST,
    }  # fmt: skip
    keep(args.output, results)


if __name__ == "__main__":
    main()
