"""Random numbers of a micro-batch (dropout), the same in every schedule.

Each micro-batch draws from a state of its own, seeded by its place in the run. So its stages can run far
apart, and be recomputed, with the numbers that one forward through the whole model would draw.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RandomState = tuple[Tensor, Tensor | None]
"""The state of the CPU's generator and of the GPU's, if the model is on one."""


def micro_batch_seed(seed: int, step: int, slot: int, rank: int = 0) -> int:
    """Return the seed of micro-batch `slot` of optimizer step `step` on process `rank`."""
    return zlib.crc32(f"{seed} {step} {slot} {rank}".encode())


def random_state(device: torch.device) -> RandomState:
    """Return the present state of the generators that a computation on `device` draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(device: torch.device, state: RandomState | int) -> None:
    """Set those generators to a state, or seed them."""
    if isinstance(state, int):
        torch.default_generator.manual_seed(state)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(state)
        return
    cpu, gpu = state
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu, device)


@contextmanager
def random_numbers(device: torch.device, state: RandomState | int) -> Iterator[None]:
    """Within, generators are in `state`, or seeded by it; afterwards they are as they were."""
    before = random_state(device)
    set_random_state(device, state)
    try:
        yield
    finally:
        set_random_state(device, before)
