"""The processes of a run as a grid: a pipeline of blocks, and replicas of every block.

In a run of several processes transformers, TRL and accelerate average, gather and share out rows over the
default process group. Between blocks there is nothing to average, and whoever waited for a later block would
lose what a boundary gives. So in a pipeline the default group of a process is that of the replicas of its own
blocks, alone with one pipeline. What all processes have to know is in the launcher's store, where nobody
waits for anybody unless the run asks for it.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from lopt.engine.presence import Presence
from lopt.validation import check

T = TypeVar("T")
FAILED = "lopt/failed"
"""Key of the sentence with which the first process that failed has ended."""
JOIN_TIMEOUT = timedelta(minutes=10)
"""In which all processes of a run have to be there."""
_LONGEST_PAUSE = 0.2  # seconds between two looks for a value
_KEPT = 100  # values for the processes of a pipeline that stay in the store
HOST_GONE = "rank 0, which the others need, has ended or cannot be reached"
_LINK_TIMEOUT = timedelta(days=7)  # a stage may take long; `Presence` tells who is gone


class RankError(ValueError):
    """Another rank failed, with this message."""


@dataclass
class Grid:
    """The place of this process.

    Attributes:
        position: Of its blocks in the pipeline, from 0.
        size: Processes of a pipeline.
        replica: Index of its pipeline, from 0.
        replicas: Number of pipelines.
        store: Of all processes.
        group: The processes of its pipeline, in the order of their blocks.
        presence: Tells which processes have ended.
        asking: A connection of its own to the store, for whoever looks for failures beside the main thread.
        calls: Numbers what processes say to each other in the store; all call in the same order.
        told: Keys of what this process has told the others of its pipeline.
    """

    position: int
    size: int
    replica: int
    replicas: int
    store: Any
    group: Any
    presence: Presence
    asking: Any
    calls: Iterator[int] = field(default_factory=itertools.count, repr=False)
    told: deque[str] = field(default_factory=deque, repr=False)

    @property
    def rank(self) -> int:
        """The launcher's number of this process."""
        return self.position * self.replicas + self.replica

    @property
    def ranks(self) -> int:
        """Number of all processes."""
        return self.size * self.replicas

    @property
    def is_last(self) -> bool:
        """Whether this process has the last block."""
        return self.position == self.size - 1

    @property
    def is_main(self) -> bool:
        """Whether this process logs, reports and writes what is written once: the first with the last block.

        It has the loss of the task, and is the last to finish an optimizer step.
        """
        return self.is_last and self.replica == 0

    def gather(self, value: Any) -> list[Any]:
        """Return what all processes give, in the order of their ranks, when all have called this.

        Args:
            value: Something that JSON can hold.

        Raises:
            RankError: Another process has failed.
        """
        return self._read(self._give(value))

    def from_main(self, value: Any) -> Any:
        """Return what the main process gives; all processes call this.

        Raises:
            RankError: Another process has failed.
        """
        main = (self.size - 1) * self.replicas
        (found,) = self._read([self._give(value)[main]])
        return found

    def from_last(self, value: Any) -> Any:
        """Return what the process with the last block of this pipeline gives; all processes call this.

        Raises:
            RankError: Another process has failed.
        """
        key = f"lopt/call/{next(self.calls)}/of/{self.replica}"
        if self.is_last:
            self.store.set(key, json.dumps(value))
            self.told.append(key)
            if len(self.told) > _KEPT:  # a forward through the pipeline follows each: all have read it
                self.store.delete_key(self.told.popleft())
        return json.loads(self.wait_for(key))

    def hand_in(self, value: Any) -> list[Any]:
        """Give `value`; return in the main process what all give, and nothing in the others, which go on."""
        keys = self._give(value)
        if not self.is_main:
            return []
        found = self._read(keys)
        for key in keys:  # one of every log: they would fill the store
            self.store.delete_key(key)
        return found

    def _give(self, value: Any) -> list[str]:
        """Put `value` into the store, and return the keys of what all processes give in the same call."""
        name = f"lopt/call/{next(self.calls)}"
        self.store.set(f"{name}/{self.rank}", json.dumps(value))
        return [f"{name}/{rank}" for rank in range(self.ranks)]

    def _read(self, keys: Iterable[str]) -> list[Any]:
        return [json.loads(self.wait_for(key)) for key in keys]

    def wait_for(self, key: str) -> str:
        """Return the value of `key` in the store, however long another process takes to set it.

        Raises:
            RankError: Another process has failed.
        """
        pause = 0.001
        try:
            while not self.store.check([key]):
                self.check()
                time.sleep(pause)
                pause = min(1.3 * pause, _LONGEST_PAUSE)
            return self.store.get(key).decode()
        except RuntimeError as error:  # the store was in another process
            raise RankError(HOST_GONE) from error

    def wait_for_failure(self) -> NoReturn:
        """Raise the RankError of another process, which is about to say that it fails."""
        raise RankError(self.wait_for(FAILED))

    def check(self, store: Any = None) -> None:
        """Raise a RankError if another process has failed; `store` as of `failure`."""
        message = self.failure(store)
        if message is not None:
            raise RankError(message)

    def failure(self, store: Any = None) -> str | None:
        """Return why another process has failed; None if none has.

        Args:
            store: `asking`, beside the main thread.
        """
        store = store or self.store
        try:
            gone = [rank for rank in self.presence.gone() if not store.check([f"lopt/left/{rank}"])]
            if gone and not store.check([FAILED]):
                why = "it was killed, or its machine failed"
                store.compare_set(FAILED, "", f"rank {gone[0]} has ended and does not say why: {why}")
            return store.get(FAILED).decode() if store.check([FAILED]) else None
        except RuntimeError:  # the store was in a process that has ended
            return HOST_GONE

    def fail(self, message: str) -> str:
        """Let all processes know why this one ends; return what the first one that failed has said."""
        try:
            return self.store.compare_set(FAILED, "", message).decode()
        except RuntimeError:  # the store was in a process that has ended
            return message

    def part(self, seconds: float = math.inf) -> None:
        """Say that this process ends; the first waits as long for the others, since it may have the store."""
        try:
            self.store.set(f"lopt/left/{self.rank}", "")
            deadline = time.monotonic() + seconds
            others = set(range(1, self.ranks)) if self.rank == 0 else set()
            while others and time.monotonic() < deadline:
                others -= set(self.presence.gone())
                others = {rank for rank in others if not self.store.check([f"lopt/left/{rank}"])}
                time.sleep(0.01)
        except RuntimeError:  # the store was in a process that has ended
            return


_current: Grid | None = None


def current() -> Grid | None:
    """Return the grid that this process has joined; None outside of a pipeline."""
    return _current


def join(size: int, use_cpu: bool = False) -> Grid:
    """Take this process's place in a grid of pipelines of `size` processes, by what the launcher says.

    Call it before anything sets up torch.distributed, as TrainingArguments do. Replicas of a block have
    neighbouring ranks: they exchange gradients, which are more than what blocks exchange.

    Args:
        size: Processes of a pipeline.
        use_cpu: Compute on CPUs also where there are GPUs.

    Raises:
        ValueError: No launcher has started this process; `size` does not divide the number of processes;
            torch.distributed is set up already.
    """
    global _current
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"a pipeline of {size} processes has to be started by a launcher: "
            f"torchrun --nproc_per_node {size} ..."
        )
    if dist.is_initialized():
        raise ValueError("join the pipeline before TrainingArguments are made: they set up torch.distributed")
    ranks = int(os.environ["WORLD_SIZE"])
    rule = f"a divisor of {ranks}, the processes that the launcher has started"
    check(size >= 1 and ranks % size == 0, "pipeline_size", size, rule)
    on_gpu = torch.cuda.is_available() and not use_cpu
    try:
        place = _obeying_signals(lambda: _meet(size))
        _obeying_signals(lambda: _connect(place, on_gpu), lambda: place.check(place.asking))
    except (RuntimeError, OSError) as error:  # of torch.distributed, and of sockets
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"the {ranks} processes of the pipeline have not all joined ({why}), for which they have "
            f"{JOIN_TIMEOUT.total_seconds():g} s: look at what the others say, and whether they can reach "
            "MASTER_ADDR"
        ) from error
    if on_gpu:
        torch.cuda.set_device(_local_rank())
    _current = place
    return place


def leave() -> None:
    """Leave the grid, if this process has joined one; the first one last, which may have the store."""
    global _current
    place, _current = _current, None
    if place is None:
        return
    place.part()
    place.presence.close()
    if dist.is_initialized():  # accelerate may have done it
        dist.destroy_process_group()


def _meet(size: int) -> Grid:
    """Wait for all processes, and return the place of this one, whose group is still to be made."""
    store, rank, ranks = next(iter(dist.rendezvous("env://", timeout=JOIN_TIMEOUT)))
    replicas = ranks // size
    position, replica = divmod(rank, replicas)
    presence = Presence(store, rank, ranks, JOIN_TIMEOUT)
    return Grid(position, size, replica, replicas, store, None, presence, store.clone())


def _connect(place: Grid, on_gpu: bool) -> None:
    """Make the process groups: the default one, of the replicas of these blocks, and the pipeline's."""
    pipeline = dist.PrefixStore(f"pipeline/{place.replica}", place.store)
    block = dist.PrefixStore(f"block/{place.position}", place.store)
    if on_gpu:
        torch.cuda.set_device(_local_rank())  # of this thread
        options = dist.ProcessGroupNCCL.Options()
        place.group = dist.ProcessGroupNCCL(pipeline, place.position, place.size, options)
    else:
        place.group = dist.ProcessGroupGloo(pipeline, place.position, place.size, JOIN_TIMEOUT)
    place.group.set_timeout(_LINK_TIMEOUT)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=block, rank=place.replica, world_size=place.replicas)


def _obeying_signals(work: Callable[[], T], look: Callable[[], None] = lambda: None) -> T:
    """Return what `work` returns, which may wait long in C++, where Python hears no signal."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not future.done():
        time.sleep(0.02)
        look()
    return future.result()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))
