"""Pinned host memory goes back when nobody holds it any more; the driver is a stand-in."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

from lopt.engine import pinned
from lopt.engine.pinned import PinnedMemory
from lopt.instruments.memory import in_host_memory


class Driver:
    """Keeps what is registered, up to a limit, as the CUDA driver does."""

    def __init__(self) -> None:
        self.pages: dict[int, int] = {}
        self.limit = 2**60
        self.mapped: list[bool] = []

    def register(self, address: int, nbytes: int) -> int:
        if sum(self.pages.values()) + nbytes > self.limit:
            return 2
        if address in self.pages:
            return 712
        self.pages[address] = nbytes
        return 0

    def unregister(self, address: int, nbytes: int, process: int) -> None:
        assert self.pages.pop(address) == nbytes and process == os.getpid()
        self.mapped.append(is_mapped(address))

    @property
    def nbytes(self) -> int:
        return sum(self.pages.values())


def is_mapped(address: int) -> bool:
    """Return whether this process has a page at `address`; where the system does not tell, True."""
    if sys.platform != "linux":
        return True
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(stop, 16) for start, stop in ranges)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(pinned, "_register", made.register)
    monkeypatch.setattr(pinned, "_unregister", made.unregister)
    return made


def test_memory_is_pinned_as_long_as_somebody_holds_it(driver: Driver) -> None:
    memory = PinnedMemory()
    first, second = memory.empty_like(torch.ones(3, 5)), memory.empty_like(torch.ones(4, dtype=torch.int8))
    assert first.shape == (3, 5) and second.dtype == torch.int8 and in_host_memory(first)
    assert driver.nbytes == memory.nbytes == 64
    row = first[1].fill_(7)
    del first, second
    assert driver.nbytes == memory.nbytes == 60 and row.eq(7).all()  # a view of it holds all of it
    assert driver.mapped == [True]  # unpinned first, then given back
    memory.close()
    assert driver.nbytes == memory.nbytes == 0 and row.eq(7).all()
    memory.close()
    del row
    assert driver.nbytes == 0


def test_what_nobody_uses_makes_room(driver: Driver) -> None:
    """A trainer that is gone is a circle of objects, which the garbage collector alone takes apart."""
    driver.limit = 100
    gc.disable()
    try:
        circle: list[object] = [PinnedMemory().empty_like(torch.ones(20))]
        circle.append(circle)
        del circle
        assert driver.nbytes == 80
        memory = PinnedMemory()
        held = memory.empty_like(torch.ones(15))
        assert driver.nbytes == held.nbytes == 60
    finally:
        gc.enable()
    sentence = r"refuses to pin 44 B of host memory beside the 60 B of this trainer \(error 2\): raise"
    with pytest.raises(ValueError, match=sentence):
        memory.empty_like(torch.ones(11))
    assert driver.nbytes == 60
