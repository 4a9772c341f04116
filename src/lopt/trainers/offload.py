"""A trainer whose model is not on the device as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lopt.engine.offload import Offload

if TYPE_CHECKING:  # what the mixin is put in front of
    from transformers import Trainer
else:
    Trainer = object


class TravellingWeights(Trainer):
    """Part of `LoPTMixin`: what transformers and accelerate must not do with weights that travel.

    Attributes:
        weights_travel: whether `--offload block` is on.
        offload: what travels between host memory and the device; None if nothing does.
    """

    weights_travel: bool
    offload: Offload | None = None

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.weights_travel:
            super()._move_model_to_device(model, device)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with self._left_in_place():
            return super()._prepare_for_training(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluation, for which travelling weights come in by themselves."""
        with self._left_in_place():
            return super().evaluation_loop(*args, **kwargs)

    @contextmanager
    def _left_in_place(self) -> Iterator[None]:
        """accelerate does not move the model to the device."""
        before = self.accelerator.device_placement
        self.accelerator.device_placement = before and not self.weights_travel
        try:
            yield
        finally:
            self.accelerator.device_placement = before

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._settle()
        super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        self._settle()
        super()._load_best_model()

    def _settle(self) -> None:
        if self.offload is not None:
            self.offload.synchronize()
