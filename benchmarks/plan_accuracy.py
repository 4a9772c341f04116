"""Bytes that the planner predicts beside those that are live in a real optimizer step, of device and host.

Three small models of random weights, two of them with an embedding that is the LM head as well: end to end,
LoPT k=2, frozen k=2 and LoRA, each eager, in stages, with optimizer state or weights in host memory, and
stepped there. `lopt.planning.calibrate` trains optimizer steps; of the last one every tensor is counted while
it lives. Host memory counts at its own peak, with steps there as late as can be: each one when the device
needs its weights, as a slow host would do it.

    OMP_NUM_THREADS=1 python benchmarks/plan_accuracy.py [--only llama]
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import datasets
import torch
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.utils import logging

from lopt import LoPTSFTTrainer
from lopt.compat import replaced
from lopt.engine import host_optimizer, plain_loop
from lopt.instruments.memory import MemoryPeak
from lopt.planning.calibrate import measured
from lopt.planning.plan import Plan, Planner
from lopt.planning.run import Run, Setting
from lopt.trainers.config import LoPTSFTConfig
from lopt.trainers.lora import lora_config
from small_model import flags, keep

WIDTH = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, head_dim=32, num_hidden_layers=6)
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WIDTH, num_key_value_heads=2, vocab_size=512),
    "qwen3": Qwen3Config(**WIDTH, num_key_value_heads=2, vocab_size=768, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**WIDTH, num_key_value_heads=1, vocab_size=1024, sliding_window=64),  # tied
}
METHODS = (("e2e", 1), ("lopt", 2), ("frozen", 2), ("lora", 1))
STAGES = 8  # embedding, LM head and each layer
RESIDENCY: dict[str, dict[str, Any]] = {
    "eager": dict(),
    "stages": dict(schedule="block_major"),
    "optimizer offloaded": dict(schedule="block_major", offload="optimizer"),
    "weights offloaded": dict(schedule="block_major", offload="block"),
    "host optimizer": dict(schedule="block_major", offload="block", optimizer_device="cpu"),
}
ROWS, TOKENS, MICRO_BATCHES = 2, 128, 3
PREFETCH = 3 * 10**5


class LateSteps:
    """Stands in for the thread of a host optimizer; a step runs when it is waited for, after those before."""

    def __init__(self, *_: Any) -> None:
        self.waiting: list[_Step] = []

    def submit(self, step: Callable[[], None]) -> Future:
        self.waiting.append(_Step(self, step))
        return self.waiting[-1]


class _Step(Future):
    def __init__(self, pool: LateSteps, step: Callable[[], None]) -> None:
        super().__init__()
        self._pool, self._run = pool, step

    def result(self, timeout: float | None = None) -> None:
        while not self.done():
            first = self._pool.waiting.pop(0)
            first._run()
            first.set_result(None)


@dataclass
class Found:
    """Live bytes of a step: `host` at its own peak, `logged` what the trainer reports of the device."""

    device: MemoryPeak
    host: int
    logged: int


def live(run: Run, setting: Setting) -> Found:
    """Train a few optimizer steps and return what was live in the last; with a host optimizer in two runs."""

    def train(late: bool = False) -> Found:
        gc.collect()  # what runs before have left in host memory
        lately = replaced(host_optimizer, ThreadPoolExecutor=LateSteps) if late else nullcontext()
        # A tracker follows one thread: with 0 a step runs at once.
        with replaced(plain_loop, step_threads=lambda *_: int(late)), lately:
            found = measured(run, setting, LoPTSFTTrainer, LoPTSFTConfig)
        assert isinstance(found.peak, MemoryPeak)
        return Found(found.peak, found.host, found.logged)

    at_once = train()
    if setting.optimizer_device == "cpu":
        at_once.host = max(at_once.host, train(late=True).host)
    return at_once


@cache
def planner(name: str, dtype: torch.dtype) -> Planner:
    run = Run(
        CONFIGS[name], ROWS, TOKENS, MICRO_BATCHES, dtype, autocast=False, device="cpu", prefetch=PREFETCH,
        adapters=lora_config(8, 16),
    )  # fmt: skip
    return Planner(run)


def compare(name: str, method: Any, k: int, residency: str) -> tuple[Plan, Found]:
    """Return plan and live bytes; in host memory weights are bfloat16 with float32 masters."""
    options = RESIDENCY[residency]
    dtype = torch.bfloat16 if options.get("optimizer_device") == "cpu" else torch.float32
    setting = Setting(method, k)
    if options:
        setting = replace(setting, stages=STAGES, **options)
    plans = planner(name, dtype)
    return plans.plan(setting), live(plans.run, setting)


def main() -> None:
    parser = flags(__doc__, "plan_accuracy.json")
    parser.add_argument("--only", nargs="*", default=list(CONFIGS))
    args = parser.parse_args()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    most = {"device": 0.0, "host": 0.0}
    print(f"{'':34}{'device: plan':>14}{'live':>12}{'off':>8}{'host: plan':>14}{'live':>12}{'off':>8}")
    for name in args.only:
        for method, k in METHODS:
            for residency in RESIDENCY:
                plan, found = compare(name, method, k, residency)
                both = {"device": (plan.total, found.device.total), "host": (plan.host, found.host)}
                row: dict[str, Any] = {}
                line = f"{name:8}{method:7}{residency:19}"
                for where, (predicted, real) in both.items():
                    off = predicted / real - 1 if real else 0.0
                    assert real or not predicted, "nothing was in host memory"
                    most[where] = max(most[where], abs(off))
                    row[where] = {"plan": predicted, "live": real, "off": round(off, 4)}
                    line += f"{predicted:14,}{real:12,}{off:+8.2%}"
                print(line, flush=True)
                results.setdefault(name, {}).setdefault(method, {})[residency] = row
    print("at most off: " + ", ".join(f"{where} {off:.2%}" for where, off in most.items()))
    results |= {
        "unit": "bytes at the peak of an optimizer step, of device and host each at its own",
        "at most off": {where: round(off, 4) for where, off in most.items()},
        "micro-batches": f"{MICRO_BATCHES} of {ROWS} x {TOKENS} tokens",
    }
    keep(args.output, results)


if __name__ == "__main__":
    main()
