"""Several processes: average the gradients of earlier blocks as soon as they are complete.

An earlier block's backward is over before the next block's forward begins, which is before
DistributedDataParallel (DDP) prepares its own reduction, so DDP would never reduce those gradients.
They are kept out of it and averaged here, by asynchronous all-reduces that run beside the rest of the
forward. Under FSDP2 the blocks' gradients are DTensors, which FSDP2 reduces in the local backward
itself; only the reconstruction heads, which are whole on every rank, are reduced here.

In a plain PyTorch script:

    lopt = attach(model, LoPTConfig(num_blocks=2))
    reduction = GradientReduction(lopt)            # before DDP, which reduces the last block
    model = DistributedDataParallel(model)
    ...
    loss.backward()
    reduction.wait()                               # before clipping and the optimizer step
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lopt import compat
from lopt.core.attach import LoPT

HEADS_OPTIMIZER_NAME = "reconstruction_heads_optimizer.safetensors"


class GradientReduction:
    """Averages the gradients of earlier blocks and heads over all ranks.

    Args:
        lopt: the handle; its model must not be wrapped yet, and every rank must hold the same
            weights. The heads of rank 0 become everyone's.
        is_last: returns, in the backward, whether this is the last micro-batch of the optimizer step,
            after which gradients are reduced. Default: every micro-batch is.
    """

    def __init__(self, lopt: LoPT, is_last: Callable[[], bool] = lambda: True) -> None:
        self._lopt = lopt
        self._is_last = is_last
        self._running: list[dist.Work] = []
        names = [
            name for block in lopt.blocks[:-1] for name, _ in lopt.blocks.parameters(lopt.model, block.index)
        ]
        compat.leave_out_of_ddp(lopt.model, names)
        lopt.after_local_backward = self._start
        self.broadcast_heads()

    def broadcast_heads(self) -> None:
        """Give every rank the heads of rank 0."""
        for parameter in self._lopt.heads.parameters():
            dist.broadcast(parameter.data, src=0)

    def _start(self, block: int) -> None:
        if not self._is_last():
            return
        ranks = dist.get_world_size()
        for parameter in self._lopt.block_parameters(block):
            if isinstance(parameter, DTensor):
                continue
            if parameter.grad is None:  # unused here, perhaps not elsewhere: all ranks must take part
                parameter.grad = torch.zeros_like(parameter)
            work = dist.all_reduce(parameter.grad.div_(ranks), async_op=True)
            assert work is not None
            self._running.append(work)

    def wait(self) -> None:
        """Wait until every gradient is the average; call it before clipping and the optimizer step."""
        for work in self._running:
            work.wait()
        self._running = []


@contextmanager
def heads_apart(optimizer: Optimizer) -> Iterator[list[nn.Parameter]]:
    """Within, `optimizer` has neither the groups nor the state of the heads; yields their parameters.

    Saving and loading the optimizer of a sharded model must see that model's parameters only.
    """
    groups = optimizer.param_groups
    heads = [group for group in groups if group.get("heads")]
    parameters = [p for group in heads for p in group["params"]]
    states = {p: optimizer.state.pop(p) for p in parameters if p in optimizer.state}
    groups[:] = [group for group in groups if not group.get("heads")]
    try:
        yield parameters
    finally:
        optimizer.param_groups.extend(heads)
        optimizer.state.update(states)


def save_heads_optimizer(optimizer: Optimizer, folder: str | Path) -> None:
    """Write the optimizer state of the heads, which `heads_apart` hides from the sharded save."""
    tensors = {}
    for number, parameter in enumerate(_head_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{number}.{key}"] = value.contiguous()
    safetensors.torch.save_file(tensors, Path(folder) / HEADS_OPTIMIZER_NAME)


def load_heads_optimizer(optimizer: Optimizer, folder: str | Path) -> None:
    """Load what `save_heads_optimizer` wrote."""
    tensors = safetensors.torch.load_file(Path(folder) / HEADS_OPTIMIZER_NAME)
    for number, parameter in enumerate(_head_parameters(optimizer)):
        prefix = f"{number}."
        optimizer.state[parameter] = {
            key.removeprefix(prefix): value if key.endswith(".step") else value.to(parameter.device)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }


def _head_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups if group.get("heads") for p in group["params"]]
