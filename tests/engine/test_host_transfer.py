"""Tensors on their way: values, order, and never more device memory than the budget allows."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch

from lopt.engine.host_transfer import HostTransfer, TensorGroup
from lopt.instruments.memory import MemoryTracker, dense_parts, in_host_memory

KIB = 1024


class Owner:
    """Holds tensors of `sizes` bytes, all of one value."""

    def __init__(self, *sizes: int, value: float = 1.0) -> None:
        self.tensors = [torch.full((size // 4,), value) for size in sizes]
        self.group = TensorGroup(lambda: dict(enumerate(self.tensors)), self.put)

    def put(self, tensors: dict[int, torch.Tensor]) -> None:
        self.tensors = [tensors.get(number, old) for number, old in enumerate(self.tensors)]


def owners(transfer: HostTransfer, *sizes: int) -> list[Owner]:
    made = [Owner(size, value=float(number)) for number, size in enumerate(sizes)]
    for owner in made:
        transfer.store(owner.group)
    return made


def test_values_go_out_and_come_back() -> None:
    transfer = HostTransfer(torch.device("cpu"), KIB)
    owner = Owner(64, 128)
    transfer.store(owner.group)
    assert all(map(in_host_memory, owner.tensors)) and owner.group.nbytes == 192
    host = owner.tensors
    transfer.fetch(owner.group)
    assert not any(map(in_host_memory, owner.tensors))
    owner.tensors[0].fill_(7)
    assert host[0].eq(1).all()  # a real copy
    transfer.release(owner.group)
    assert owner.tensors[0] is host[0] and host[0].eq(7).all() and host[1].eq(1).all()
    host[1].fill_(9)  # whoever writes there changes the real thing
    transfer.fetch(owner.group)
    assert owner.tensors[1].eq(9).all()
    owner.tensors[1].fill_(0)
    transfer.release(owner.group, changed=False)
    assert owner.tensors[1].eq(9).all()


@pytest.mark.parametrize(("budget", "expected"), [(0, 0), (2 * KIB, 2), (3 * KIB - 4, 2), (100 * KIB, 5)])
def test_as_much_is_prefetched_as_the_budget_allows(budget: int, expected: int) -> None:
    transfer = HostTransfer(torch.device("cpu"), budget)
    first, *rest = owners(transfer, 64, *[KIB] * 5)
    with MemoryTracker() as tracker:
        transfer.fetch(first.group)
        transfer.prefetch([owner.group for owner in rest])
        assert tracker.current.total == 64 + expected * KIB
        for owner in rest:
            transfer.fetch(owner.group)
            assert owner.tensors[0].eq(rest.index(owner) + 1).all()
            assert tracker.current.total <= 64 + KIB + budget
            transfer.release(owner.group)
        transfer.release(first.group)
        assert tracker.current.total == 0
    assert tracker.peak.total <= 64 + KIB + budget + 257  # what `eq` and `all` make
    assert tracker.peak.host > 0


def test_order_is_kept_and_what_was_used_does_not_come_again() -> None:
    transfer = HostTransfer(torch.device("cpu"), 10 * KIB)
    a, b, c = owners(transfer, KIB, KIB, KIB)
    transfer.fetch(b.group)
    transfer.prefetch([a.group, b.group, c.group])
    transfer.release(b.group)
    with MemoryTracker() as tracker:
        transfer.fetch(a.group)
        transfer.fetch(c.group)
        assert tracker.current.total == 0 or tracker.current.activations == 0  # both had come before
    assert in_host_memory(b.tensors[0])


def test_synchronize_drops_what_was_prefetched_so_that_no_stale_copy_is_used() -> None:
    transfer = HostTransfer(torch.device("cpu"), 10 * KIB)
    a, b = owners(transfer, KIB, KIB)
    transfer.prefetch([a.group, b.group])
    transfer.synchronize()
    b.tensors[0].fill_(42)
    transfer.fetch(b.group)
    assert b.tensors[0].eq(42).all()


def test_state_made_on_the_device_gets_a_place_when_it_first_leaves() -> None:
    transfer = HostTransfer(torch.device("cpu"), KIB)
    owner = Owner(KIB)
    transfer.fetch(owner.group)  # nothing to fetch yet
    assert owner.group.nbytes == 0
    transfer.release(owner.group)
    assert in_host_memory(owner.tensors[0]) and owner.tensors[0].eq(1).all() and owner.group.nbytes == KIB
    owner.tensors = [torch.full((8,), 3.0)]
    transfer.store(owner.group)
    assert in_host_memory(owner.tensors[0]) and owner.tensors[0].eq(3).all() and owner.group.nbytes == 32


def test_what_appears_or_grows_on_the_device_gets_a_place_and_the_rest_keeps_its_own() -> None:
    transfer = HostTransfer(torch.device("cpu"), KIB)
    owner = Owner(64, 128)
    transfer.store(owner.group)
    kept, grown = owner.tensors
    transfer.fetch(owner.group)
    owner.tensors[0] += 1
    owner.tensors[1] = torch.full((64,), 5.0)
    owner.tensors.append(torch.full((8,), 6.0))
    transfer.release(owner.group)
    assert owner.tensors[0] is kept and kept.eq(2).all()
    assert [t.unique().item() for t in owner.tensors[1:]] == [5, 6] and owner.tensors[1] is not grown
    assert all(map(in_host_memory, owner.tensors)) and owner.group.nbytes == 64 + 256 + 32
    transfer.fetch(owner.group)
    assert [t.unique().item() for t in owner.tensors] == [2, 5, 6]


def test_quantized_state_moves_in_its_parts() -> None:
    subclass = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit
    transfer = HostTransfer(torch.device("cpu"), KIB)
    owner = Owner(0)
    owner.tensors = [subclass.zeros((16, 256), True, 256, "cpu", dtype=torch.float32)]
    owner.tensors[0].copy_(torch.linspace(-1, 1, 4096).view(16, 256))
    values = owner.tensors[0].dequantize()
    transfer.store(owner.group)
    assert len(list(dense_parts(owner.tensors[0]))) == 3 and in_host_memory(owner.tensors[0])
    transfer.fetch(owner.group)
    assert type(owner.tensors[0]) is subclass and torch.equal(owner.tensors[0].dequantize(), values)
    owner.tensors[0].copy_(torch.zeros(16, 256))
    transfer.release(owner.group)
    assert owner.tensors[0].dequantize().abs().max() < 1e-6


def test_values_that_are_not_final_are_waited_for_by_a_fetch_alone() -> None:
    """As those that a host optimizer is at work on; once final, they are prefetched like any other."""
    transfer = HostTransfer(torch.device("cpu"), KIB)
    (owner,) = owners(transfer, 64)
    owner.group.pending = Future()
    transfer.prefetch([owner.group])
    assert transfer.bytes_in_flight == 0
    owner.group.pending.set_result(None)
    transfer.prefetch([])
    assert transfer.bytes_in_flight == 64 and owner.group.pending is None
    transfer.fetch(owner.group)
    assert not any(map(in_host_memory, owner.tensors))
