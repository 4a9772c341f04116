"""Host memory that the parts of a step use one after the other."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """float32 copies of bfloat16 values in host memory, at the same place for every part.

    With new memory for each of them a step takes twice as long: the system makes its pages one by one.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._used = 0

    def begin(self, numbers: int) -> None:
        """Make room for so many numbers in all; what was here before is overwritten."""
        self._used = 0
        if len(self._memory) < numbers:
            self._memory = torch.empty(0)  # let go of it before there is more
            self._memory = torch.empty(numbers)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether the values of `tensor` are here, and will be overwritten."""
        same = type(tensor) is Tensor and tensor.device == self._memory.device
        return same and tensor.untyped_storage().data_ptr() == self._memory.untyped_storage().data_ptr()

    def widened(self, tensor: Tensor) -> Tensor:
        """Return `tensor` in float32."""
        start = self._used
        self._used += tensor.numel()
        return self._memory[start : self._used].view(tensor.shape).copy_(tensor)
