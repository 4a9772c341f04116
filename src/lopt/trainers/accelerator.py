"""What a LoPT trainer changes in accelerate: clipping, where offloaded weights are, what DDP searches for."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from lopt.architectures import base_model, find_decoder
from lopt.trainers.optimizer import clip

# What a config calls experts, layers that are skipped at random, and layers that use others' keys and values.
_LEFT_OUT = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("layerdrop", "num_kv_shared_layers"),
)


def find_unused_if_needed(accelerator: Any, asked: bool | None, model: nn.Module) -> None:
    """Let DDP search for parameters without a gradient only where a forward may leave some out.

    By default transformers has it search in every step, which costs a walk through the graph, and DDP warn
    that there are none.

    Args:
        accelerator: with transformers' arguments for DDP.
        asked: what the user says (`ddp_find_unused_parameters`), which holds.
    """
    if asked is None and dist.is_initialized() and _uses_all(model):
        accelerator.ddp_handler.find_unused_parameters = False


def _uses_all(model: nn.Module) -> bool:
    """Return True if every forward uses every parameter, as in a dense model of text alone."""
    base = base_model(model)
    config: Any = base.config.get_text_config()
    if any(getattr(config, name, None) for name in _LEFT_OUT):
        return False
    found: Any = find_decoder(base)
    ends: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    parts = [*found.front, *found.layers, *found.tail, *ends]
    used = {id(p) for part in parts for p in part.parameters()}
    return all(id(p) in used for p in model.parameters() if p.requires_grad)


def adapt_accelerator(trainer: Any) -> None:
    """Set what DDP searches for and replace two public methods in the accelerator of a `LoPTMixin` trainer.

    `clip_grad_norm_`, with which Trainer clips and, by an infinite `max_norm`, takes the norm, clips as the
    blocks need it. `prepare_model` leaves the model that is trained where it is if its weights are offloaded,
    and without DDP in the block-major schedule; a reference model is placed on the device.
    """
    accelerator = trainer.accelerator
    find_unused_if_needed(accelerator, trainer.args.ddp_find_unused_parameters, trainer.model)
    prepare_model = accelerator.prepare_model

    def prepare(model: Any, device_placement: bool | None = None, evaluation_mode: bool = False) -> Any:
        is_trained = model is getattr(trainer, "model", None)
        if is_trained and getattr(trainer, "block_major", None) is not None:
            evaluation_mode = True  # not wrapped in DDP: the schedule averages gradients itself
        stays = is_trained and (trainer.weights_offloaded or trainer.grid is not None)
        return prepare_model(model, False if stays else device_placement, evaluation_mode)

    accelerator.prepare_model = prepare
    accelerator.clip_grad_norm_ = lambda parameters, max_norm, norm_type=2: clip(trainer, max_norm)
