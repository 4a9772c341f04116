"""An optimizer that steps a few parameters at a time, in the precision that they need."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lopt.engine.host_transfer import HostTransfer, TensorGroup, Tensors
from lopt.engine.rounding import round_stochastically
from lopt.engine.scratch import Scratch
from lopt.instruments.memory import dense_parts

PART_BYTES = 256 * 2**20
"""Parameters that are stepped together, in bytes of weights; bounds the memory that a step adds."""
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
    """Parameters of one stage that are stepped together."""

    parameters: list[nn.Parameter]
    proxies: list[list[nn.Parameter]]  # by parameter group
    stage: int
    state: TensorGroup


class BlockOptimizer(Optimizer):
    """Wraps any optimizer so that it steps part by part, in the precision that the weights need.

    A part is some consecutive parameters of one stage. Whatever the optimizer allocates for a step, and
    every float32 copy of bfloat16 weights, is as large as a part; the state of parts may stay in host
    memory but for the one that is being stepped. The inner optimizer, `.optimizer`, steps proxies,
    which hold a parameter's values during the step and nothing otherwise.

    Args:
        groups: `LoPT.parameter_groups(...)`.
        make: makes the inner optimizer out of such groups.
        precision: for bfloat16.
        part_bytes: the size of a part; a single larger parameter is one. Default: `PART_BYTES`, or less
            if the budget of `transfer` is small (`part_bytes_within`).
        transfer: moves optimizer state between host memory and device, and frees every gradient as soon
            as it is used; None leaves both where they are.
        stage_of: returns the index of the stage of a parameter. Default: a block is a stage.
        device: where parameters are stepped. Default: where `transfer` takes them, or where they are now.

    Attributes:
        optimizer: the inner optimizer.
        scratch: where bfloat16 values of parts in host memory become float32; None makes new memory for each.
        parts: in the order in which they are stepped.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        make: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        precision: Precision | None = None,
        part_bytes: int | None = None,
        transfer: HostTransfer | None = None,
        stage_of: Callable[[nn.Parameter], int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(groups, {})
        self._precision = precision or Precision()
        self.scratch: Scratch | None = None
        self._transfer = transfer
        self._device = device or (transfer.device if transfer is not None else None)
        self._proxies = {p: self._proxy(p) for group in self.param_groups for p in group["params"]}
        self._parameters = {proxy: p for p, proxy in self._proxies.items()}
        self.optimizer = make(
            [group | {"params": [self._proxies[p] for p in group["params"]]} for group in self.param_groups]
        )
        for proxy in self._proxies.values():
            proxy.data = proxy.data.new_empty(0)
        _copy_settings(self.optimizer.param_groups, self.param_groups)
        for group in self.param_groups:
            group.setdefault("updates", 0)
        self._stepped: list[set[int]] = [set() for _ in self.param_groups]  # parts since the last update
        self.defaults = self.optimizer.defaults
        self.state = self.optimizer.state
        self._group = {p: group for group in self.param_groups for p in group["params"]}
        self._numbers = {p: number for number, p in enumerate(self._proxies)}
        if part_bytes is None:
            part_bytes = PART_BYTES if transfer is None else part_bytes_within(transfer.budget)
        blocks = {p: group.get("block", 0) for group in self.param_groups for p in group["params"]}
        self._stage_of = stage_of or blocks.__getitem__
        self.parts = [self._part(p) for p in split_into_parts(self.param_groups, part_bytes, self._stage_of)]
        self._store_state()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        assert closure is None, "a block's gradients are final when it is stepped"
        self._step(self.parts)

    def step_stage(
        self,
        index: int,
        gradients: dict[nn.Parameter, Tensor] | None = None,
        settings: list[dict[str, Any]] | None = None,
    ) -> None:
        """Step every parameter of one stage that has a gradient.

        Args:
            index: Of the stage.
            gradients: By parameter; default: their `grad`.
            settings: Learning rates and the like, by parameter group; default: the present ones.
        """
        self._step([part for part in self.parts if part.stage == index], gradients, settings)

    @torch.no_grad()
    def _step(
        self,
        parts: list[_Part],
        gradients: dict[nn.Parameter, Tensor] | None = None,
        settings: list[dict[str, Any]] | None = None,
    ) -> None:
        if gradients is None:
            gradients = {p: p.grad for part in parts for p in part.parameters if p.grad is not None}
        active = [part for part in parts if any(p in gradients for p in part.parameters)]
        if not active:
            return
        self._count_updates(active)
        _copy_settings(settings or self.param_groups, self.optimizer.param_groups)
        for part in active:
            if self._transfer is not None:
                self._transfer.fetch(part.state)
            with self._loaded_proxies(part, gradients), self._widened_state(part), self._restricted_to(part):
                self.optimizer.step()
            if self._transfer is not None:
                self._transfer.release(part.state)

    def state_groups(self, stage: int) -> list[TensorGroup]:
        """Return the state of stage `stage`, part by part in the order of its step."""
        return [part.state for part in self.parts if part.stage == stage]

    def _count_updates(self, active: list[_Part]) -> None:
        """Count an update of each group of `active`, one for all of its parts, which may be stepped apart."""
        for index, stepped in enumerate(self._stepped):
            numbers = {id(part) for part in active if part.proxies[index]}
            if numbers and (not stepped or stepped & numbers):
                self.param_groups[index]["updates"] += 1
                stepped.clear()
            stepped |= numbers

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's, with all state where it is kept between steps.

        Parameters on the meta device, which another process has, are counted and have no state.
        """
        if self._transfer is not None:
            self._transfer.synchronize()
        _copy_settings(self.param_groups, self.optimizer.param_groups)
        saved, elsewhere = self.optimizer.state_dict(), self._elsewhere()
        return saved | {"state": {n: state for n, state in saved["state"].items() if n not in elsewhere}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of what `state_dict` returned; state goes straight to its place, in `state_dtype`.

        It may be of a process with other blocks, or of all: what belongs to parameters on the meta device is
        left out.
        """
        small: dict[int, dict[str, Any]] = {}
        large: list[tuple[int, str, Tensor]] = []
        for number in state_dict["state"].keys() - self._elsewhere():
            entries = state_dict["state"][number]
            rest = {key: value for key, value in entries.items() if not _has_dimensions(value)}
            small[number] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in rest.items()}
            large += [(number, key, value) for key, value in entries.items() if _has_dimensions(value)]
        self.optimizer.load_state_dict(state_dict | {"state": small})
        self._stepped = [set() for _ in self.param_groups]
        _copy_settings(self.optimizer.param_groups, self.param_groups)
        self.state = self.optimizer.state
        proxies = list(self._proxies.values())
        for number, key, value in large:
            if _has_state_dtype(key, value):
                value = value.to(self._precision.state_dtype)
            if self._transfer is None:  # else it is copied when it is stored
                value = value.to(proxies[number].device, copy=True)
            self.state[proxies[number]][key] = value
        self._store_state()

    def _elsewhere(self) -> set[int]:
        """Return the numbers of the parameters that another process has."""
        return {self._numbers[p] for p in self._proxies if p.is_meta}

    def _store_state(self) -> None:
        if self._transfer is not None:
            for part in self.parts:
                self._transfer.store(part.state)

    # -- one part at work ------------------------------------------------------------------------

    @contextmanager
    def _loaded_proxies(self, part: _Part, gradients: dict[nn.Parameter, Tensor]) -> Iterator[None]:
        """Within, proxies hold values and gradients, in float32 where the weights are bfloat16.

        Gradients are taken out of `gradients`.
        """
        learning = [p for p in part.parameters if p in gradients]
        if self.scratch is not None:
            narrow = sum(p.numel() for p in learning if _is_rounded(p))
            self.scratch.begin(narrow if self._precision.masters else 2 * narrow)
        for p in learning:
            self._load_proxy(p, gradients)
        yield
        self._keep_state(part)
        for p in learning:
            proxy = self._proxies[p]
            proxy.grad = None
            if _is_rounded(p) and not self._precision.masters:
                round_stochastically(proxy.data, p.data, self._noise(p))
            elif proxy.data.untyped_storage() is not p.data.untyped_storage():
                # A master, or the result of an optimizer that does not work in place.
                p.data.copy_(proxy.data)
            if _is_rounded(p) and self._precision.masters:
                self.state[proxy][MASTER] = proxy.data
            proxy.data = proxy.data.new_empty(0)

    def _keep_state(self, part: _Part) -> None:
        """Copy state that is in the scratch, as of an optimizer that keeps a gradient."""
        for proxy, key, value in self._state_tensors(part.proxies):
            if self.scratch is not None and self.scratch.holds(value):
                self.state[proxy][key] = value.clone()

    def _load_proxy(self, p: nn.Parameter, gradients: dict[nn.Parameter, Tensor]) -> None:
        proxy, gradient = self._proxies[p], gradients.pop(p)
        if self._transfer is not None:
            p.grad = None
        if not _is_rounded(p):
            proxy.data, proxy.grad = p.data, gradient.to(p.dtype)
            return
        widened = Tensor.float if self.scratch is None else self.scratch.widened
        gradient = widened(gradient)  # which lets go of it before the weights are copied as well
        master = self.state[proxy].get(MASTER) if proxy in self.state else None
        if master is None:  # the first one is new memory, which is kept
            master = p.data.float().contiguous() if self._precision.masters else widened(p.data)
        proxy.data, proxy.grad = master, gradient

    @contextmanager
    def _widened_state(self, part: _Part) -> Iterator[None]:
        """Within, state that is kept in bfloat16 is float32."""
        narrow = self._precision.state_dtype
        if narrow == torch.float32:
            yield
            return
        kept: dict[tuple[nn.Parameter, str], Tensor] = {}
        for proxy, key, value in self._state_tensors(part.proxies):
            if value.dtype == narrow:
                kept[proxy, key] = value
                self.state[proxy][key] = value.float()
        yield
        for proxy, key, value in self._state_tensors(part.proxies):
            if value.dtype == torch.float32 and _has_state_dtype(key, value):
                place = kept.get((proxy, key))
                place = torch.empty_like(value, dtype=narrow) if place is None else place
                round_stochastically(value, place, self._noise(self._parameters[proxy], salt=key))
                self.state[proxy][key] = place

    @contextmanager
    def _restricted_to(self, part: _Part) -> Iterator[None]:
        """Within, the inner optimizer has the proxies of `part` alone."""
        groups = self.optimizer.param_groups
        whole = [group["params"] for group in groups]
        for group, proxies in zip(groups, part.proxies, strict=True):
            group["params"] = proxies
        try:
            yield
        finally:
            for group, proxies in zip(groups, whole, strict=True):
                group["params"] = proxies

    def _noise(self, p: nn.Parameter, salt: str = "") -> torch.Generator:
        """Random numbers that depend on the seed, the parameter and its number of updates alone."""
        name = f"{self._precision.seed} {self._numbers[p]} {self._group[p]['updates']} {salt}"
        return torch.Generator(p.device).manual_seed(zlib.crc32(name.encode()))

    # -- proxies and parts -----------------------------------------------------------------------

    def _proxy(self, p: nn.Parameter) -> nn.Parameter:
        """A proxy of the parameter's shape, without memory: some optimizers make their state at once."""
        device = self._device or p.device
        dtype = torch.float32 if _is_rounded(p) else p.dtype
        return nn.Parameter(torch.zeros((), dtype=dtype, device=device).expand(p.shape))

    def _part(self, members: list[nn.Parameter]) -> _Part:
        wanted = set(members)
        proxies = [[self._proxies[p] for p in group["params"] if p in wanted] for group in self.param_groups]

        def get() -> Tensors:
            return {(proxy, key): value for proxy, key, value in self._state_tensors(proxies)}

        def put(tensors: Tensors) -> None:
            for (proxy, key), tensor in tensors.items():
                self.state[proxy][key] = tensor

        return _Part(members, proxies, self._stage_of(members[0]), TensorGroup(get, put))

    def _state_tensors(self, proxies: list[list[nn.Parameter]]) -> list[tuple[nn.Parameter, str, Tensor]]:
        """The state of proxies by proxy and name, without step counters and other scalars."""
        return [
            (proxy, key, value)
            for group in proxies
            for proxy in group
            if proxy in self.state
            for key, value in self.state[proxy].items()
            if _has_dimensions(value)
        ]


def part_bytes_within(budget: int) -> int:
    """Return a size of parts of which the state of a few fits into `budget` bytes."""
    return min(PART_BYTES, budget // 8)


def split_into_parts(
    groups: list[dict[str, Any]], part_bytes: int, stage_of: Callable[[nn.Parameter], int]
) -> list[list[nn.Parameter]]:
    """Return the parameters of optimizer groups in parts of at most `part_bytes`, none across stages.

    Within a stage the largest part comes last: what its step adds meets fewest gradients then.
    """
    stages: dict[int, list[nn.Parameter]] = {}
    for group in groups:
        for parameter in group["params"]:
            stages.setdefault(stage_of(parameter), []).append(parameter)
    return [part for index in sorted(stages) for part in sorted(_pack(stages[index], part_bytes), key=_bytes)]


def _pack(parameters: list[nn.Parameter], part_bytes: int) -> list[list[nn.Parameter]]:
    made: list[list[nn.Parameter]] = [[]]
    for parameter in parameters:
        if made[-1] and _bytes([*made[-1], parameter]) > part_bytes:
            made.append([])
        made[-1].append(parameter)
    return made


def _bytes(parameters: list[nn.Parameter]) -> int:
    return sum(p.nbytes for p in parameters)


def state_bytes(
    make: Callable[[list[dict[str, Any]]], Optimizer], precision: Precision, dtype: torch.dtype
) -> float:
    """Return the bytes of optimizer state per parameter of `dtype`, counted on a small one."""
    parameter = nn.Parameter(torch.zeros(64, 1024, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = BlockOptimizer([{"params": [parameter]}], make, precision=precision)
    with torch.compiler.set_stance("force_eager"):  # torchao's optimizers compile their step
        optimizer.step()
    (group,) = optimizer.state_groups(0)
    tensors = group.get().values()
    return sum(part.nbytes for tensor in tensors for part in dense_parts(tensor)) / parameter.numel()


def _copy_settings(source: list[dict[str, Any]], target: list[dict[str, Any]]) -> None:
    """Copy all settings of parameter groups but their parameters."""
    for old, new in zip(source, target, strict=True):
        new.update({key: value for key, value in old.items() if key != "params"})


def _has_dimensions(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _has_state_dtype(key: str, value: Tensor) -> bool:
    quantized = hasattr(value, "__tensor_flatten__")
    return key != MASTER and not quantized and value.dtype in (torch.float32, torch.bfloat16)


def _is_rounded(p: Tensor) -> bool:
    return p.dtype == torch.bfloat16
