"""The optimizer's turn in a plan: state, what its step adds for a while, and what travels meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lopt.engine.host_transfer import Cargo, Conveyor
from lopt.engine.optimizer import PART_BYTES, ROUNDED_AT_ONCE, part_bytes_ahead, parts
from lopt.planning.shapes import Stage

# State tensors per parameter, bytes beside them (quantized state), and tensors that a step makes on a
# GPU for a part's parameters at once.
OPTIMIZERS = {
    "adamw_torch_fused": (2, 0, 0),
    "adamw_torch": (2, 0, 1),
    "sgd": (0, 0, 0),
    "adagrad": (1, 0, 2),
    "rmsprop": (1, 0, 1),
    "adamw_bnb_8bit": (0, 2, 0),
    "adamw_torch_8bit": (0, 2, 0),
    "adamw_torch_4bit": (0, 1, 0),
    "lion_32bit": (0, 4, 0),
    "lion_8bit": (0, 1, 0),
}


@dataclass(frozen=True)
class Optimizer:
    """Sizes of an optimizer behind `lopt.engine.optimizer.BlockOptimizer`.

    Attributes:
        name: of `OPTIMIZERS`.
        dtype: of the weights. state_dtype: of the state between steps.
        masters: whether bfloat16 weights have float32 masters.
        foreach: whether the step works on all parameters of a part at once, as on a GPU.
    """

    name: str
    dtype: torch.dtype
    state_dtype: torch.dtype = torch.float32
    masters: bool = False
    foreach: bool = True

    @property
    def rounded(self) -> bool:
        """Whether weights are stepped in float32 copies."""
        return self.dtype == torch.bfloat16

    def state(self, weights: int, heads: int = 0) -> int:
        """Bytes of state for so many elements of weights and of (float32) heads."""
        tensors, extra, _ = OPTIMIZERS[self.name]
        each = tensors * self.state_dtype.itemsize + extra
        return each * (weights + heads) + 4 * weights * (self.masters and self.rounded)

    def part_state(self, part: Sequence[Tensor]) -> int:
        """Bytes of state for a part; what is not in the weights' dtype are heads."""
        heads = sum(t.numel() for t in part if t.dtype != self.dtype)
        return self.state(sum(t.numel() for t in part) - heads, heads)

    def temporaries(self, part: Sequence[Tensor]) -> int:
        """Bytes that the step of a part adds, beside its state and its gradients in the weights' dtype."""
        tensors, _, made = OPTIMIZERS[self.name]
        count = sum(t.numel() for t in part)
        total = 4 * made * count * self.foreach
        if self.state_dtype != torch.float32:
            total += 4 * tensors * count
        if any(t.dtype == torch.bfloat16 for t in part):
            total += 4 * count * (1 if self.masters else 2)
            total += 0 if self.masters else 4 * min(max(t.numel() for t in part), ROUNDED_AT_ONCE)
        return total

    def parts(self, stage: Stage, part_bytes: int = PART_BYTES) -> Sequence[Sequence[Tensor]]:
        """What of a block is stepped together, in order; nothing of one that does not learn."""
        if not stage.learns:
            return []
        groups = [
            {"params": [t for t in tensors if (t.ndim >= 2) == matrices]}
            for tensors in (stage.tensors, stage.head_tensors)
            for matrices in (True, False)
        ]
        return parts(groups, part_bytes)


@dataclass(frozen=True)
class Moment:
    """Bytes on the device in the turn of one block, beside those of its micro-batches.

    Attributes:
        gradients: of the block; None while its micro-batches run, which decide about them.
        optimizer: state and temporaries. transfers: on its way.
    """

    gradients: int | None
    optimizer: int
    transfers: int


def travel(
    optimizer: Optimizer, stages: list[Stage], prefetch: int, weights: bool
) -> list[tuple[Moment, list[Moment]]]:
    """Follow the real `Conveyor`, with tensors that have no memory, through an optimizer step.

    Returns:
        By block: its micro-batches, and the step of every part.
    """
    with FakeTensorMode():
        return list(_follow(optimizer, stages, prefetch, weights))


def _follow(
    optimizer: Optimizer, stages: list[Stage], prefetch: int, weights_travel: bool
) -> Iterator[tuple[Moment, list[Moment]]]:
    conveyor, width = Conveyor(torch.device("cpu"), prefetch), optimizer.dtype.itemsize
    parted = [optimizer.parts(stage, part_bytes_ahead(prefetch)) for stage in stages]
    states = [[_cargo(conveyor, optimizer.part_state(part)) for part in split] for split in parted]
    weights: list[list[Cargo]] = []
    for stage in stages:
        sizes = [*(n * width for n in (stage.rest, *stage.layers)), 4 * stage.head]
        weights.append([_cargo(conveyor, n) for n in sizes if n and weights_travel])
    for index, split in enumerate(parted):
        for cargo in weights[index]:
            conveyor.take(cargo)
        conveyor.expect(states[index])
        conveyor.expect(weights[index + 1] if index + 1 < len(weights) else [])
        working, steps = Moment(None, 0, conveyor.on_the_way), []
        left = sum(t.nbytes for part in split for t in part)
        for part, cargo in zip(split, states[index], strict=True):
            conveyor.take(cargo)
            wide = any(t.dtype == torch.bfloat16 for t in part)  # then gradients go as they are copied
            own = sum(t.nbytes for t in part)
            adds = optimizer.part_state(part) + optimizer.temporaries(part)
            steps.append(Moment(left - own * wide, adds, conveyor.on_the_way))
            left -= own
            conveyor.give_back(cargo)
        for cargo in weights[index]:
            conveyor.give_back(cargo)
        yield working, steps


def _cargo(conveyor: Conveyor, nbytes: int) -> Cargo:
    held = [torch.empty(nbytes, dtype=torch.uint8)]
    cargo = Cargo(lambda: list(held), lambda tensors: held.__setitem__(slice(None), tensors))
    conveyor.store(cargo)
    return cargo
