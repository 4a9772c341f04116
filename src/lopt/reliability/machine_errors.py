"""Errors of the machine, recognized and explained in one line: no memory left, a worker that died."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lopt.compat import while_waiting_for_a_worker
from lopt.instruments.memory import dense_parts, format_bytes, free_memory, used_memory

if TYPE_CHECKING:
    from lopt.reliability.advice import Attempt

HOST_ADVICE = (
    "What helps: `param_dtype` bfloat16, fewer `dataloader_num_workers`, fewer processes on this machine, "
    "`streaming`, less of `offload`"
)


class OutOfMemory(ValueError):
    """The device or the host has no memory left; the message says where, what was in use, what would fit."""


class WorkerDied(ValueError):
    """A process that loads data was killed or failed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is about memory, of a GPU or of the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("can't allocate memory", "not enough memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def full_device(error: BaseException, device: torch.device) -> torch.device:
    """Return whose memory is full: that of `device` or, on a GPU as well, that of the host."""
    host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    return torch.device("cpu") if host else device


@contextmanager
def memory_errors_explained(
    phase: str, device: torch.device, attempt: Callable[[], Attempt]
) -> Iterator[None]:
    """Explain an out-of-memory error where there is no trainer yet.

    Args:
        phase: what is being done, for the message.
        device: where the model is going to be trained.
        attempt: returns the run that did not fit.

    Raises:
        OutOfMemory: there is no memory left.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        from lopt.reliability.advice import advice

        full = full_device(error, device)
        used = memory_in_use(full)
        clear_frames(error.__traceback__)
        helps = advice(attempt) if full == device else HOST_ADVICE
        raise OutOfMemory(f"out of memory in {phase}: {used}; {helps}") from error


def worker_error(error: BaseException) -> str | None:
    """Return what happened to a data-loader worker, or None if `error` is about something else."""
    text = str(error)
    if isinstance(error, (EOFError, ConnectionError, FileNotFoundError)) and while_waiting_for_a_worker(
        error
    ):
        text = "DataLoader worker (pid ?) exited"  # while it was handing over a batch
    if killed := re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ?]+)\) (.+)", text):
        by = re.search(r"killed by signal: ([^.]+)", killed[2])
        how = f"was killed ({by[1].strip()})" if by else "exited"
        process = "" if killed[1] == "?" else f" (process {killed[1]})"
        return (
            f"a data-loader worker{process} {how}: most likely host memory or shared memory "
            "(/dev/shm) ran out; lower `dataloader_num_workers`, 0 loads in the training process"
        )
    if caught := re.search(r"Caught (\w+) in DataLoader worker process (\d+)", text):
        last = [line for line in text.splitlines() if line.strip()][-1].strip()
        return (
            f"data-loader worker {caught[2]} failed with {last}; `dataloader_num_workers` 0 and "
            "LOPT_DEBUG=1 show where"
        )
    return None


def ignore_children() -> Callable[[], object]:
    """Remove torch's handler of SIGCHLD, which would raise a worker's error again wherever the program is.

    Returns:
        What puts it back.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        return lambda: None
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if handler is None:  # it was not installed from Python and cannot be put back
        return lambda: None
    return lambda: signal.signal(signal.SIGCHLD, handler)


def held_bytes(tensors: Iterable[Tensor | None], device: torch.device) -> int:
    """Return the bytes of the storages of `tensors` on `device`, each counted once."""
    parts = [part for tensor in tensors if tensor is not None for part in dense_parts(tensor)]
    storages = [part.untyped_storage() for part in parts if part.device.type == device.type]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def memory_in_use(device: torch.device, model: Any = None, optimizer: Any = None) -> str:
    """Return where the memory of `device` went, in words."""
    parts = {}
    if model is not None:
        weights = list(model.parameters())
        states = [] if optimizer is None else list(optimizer.state.values())
        found = {
            "weights": [*weights, *model.buffers()],
            "gradients": [weight.grad for weight in weights],
            "optimizer state": [t for state in states for t in state.values() if isinstance(t, Tensor)],
        }
        parts = {name: held_bytes(tensors, device) for name, tensors in found.items()}
    used = used_memory(device)
    if device.type == "cuda":
        owner = f"the GPU has {format_bytes(torch.cuda.mem_get_info(device)[1])}"
    else:
        owner = f"the machine has {format_bytes(free_memory(device) + used)} for this process"
    if parts:
        parts["activations and libraries"] = max(0, used - sum(parts.values()))
    shares = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    return f"{owner}, {format_bytes(used)} were in use" + (f" ({shares})" if shares else "")
