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

With gradient accumulation every micro-batch's gradients are averaged, as DDP does: the sum of those before is
the same on all ranks and stays what it is. A forward waits for the averages that it would add to. Where DDP
averages once (`no_sync`), let `is_last` say when.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lopt import compat
from lopt.core.attach import LoPT
from lopt.files import save_tensors

HEADS_OPTIMIZER_NAME = "reconstruction_heads_optimizer.safetensors"


class GradientReduction:
    """Averages the gradients of earlier blocks and heads over all ranks.

    Args:
        lopt: the handle; its model must not be wrapped yet, and every rank must hold the same
            weights. The heads of rank 0 become everyone's.
        is_last: returns, in the backward, whether this is the last micro-batch of the optimizer step,
            after which gradients are reduced. Default: every micro-batch is.
        in_backward: reduce at all; the block-major schedule averages each stage's gradients by itself
            (`average_gradients`), and its model is not wrapped in DDP.
    """

    def __init__(
        self, lopt: LoPT, is_last: Callable[[], bool] = lambda: True, in_backward: bool = True
    ) -> None:
        self._lopt = lopt
        self._is_last = is_last
        self._running: list[dist.Work] = []
        if in_backward:
            self._keep_out_of_ddp()
        self.broadcast_heads()

    def _keep_out_of_ddp(self) -> None:
        lopt = self._lopt
        names = [
            name for block in lopt.blocks[:-1] for name, _ in lopt.blocks.parameters(lopt.model, block.index)
        ]
        compat.leave_out_of_ddp(lopt.model, names)
        lopt.after_local_backward = self._start
        # The local backward in a forward adds to gradients, which nothing may be averaging then.
        lopt.hooks.append(lopt.blocks.decoder.register_forward_pre_hook(lambda *_: self.wait()))

    def broadcast_heads(self) -> None:
        """Give every rank the heads of rank 0."""
        for parameter in self._lopt.heads.parameters():
            if not parameter.is_meta:  # in a pipeline another process has it
                dist.broadcast(parameter.data, src=0)

    def _start(self, block: int) -> None:
        compat.keep_fsdp_root(self._lopt.model)
        if not self._is_last():
            return
        whole = [p for p in self._lopt.block_parameters(block) if not isinstance(p, DTensor)]
        self._running += _all_reduce(whole)

    def wait(self) -> None:
        """Wait until every gradient is the average; call it before clipping and the optimizer step."""
        for work in self._running:
            work.wait()
        self._running = []


def average_gradients(parameters: list[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Average the gradients of `parameters` over the ranks of `group` (None: all), who must all call this."""
    for work in _all_reduce(parameters, group):
        work.wait()


def _all_reduce(parameters: list[nn.Parameter], group: dist.ProcessGroup | None = None) -> list[dist.Work]:
    """Begin to average gradients; one that is unused here may not be elsewhere, so all ranks take part."""
    ranks, running = dist.get_world_size(group), []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        work = dist.all_reduce(parameter.grad.div_(ranks), group=group, async_op=True)
        assert work is not None
        running.append(work)
    return running


@contextmanager
def heads_apart(optimizer: Optimizer, *, only: bool = False) -> Iterator[None]:
    """Within, `optimizer` has neither the groups nor the state of the heads, which come last; or only those.

    Saving and loading the optimizer of a sharded model must see that model's parameters only.
    """
    hidden = [group for group in optimizer.param_groups if bool(group.get("heads")) != only]
    states = {p: optimizer.state.pop(p) for g in hidden for p in g["params"] if p in optimizer.state}
    optimizer.param_groups[:] = [
        group for group in optimizer.param_groups if bool(group.get("heads")) == only
    ]
    try:
        yield
    finally:
        place = 0 if only else len(optimizer.param_groups)
        optimizer.param_groups[place:place] = hidden
        optimizer.state.update(states)


def save_heads_optimizer(optimizer: Optimizer, folder: str | Path) -> None:
    """Write state and learning rates of the heads, which `heads_apart` hides from the sharded save."""
    with heads_apart(optimizer, only=True):
        saved = optimizer.state_dict()
    tensors = {
        f"{p}.{key}": value.contiguous() for p, s in saved["state"].items() for key, value in s.items()
    }
    rates = json.dumps([float(group["lr"]) for group in saved["param_groups"]])
    save_tensors(tensors, Path(folder) / HEADS_OPTIMIZER_NAME, {"learning_rates": rates})


def load_heads_optimizer(optimizer: Optimizer, folder: str | Path) -> None:
    """Load what `save_heads_optimizer` wrote, each state to where the optimizer keeps it."""
    state: dict[int, dict[str, Tensor]] = {}
    with safetensors.safe_open(Path(folder) / HEADS_OPTIMIZER_NAME, "pt") as file:
        rates = json.loads((file.metadata() or {}).get("learning_rates", "[]"))
        for name in sorted(file.keys()):
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = file.get_tensor(name)
    with heads_apart(optimizer, only=True):
        saved = optimizer.state_dict()
        for group, rate in zip(saved["param_groups"], rates, strict=False):
            group["lr"] = rate
        optimizer.load_state_dict(saved | {"state": state})
