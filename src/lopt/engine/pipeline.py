"""A block on each device: every process of a pipeline runs the block-major schedule with its own blocks.

No gradient crosses a boundary, so no process waits for a later one: it takes the next micro-batch, or the
next optimizer step, as soon as the process before it has sent it. The result is that of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lopt.architectures import base_model
from lopt.core.attach import LoPT
from lopt.core.config import LoPTConfig
from lopt.engine.block_major import BlockMajor
from lopt.engine.links import Link
from lopt.engine.optimizer import Precision
from lopt.engine.plain_loop import staged_optimizer
from lopt.engine.reduction import average_gradients
from lopt.engine.stages import Stages
from lopt.engine.updates import Updates
from lopt.validation import check


def pipeline(
    lopt: LoPT,
    groups: list[dict[str, Any]],
    make: Callable[[list[dict[str, Any]]], Optimizer],
    mesh: DeviceMesh,
    *,
    device: torch.device,
    max_norm: float = math.inf,
    precision: Precision | None = None,
    depth: int = 2,
) -> BlockMajor:
    """Return what runs whole optimizer steps of this process's blocks, in a pipeline of processes.

    Blocks are dealt out in order, as evenly as can be. Of the other blocks the weights are let go: they are
    on the meta device then, as `lopt.models.part.load_part` leaves them. All processes of a pipeline take the
    same micro-batches; each calls `schedule.link.expect(shapes)` with their (B, T), at any time before the
    step, and then `schedule.step`.

    Args:
        lopt, groups, make, max_norm, precision: As of `block_major`.
        mesh: Of dimensions "pipeline" and, where blocks have replicas whose gradients are averaged, "data".
        device: Where to compute.
        depth: Micro-batches that may be on their way between two processes.

    Raises:
        ValueError: The config cannot run in a pipeline of this size.
    """
    ranks = mesh["pipeline"]
    check_pipeline(lopt.config, ranks.size())
    lopt.offload_device = device
    config: Any = base_model(lopt.model).config.get_text_config()
    dtype = next(p.dtype for p in lopt.blocks.layers[0].parameters() if p.is_floating_point())
    link = Link(ranks.get_group(), device, config.hidden_size, dtype, depth)
    stages = Stages(lopt)
    own = {stage.block for stage in stages.of_pipeline(link.position, link.size)}
    leave_out(lopt, [block.index for block in lopt.blocks if block.index not in own])
    groups = [group for group in groups if group["block"] in own]
    optimizer = staged_optimizer(lopt, groups, make, stages, None, precision) if groups else None
    updates = Updates(lopt, stages, optimizer, max_norm=max_norm)
    if "data" in (mesh.mesh_dim_names or ()):
        updates.reduce = partial(average_gradients, group=mesh["data"].get_group())
    return BlockMajor(lopt, updates, link=link)


def check_pipeline(config: LoPTConfig, size: int) -> None:
    """Raise a ValueError if a run with `config` cannot be a pipeline of `size` processes."""
    if not config.is_cut:
        raise ValueError(
            f"a pipeline needs gradient boundaries, and `method` {config.method} has none: use lopt or frozen"
        )
    rule = f">= {size}, the processes of the pipeline"
    check(config.block_count >= size, "num_blocks", config.block_count, rule)
    if config.clip == "global":
        raise ValueError("`clip` global waits for the gradients of all processes: use block in a pipeline")
    if config.aux_loss == "next_token" and config.is_local:
        raise ValueError("`aux_loss` next_token reads the LM head, which another process has: use recon")


def leave_out(lopt: LoPT, blocks: Iterable[int]) -> None:
    """Let go of the weights of `blocks` and of their heads: they are on the meta device then."""
    parameters = [p for index in blocks for _, p in lopt.blocks.parameters(lopt.model, index)]
    empty = {p: p if p.is_meta else nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in parameters}
    for module in lopt.model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in empty:
                setattr(module, name, empty[parameter])
    for index in blocks:
        if index < len(lopt.heads):
            lopt.heads[index].to("meta")
