"""Exact peak of live tensor bytes, counted storage by storage.

Every operator that PyTorch dispatches passes through a hook, which counts each storage once, from its
first appearance as an argument or a result until it is freed. Nothing is assumed about phases: a
backward inside a forward, recomputation and optimizer steps inside hooks are all counted alike.
Real tensors (any device) and fake tensors work, so a model too large for this machine can be
measured by its shapes alone: make it and call `peak_memory` under `FakeTensorMode()`.

Not counted: what is no dense or COO tensor, allocator rounding (512 bytes on CUDA), fragmentation,
library workspaces, and scratch memory inside one kernel or one compiled region.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import psutil
import torch
from torch import Tensor, UntypedStorage, nn
from torch.optim import Optimizer

from lopt import compat


@dataclass(frozen=True)
class MemoryPeak:
    """Live tensor bytes at one moment, split by what they hold."""

    parameters: int  # parameters and buffers of the tracked modules
    gradients: int  # storages that are, or were, the .grad of a tracked parameter
    optimizer: int  # tensors in the optimizer's state, step counters included
    activations: int  # all else: activations, their gradients, temporaries, inputs
    host: int = 0  # made by `host_tensor`: not on the device, so not in the total

    @property
    def total(self) -> int:
        """Sum of the categories on the device, in bytes."""
        return self.parameters + self.gradients + self.optimizer + self.activations


class MemoryTracker:
    """Context manager that counts the bytes of live tensor storages and keeps their peak.

    Parameters, buffers, existing gradients, existing optimizer state and host memory are counted on entry.
    Other tensors made before entry count (as activations) from the first operator that uses them, so a
    module left out of `modules` shows up under activations. Each entry starts a new measurement.
    `peak` is the moment of the largest total; a storage that becomes a gradient or optimizer state
    after that moment is shown under its final category. After exit the numbers stay as they were.

    Args:
        modules: modules whose parameters and buffers count as parameters.
        optimizer: optimizer whose state counts as optimizer, possibly wrapped (`unwrap_optimizer`).
        device: count only tensors on this device ("cuda", "cuda:1", "cpu"); None counts all.
        goes_on: a later entry goes on with the measurement of those before, with all that is still live.

    Raises:
        RuntimeError: `device` names no device, or the tracker is entered while active.
    """

    def __init__(
        self,
        *modules: nn.Module,
        optimizer: Optimizer | None = None,
        device: str | None = None,
        goes_on: bool = False,
    ) -> None:
        self._modules = modules
        self._optimizer = unwrap_optimizer(optimizer)
        self._device = None if device is None else torch.device(device)
        self._goes_on = goes_on
        self._ledger = _Ledger(self._device)
        self._hook: Any = None  # while active
        self._thread = 0  # that is measured
        self._undo: list[Callable[[], object]] = []

    @property
    def peak(self) -> MemoryPeak:
        """Bytes at the moment of the largest total since entry or `reset_peak`."""
        self._classify_all()
        return MemoryPeak(**self._ledger.peak)

    @property
    def current(self) -> MemoryPeak:
        """Bytes live now (after exit: at exit)."""
        self._classify_all()
        return MemoryPeak(**self._ledger.live)

    @property
    def host_peak(self) -> int:
        """Bytes of host memory at the moment of its own largest total, since entry or `reset_peak`."""
        return self._ledger.host_peak

    def reset_peak(self) -> None:
        """Start the peaks anew from the bytes live now."""
        self._ledger.mark_peak()
        self._ledger.host_peak = self._ledger.live["host"]

    def __enter__(self) -> Self:
        if self._hook is not None:
            raise RuntimeError("this MemoryTracker is already active: make a second one to nest them")
        if not self._goes_on:
            self._ledger = _Ledger(self._device)
        self._hook = compat.operator_hook(self._dispatch)
        self._thread = threading.get_ident()
        with _host_step:
            for storage in list(_host_storages):
                self._ledger.count_host(storage)
            self._classify_all()
            if self._optimizer is not None:
                self._undo.append(self._optimizer.register_step_pre_hook(self._around_step).remove)
                self._undo.append(self._optimizer.register_step_post_hook(self._around_step).remove)
        for parameter in (p for module in self._modules for p in module.parameters()):
            if parameter.requires_grad and parameter.is_leaf:
                # An optimizer that steps in such a hook of its own frees the gradient there.
                self._undo.append(compat.hook_gradient_first(parameter, self._gradient_ready).remove)
        self._undo.append(compat.watch_storage_resize(self._ledger.resize))
        self._hook.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.__exit__(*error)
        with _host_step:
            while self._undo:
                self._undo.pop()()
            self._classify_all()
            self._hook = None
        if not self._goes_on:
            self._ledger.entries.clear()  # with them the weak references: the totals now stay

    def _dispatch(self, operator: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # the subclass runs next, and its inner operators come here
        if torch.is_inference_mode_enabled() and hasattr(operator, "decompose"):
            # Without autograd, composite operators arrive whole: count their parts.
            with self._hook:
                result = operator.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._ledger.count((args, kwargs))
        result = operator(*args, **kwargs)
        self._ledger.count(result)
        return result

    def _gradient_ready(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._ledger.classify(parameter.grad, "gradients")

    def _classify_all(self, *_: Any) -> None:
        """Sort every reachable storage anew: `.data` and `.grad` may be assigned without an operator."""
        if self._hook is None:
            return
        self._classify_state()
        for module in self._modules:
            for parameter in module.parameters():
                self._ledger.classify(parameter, "parameters")
                self._gradient_ready(parameter)
            for buffer in module.buffers():
                self._ledger.classify(buffer, "parameters")

    def _classify_state(self) -> None:
        if self._optimizer is not None:
            with _host_step:
                for tensor in _tensors(self._optimizer.state):
                    self._ledger.classify(tensor, "optimizer")

    def _around_step(self, *_: Any) -> None:
        """Look at all in the measured thread, and in that of a host optimizer at what this changes."""
        if threading.get_ident() == self._thread:
            self._classify_all()
        else:
            self._classify_state()


def peak_memory(
    function: Callable[[], object],
    *modules: nn.Module,
    optimizer: Optimizer | None = None,
    device: str | None = None,
) -> MemoryPeak:
    """Call `function` once and return the peak of live tensor bytes; arguments as for `MemoryTracker`."""
    with MemoryTracker(*modules, optimizer=optimizer, device=device) as tracker:
        function()
    return tracker.peak


def unwrap_optimizer(optimizer: Any, keep: type[Optimizer] | tuple[()] = ()) -> Any:
    """Return the optimizer inside wrappers that hold it in `.optimizer`, as accelerate's does.

    Args:
        optimizer: an optimizer, wrapped any number of times, or None.
        keep: a kind of wrapper to stop at, such as `lopt.engine.optimizer.BlockOptimizer`.
    """
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(optimizer, keep) or not isinstance(inner, Optimizer):
        return optimizer
    return unwrap_optimizer(inner, keep)


# -- host memory -------------------------------------------------------------------------------------

# On a CPU the device and the host share one memory, so what stands for host memory has to be marked.
_host_storages: weakref.WeakSet[UntypedStorage] = weakref.WeakSet()
_this_thread = threading.local()
_host_step = threading.RLock()  # held while an optimizer's state changes in a thread beside the measured one


@contextmanager
def counted_as_host() -> Iterator[None]:
    """Within, what this thread makes is counted by every tracker as host memory."""
    before = getattr(_this_thread, "on_host", False)
    _this_thread.on_host = True
    try:
        yield
    finally:
        _this_thread.on_host = before


@contextmanager
def host_step() -> Iterator[None]:
    """Within, this thread steps an optimizer in host memory: no tracker in another looks at its state."""
    with _host_step, counted_as_host():
        yield


def host_tensor(make: Callable[[], Tensor]) -> Tensor:
    """Return what `make` makes, counted by every tracker as host memory from the first moment on."""
    with counted_as_host():
        tensor = make()
    count_as_host([tensor])
    return tensor


def count_as_host(tensors: Iterable[Tensor]) -> None:
    """Count tensors of the CPU as host memory from now on, as what `host_tensor` made."""
    _host_storages.update(part.untyped_storage() for tensor in tensors for part in dense_parts(tensor))


def in_host_memory(tensor: Tensor) -> bool:
    """Return whether `tensor` counts as host memory, which is what `host_tensor` made."""
    return all(part.untyped_storage() in _host_storages for part in dense_parts(tensor))


HOST = torch.device("cpu")


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on `device`.

    On a CPU those of the machine, or of its control group if less; several processes share them.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = psutil.virtual_memory().available
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        pass
    return free


def used_memory(device: torch.device) -> int:
    """Return the bytes that this process has in use on `device`; on a CPU all that it has in memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def format_bytes(n: int) -> str:
    """Return bytes in binary units with one decimal, such as "28.8 GiB"; below 1 KiB as "512 B"."""
    if n < 1024:
        return f"{n} B"
    size = n / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if size < 1023.95:  # what would print as 1024.0 goes to the next unit
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


# -- counting ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Entry:
    nbytes: int
    category: str
    birth: int  # ledger clock when these bytes came to life
    reference: weakref.ref[UntypedStorage]


class _Ledger:
    """Running totals per category over live storages, and a copy of them at the peak.

    PyTorch keeps one Python object per storage for as long as the storage lives, also while only
    C++ (autograd) holds it, so its id names the storage and a weak reference to it dies exactly when
    the bytes are freed. A free can interrupt any method here (garbage collection): no total is held
    across a call. Other threads free as well, and a host optimizer's counts its state.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.live = dict.fromkeys(("parameters", "gradients", "optimizer", "activations", "host"), 0)
        self.peak = dict(self.live)
        self.host_peak = 0
        self.entries: dict[int, _Entry] = {}
        self._device = device
        self._lock = threading.RLock()
        self._peak_total = self._clock = self._peak_clock = 0

    def count(self, value: object) -> None:
        """Count the storages of the tensors in `value`, which may be nested."""
        for tensor in _tensors(value):
            for part in dense_parts(tensor):
                self._entry(part)

    def count_host(self, storage: UntypedStorage) -> None:
        """Count a storage in host memory."""
        self._entry_of(storage, HOST)

    def classify(self, tensor: Tensor, category: str) -> None:
        """Count `tensor` under `category`, in the peak too if it was already live then."""
        for part in dense_parts(tensor):
            with self._lock:
                entry = self._entry(part)
                if entry is None or entry.category in (category, "host"):
                    continue
                live_at_peak = entry.birth <= self._peak_clock
                for totals in (self.live, self.peak) if live_at_peak else (self.live,):
                    totals[entry.category] -= entry.nbytes
                    totals[category] += entry.nbytes
                entry.category = category

    def resize(self, storage: UntypedStorage) -> None:
        """Take up the new size of a storage, if it is counted."""
        with self._lock:
            if (entry := self.entries.get(id(storage))) is not None:
                self._update(entry, storage.nbytes())

    def mark_peak(self) -> None:
        """Make the present totals the peak."""
        with self._lock:
            self.peak = dict(self.live)
            self._peak_total, self._peak_clock = self._total(), self._clock

    def _total(self) -> int:
        return sum(self.live.values()) - self.live["host"]

    def _entry(self, tensor: Tensor) -> _Entry | None:
        return self._entry_of(tensor.untyped_storage(), tensor.device)  # a fake tensor's storage is on "meta"

    def _entry_of(self, storage: UntypedStorage, device: torch.device) -> _Entry | None:
        with self._lock:
            if (entry := self.entries.get(id(storage))) is None:
                want = self._device
                if want and (device.type != want.type or want.index not in (None, device.index)):
                    return None
                on_host = getattr(_this_thread, "on_host", False) or storage in _host_storages
                gone = weakref.ref(storage, partial(self._free, id(storage)))
                entry = self.entries[id(storage)] = _Entry(0, "host" if on_host else "activations", 0, gone)
            if entry.nbytes != (nbytes := storage.nbytes()):
                self._update(entry, nbytes)
            return entry

    def _update(self, entry: _Entry, nbytes: int) -> None:
        change = nbytes - entry.nbytes
        self._clock += 1
        entry.birth, entry.nbytes = self._clock, nbytes
        self.live[entry.category] += change
        self.host_peak = max(self.host_peak, self.live["host"])
        if self._total() > self._peak_total:
            self.mark_peak()

    def _free(self, key: int, _: object) -> None:
        with self._lock:
            entry = self.entries.pop(key)
            self.live[entry.category] -= entry.nbytes


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def dense_parts(tensor: Tensor) -> Iterable[Tensor]:
    """Return the tensors with a storage inside `tensor`: itself, or what a subclass or layout wraps."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [d for t in inner if isinstance(t, Tensor) for d in dense_parts(t)]
    if tensor.layout is torch.sparse_coo:
        return compat.sparse_parts(tensor)
    return (tensor,) if tensor.layout is torch.strided else ()
