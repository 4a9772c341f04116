"""What waits between the stages: of each micro-batch a stage's input, later the gradient of it."""

from __future__ import annotations

import torch
from torch import Tensor

from lopt.instruments.memory import host_tensor


class Stash:
    """Tensors by (stage, micro-batch), on the device or in host memory.

    Args:
        device: Where the model computes.
        on_host: Keep them in host memory: on a GPU pinned, and copied on the computation's own stream.
    """

    def __init__(self, device: torch.device, on_host: bool) -> None:
        self._device = device
        self._on_host = on_host
        self._kept: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(tensor.nbytes for tensor in self._kept.values())

    def put(self, stage: int, slot: int, value: Tensor) -> None:
        """Keep `value` (B, T, H); a host tensor of its shape in the same place is used again."""
        value = value.detach()
        if self._on_host:
            place = self._kept.get((stage, slot))
            if place is None or place.shape != value.shape or place.dtype != value.dtype:
                pinned = self._device.type == "cuda"
                place = host_tensor(lambda: torch.empty_like(value, device="cpu", pin_memory=pinned))
            value = place.copy_(value, non_blocking=True)
        self._kept[stage, slot] = value

    def get(self, stage: int, slot: int) -> Tensor:
        """Return what is kept, on the device."""
        value = self._kept[stage, slot]
        return value.to(self._device, non_blocking=True, copy=True) if self._on_host else value.detach()

    def drop(self, stage: int, slot: int) -> None:
        """Keep it no longer; unknown places are ignored."""
        self._kept.pop((stage, slot), None)

    def clear(self) -> None:
        """Keep nothing, after an error."""
        self._kept.clear()
