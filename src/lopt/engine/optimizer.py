"""Clipping by block, and one optimizer face that steps a few parameters at a time."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lopt.core.attach import LoPT
from lopt.engine.host_transfer import Cargo, Conveyor
from lopt.instruments.memory import dense_parts

PART_BYTES = 256 * 2**20
"""Parameters that are stepped together, in bytes of weights; it bounds what a step adds for a while."""
ROUNDED_AT_ONCE = 2**24
"""Numbers that are rounded stochastically together."""
MASTER = "master"
"""Name of a parameter's float32 master in the optimizer's state."""


@dataclass(frozen=True)
class Precision:
    """How bfloat16 weights and optimizer state are kept.

    Rounding to nearest loses every update smaller than half a unit in the last place, so bfloat16
    weights are updated in float32 and rounded stochastically, which keeps them on average, or follow
    float32 masters. Weights of another dtype are stepped as they are.

    Attributes:
        masters: keep a float32 copy of bfloat16 weights in the optimizer's state.
        state_dtype: float32, or bfloat16: half the state, rounded stochastically as well.
        seed: of the rounding, which is the same on every rank and in a resumed run.
    """

    masters: bool = False
    state_dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass
class _Part:
    """Parameters that are stepped together, and what the inner optimizer steps in their place."""

    parameters: list[nn.Parameter]
    groups: list[list[nn.Parameter]]  # stand-ins, by parameter group
    block: int
    state: Cargo

    @property
    def group_indices(self) -> set[int]:
        return {index for index, members in enumerate(self.groups) if members}


class BlockOptimizer(Optimizer):
    """Any optimizer behind a face that steps part by part, in the precision the weights need.

    A part is some consecutive parameters of one block. Whatever the optimizer allocates for a step,
    and every float32 copy of bfloat16 weights, is as large as a part; the state of parts may stay in
    host memory (`conveyor`) but for the one that is being stepped. The inner optimizer, `.optimizer`,
    sees stand-ins which hold a parameter's values during the step and nothing otherwise.

    Args:
        groups: `LoPT.parameter_groups(...)`.
        make: makes the inner optimizer out of such groups.
        precision: for bfloat16.
        part_bytes: the size of a part; a single larger parameter is one. Default: `PART_BYTES`, or what
            `part_bytes_ahead` says of the conveyor's budget.
        conveyor: moves optimizer state between host memory and device; None keeps it on the device.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        make: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        precision: Precision | None = None,
        part_bytes: int | None = None,
        conveyor: Conveyor | None = None,
    ) -> None:
        super().__init__(groups, {})
        self._precision = precision or Precision()
        self._conveyor = conveyor
        self._stand_ins = {p: self._stand_in(p) for group in self.param_groups for p in group["params"]}
        with self._shaped():
            self.optimizer = make([self._inner_group(group) for group in self.param_groups])
        _carry_over(self.optimizer.param_groups, self.param_groups)
        for group in self.param_groups:
            group.setdefault("updates", 0)
        self.defaults = self.optimizer.defaults
        self.state = self.optimizer.state
        self._group = {p: group for group in self.param_groups for p in group["params"]}
        self._numbers = {p: number for number, p in enumerate(self._stand_ins)}
        if part_bytes is None:
            part_bytes = PART_BYTES if conveyor is None else part_bytes_ahead(conveyor.ahead)
        self.parts = [self._part(members) for members in parts(self.param_groups, part_bytes)]
        self._store_state()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient; with a conveyor its gradient is freed at once."""
        assert closure is None, "a block's gradients are final when it is stepped"
        active = [part for part in self.parts if any(p.grad is not None for p in part.parameters)]
        for index in set().union(*(part.group_indices for part in active)):
            self.param_groups[index]["updates"] += 1
        _carry_over(self.param_groups, self.optimizer.param_groups)
        for part in active:
            self._step(part)

    def state_cargo(self, block: int) -> list[Cargo]:
        """The state of block `block`, part by part in the order of its step."""
        return [part.state for part in self.parts if part.block == block]

    def _step(self, part: _Part) -> None:
        if self._conveyor is not None:
            self._conveyor.take(part.state)
        with self._standing_in(part), self._wide_state(part), self._only(part):
            self.optimizer.step()
        if self._conveyor is not None:
            self._conveyor.give_back(part.state)

    @contextmanager
    def _standing_in(self, part: _Part) -> Iterator[None]:
        """Stand-ins hold values and gradients, in float32 where the weights are bfloat16."""
        learning = [p for p in part.parameters if p.grad is not None]
        for p in learning:
            self._stand_in_for(p)
        yield
        for p in learning:
            stand_in = self._stand_ins[p]
            stand_in.grad = None
            if _rounded(p) and self._precision.masters:
                self.state[stand_in][MASTER] = stand_in.data
                p.data.copy_(stand_in.data)
            elif _rounded(p):
                round_stochastically(stand_in.data, p.data, self._noise(p))
            elif stand_in.data.untyped_storage()._cdata != p.data.untyped_storage()._cdata:
                p.data.copy_(stand_in.data)  # an optimizer that does not work in place
            stand_in.data = stand_in.data.new_empty(0)

    def _stand_in_for(self, p: nn.Parameter) -> None:
        stand_in = self._stand_ins[p]
        assert p.grad is not None
        master = self.state[stand_in].get(MASTER) if stand_in in self.state else None
        stand_in.data = p.data.to(stand_in.dtype) if master is None else master
        stand_in.grad = p.grad.to(stand_in.dtype)
        if self._conveyor is not None:
            p.grad = None

    @contextmanager
    def _wide_state(self, part: _Part) -> Iterator[None]:
        """State that is kept in bfloat16 is float32 during the step."""
        narrow = self._precision.state_dtype
        if narrow == torch.float32:
            yield
            return
        kept: dict[tuple[nn.Parameter, str], Tensor] = {}
        for stand_in, key, value in self._state_of(part.groups):
            if value.dtype == narrow:
                kept[stand_in, key] = value
                self.state[stand_in][key] = value.float()
        yield
        for stand_in, key, value in self._state_of(part.groups):
            if value.dtype == torch.float32 and key != MASTER and not is_traceable_wrapper_subclass(value):
                place = kept.get((stand_in, key))
                place = torch.empty_like(value, dtype=narrow) if place is None else place
                round_stochastically(value, place, self._noise(part.parameters[0], salt=key))
                self.state[stand_in][key] = place

    @contextmanager
    def _only(self, part: _Part) -> Iterator[None]:
        groups = self.optimizer.param_groups
        whole = [group["params"] for group in groups]
        for group, members in zip(groups, part.groups, strict=True):
            group["params"] = members
        try:
            yield
        finally:
            for group, members in zip(groups, whole, strict=True):
                group["params"] = members

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, with all state where it is kept."""
        if self._conveyor is not None:
            self._conveyor.settle()
        _carry_over(self.param_groups, self.optimizer.param_groups)
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` gave; state goes straight to where it is kept, in its own dtype."""
        large = {
            (number, key): value
            for number, entries in state_dict["state"].items()
            for key, value in entries.items()
            if isinstance(value, Tensor) and value.ndim
        }
        small = {
            number: {k: v for k, v in entries.items() if (number, k) not in large}
            for number, entries in state_dict["state"].items()
        }
        self.optimizer.load_state_dict(state_dict | {"state": small})
        _carry_over(self.optimizer.param_groups, self.param_groups)
        self.state = self.optimizer.state
        stand_ins = list(self._stand_ins.values())
        for (number, key), value in large.items():
            keep = stand_ins[number].device if self._conveyor is None else "cpu"
            self.state[stand_ins[number]][key] = value.to(keep, copy=True)
        self._store_state()

    def _store_state(self) -> None:
        if self._conveyor is not None:
            for part in self.parts:
                self._conveyor.forget(part.state)

    @contextmanager
    def _shaped(self) -> Iterator[None]:
        """Stand-ins have their parameters' shapes, without memory: some optimizers make state at once."""
        for parameter, stand_in in self._stand_ins.items():
            stand_in.data = stand_in.data.new_zeros(()).expand(parameter.shape)
        yield
        for stand_in in self._stand_ins.values():
            stand_in.data = stand_in.data.new_empty(0)

    def _stand_in(self, p: nn.Parameter) -> nn.Parameter:
        # Where it is stepped, even if its values are in host memory now.
        device = p.device if self._conveyor is None else self._conveyor.device
        return nn.Parameter(torch.empty(0, dtype=torch.float32 if _rounded(p) else p.dtype, device=device))

    def _inner_group(self, group: dict[str, Any]) -> dict[str, Any]:
        return group | {"params": [self._stand_ins[p] for p in group["params"]]}

    def _part(self, members: list[nn.Parameter]) -> _Part:
        wanted = set(members)
        inside = [[p for p in group["params"] if p in wanted] for group in self.param_groups]
        groups = [[self._stand_ins[p] for p in group] for group in inside]
        index = next(i for i, group in enumerate(groups) if group)

        def get() -> list[Tensor]:
            return [value for _, _, value in self._state_of(groups)]

        def put(tensors: list[Tensor]) -> None:
            for (stand_in, key, _), tensor in zip(self._state_of(groups), tensors, strict=True):
                self.state[stand_in][key] = tensor

        return _Part(members, groups, self.param_groups[index].get("block", 0), Cargo(get, put))

    def _state_of(self, groups: list[list[nn.Parameter]]) -> list[tuple[nn.Parameter, str, Tensor]]:
        """The state tensors of a part's stand-ins; counters of no dimension are not among them."""
        found = []
        for stand_in in (s for group in groups for s in group if s in self.state):
            for key, value in self.state[stand_in].items():
                if isinstance(value, Tensor) and value.ndim:
                    found.append((stand_in, key, value))
        return found

    def _noise(self, p: nn.Parameter, salt: str = "") -> torch.Generator:
        """Random numbers that depend on the seed, the parameter and its number of updates alone."""
        name = f"{self._precision.seed} {self._numbers[p]} {self._group[p]['updates']} {salt}"
        return torch.Generator(p.device).manual_seed(zlib.crc32(name.encode()))


def part_bytes_ahead(ahead: int) -> int:
    """Small enough that the state of a few parts fits into `ahead` bytes on their way."""
    return min(PART_BYTES, ahead // 8)


def parts(groups: list[dict[str, Any]], part_bytes: int) -> list[list[nn.Parameter]]:
    """Parameters of optimizer groups in parts of at most `part_bytes`, none across blocks.

    Within a block the largest part comes last: what its step adds meets fewest gradients then.
    """
    blocks: dict[int, list[nn.Parameter]] = {}
    for group in groups:
        blocks.setdefault(group.get("block", 0), []).extend(group["params"])
    return [part for index in sorted(blocks) for part in sorted(_pack(blocks[index], part_bytes), key=_bytes)]


def _pack(parameters: list[nn.Parameter], part_bytes: int) -> list[list[nn.Parameter]]:
    made: list[list[nn.Parameter]] = [[]]
    for parameter in parameters:
        if made[-1] and _bytes([*made[-1], parameter]) > part_bytes:
            made.append([])
        made[-1].append(parameter)
    return made


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def state_bytes(
    make: Callable[[list[dict[str, Any]]], Optimizer], precision: Precision, dtype: torch.dtype
) -> float:
    """Bytes of optimizer state per parameter of `dtype`, counted on a small one."""
    parameter = nn.Parameter(torch.zeros(64, 1024, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = BlockOptimizer([{"params": [parameter]}], make, precision=precision)
    with torch.compiler.set_stance("force_eager"):  # torchao's optimizers compile their step
        optimizer.step()
    (cargo,) = optimizer.state_cargo(0)
    return sum(t.nbytes for tensor in cargo.get() for t in dense_parts(tensor)) / parameter.numel()


def round_stochastically(wide: Tensor, narrow: Tensor, noise: torch.Generator | None) -> None:
    """Write float32 `wide` into bfloat16 `narrow`, up or down with the odds that keep it on average.

    A bfloat16 is the upper half of a float32: random bits are added to the lower half, which is then
    cut off. Row by row, so that the random bits take little memory.
    """
    rows = max(1, ROUNDED_AT_ONCE * len(wide) // max(wide.numel(), 1))
    for some, target in zip(wide.split(rows), narrow.split(rows), strict=True):
        bits = torch.randint(0, 1 << 16, some.shape, generator=noise, dtype=torch.int32, device=some.device)
        bits.add_(some.view(torch.int32)).bitwise_and_(-(1 << 16))
        target.copy_(bits.view(torch.float32))


def _carry_over(source: list[dict[str, Any]], target: list[dict[str, Any]]) -> None:
    """All of the groups' settings but their parameters."""
    for old, new in zip(source, target, strict=True):
        new.update({k: v for k, v in old.items() if k != "params"})


def _rounded(p: Tensor) -> bool:
    return p.dtype == torch.bfloat16


def clip_gradients(lopt: LoPT, max_norm: float = math.inf) -> Tensor:
    """Clip the accumulated gradients to `max_norm`, all together or per block (`config.clip`).

    All together, as published, one block's large gradient shrinks every other block's step; the
    norms returned here show it. Gradients that are sharded (FSDP2) count whole.

    Returns:
        (k,) the gradient norm of every block, its head included, before clipping.
    """
    blocks = [_by_kind(lopt.block_parameters(b.index)) for b in lopt.blocks]
    norms = torch.stack([_norm(lopt, kinds) for kinds in blocks])
    total = torch.linalg.vector_norm(norms)
    for kinds, norm in zip(blocks, norms, strict=True):
        _scale(kinds, max_norm, norm if lopt.config.clip == "block" else total)
    return norms


def clip_block(lopt: LoPT, index: int, max_norm: float = math.inf) -> Tensor:
    """Clip the gradient of block `index` (from 0) and its head; returns its norm before clipping."""
    kinds = _by_kind(lopt.block_parameters(index))
    norm = _norm(lopt, kinds)
    _scale(kinds, max_norm, norm)
    return norm


def _scale(kinds: list[list[nn.Parameter]], max_norm: float, norm: Tensor) -> None:
    if math.isfinite(max_norm):
        for parameters in kinds:
            clip_grads_with_norm_(parameters, max_norm, norm)


def _by_kind(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters with a gradient, whole and sharded ones apart: one operation cannot take both."""
    learning = [p for p in parameters if p.grad is not None]
    whole = [p for p in learning if not isinstance(p.grad, DTensor)]
    sharded = [p for p in learning if isinstance(p.grad, DTensor)]
    return [kind for kind in (whole, sharded) if kind]


def _norm(lopt: LoPT, kinds: list[list[nn.Parameter]]) -> Tensor:
    if not kinds:
        return torch.zeros((), device=lopt.device)
    norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(whole)).float()
