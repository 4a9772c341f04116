"""Move groups of tensors between host memory and the device, beside the computation.

A `TensorGroup` moves as a whole: the weights of a layer, the optimizer state of a few parameters.
`HostTransfer` copies a group to the device before it is used and back afterwards, on CUDA streams of
their own, and prefetches the next groups as far as a budget of device memory allows. While a group is
in host memory (pinned where the device is a GPU), its owner holds the host tensors themselves: whoever
reads or writes them there sees and changes the real values.

On a CPU the same code runs; every copy is real and done at once, in order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lopt.engine.pinned import PinnedMemory
from lopt.instruments.memory import dense_parts, host_tensor

Tensors = dict[Any, Tensor]
"""Tensors by what their owner calls them."""


class TensorGroup:
    """Tensors that move together; their owner may get more of them, or others, while they are on the device.

    Args:
        get: returns the tensors where their owner holds them now.
        put: hands the owner other tensors of the same shapes in their place.

    Attributes:
        host: their places in host memory; None until they have been there once.
        pending: ends when their values in host memory are final; None if they are.
    """

    def __init__(self, get: Callable[[], Tensors], put: Callable[[Tensors], None]) -> None:
        self.get = get
        self.put = put
        self.host: Tensors | None = None
        self.pending: Future | None = None

    @classmethod
    def of_parameters(cls, parameters: Iterable[Tensor]) -> TensorGroup:
        """Return the group of the values (`.data`) of `parameters`."""
        parameters = list(parameters)

        def put(tensors: Tensors) -> None:
            for parameter, tensor in tensors.items():
                parameter.data = tensor

        return cls(lambda: {parameter: parameter.data for parameter in parameters}, put)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors; 0 if they have never been in host memory."""
        host = {} if self.host is None else self.host
        return sum(part.nbytes for tensor in host.values() for part in dense_parts(tensor))


@dataclass
class _Outgoing:
    group: TensorGroup
    tensors: Tensors  # on the device, held until they have been copied
    copied: torch.cuda.Event


class HostTransfer:
    """Moves tensor groups between host memory and one device.

    Args:
        device: where groups are used.
        budget: bytes of device memory for groups on their way in or out. A group that is needed at once
            comes in whatever its size.

    Attributes:
        waited: seconds that fetches have waited for values in host memory to become final.
    """

    def __init__(self, device: torch.device, budget: int) -> None:
        self.device = device
        self.budget = budget
        self.waited = 0.0
        self._on_gpu = device.type == "cuda"
        self._upcoming: deque[TensorGroup] = deque()
        self._prefetched: dict[TensorGroup, tuple[Tensors, torch.cuda.Event | None]] = {}
        self._in_use: set[TensorGroup] = set()
        self._outgoing: deque[_Outgoing] = deque()
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if self._on_gpu else None
        self._pinned = PinnedMemory() if self._on_gpu else None

    def store(self, group: TensorGroup) -> None:
        """Put the tensors that the owner of `group` has now into host memory; older copies are dropped."""
        self.synchronize()
        self._in_use.discard(group)
        group.host = None
        tensors = group.get()
        for name in tensors:  # one by one, so that memory is not held twice
            host = self._host_like(tensors[name])
            _copy({name: host}, tensors)
            tensors[name] = host
            group.put({name: host})
        group.host = tensors or None
        if self._streams is not None:
            torch.cuda.current_stream(self.device).synchronize()

    def prefetch(self, groups: Iterable[TensorGroup]) -> None:
        """Announce what will be fetched next, in this order; copies begin as far as the budget allows."""
        self._upcoming.extend(groups)
        self._prefetch_within_budget()

    def fetch(self, group: TensorGroup) -> None:
        """Put `group` on the device, for what is launched there from now on."""
        if group.host is None or group in self._in_use:
            return
        if group not in self._prefetched:
            self.wait_until_final(group)
            while self._outgoing and self.bytes_in_flight + group.nbytes > self.budget:
                self._finish_oldest()
            self._copy_in(group)
        tensors, arrived = self._prefetched.pop(group)
        self._wait_for(arrived)
        group.put(tensors)
        self._in_use.add(group)
        self._prefetch_within_budget()

    def release(self, group: TensorGroup, changed: bool = True) -> None:
        """Take `group` off the device; unless it is unchanged, its values are copied to the host first."""
        if group.host is not None and group not in self._in_use:
            return
        tensors = group.get()
        places = group.host or {}
        # What was made on the device gets a place in host memory now.
        group.host = {
            name: places[name] if _fits(tensor, places.get(name)) else self._host_like(tensor)
            for name, tensor in tensors.items()
        }
        self._in_use.discard(group)
        if changed:
            self._copy_out(group, tensors)
        group.put(group.host)
        self._prefetch_within_budget()

    def send(self, group: TensorGroup) -> torch.cuda.Event | None:
        """Copy tensors that the owner of `group` has made on the device to host memory.

        Returns:
            What has passed when they are there; None if they are there at once.
        """
        self._in_use.add(group)
        self.release(group)
        return self._outgoing[-1].copied if self._outgoing else None

    def wait_until_final(self, group: TensorGroup) -> None:
        """Wait until the values of `group` in host memory are final."""
        if group.pending is not None:
            began = time.perf_counter()
            group.pending.result()
            self.waited += time.perf_counter() - began
            group.pending = None

    def synchronize(self) -> None:
        """Wait until all that leaves is in host memory, and drop what was prefetched or announced."""
        while self._outgoing:
            self._finish_oldest()
        for _, arrived in self._prefetched.values():
            self._wait_for(arrived)  # only then its memory is free for use
        self._prefetched.clear()
        self._upcoming.clear()

    def close(self) -> None:
        """Unpin all host memory now, not when its owners let go of it; its values stay there."""
        self.synchronize()
        if self._pinned is not None:
            self._pinned.close()

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of device memory of the groups that are prefetched or on their way out."""
        return sum(group.nbytes for group in (*self._prefetched, *(out.group for out in self._outgoing)))

    # -- copies ----------------------------------------------------------------------------------

    def _copy_in(self, group: TensorGroup) -> None:
        assert group.host is not None
        tensors = {
            name: _map_dense(host, lambda t: torch.empty_like(t, device=self.device))
            for name, host in group.host.items()
        }
        if self._streams is None:
            _copy(tensors, group.host)
            self._prefetched[group] = (tensors, None)
            return
        stream = self._streams[0]
        stream.wait_stream(torch.cuda.current_stream(self.device))  # the memory may have been in use there
        for outgoing in self._outgoing:
            if outgoing.group is group:
                stream.wait_event(outgoing.copied)
        with torch.cuda.stream(stream):
            _copy(tensors, group.host)
        self._prefetched[group] = (tensors, stream.record_event())

    def _copy_out(self, group: TensorGroup, tensors: Tensors) -> None:
        assert group.host is not None
        if self._streams is None:
            _copy(group.host, tensors)
            return
        stream = self._streams[1]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            _copy(group.host, tensors)
        self._outgoing.append(_Outgoing(group, tensors, stream.record_event()))

    def _wait_for(self, arrived: torch.cuda.Event | None) -> None:
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)

    def _prefetch_within_budget(self) -> None:
        while self._outgoing and self._outgoing[0].copied.query():
            self._outgoing.popleft()
        while self._upcoming:
            group = self._upcoming[0]
            if group.host is not None and group not in self._prefetched and group not in self._in_use:
                if group.pending is not None and not group.pending.done():
                    return  # not waited for ahead of time
                self.wait_until_final(group)
                if self.bytes_in_flight + group.nbytes > self.budget:
                    return
                self._copy_in(group)
            self._upcoming.popleft()

    def _finish_oldest(self) -> None:
        self._outgoing.popleft().copied.synchronize()

    # -- host memory -----------------------------------------------------------------------------

    def _host_like(self, tensor: Tensor) -> Tensor:
        return _map_dense(tensor, self._dense_host_like)

    def _dense_host_like(self, tensor: Tensor) -> Tensor:
        if self._pinned is not None and tensor.numel():
            return self._pinned.empty_like(tensor)
        layout = torch.contiguous_format
        return host_tensor(lambda: torch.empty_like(tensor, device="cpu", memory_format=layout))


def _map_dense(tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `tensor` with every dense tensor inside it replaced by what `make` returns for it."""
    kind: Any = type(tensor)
    if not hasattr(kind, "__tensor_flatten__"):
        return make(tensor)
    names, context = kind.__tensor_flatten__(tensor)
    inner = {name: _map_dense(getattr(tensor, name), make) for name in names}
    return kind.__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())


def _fits(tensor: Tensor, place: Tensor | None) -> bool:
    """Return whether `tensor` can be copied into `place` as it is."""
    kinds = type(tensor), tensor.shape, tensor.dtype
    return place is not None and kinds == (type(place), place.shape, place.dtype)


@torch.no_grad()
def _copy(targets: Tensors, sources: Tensors) -> None:
    for name, target in targets.items():
        for there, here in zip(dense_parts(target), dense_parts(sources[name]), strict=True):
            there.copy_(here, non_blocking=True)
