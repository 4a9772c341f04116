"""Peak live bytes of every process of a pipeline that `lopt plan` predicts, beside those of a real run.

Small models of random weights in pipelines of 2 and 3 processes on the CPUs of this machine, trained by the
trainer of `lopt sft`; of one optimizer step every tensor is counted while it lives.

    python benchmarks/pipeline_memory.py [--only lopt-2]
"""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.multiprocessing as mp
from transformers import LlamaConfig
from transformers.utils import logging

from lopt import LoPTConfig, LoPTSFTTrainer
from lopt.engine import grid
from lopt.instruments.memory import MemoryPeak
from lopt.planning.calibrate import measured
from lopt.planning.pipeline import PipelinePlanner
from lopt.planning.plan import Planner
from lopt.planning.run import Run, Setting
from lopt.trainers.config import LoPTSFTConfig
from lopt.trainers.pipeline import join_pipeline
from plan_accuracy import CONFIGS
from small_model import flags, keep

SMALL = LlamaConfig(
    hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, vocab_size=8192,
)  # fmt: skip
MODELS = CONFIGS | {"small llama": SMALL}
CASES = {
    "lopt-2": Setting("lopt", 2, "pipeline"),
    "lopt-3": Setting("lopt", 3, "pipeline"),
    "lopt-3, depth 4": Setting("lopt", 3, "pipeline", pipeline_depth=4),
    "lopt-2, 4 blocks": Setting("lopt", 4, "pipeline", pipeline_size=2),
    "lopt-2, checkpointed": Setting("lopt", 2, "pipeline", checkpointing=True),
    "lopt-2, boundary 4": Setting("lopt", 2, "pipeline", block_boundaries=(4,)),
    "frozen-3": Setting("frozen", 3, "pipeline"),
}
ROWS, TOKENS, MICRO_BATCHES = 2, 128, 6


def run_ranks(ranks: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `work(*args)` in processes of one thread, as torchrun starts them; return what each returned."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (ranks, port, folder, work, args), nprocs=ranks, start_method="fork")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(ranks)]


def _rank(rank: int, ranks: int, port: int, folder: str, work: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = work(*args)
    if (place := grid.current()) is not None:
        place.gather(None)  # nobody goes before all have received what was sent to them
        grid.leave()
    Path(folder, str(rank)).write_bytes(pickle.dumps(found))


def live(run: Run, setting: Setting) -> MemoryPeak:
    """Train a few optimizer steps as a process of a pipeline, and return its live bytes in one of them."""
    names = ("method", "num_blocks", "schedule", "pipeline_size")
    join_pipeline(LoPTConfig(**{name: getattr(setting, name) for name in names}), use_cpu=True)
    found = measured(run, setting, LoPTSFTTrainer, LoPTSFTConfig).peak
    assert isinstance(found, MemoryPeak)
    return found


def quiet() -> None:
    """Let the library say nothing of rows that are random."""
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore")


def compare(model: str, setting: Setting) -> list[tuple[int, int]]:
    """Return planned and live bytes of every process."""
    run = Run(MODELS[model], ROWS, TOKENS, MICRO_BATCHES, torch.float32, autocast=False, device="cpu")
    plan = PipelinePlanner(Planner(run)).plan(setting)
    found = run_ranks(len(plan.ranks), live, run, setting)
    return [(rank.peak.total, peak.total) for rank, peak in zip(plan.ranks, found, strict=True)]


def main() -> None:
    parser = flags(__doc__, "pipeline_memory.json")
    parser.add_argument("--only", nargs="*", default=list(CASES))
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    args = parser.parse_args()
    quiet()
    results: dict[str, Any] = {}
    most = 0.0
    for model in args.models:
        for case in args.only:
            rows = []
            for rank, (planned, real) in enumerate(compare(model, CASES[case])):
                off = planned / real - 1
                most = max(most, abs(off))
                rows.append({"plan": planned, "live": real, "off": round(off, 4)})
                print(f"{model:12}{case:22}rank {rank}{planned:14,}{real:14,}{off:+8.2%}", flush=True)
            results.setdefault(model, {})[case] = rows
    print(f"at most off: {most:.2%}")
    results |= {
        "unit": "bytes at the peak of an optimizer step, of every process",
        "at most off": round(most, 4),
        "micro-batches": f"{MICRO_BATCHES} of {ROWS} x {TOKENS} tokens",
    }
    keep(args.output, results)


if __name__ == "__main__":
    main()
