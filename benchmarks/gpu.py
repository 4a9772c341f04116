"""What one GPU does, found in minutes: speed and peak memory in stages, beside the plan and beside others.

Random weights of the real shape in bfloat16, random tokens, 4 x 1,024 a micro-batch, clipped AdamW. Cases in
the order of their worth; what would not fit into the time that is left, or into host memory, is skipped with
the reason. A model too large for host memory is measured with fewer layers of its width, and the row says so.

- "machine": a product in bfloat16, copies each way, pinning, AdamW in host memory.
- "parity": streamed against eager weights (gpu_parity.py).
- "7B ...": end to end, LoPT k=2 and frozen k=2 in 8 and 28 stages, AdamW on the host (float32 masters) or
  on the device (float32 state, stochastic rounding), 8 and 32 micro-batches; with TRL, the plan too.
- "32B": all layers end to end with SGD, which has no state; and as many layers as fit with AdamW on the host.
- "eager": LoPT k=2 without recompute beside end to end with it, a 1.5B shape on the device, in pairs.
- others (gpu_rivals.py) that can be imported.

Needs torch 2.11 or newer, transformers and accelerate, and `src` on PYTHONPATH. The two commands for a
machine whose GPU was never tried, correctness first (about a minute), then everything else:

    PYTHONPATH=src python3 benchmarks/gpu_parity.py --output $OUT/parity.json
    PYTHONPATH=src python3 benchmarks/gpu.py --minutes 8 --skip parity --output $OUT/gpu.json

    python benchmarks/gpu.py --device cpu --shape tiny     # the test of this script: a minute
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import gpu_machine
import gpu_parity
import gpu_rivals
from gpu_training import GIB, HAS_TRL, Setting, Shape, Training, free_host_gib, seconds, synchronize
from lopt.models.shapes import SHAPES
from small_model import flags, keep

TINY: dict[str, Any] = dict(
    model_type="qwen2", hidden_size=64, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False,
)  # fmt: skip
MIDDLE: dict[str, Any] = SHAPES["qwen2.5-7b"] | dict(
    hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2
)  # Qwen2.5-1.5B, untied
ORDER = [  # method, blocks, stages, optimizer
    ("e2e", 1, 28, "host"),
    ("lopt", 2, 28, "host"),
    "eager",
    "32B sgd",
    ("e2e", 1, 28, "device"),
    ("frozen", 2, 28, "host"),
    *gpu_rivals.RIVALS,
    ("lopt", 2, 28, "device"),
    ("e2e", 1, 8, "host"),
    "32B host",
    ("lopt", 2, 8, "host"),
    ("frozen", 2, 8, "host"),
    ("e2e", 1, 8, "device"),
    ("frozen", 2, 28, "device"),
]
RESERVE_GIB = 6.0
"""Host memory for Python, CUDA and pages of the system."""
REACHED = 0.4
"""Share of the rate of a product that a step is expected to reach, to foresee its time."""
RIVAL_LAYERS = 8
"""Layers of the model on which others are measured: their host memory is not known before."""
TOUCHED = 3.0
"""GiB a second at which the first step is expected to make optimizer state in host memory."""


class Skip(Exception):
    """A case is not run, for the reason given."""


class Bench:
    """Cases, and what is left of time and host memory."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.ends = time.perf_counter() + 60 * args.minutes
        self.tiny = args.shape == "tiny"
        self.rates: dict[str, Any] = {}
        self.results: dict[str, Any] = {
            "on": args.device,
            "micro-batch": f"{args.batch} x {args.tokens} tokens",
            "LM head": "TRL's fused" if HAS_TRL else "logits in parts, recomputed",
            "cases": {},
        }

    def run(self) -> None:
        """Run all cases; what is found is written after each."""
        self._case("machine", self._machine)
        self._case("parity", lambda: gpu_parity.parity(self.device))
        for which in ORDER:
            if isinstance(which, str):
                name = which if which == "eager" or "32B" in which else f"7B e2e, {which}"
                self._case(name, self._others(which))
            else:
                method, blocks, stages, optimizer = which
                setting = Setting(method, blocks, stages, optimizer)
                cut = "" if blocks == 1 else f" k={blocks}"
                name = f"7B {method}{cut}, {stages} stages, {optimizer} optimizer"
                self._case(name, lambda setting=setting: self._streamed(self._large(), setting))

    def _case(self, name: str, function: Callable[[], dict[str, Any]]) -> None:
        began = time.perf_counter()
        parts = set(name.split(", "))
        if any(parts >= set(given.split(", ")) for given in self.args.skip):
            return
        try:
            self._check_time(5)
            found = function()
        except Skip as reason:
            found = {"skipped": str(reason)}
        except Exception as error:  # the cases after it are worth as much
            found = {"error": f"{type(error).__name__}: {error}"[:1000]}
        found["took, s"] = time.perf_counter() - began
        self.results["cases"][name] = found
        self._empty_caches()
        print(name, json.dumps(found), flush=True)
        keep(self.args.output, self.results)

    def _empty_caches(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            getattr(torch._C, "_host_emptyCache", gc.collect)()  # pinned memory of what waited between stages

    def _check_time(self, needed: float) -> None:
        left = self.ends - time.perf_counter()
        if needed > left:
            raise Skip(f"needs about {needed:.0f} s, {left:.0f} s are left")

    def _large(self) -> dict[str, Any]:
        return TINY if self.tiny else SHAPES[self.args.shape]

    def _machine(self) -> dict[str, Any]:
        self.rates = gpu_machine.rates(self.device)
        return self.rates

    def _others(self, which: str) -> Callable[[], dict[str, Any]]:
        if which == "eager":
            return self._eager
        wide = TINY if self.tiny else SHAPES["qwen2.5-32b"]
        if which == "32B sgd":
            stages = wide["num_hidden_layers"] + 2
            return lambda: self._streamed(wide, Setting("e2e", 1, stages, "sgd"), [2, 4])
        if which == "32B host":
            return lambda: self._streamed(wide, Setting("e2e", 1, wide["num_hidden_layers"] + 2, "host"), [8])
        return lambda: self._rival(which)

    # -- what fits -------------------------------------------------------------------------------

    def _host_gib(self) -> float:
        given = self.args.host_gib
        return (free_host_gib() if given is None else given) - RESERVE_GIB

    def _fitting(self, options: dict[str, Any], setting: Setting, micro_batches: int) -> Shape:
        """Return the shape with as many layers as host memory has room for."""
        room, rows = self._host_gib(), self.args.batch * self.args.tokens
        for layers in range(options["num_hidden_layers"], 3, -2):
            shape = Shape(options, layers)
            if shape.host_bytes(setting, rows, micro_batches) / GIB <= room or self.tiny:
                return shape
        raise Skip(f"host memory has room for {room:.0f} GiB, too little for 4 layers")

    def _foreseen(self, shape: Shape, setting: Setting, micro_batches: int, steps: float) -> float:
        """Return about the seconds of so many steps."""
        tokens = micro_batches * self.args.batch * self.args.tokens
        compute = shape.flops(setting, tokens) / (REACHED * self.rates.get("matmul, TFLOP/s", 1.0) * 1e12)
        host = shape.learning(setting) / self.rates.get("host AdamW, 10^9 numbers/s", 1.0) / 1e9
        return steps * (compute + host * (setting.optimizer == "host"))

    # -- cases -----------------------------------------------------------------------------------

    def _streamed(
        self, options: dict[str, Any], setting: Setting, micro_batches: list[int] | None = None
    ) -> dict[str, Any]:
        """Speed and peak of a setting by the number of micro-batches, and the plan."""
        args = self.args
        numbers = micro_batches or args.micro_batches
        shape = self._fitting(options, setting, numbers[0])
        host = shape.host_bytes(setting, args.batch * args.tokens, numbers[0]) / GIB
        pinned = 2 * (shape.parameters + shape.learning(setting)) / GIB
        setup = pinned / self.rates.get("pinning, GiB/s", 2.0) + (host - pinned) / TOUCHED
        if self.device.type == "cpu":
            setup = 1.0
        self._check_time(setup + self._foreseen(shape, setting, numbers[0], args.steps + 2))
        layers = shape.config.num_hidden_layers
        found: dict[str, Any] = {
            "layers": f"{layers} of {shape.published_layers}",
            "parameters": shape.parameters,
            "host GiB, foreseen": host,
        }
        began = time.perf_counter()
        training = Training(shape, setting, args.device, (max(numbers), args.batch, args.tokens))
        try:
            training.step(1)
            synchronize(self.device)
            found["set up, s"] = time.perf_counter() - began
            for number in numbers:
                found[f"M={number}"] = self._at(training, shape, number)
        finally:
            training.close()
        return found | self._planned(shape, setting, numbers[0], found)

    def _at(self, training: Training, shape: Shape, number: int) -> dict[str, Any]:
        """Return speed and peak with so many micro-batches, or why it is not measured."""
        needed = shape.host_bytes(training.setting, self.args.batch * self.args.tokens, number) / GIB
        if needed > self._host_total() and not self.tiny:
            return {"skipped": f"needs {needed:.0f} GiB of host memory"}
        steps = self.args.steps if number <= 8 else 1
        try:
            self._check_time(self._foreseen(shape, training.setting, number, steps + 1))
        except Skip as reason:
            return {"skipped": str(reason)}
        return training.measure(number, steps, shape)

    def _host_total(self) -> float:
        """Return GiB for a model that is there already: what was free at the start."""
        given = self.args.host_gib or self.rates.get("free host GiB", free_host_gib())
        return given - RESERVE_GIB

    def _planned(self, shape: Shape, setting: Setting, number: int, found: dict[str, Any]) -> dict[str, Any]:
        """Return the plan's peak and time beside what was measured."""
        measured = found.get(f"M={number}", {})
        if not HAS_TRL or setting.optimizer == "sgd" or "peak GiB" not in measured:
            return {"plan": "none: TRL is not installed" if not HAS_TRL else "none"}
        from lopt.planning.plan import Planner
        from lopt.planning.run import Run
        from lopt.planning.run import Setting as Planned

        args = self.args
        run = Run(
            shape.config,
            args.batch,
            args.tokens,
            accumulation=number,
            autocast=False,
            masters=setting.masters,
            prefetch=int(setting.prefetch_gib * GIB),
            device=self.device.type,
        )
        stages = min(setting.stages or 1, shape.config.num_hidden_layers + 2)
        where = "cpu" if setting.optimizer == "host" else "auto"
        residency: Any = dict(schedule="block_major", offload="block", stages=stages, optimizer_device=where)
        method: Any = setting.method
        try:
            plan = Planner(run).plan(Planned(method=method, num_blocks=setting.blocks, **residency))
        except ValueError as error:  # what was measured is worth keeping
            return {"plan": str(error)}
        took = statistics.mean(measured["seconds"])
        time_of_step = self._seconds(plan)
        return {
            "planned GiB": plan.total / GIB,
            "measured over planned": measured["peak GiB"] * GIB / plan.total,
            "predicted, s": time_of_step,
            "measured over predicted": None if time_of_step is None else took / time_of_step,
        }

    def _seconds(self, plan: Any) -> float | None:
        """Return the planned time of a step at the rates of this machine."""
        if "in, GB/s" not in self.rates:
            return None
        reached, rates = REACHED * self.rates["matmul, TFLOP/s"], self.rates
        if not hasattr(plan, "time"):  # a planner without a model of time
            return plan.seconds(reached, min(rates["in, GB/s"], rates["out, GB/s"]))
        from lopt.planning.devices import Machine

        copies = (rates["in, GB/s"], rates["out, GB/s"])
        machine = Machine(tflops=(reached,) * 3, bandwidth=copies, host_gbps=rates["host AdamW, GB/s"])
        return plan.time(machine).seconds

    def _eager(self) -> dict[str, Any]:
        """End to end with recompute over LoPT without, pair by pair, and their peaks."""
        shape = Shape(TINY if self.tiny else MIDDLE)
        settings = {
            "e2e, checkpointed": Setting("e2e", 1, checkpointing=True),
            "lopt k=2": Setting("lopt", 2),
        }
        self._check_time(20 + self._foreseen(shape, settings["lopt k=2"], 4, 16) * (not self.tiny))
        size = (4, self.args.batch, self.args.tokens)
        loops = {name: Training(shape, setting, self.args.device, size) for name, setting in settings.items()}
        peaks = {}
        for name, loop in loops.items():  # of one beside the weights and state of both
            loop.step(4)
            peaks[name] = loop.measure(4, 1, shape)["peak GiB"]
        times: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(5):
            for name, loop in loops.items():
                times[name].append(seconds(lambda loop=loop: loop.step(4), self.device))
        ratios = [a / b for a, b in zip(*times.values(), strict=True)]
        return {
            "seconds": times,
            "e2e over LoPT": statistics.median(ratios),
            "peak of one beside what both hold, GiB": peaks,
        }

    def _rival(self, name: str) -> dict[str, Any]:
        if name not in gpu_rivals.installed():
            raise Skip("not installed")
        if self.device.type != "cuda":
            raise Skip("needs a GPU")
        shape = Shape(self._large() | {"model_type": "llama"}, RIVAL_LAYERS)  # which all of them know
        self._check_time(90 + 3 * self._foreseen(shape, Setting("e2e", 1, 28, "host"), 8, 4))
        size = (8, self.args.batch, self.args.tokens)
        found: dict[str, Any] = {"layers": f"{RIVAL_LAYERS} of {shape.published_layers}"}
        for method, blocks in (("e2e", 1), ("lopt", 2)):
            setting = Setting(method, blocks, RIVAL_LAYERS + 2, "host")
            training = Training(shape, setting, self.args.device, size)
            try:
                found[f"ours, {method} k={blocks}"] = training.measure(8, self.args.steps, shape)
            finally:
                training.close()
                del training
                self._empty_caches()
        return found | gpu_rivals.measure(name, shape.config, self.device, size)

    def table(self) -> Iterator[str]:
        """Yield the lines of a table of all cases."""
        columns = ("tokens/s", "TFLOP/s", "peak GiB", "planned GiB", "host wait, s a step")
        titles = [f"{title:>8}" for title in ("tokens/s", "TFLOP/s", "peak", "plan", "wait")]
        yield f"{'case':42} {'layers':8} {'M':>3}  {' '.join(titles)}"
        for name, found in self.results["cases"].items():
            rows = {key[2:]: row for key, row in found.items() if key.startswith("M=")}
            if not rows and "tokens/s" in found:
                rows = {"8": found}
            for number, row in rows.items():
                row = {"planned GiB": found.get("planned GiB")} | row
                shown = [f"{row[c]:8.2f}" if row.get(c) is not None else " " * 8 for c in columns]
                end = " ".join([*shown, row.get("skipped", "")])
                yield f"{name:42} {found.get('layers', ''):8} {number:>3}  {end}"
            if "skipped" in found or "error" in found:
                yield f"{name:42} {found.get('skipped') or found['error'][:100]}"
        if "e2e over LoPT" in (eager := self.results["cases"].get("eager", {})):
            yield f"eager: end to end with recompute takes {eager['e2e over LoPT']:.2f} x LoPT k=2 without"
        for name in ("machine", "parity"):
            found = self.results["cases"].get(name, {})
            numbers = {k: round(v, 2) for k, v in found.items() if isinstance(v, float | bool)}
            yield f"{name}: {json.dumps(numbers)}"


def main() -> None:
    parser = flags(__doc__, "gpu.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="qwen2.5-7b", choices=["tiny", *SHAPES])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--host_gib", type=float, help="host memory to use (default: what is free)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--steps", type=int, default=2, help="that are timed")
    parser.add_argument(
        "--skip",
        nargs="*",
        default=[],
        help='cases by name, or by parts of it, as in "8 stages, host optimizer"',
    )
    args = parser.parse_args()
    if args.shape == "tiny":
        args.batch, args.tokens, args.micro_batches = 2, min(args.tokens, 32), [2, 3]
    bench = Bench(args)
    bench.run()
    bench.results["table"] = list(bench.table())
    keep(args.output, bench.results)
    print(*bench.results["table"], sep="\n")


if __name__ == "__main__":
    main()
