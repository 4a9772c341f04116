"""The processes of a run, its ranks: how many share a machine, and how they wait for each other.

A collective ends in a timeout (`ddp_timeout`, half an hour) where one rank works longer than that, as the one
that writes or reads a checkpoint of hundreds of GB may. So ranks that wait for such work ask the store of
their process group for it, again and again, for as long as it takes. In a pipeline they are the processes of
all blocks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate.utils import get_cpu_distributed_information

from lopt import compat
from lopt.engine import grid
from lopt.engine.grid import RankError

T = TypeVar("T")
LONGEST_PAUSE = 1.0
"""Seconds between two questions to the store, after a while."""


def processes_here() -> int:
    """Return how many processes of this run share the machine's memory, by what their launcher says."""
    return max(1, get_cpu_distributed_information().local_world_size)


def together(work: Callable[[], T]) -> T:
    """Return what `work` returns on this rank, when all ranks have done theirs, however long that takes.

    Raises:
        RankError: it failed on another rank.
    """
    store, rank, ranks = _group()
    if ranks == 1:
        return work()
    name = f"lopt/together/{store.add(f'lopt/together/of/{rank}', 1)}"
    try:
        found = work()
    except BaseException as error:
        store.set(f"{name}/failed", str(error) or repr(error))
        raise
    try:
        _wait(store, name, ranks)
    except RuntimeError as error:  # the store was in another process
        raise RankError(f"another rank has ended ({str(error).splitlines()[0]})") from error
    return found


def _wait(store: Any, name: str, ranks: int) -> None:
    """Note that this rank is done, and ask until all are, or one has failed."""
    store.add(f"{name}/done", 1)
    pause = 0.005
    while store.add(f"{name}/done", 0) < ranks:
        if store.check([f"{name}/failed"]):
            raise RankError(store.get(f"{name}/failed").decode())
        if (place := grid.current()) is not None:
            place.check()
        time.sleep(pause)
        pause = min(1.2 * pause, LONGEST_PAUSE)


def on_first_rank(args: Any, function: Callable[[], str | None]) -> str | None:
    """Return on all ranks what `function` returns on the first.

    Raises:
        RankError: what it raises there, on the others.
    """
    _ = args.process_index  # sets up the process group, if that was not done
    store, rank, ranks = _group()
    found = together(lambda: function() if rank == 0 else None)
    if ranks == 1:
        return found
    key = f"lopt/first/{store.add(f'lopt/first/of/{rank}', 1)}"
    if rank == 0:
        store.set(key, json.dumps(found))
    return json.loads(store.get(key))


def _group() -> tuple[Any, int, int]:
    """Return the store of the run's processes, this rank and the number of ranks."""
    place = grid.current()
    if place is not None:
        return place.store, place.rank, place.ranks
    if not dist.is_available() or not dist.is_initialized():
        return None, 0, 1
    return compat.process_store(), dist.get_rank(), dist.get_world_size()
