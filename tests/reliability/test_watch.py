"""A pipeline's processes end together, with one sentence, when one of them fails or vanishes."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, GradientState

from lopt.cli.main import main
from lopt.trainers.events import LoopEvents

FAULT_STEP = 2
RANKS = 3


def not_finite(trainer: Any) -> None:
    """Spoil the weights of this process's block, which it notices after the next process."""
    for _, parameter in trainer.lopt.blocks.parameters(trainer.lopt.model, 1):
        parameter.data.fill_(torch.nan)
    look = trainer.guard.look

    def look_late() -> None:
        time.sleep(2)
        look()

    trainer.guard.look = look_late


def no_memory(trainer: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def vanish(trainer: Any) -> None:
    os._exit(9)


def rank(number: int, port: int, folder: str, fault: Callable[[Any], None], words: list[str]) -> None:
    """Train as one of several processes, the one in the middle with a fault; note how it ended, and when."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(RANKS))
    os.environ.update(LOCAL_WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    begin = LoopEvents.on_step_begin

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        if number == 1 and state.global_step == FAULT_STEP:
            Path(folder, "fault").write_text(str(time.time()))
            fault(self._trainer)

    LoopEvents.on_step_begin = on_step_begin  # type: ignore[method-assign]
    with Path(folder, f"said-{number}").open("w") as sys.stderr:
        code = main(words)
    Path(folder, f"end-{number}").write_text(f"{code} {time.time()}")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (not_finite, "rank 1: step 3, batch 1 of 2: the local loss of block 2 is nan"),
        (no_memory, "rank 1: out of memory in step 3"),
        (vanish, "has ended"),
    ],
)
def test_all_end_with_one_sentence(
    fault: Callable[[Any], None], said: str, tiny_folder: Path, sums_file: Path, tmp_path: Path
) -> None:
    given = dict(
        model_name_or_path=tiny_folder, train_file=sums_file, output_dir=tmp_path / "out", report_to="none",
        schedule="pipeline", num_blocks=RANKS, head_warmup_steps=0, max_steps=1000, save_strategy="no",
        per_device_train_batch_size=2, gradient_accumulation_steps=2, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    words = ["sft", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.start_processes(
        rank, (port, str(tmp_path), fault, words), nprocs=RANKS, join=False, start_method="fork"
    )
    for process in context.processes:
        process.join(60)
        assert not process.is_alive(), "a process hangs"
    began = float((tmp_path / "fault").read_text())
    for number in (0, 2):
        code, ended = (tmp_path / f"end-{number}").read_text().split()
        assert code == "2" and float(ended) - began < 10
        lines = (tmp_path / f"said-{number}").read_text().splitlines()
        (line,) = [line for line in lines if "error:" in line]
        assert said in line, line
