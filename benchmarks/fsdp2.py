"""What `lopt plan --fsdp2` predicts, beside a real step of two processes: peak bytes and bytes sent.

Small models of random weights, sharded over two processes on the CPUs of this machine (gloo), trained by the
trainer of `lopt sft`; every tensor is counted while it lives, and every collective by what a ring sends.

    python benchmarks/fsdp2.py [--models llama]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from pipeline_memory import MODELS, quiet, run_ranks
from transformers import TrainerCallback

from lopt import LoPTSFTTrainer
from lopt.compat import replaced
from lopt.instruments.memory import MemoryPeak
from lopt.planning.calibrate import measured
from lopt.planning.plan import Planner
from lopt.planning.run import Run, Setting
from lopt.trainers.config import LoPTSFTConfig
from small_model import flags, keep

FSDP = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
FSDP["state_dict_type"] = "FULL_STATE_DICT"
SETTINGS = {
    "e2e": Setting("e2e", 1),
    "e2e, checkpointed": Setting("e2e", 1, checkpointing=True),
    "lopt": Setting("lopt", 2),
    "frozen": Setting("frozen", 2),
}
PROCESSES, ROWS, TOKENS = 2, 2, 128
_NEW = hasattr(dist, "all_gather_single")  # torch 2.13
_GATHER = "all_gather_single" if _NEW else "all_gather_into_tensor"
_SCATTER = "reduce_scatter_single" if _NEW else "reduce_scatter_tensor"


def main() -> None:
    parser = flags(__doc__, "fsdp2.json")
    parser.add_argument("--models", nargs="*", default=["llama"])
    args = parser.parse_args()
    quiet()
    results: dict[str, Any] = {}
    most = {"bytes": 0.0, "sent": 0.0}
    for model in args.models:
        for name, setting in SETTINGS.items():
            for micro_batches in (1, 3):
                row = compare(model, setting, micro_batches)
                for what in most:
                    most[what] = max(most[what], abs(row[what]["off"]))
                case = f"{name}, {micro_batches} micro-batches"
                print(f"{model:12}{case:36}", *row.items(), flush=True)
                results.setdefault(model, {})[case] = row
    print("at most off:", most)
    results |= {
        "unit": "bytes on a device at the peak of an optimizer step, and bytes that it sends in one",
        "at most off": {what: round(off, 4) for what, off in most.items()},
        "micro-batches": f"of {ROWS} x {TOKENS} tokens, {PROCESSES} processes",
    }
    keep(args.output, results)


def compare(model: str, setting: Setting, micro_batches: int) -> dict[str, Any]:
    """Return what was planned and what was measured, of the process that needs most."""
    run = Run(
        MODELS[model], ROWS, TOKENS, micro_batches, torch.float32, autocast=False, device="cpu",
        processes=PROCESSES, fsdp2=True,
    )  # fmt: skip
    plan = Planner(run).plan(setting)
    found = run_ranks(PROCESSES, live, run, setting)
    planned = {"bytes": plan.total, "sent": plan.sent}
    real = {"bytes": max(one for one, _ in found), "sent": max(sent for _, sent in found)}
    return {
        what: {"plan": planned[what], "real": real[what], "off": round(planned[what] / real[what] - 1, 4)}
        for what in planned
    }


def live(run: Run, setting: Setting) -> tuple[int, int]:
    """Train a few optimizer steps; return the live bytes of one of them, and the bytes sent in it."""
    allow_fsdp_on_cpu()
    counter = _Sent()

    def settings(**options: Any) -> LoPTSFTConfig:
        return LoPTSFTConfig(fsdp=True, fsdp_config=dict(FSDP), **options)

    def make(*args: Any, **options: Any) -> LoPTSFTTrainer:
        trainer = LoPTSFTTrainer(*args, **options)
        trainer.add_callback(counter)
        return trainer

    with counter.counting():
        found = measured(run, setting, make, settings)
    assert isinstance(found.peak, MemoryPeak)
    return found.peak.total, counter.of_step


class _Sent(TrainerCallback):
    """Counts what collectives send, as a ring does: N - 1 of N of the whole, twice to average."""

    def __init__(self) -> None:
        self._now = self.of_step = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._now = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.of_step = self._now

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within, collectives of torch.distributed are counted."""
        with ExitStack() as stack:
            for name, whole, times in (
                (_GATHER, 0, 1),
                (_SCATTER, 1, 1),
                ("all_reduce", 0, 2),
            ):
                counted = self._counted(getattr(dist, name), whole, times)
                stack.enter_context(replaced(dist, **{name: counted}))
            yield

    def _counted(self, collective: Callable[..., Any], whole: int, times: int) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            given = [*args, *(value for value in options.values() if isinstance(value, torch.Tensor))]
            tensor = given[whole]
            if tensor.nbytes > 1024:  # not a norm or a loss
                self._now += times * tensor.nbytes * (PROCESSES - 1) // PROCESSES
            return collective(*args, **options)

        return counted


def allow_fsdp_on_cpu() -> None:
    """Let accelerate, which offers FSDP on accelerators only, use gloo; all it does works there as well."""
    start = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        kinds = (DistributedType.MULTI_CPU, DistributedType.FSDP)
        if fsdp_plugin is not None and self.distributed_type in kinds:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    main()
