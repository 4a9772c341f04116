"""The block-major schedule for a plain PyTorch loop, made in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from lopt.architectures import base_model
from lopt.core.attach import LoPT
from lopt.engine.block_major import ROUTERS, BlockMajor
from lopt.engine.host_optimizer import HostOptimizer, step_threads
from lopt.engine.links import Link
from lopt.engine.offload import Offload, move_rest
from lopt.engine.optimizer import BlockOptimizer, Precision
from lopt.engine.stages import Stages
from lopt.engine.updates import Updates
from lopt.instruments.memory import HOST


def block_major(
    lopt: LoPT,
    groups: list[dict[str, Any]],
    make: Callable[[list[dict[str, Any]]], Optimizer],
    *,
    device: torch.device | None = None,
    max_norm: float = math.inf,
    precision: Precision | None = None,
    threads: int | None = None,
) -> BlockMajor:
    """Return what runs whole optimizer steps of an attached model, as its config says.

    Args:
        lopt: The handle. With `offload` block its model may be in host memory.
        groups: `lopt.parameter_groups(...)`.
        make: Makes an optimizer out of such groups, for example `torch.optim.AdamW`.
        device: Where to compute, to which what is not offloaded is moved; default: where the model is.
        max_norm: Norm to clip gradients to, by `clip` of the config; infinity clips nothing.
        precision: How bfloat16 weights are stepped; default: by float32 masters where the host steps them,
            and rounded stochastically elsewhere.
        threads: That a host optimizer computes with; 0 steps in the calling thread. Default: `step_threads`.

    Returns:
        A schedule, whose `step` runs one optimizer step; `schedule.optimizer` is for a learning-rate schedule
        and checkpoints.

    Raises:
        ValueError: The model's config asks for router logits.
    """
    return staged(lopt, Stages(lopt), groups, make, device or lopt.device, None, max_norm, precision, threads)


def staged(
    lopt: LoPT,
    stages: Stages,
    groups: list[dict[str, Any]],
    make: Callable[[list[dict[str, Any]]], Optimizer],
    device: torch.device,
    link: Link | None,
    max_norm: float,
    precision: Precision | None,
    threads: int | None,
) -> BlockMajor:
    """Return the schedule of a model, all on `device` but what its config offloads.

    Args:
        stages: The model's.
        link: To the neighbours in a pipeline; None outside of one.
        lopt, groups, make, device, max_norm, precision, threads: As of `block_major`.
    """
    model_config: Any = base_model(lopt.model).config.get_text_config()
    if getattr(model_config, "output_router_logits", False):
        raise ValueError(f"{ROUTERS}, or set `output_router_logits` False in the model's config")
    offload = Offload.of_config(lopt, stages, device)
    if offload is None or offload.weights is None:
        move_rest(lopt.model, (), device)
    move_rest(lopt.heads, (), device)
    optimizer = staged_optimizer(lopt, groups, make, stages, offload, precision, threads=threads)
    return BlockMajor(lopt, Updates(lopt, stages, optimizer, offload, max_norm), offload, link)


def staged_optimizer(
    lopt: LoPT,
    groups: list[dict[str, Any]],
    make: Callable[[list[dict[str, Any]]], Optimizer],
    stages: Stages,
    offload: Offload | None,
    precision: Precision | None = None,
    workers: int = 0,
    threads: int | None = None,
) -> BlockOptimizer:
    """Return the optimizer of a model that runs in stages, and let `offload` know it.

    Args:
        lopt: The handle.
        groups: `lopt.parameter_groups(...)`.
        make: Makes the inner optimizer out of such groups.
        stages: The model's.
        offload: What moves weights or state; None if everything stays on the device.
        precision: How bfloat16 weights are stepped.
        workers: Data-loader workers, which need cores as a host optimizer does.
        threads: Of a host optimizer; default: what `step_threads` says.
    """
    on_host = lopt.config.optimizer_device == "cpu"
    optimizer = BlockOptimizer(
        groups,
        make,
        precision=precision or Precision(masters=lopt.config.keeps_masters(None)),
        transfer=None if offload is None or on_host else offload.transfer,
        stage_of=stages.owner,
        device=HOST if on_host else None,
    )
    if on_host:
        assert offload is not None, "the config asks for it"
        default = step_threads(offload.transfer.device, workers)
        offload.host = HostOptimizer(optimizer, default if threads is None else threads)
    elif offload is not None:
        offload.optimizer = optimizer
    return optimizer
