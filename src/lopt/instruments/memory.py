"""Exact peak of live tensor bytes, counted storage by storage.

Every operator PyTorch dispatches passes through a watcher, which counts each storage once, from its
first appearance as an argument or a result until it is freed. Nothing is assumed about phases: a
backward inside a forward, recomputation and optimizer steps inside hooks are all counted alike.
Real tensors (any device) and fake tensors work, so a model too large for this machine can be
measured by its shapes alone: make it and call `peak_memory` under `FakeTensorMode()`.

Not counted: what is no dense or COO tensor, allocator rounding (512 bytes on CUDA), fragmentation,
library workspaces, and scratch memory inside one kernel or one compiled region.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import psutil
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import _python_dispatch as python_dispatch
from torch.utils._pytree import tree_leaves

__all__ = [
    "MemoryPeak",
    "MemoryTracker",
    "dense_parts",
    "format_bytes",
    "free_host_memory",
    "host_tensor",
    "in_host_memory",
    "peak_memory",
]


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

    Parameters, buffers, existing gradients and existing optimizer state are counted on entry. Other
    tensors made before entry count (as activations) from the first operator that uses them, so a
    module left out of `modules` shows up under activations. Each entry starts a new measurement.
    `peak` is the moment of the largest total; a storage that becomes a gradient or optimizer state
    after that moment is shown under its final category. After exit the numbers stay as they were.

    Args:
        modules: modules whose parameters and buffers count as parameters.
        optimizer: optimizer whose state counts as optimizer; a wrapper that holds the real one in
            `.optimizer`, as accelerate's does, is unwrapped.
        device: count only tensors on this device ("cuda", "cuda:1", "cpu"); None counts all.

    Raises RuntimeError if `device` names no device or the tracker is entered while active.
    """

    def __init__(
        self, *modules: nn.Module, optimizer: Optimizer | None = None, device: str | None = None
    ) -> None:
        self._modules = modules
        self._optimizer = _unwrap(optimizer)
        self._device = None if device is None else torch.device(device)
        self._ledger = _Ledger(self._device)
        self._watcher: _Watcher | None = None
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

    def reset_peak(self) -> None:
        """Start the peak anew from the bytes live now."""
        self._ledger.mark_peak()

    def __enter__(self) -> Self:
        if self._watcher is not None:
            raise RuntimeError("This MemoryTracker is already active; make a second one to nest.")
        self._ledger = _Ledger(self._device)
        self._watcher = _Watcher(self._ledger)
        self._classify_all()
        self._add_hooks()
        self._watcher.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._watcher is not None
        self._watcher.__exit__(*error)
        while self._undo:
            self._undo.pop()()
        self._classify_all()
        self._watcher = None
        self._ledger.entries.clear()  # with them the weak references: the totals now stay

    def _add_hooks(self) -> None:
        if self._optimizer is not None:
            before = self._optimizer.register_step_pre_hook(self._classify_all)
            after = self._optimizer.register_step_post_hook(self._classify_all)
            self._undo += [before.remove, after.remove]
        for parameter in (p for module in self._modules for p in module.parameters()):
            if parameter.requires_grad and parameter.is_leaf:
                # First in line: an optimizer that steps in such a hook frees the gradient there.
                # move_to_end would not do: PyTorch reads the plain dict below the OrderedDict.
                hooks: dict[Any, Any] = parameter._post_accumulate_grad_hooks or {}
                others = dict(hooks)
                hooks.clear()
                handle = parameter.register_post_accumulate_grad_hook(self._grad_ready)
                parameter._post_accumulate_grad_hooks.update(others)
                self._undo.append(handle.remove)
        self._undo.append(_watch_storage_resize(self._ledger.resize))

    def _grad_ready(self, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._ledger.classify(parameter.grad, "gradients")

    def _classify_all(self, *_: Any) -> None:
        """Sort every reachable storage anew: `.data` and `.grad` may be assigned without an op."""
        if self._watcher is None:
            return
        if self._optimizer is not None:
            for leaf in tree_leaves(list(self._optimizer.state.values())):
                if isinstance(leaf, torch.Tensor):
                    self._ledger.classify(leaf, "optimizer")
        for module in self._modules:
            for parameter in module.parameters():
                self._ledger.classify(parameter, "parameters")
                self._grad_ready(parameter)
            for buffer in module.buffers():
                self._ledger.classify(buffer, "parameters")


def host_tensor(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A tensor, made by `make`, that counts as host memory: on a CPU it and the device are one."""
    global _making_host
    _making_host = True
    try:
        tensor = make()
    finally:
        _making_host = False
    for part in dense_parts(tensor):
        storage = part.untyped_storage()
        _HOST[storage._cdata] = weakref.ref(storage, partial(_forget_host, storage._cdata))
    return tensor


def in_host_memory(tensor: torch.Tensor) -> bool:
    """Whether `tensor` lies in what `host_tensor` made."""
    return all(part.untyped_storage()._cdata in _HOST for part in dense_parts(tensor))


_HOST: dict[int, weakref.ref[torch.UntypedStorage]] = {}
_making_host = False


def _forget_host(key: int, _: object) -> None:
    _HOST.pop(key, None)


def peak_memory(
    function: Callable[[], object],
    *modules: nn.Module,
    optimizer: Optimizer | None = None,
    device: str | None = None,
) -> MemoryPeak:
    """Call `function` once; the peak of live tensor bytes meanwhile. Args: see `MemoryTracker`."""
    with MemoryTracker(*modules, optimizer=optimizer, device=device) as tracker:
        function()
    return tracker.peak


def format_bytes(n: int) -> str:
    """Bytes in binary units with one decimal, such as "28.8 GiB"; below 1 KiB as "512 B"."""
    if n < 1024:
        return f"{n} B"
    size = n / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if size < 1023.95:  # what would print as 1024.0 goes to the next unit
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def free_host_memory() -> int:
    """Bytes of host memory that this process may still use: the machine's, or its control group's if less."""
    free = psutil.virtual_memory().available
    try:
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            free = min(free, int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        pass
    return free


@dataclass(slots=True)
class _Entry:
    nbytes: int
    category: str
    birth: int  # ledger clock when these bytes came to life
    reference: weakref.ref[torch.UntypedStorage]


class _Ledger:
    """Running totals per category over live storages, and a copy of them at the peak.

    PyTorch keeps one Python object per storage for as long as the storage lives, also while only
    C++ (autograd) holds it, so a weak reference to it dies exactly when the bytes are freed.
    A free can interrupt any method here (garbage collection): no total is held across a call.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.live = dict.fromkeys(("parameters", "gradients", "optimizer", "activations", "host"), 0)
        self.peak = dict(self.live)
        self._device = device
        self.entries: dict[int, _Entry] = {}
        self._total = self._peak_total = 0
        self._clock = self._peak_clock = 0

    def see(self, value: object) -> None:
        """Count the storages of a tensor or of a nested list or tuple of tensors."""
        if isinstance(value, torch.Tensor):
            for tensor in dense_parts(value):
                self._entry(tensor)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.see(item)

    def classify(self, tensor: torch.Tensor, category: str) -> None:
        """Count `tensor` under `category`, in the peak too if it was already live then."""
        for part in dense_parts(tensor):
            entry = self._entry(part)
            if entry is None or entry.category in (category, "host"):
                continue
            live_at_peak = entry.birth <= self._peak_clock
            for totals in (self.live, self.peak) if live_at_peak else (self.live,):
                totals[entry.category] -= entry.nbytes
                totals[category] += entry.nbytes
            entry.category = category

    def resize(self, storage: torch.UntypedStorage) -> None:
        """Take up the new size of a storage, if it is counted."""
        if (entry := self.entries.get(storage._cdata)) is not None:
            self._update(entry, storage.nbytes())

    def mark_peak(self) -> None:
        """Make the present totals the peak."""
        self.peak = dict(self.live)
        self._peak_total, self._peak_clock = self._total, self._clock

    def _entry(self, tensor: torch.Tensor) -> _Entry | None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (entry := self.entries.get(key)) is None:
            want, device = self._device, tensor.device  # a fake tensor's storage is on "meta"
            if want and (device.type != want.type or want.index not in (None, device.index)):
                return None
            category = "host" if _making_host or key in _HOST else "activations"
            entry = _Entry(0, category, 0, weakref.ref(storage, partial(self._free, key)))
            self.entries[key] = entry
        if entry.nbytes != (nbytes := storage.nbytes()):
            self._update(entry, nbytes)
        return entry

    def _update(self, entry: _Entry, nbytes: int) -> None:
        change = nbytes - entry.nbytes
        self._clock += 1
        entry.birth, entry.nbytes = self._clock, nbytes
        self.live[entry.category] += change
        if entry.category != "host":
            self._total += change
        if self._total > self._peak_total:
            self.mark_peak()

    def _free(self, key: int, _: object) -> None:
        entry = self.entries.pop(key)
        self.live[entry.category] -= entry.nbytes
        if entry.category != "host":
            self._total -= entry.nbytes


class _Watcher(python_dispatch.TorchDispatchMode):
    """Shows the ledger every argument and result of every operator."""

    supports_higher_order_operators = True

    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()
        self._ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(python_dispatch.is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # the subclass runs next, and its inner operators come here
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and isinstance(func, torch._ops.OpOverload):
            # Without autograd, composite operators arrive whole: look at the parts.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._ledger.see((args, tuple(kwargs.values())))
        result = func(*args, **kwargs)
        self._ledger.see(result)
        return result


def dense_parts(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """The tensors with a storage inside `tensor`: itself, or what a subclass or layout wraps."""
    if python_dispatch.is_traceable_wrapper_subclass(tensor):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [d for t in inner if isinstance(t, torch.Tensor) for d in dense_parts(t)]
    if tensor.layout is torch.sparse_coo:
        return (tensor._indices(), tensor._values())
    return (tensor,) if tensor.layout is torch.strided else ()


def _unwrap(optimizer: Optimizer | None) -> Optimizer | None:
    inner = getattr(optimizer, "optimizer", None)
    return _unwrap(inner) if isinstance(inner, Optimizer) else optimizer


def _watch_storage_resize(notify: Callable[[torch.UntypedStorage], None]) -> Callable[[], object]:
    """Report direct `storage.resize_` calls, which no operator shows; returns the undo."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> object:
        result = original(storage, size)
        notify(storage)
        return result

    setattr(torch.UntypedStorage, "resize_", resize_)  # noqa: B010
    return lambda: setattr(torch.UntypedStorage, "resize_", original)
