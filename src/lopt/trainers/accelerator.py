"""What a LoPT trainer changes in its accelerator: clipping by block, and where offloaded weights are."""

from __future__ import annotations

from typing import Any

from lopt.trainers.optimizer import clip


def adapt_accelerator(trainer: Any) -> None:
    """Replace two public methods of the accelerator of a `LoPTMixin` trainer.

    `clip_grad_norm_`, with which Trainer clips and, by an infinite `max_norm`, takes the norm, clips as the
    blocks need it. `prepare_model` leaves the model that is trained where it is if its weights are offloaded;
    a reference model is placed on the device.
    """
    accelerator = trainer.accelerator
    prepare_model = accelerator.prepare_model

    def prepare(model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        stays = trainer.weights_offloaded and model is getattr(trainer, "model", None)
        return prepare_model(model, False if stays else device_placement, evaluation_mode)

    accelerator.prepare_model = prepare
    accelerator.clip_grad_norm_ = lambda parameters, max_norm, norm_type=2: clip(trainer, max_norm)
