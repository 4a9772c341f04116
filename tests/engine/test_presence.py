"""A process that vanishes without a word ends those that wait for it, also where nothing flows to it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing as mp

from lopt.engine import grid
from lopt.engine.grid import RankError


def wait_for_the_second(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="3")
    place = grid.join(3, use_cpu=True)
    if rank == 1:
        os._exit(0)
    try:
        place.gather(rank)
    except RankError as error:
        Path(folder, str(rank)).write_text(str(error))
    grid.leave()


def test_who_waits_for_a_process_that_is_gone_hears_of_it(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(wait_for_the_second, (port, str(tmp_path)), nprocs=3, start_method="fork")
    for rank in (0, 2):
        assert "rank 1 has ended and does not say why" in (tmp_path / str(rank)).read_text()
