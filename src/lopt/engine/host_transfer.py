"""Tensors between host memory and the device, beside the computation.

`Cargo` are tensors that travel together: the weights of a layer, the optimizer state of a few
parameters. The `Conveyor` brings a cargo in before it is used and takes it out afterwards, on streams
of their own beside the computation, and fetches what comes next ahead of time as far as a budget of
device memory goes. A cargo that is out lies in host memory, pinned where the device is a GPU, and
that copy is what its owner holds: whoever reads or writes it there sees and changes the real thing.

On a CPU the same code runs, and the copies are real, at once and in order.
"""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _python_dispatch as python_dispatch

from lopt.instruments.memory import dense_parts, host_tensor


class Cargo:
    """Tensors that travel together.

    Args:
        get: the tensors, where their owner holds them now, always in the same order.
        put: hands the owner other tensors of the same shapes in their place.
    """

    def __init__(self, get: Callable[[], list[Tensor]], put: Callable[[list[Tensor]], None]) -> None:
        self.get = get
        self.put = put
        self.host: list[Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device; 0 if it has never been in host memory."""
        return sum(part.nbytes for tensor in self.host or () for part in dense_parts(tensor))


@dataclass
class _Leaving:
    cargo: Cargo
    device: list[Tensor]
    done: torch.cuda.Event


class Conveyor:
    """Moves cargo between host memory and one device.

    Args:
        device: where cargo is used.
        ahead: bytes of device memory for cargo on its way in or out. What is needed at once comes in
            whatever its size.
    """

    def __init__(self, device: torch.device, ahead: int) -> None:
        self.device = device
        self.ahead = ahead
        self._upcoming: deque[Cargo] = deque()
        self._fetched: dict[Cargo, tuple[list[Tensor], torch.cuda.Event | None]] = {}
        self._used: set[Cargo] = set()
        self._leaving: deque[_Leaving] = deque()
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if self._on_gpu else None
        self._pinned: list[Tensor] = []

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def store(self, cargo: Cargo) -> None:
        """Put a new cargo into host memory."""
        cargo.host = []
        tensors = cargo.get()
        for position, tensor in enumerate(tensors):  # one by one, so that host memory is not held twice
            cargo.host.append(self._host_like(tensor))
            _copy(cargo.host[-1], tensor)
            tensors[position] = cargo.host[-1]
            cargo.put(tensors)

    def expect(self, cargo: Iterable[Cargo]) -> None:
        """What will be taken next, in this order."""
        self._upcoming.extend(cargo)
        self._fetch_ahead()

    def take(self, cargo: Cargo) -> None:
        """Put `cargo` on the device, for what runs there from now on, and fetch ahead."""
        if cargo.host is None or cargo in self._used:
            return
        if cargo not in self._fetched:
            self._make_room(cargo.nbytes)
            self._fetch(cargo)
        tensors, arrived = self._fetched.pop(cargo)
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
        cargo.put(tensors)
        self._used.add(cargo)
        self._fetch_ahead()

    def give_back(self, cargo: Cargo, changed: bool = True) -> None:
        """Take `cargo` off the device; unless it is unchanged, its values go out first."""
        if cargo.host is None:
            tensors = cargo.get()
            cargo.host = [self._host_like(tensor) for tensor in tensors]
        elif cargo in self._used:
            tensors = cargo.get()
            self._used.remove(cargo)
        else:
            return
        if changed:
            self._send(cargo, tensors)
        cargo.put(cargo.host)
        self._fetch_ahead()

    def settle(self) -> None:
        """Until all that leaves has arrived in host memory and nothing is fetched ahead."""
        while self._leaving:
            self._finish_oldest()
        for cargo in list(self._fetched):
            self._drop(cargo)
        self._upcoming.clear()

    def forget(self, cargo: Cargo) -> None:
        """The owner has got other tensors, on the host: store those."""
        self.settle()
        self._used.discard(cargo)
        cargo.host = None
        if cargo.get():
            self.store(cargo)

    # -- copies ----------------------------------------------------------------------------------

    def _fetch(self, cargo: Cargo) -> None:
        assert cargo.host is not None
        tensors = [_map_dense(host, lambda t: torch.empty_like(t, device=self.device)) for host in cargo.host]
        if self._streams is None:
            _copy_all(tensors, cargo.host)
            self._fetched[cargo] = (tensors, None)
            return
        stream = self._streams[0]
        stream.wait_stream(torch.cuda.current_stream(self.device))  # which the memory may have been in use by
        for leaving in self._leaving:
            if leaving.cargo is cargo:
                stream.wait_event(leaving.done)
        with torch.cuda.stream(stream):
            _copy_all(tensors, cargo.host)
        self._fetched[cargo] = (tensors, stream.record_event())

    def _send(self, cargo: Cargo, tensors: list[Tensor]) -> None:
        assert cargo.host is not None
        if self._streams is None:
            _copy_all(cargo.host, tensors)
            return
        stream = self._streams[1]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            _copy_all(cargo.host, tensors)
        self._leaving.append(_Leaving(cargo, tensors, stream.record_event()))

    def _drop(self, cargo: Cargo) -> None:
        _, arrived = self._fetched.pop(cargo)
        if arrived is not None:  # its memory is free for use when it is there, not before
            torch.cuda.current_stream(self.device).wait_event(arrived)

    # -- the budget ------------------------------------------------------------------------------

    @property
    def on_the_way(self) -> int:
        """Bytes of device memory of what is fetched ahead or leaving."""
        return sum(c.nbytes for c in self._fetched) + sum(leaving.cargo.nbytes for leaving in self._leaving)

    def _fetch_ahead(self) -> None:
        while self._leaving and self._leaving[0].done.query():
            self._leaving.popleft()
        while self._upcoming:
            cargo = self._upcoming[0]
            if cargo.host is not None and cargo not in self._fetched and cargo not in self._used:
                if self.on_the_way + cargo.nbytes > self.ahead:
                    return
                self._fetch(cargo)
            self._upcoming.popleft()

    def _make_room(self, nbytes: int) -> None:
        while self._leaving and self.on_the_way + nbytes > self.ahead:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        self._leaving.popleft().done.synchronize()

    # -- host memory -----------------------------------------------------------------------------

    def _host_like(self, tensor: Tensor) -> Tensor:
        return _map_dense(tensor, self._dense_host_like)

    def _dense_host_like(self, tensor: Tensor) -> Tensor:
        if not self._on_gpu or not tensor.numel():
            layout = torch.contiguous_format
            return host_tensor(lambda: torch.empty_like(tensor, device="cpu", memory_format=layout))
        # Pages of its own: PyTorch's pinned allocator rounds up to a power of two, and two tensors
        # that share a page cannot both be pinned.
        pages = mmap.mmap(-1, tensor.nbytes)
        flat = host_tensor(lambda: torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel()))
        error = torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0)
        if int(error):
            raise ValueError(
                f"--offload: the driver refuses to pin {flat.nbytes} bytes of host memory ({error}): "
                "raise the limit on locked memory (ulimit -l)"
            )
        self._pinned.append(flat)
        return flat.view(tensor.shape)

    def close(self) -> None:
        """Unpin the host memory; its values stay."""
        self.settle()
        for tensor in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
        self._pinned.clear()


def _map_dense(tensor: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """`tensor` made anew out of other dense tensors."""
    if not python_dispatch.is_traceable_wrapper_subclass(tensor):
        return make(tensor)
    names, context = tensor.__tensor_flatten__()
    inner = {name: _map_dense(getattr(tensor, name), make) for name in names}
    return type(tensor).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())


@torch.no_grad()
def _copy(target: Tensor, source: Tensor) -> None:
    for there, here in zip(dense_parts(target), dense_parts(source), strict=True):
        there.copy_(here, non_blocking=True)


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        _copy(target, source)
