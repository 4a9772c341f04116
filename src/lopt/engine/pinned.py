"""Pinned host memory: pages that a GPU copies from and to by itself, beside the computation."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from lopt.instruments.memory import format_bytes, host_tensor


class PinnedMemory:
    """Makes host tensors whose pages are pinned for as long as anybody holds them.

    Each has pages of its own: PyTorch's pinned allocator rounds up to a power of two, and two tensors that
    share a page cannot both be pinned.
    """

    def __init__(self) -> None:
        self._pinned: list[weakref.finalize] = []

    @property
    def nbytes(self) -> int:
        """Bytes that are pinned now."""
        self._pinned = [pages for pages in self._pinned if pages.alive]
        return sum(found[2][1] for pages in self._pinned if (found := pages.peek()) is not None)

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the shape and dtype of `tensor`, contiguous, with any values.

        Raises:
            ValueError: the driver refuses to pin so much.
        """
        pages = _new_pages(tensor.nbytes)
        flat = host_tensor(lambda: torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel()))
        flat.zero_()  # by all threads: the driver would touch the pages by one, at 1.5 to 2.5 GiB a second
        error = _register(flat.data_ptr(), flat.nbytes)
        if error:
            gc.collect()  # a trainer that nobody uses any more holds its memory until then
            error = _register(flat.data_ptr(), flat.nbytes)
        if error:
            raise ValueError(
                f"`offload`: the driver refuses to pin {format_bytes(flat.nbytes)} of host memory beside the "
                f"{format_bytes(self.nbytes)} of this trainer (error {error}): raise the limit on locked "
                "memory (ulimit -l), or let go of other trainers of this process"
            )
        unpin = weakref.finalize(pages, _unregister, flat.data_ptr(), flat.nbytes, os.getpid())
        unpin.atexit = False  # the system takes back all memory of a process that ends
        self._pinned.append(unpin)
        return flat.view(tensor.shape)

    def close(self) -> None:
        """Unpin all of it; the tensors keep their values."""
        for unpin in self._pinned:
            unpin()
        self._pinned = []


def _new_pages(nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """Return memory of its own, as an array: a map's pages are gone before its finalizer is called."""
    if sys.platform == "win32":
        memory = mmap.mmap(-1, nbytes)
    else:
        # Private pages are pinned almost twice as fast as shared ones. A forked child has none of them, or
        # its parent's first write would move them away from those that are pinned.
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform == "linux":
            memory.madvise(mmap.MADV_DONTFORK)
    return (ctypes.c_char * nbytes).from_buffer(memory)


def _register(address: int, nbytes: int) -> int:
    """Pin pages and return 0, or the driver's error code."""
    error = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
    if error:
        _clear_error()
    return error


def _unregister(address: int, nbytes: int, process: int) -> None:
    """Unpin pages; a copy that is still on its way ends first. A forked child leaves them to its parent."""
    if os.getpid() != process:
        return
    torch.cuda.synchronize()
    if int(torch.cuda.cudart().cudaHostUnregister(address)):
        _clear_error()


def _clear_error() -> None:
    with suppress(RuntimeError):  # the next kernel reports it once more, and that clears it
        torch.zeros(1, device="cuda")
