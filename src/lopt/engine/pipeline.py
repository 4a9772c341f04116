"""A block on each device: every process of a pipeline runs the block-major schedule with its own blocks.

No gradient crosses a boundary, so no process waits for a later one: it takes the next micro-batch, or the
next optimizer step, as soon as the process before it has sent it. The result is that of one process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from lopt.architectures import base_model
from lopt.core.attach import LoPT
from lopt.core.config import LoPTConfig
from lopt.engine.block_major import BlockMajor
from lopt.engine.links import Link
from lopt.engine.optimizer import Precision
from lopt.engine.plain_loop import staged
from lopt.engine.reduction import average_gradients
from lopt.engine.stages import Stage, Stages, dealt
from lopt.files import save_tensors, write_text
from lopt.models.part import replace_parameters
from lopt.models.weight_files import INDEX
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
    threads: int | None = None,
    depth: int = 2,
) -> BlockMajor:
    """Return what runs whole optimizer steps of this process's blocks, in a pipeline of processes.

    Blocks are dealt out in order, as evenly as can be. Of the other blocks the weights are let go: they are
    on the meta device then, as `lopt.models.part.load_part` leaves them. All processes of a pipeline take the
    same micro-batches; each calls `schedule.link.expect(shapes)` with their (B, T), at any time before the
    step, and then `schedule.step`.

    Args:
        lopt, groups, make, device, max_norm, precision, threads: As of `block_major`.
        mesh: Of dimensions "pipeline" and, where blocks have replicas whose gradients are averaged, "data".
        depth: Micro-batches that may be on their way between two processes.

    Raises:
        ValueError: The config cannot run in a pipeline of this size.
    """
    group = mesh["pipeline"].get_group()
    check_pipeline(lopt.config, group.size())
    stages = Stages(lopt)
    link = make_link(lopt, group, device, depth)
    gone = leave_out(lopt, stages, stages.of_pipeline(link.position, link.size))
    groups = [group | {"params": [gone.get(p, p) for p in group["params"]]} for group in groups]
    schedule = staged(lopt, stages, groups, make, device, link, max_norm, precision, threads)
    if "data" in (mesh.mesh_dim_names or ()):
        schedule.updates.reduce = partial(average_gradients, group=mesh["data"].get_group())
    return schedule


def make_link(lopt: LoPT, group: Any, device: torch.device, depth: int) -> Link:
    """Return this process's link to its neighbours in `group`, for the hidden states of a model.

    Args:
        lopt: The handle, which computes on `device` from now on.
        group: The processes of a pipeline, in the order of their blocks.
        depth: Micro-batches that may be on their way between two processes.
    """
    lopt.offload_device = device
    config: Any = base_model(lopt.model).config.get_text_config()
    dtype = next(p.dtype for p in lopt.blocks.layers[0].parameters() if p.is_floating_point())
    return Link(group, device, config.hidden_size, dtype, depth)


def own_blocks(config: LoPTConfig, mesh: DeviceMesh) -> range:
    """Return the indices (from 0) of the blocks of this process; `mesh` as of `pipeline`."""
    ranks = mesh["pipeline"]
    return dealt(config.block_count, ranks.get_local_rank(), ranks.size())


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
    if config.aux_loss != "recon" and config.is_local:
        raise ValueError(
            f"`aux_loss` {config.aux_loss} reads the LM head, which another process has: use recon"
        )


def leave_out(lopt: LoPT, stages: Stages, own: Collection[Stage]) -> dict[nn.Parameter, nn.Parameter]:
    """Let go of all weights that no stage in `own` needs: they are on the meta device then.

    Only blocks of `own` learn from now on.

    Returns:
        The empty parameters by those whose place they have taken.
    """
    blocks = {stage.block for stage in own}
    needed = {p for stage in own for module in stages.modules(stage) for p in module.parameters()}
    needed |= {p for index, head in enumerate(lopt.heads) if index in blocks for p in head.parameters()}
    gone: dict[nn.Parameter, nn.Parameter] = {}
    for part in (lopt.model, lopt.heads):
        empty = {
            p: nn.Parameter(p.detach().to("meta"), p.requires_grad)
            for p in part.parameters()
            if p not in needed and not p.is_meta
        }
        replace_parameters(part, empty)
        gone |= empty
    learning = lopt.learning
    lopt.learning = range(max(learning.start, min(blocks)), min(learning.stop, max(blocks) + 1))
    stages.refresh()
    return gone


def save_model(lopt: LoPT, schedule: BlockMajor, folder: str | Path) -> None:
    """Save the model of a pipeline as one plain folder: each process writes the weights of its blocks.

    All processes of one pipeline call this.

    Raises:
        ValueError: `folder` holds a model already.
    """
    link, folder = schedule.link, Path(folder)
    assert link is not None
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model already: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    schedule.synchronize()
    parts: list[Any] = [None] * link.size
    dist.all_gather_object(parts, write_part(lopt, schedule, folder), group=link.group)
    if link.is_first:
        write_index(lopt, parts, folder)
    dist.barrier(group=link.group)


class Part(NamedTuple):
    """What one process of a pipeline has written: a file, its bytes of weights, and their names."""

    file: str
    nbytes: int
    names: list[str]


def write_part(lopt: LoPT, schedule: BlockMajor, folder: Path) -> Part:
    """Write the weights of this process's blocks into `folder`."""
    link, model = schedule.link, base_model(lopt.model)
    assert link is not None
    blocks = sorted({stage.block for stage in schedule.own})
    own = {name: p.detach() for block in blocks for name, p in lopt.blocks.parameters(model, block)}
    if link.is_first:
        kept = model.state_dict().keys()
        own |= {name: buffer for name, buffer in model.named_buffers() if name in kept}
    file = f"model-{link.position + 1:05d}-of-{link.size:05d}.safetensors"
    save_tensors(
        {name: value.cpu().contiguous() for name, value in own.items()}, folder / file, {"format": "pt"}
    )
    size = sum(value.nbytes for value in own.values())
    return Part(file, size, sorted(own))


def write_index(lopt: LoPT, parts: Iterable[Part], folder: Path) -> None:
    """Make a plain model out of what all processes of a pipeline have written into `folder`."""
    model = base_model(lopt.model)
    parts = list(parts)
    places = {name: part.file for part in parts for name in part.names}
    index = {"metadata": {"total_size": sum(part.nbytes for part in parts)}, "weight_map": places}
    write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    model.generation_config.save_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)  # last, so that the folder is no model before it is whole
