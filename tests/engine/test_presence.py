"""A process that vanishes without a word ends those that wait for it, also where nothing flows to it."""

from __future__ import annotations

import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from lopt.engine import grid
from lopt.engine.grid import RankError


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for_the_second(rank: int, port: int, folder: str, joining: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="3")
    if rank == 1 and joining:
        grid._connect = lambda *_: os._exit(0)
    try:
        place = grid.join(3, use_cpu=True)
        if rank == 1:
            os._exit(0)
        place.gather(rank)
    except RankError as error:
        Path(folder, str(rank)).write_text(str(error))
    os._exit(0)  # the first is not waited for here: it may be gone before the last has heard of the second


@pytest.mark.parametrize("joining", [True, False])
def test_who_waits_for_a_process_that_is_gone_hears_of_it(joining: bool, tmp_path: Path) -> None:
    began = time.monotonic()
    mp.start_processes(
        wait_for_the_second, (free_port(), str(tmp_path), joining), nprocs=3, start_method="fork"
    )
    assert time.monotonic() - began < 10
    said = [(tmp_path / str(rank)).read_text() for rank in (0, 2)]
    assert "rank 1 has ended and does not say why" in said[0]
    assert said[1] in (said[0], grid.HOST_GONE)


class Alarm(BaseException):
    pass


def ring(*_: Any) -> None:
    raise Alarm


def test_who_waits_for_a_process_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal is obeyed meanwhile, and after a while it says so."""
    monkeypatch.setattr(grid, "JOIN_TIMEOUT", timedelta(seconds=1))
    for name, value in dict(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(Alarm):
        grid.join(2, use_cpu=True)
    signal.signal(signal.SIGALRM, before)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(
        ValueError, match=r"2 processes of the pipeline have not all joined .*, for which they have 1 s"
    ):
        grid.join(2, use_cpu=True)
