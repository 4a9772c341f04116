"""Commands in several processes, and what they leave."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from lopt.cli.main import main

MEASURED = ("seconds", "second", "step_time", "memory", "busy", "runtime", "flos")
"""In names of figures that differ from run to run."""


def run(ranks: int, *command: Any) -> None:
    """Run a command in so many processes, forked off this one, with what a launcher would set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(
        _rank, (ranks, port, [str(word) for word in command]), nprocs=ranks, start_method="fork"
    )


def _rank(rank: int, ranks: int, port: int, command: list[str]) -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # of earlier tests
    GradientState._reset_state()
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ.update(LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    assert main(command) == 0, command


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value for file in folder.glob("model*.safetensors") for name, value in load_file(file).items()
    }


def figures(folder: Path) -> list[dict[str, float]]:
    """Return the logged rows without what differs from run to run, rounded to what is printed."""
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [
        {
            name: float(f"{value:.5g}")
            for name, value in row.items()
            if not any(word in name for word in MEASURED)
        }
        for row in rows
    ]


def assert_same(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
