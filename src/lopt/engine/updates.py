"""Clip and step stages when their gradients are final.

The norm that a gradient is clipped by is that of its block, or of all blocks (`LoPTConfig.clip`), however
many stages there are: what the device holds must not change what is learned. Where that norm is known only
after other stages have had their backward, a final gradient waits; if weights are offloaded, in host memory.
Without clipping, and in a block of one stage, nothing waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from lopt.core.attach import LoPT
from lopt.engine.clipping import total_norm
from lopt.engine.host_optimizer import HostOptimizer
from lopt.engine.host_transfer import TensorGroup, Tensors
from lopt.engine.offload import Offload
from lopt.engine.optimizer import BlockOptimizer
from lopt.engine.stages import Stage, Stages


class Updates:
    """Clips and steps the stages of one model.

    Args:
        lopt: The handle.
        stages: Its stages.
        optimizer: Made with `stages.owner`; trainers set it when it exists.
        offload: Where weights and optimizer state are; None if they are on the device.
        max_norm: Norm to clip to; infinity clips nothing.

    Attributes:
        norms: Of this optimizer step the norm of each block's gradient before clipping, (), by block.
        stepped: Blocks that have been stepped, at least in part, in this optimizer step.
        reduce: Called with the parameters whose gradients are final on this process: averages them over
            processes.
        before_step: Called with the norms (k,) of all blocks, 0 of those that are not stepped now.
    """

    def __init__(
        self,
        lopt: LoPT,
        stages: Stages,
        optimizer: BlockOptimizer | None = None,
        offload: Offload | None = None,
        max_norm: float = math.inf,
    ) -> None:
        self.stages = stages
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.norms: dict[int, Tensor] = {}
        self.stepped: list[int] = []
        self.reduce: Callable[[list[nn.Parameter]], None] = lambda parameters: None
        self.before_step: Callable[[Tensor], None] = lambda norms: None
        self._lopt = lopt
        self._offload = offload if offload is not None and offload.weights is not None else None
        self._parameter_norms: dict[nn.Parameter, Tensor] = {}
        self._waiting: dict[int, WaitingGradients] = {}
        self._shared = WaitingGradients(self._offload)
        self._held: list[Stage] = []  # final, and not stepped yet

    def begin(self) -> None:
        """Begin an optimizer step; gradients of one that an error has ended are dropped."""
        self.norms, self.stepped, self._held = {}, [], []
        self._parameter_norms.clear()
        for waiting in (*self._waiting.values(), self._shared):
            waiting.hand_over()
        for stage in self.stages:
            for parameter in self.stages.parameters(stage):
                parameter.grad = None

    def stage_done(self, stage: Stage) -> None:
        """Take over the final gradients of `stage`, whose weights are on the device."""
        parameters = self.stages.parameters(stage)
        self.reduce(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                self._parameter_norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        if parameters:
            self._held.append(stage)
        block_done = not self.stages.reaches_back(stage)
        if block_done:
            self.norms[stage.block] = self._norm(stage.block)
        if self.max_norm == math.inf or (block_done and self._lopt.config.clip == "block"):
            self._step_held()

    def steps_at_once(self, stage: Stage) -> bool:
        """Return whether `stage` is stepped as soon as its gradient is final, which it is on this visit."""
        if not self.stages.parameters(stage) or self._lopt.config.optimizer_device == "cpu":
            return False
        known = self._lopt.config.clip == "block" and not self.stages.reaches_back(stage)
        return self.max_norm == math.inf or known

    def put_away(self) -> None:
        """Move gradients of offloaded weights to host memory, before the device turns to another stage.

        These are final gradients that wait for a norm, and those of a matrix that an earlier stage owns.
        """
        if self._offload is None:
            return
        for stage in self._held:
            self._waiting_of(stage).take(self.stages.parameters(stage))
        if self._offload.stage is not None:
            self._shared.take(self.stages.borrowed(self._offload.stage))

    def return_shared(self, stage: Stage) -> None:
        """Give parameters of `stage` the gradients that later stages have left for them."""
        self._shared.give(self.stages.parameters(stage))

    def finish(self) -> Tensor:
        """Step what waited for the norm of all blocks; return the norms (k,) of all blocks, 0 without one."""
        self._step_held()
        return self._of_all_blocks(self.norms)

    def _of_all_blocks(self, norms: dict[int, Tensor]) -> Tensor:
        zero = torch.zeros((), device=self._lopt.device)
        return torch.stack([norms.get(block.index, zero) for block in self._lopt.blocks])

    def _waiting_of(self, stage: Stage) -> WaitingGradients:
        return self._waiting.setdefault(stage.index, WaitingGradients(self._offload))

    def _norm(self, block: int) -> Tensor:
        """Return the norm of the gradients of a block that are final."""
        norms = self._parameter_norms
        given = [norms[p] for p in self._lopt.block_parameters(block) if p in norms]
        return total_norm(given, self._lopt.device)

    def _step_held(self) -> None:
        """Clip and step all stages that wait, from the first on, which the device holds in most cases."""
        held, self._held = sorted(self._held, key=lambda stage: stage.index), []
        norms = {block: self._norm(block) for block in dict.fromkeys(stage.block for stage in held)}
        if not held:
            return
        self.before_step(self._of_all_blocks(norms))
        whole = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        self.stepped += [block for block in norms if block not in self.stepped]
        for number, stage in enumerate(held):
            self._held = held[number + 1 :]
            norm = whole if self._lopt.config.clip == "global" else norms[stage.block]
            following = held[number + 1] if number + 1 < len(held) else None
            if self._offload is None or self._offload.host is None:
                self._step(stage, norm, following)
            else:
                self._submit(stage, norm, self._offload.host)

    def _step(self, stage: Stage, norm: Tensor, following: Stage | None) -> None:
        parameters = self.stages.parameters(stage)
        if self._offload is not None:
            if self._offload.stage is not stage:
                self.put_away()
                self._offload.enter(stage, will_step=True, following=following)
            self._waiting_of(stage).give(parameters)
        given = [p for p in parameters if p.grad is not None]
        if self.max_norm != math.inf and given:
            clip_grads_with_norm_(given, self.max_norm, norm)
        assert self.optimizer is not None, "the optimizer is set before the first step"
        self.optimizer.step_stage(stage.index)
        for parameter in parameters:
            parameter.grad = None
        if self._offload is not None:
            self._offload.has_changed()

    def _submit(self, stage: Stage, norm: Tensor, host: HostOptimizer) -> None:
        assert self._offload is not None and self._offload.weights is not None
        waiting = self._waiting_of(stage)
        waiting.take(self.stages.parameters(stage))
        if self._offload.stage is stage:
            self.put_away()
            self._offload.leave()
        gradients, arrived = waiting.hand_over()
        if gradients:
            weights = self._offload.weights.stepped(stage, gradients)
            clipped = None if self.max_norm == math.inf else norm
            host.submit(stage.index, gradients, arrived, weights, self.max_norm, clipped)


class WaitingGradients:
    """Gradients in host memory.

    Args:
        offload: Moves them; None if nothing ever waits.
    """

    def __init__(self, offload: Offload | None) -> None:
        self._offload = offload
        self._values: Tensors = {}
        self._arrived: torch.cuda.Event | None = None
        self._group = TensorGroup(lambda: dict(self._values), lambda tensors: self._values.update(tensors))

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the gradients of `parameters` away, where there are any."""
        values: Tensors = {p: p.grad for p in parameters if p.grad is not None}
        if not values:
            return
        assert self._offload is not None
        for parameter in values:
            parameter.grad = None
        self._values = values
        self._arrived = self._offload.transfer.send(self._group)

    def hand_over(self) -> tuple[Tensors, torch.cuda.Event | None]:
        """Return the gradients in host memory by parameter, and what has passed when they are there."""
        values, self._values = self._values, {}
        return values, self._arrived

    def give(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give `parameters` on the device the gradients that were taken from them."""
        own = [p for p in parameters if p in self._values]
        if not own:
            return
        assert self._offload is not None
        self._offload.transfer.fetch(self._group)
        for parameter in own:
            parameter.grad = self._values[parameter]
        self._values = {}
