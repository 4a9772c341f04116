"""The boundaries of an attached model: hooks by which each block's backward runs inside the forward.

- The decoder is entered: a `Forward` is made, which holds all state of this forward.
- A block's first layer is entered: its input is kept.
- A block's last layer is left: its local loss is computed, its backward run at once, which frees the block's
  graph, and the detached hidden state handed to the next block.
- The decoder is left, also by an error: the `Forward` is dropped.

Where gradients are off (evaluation, generation, a reference's log-probabilities) the hooks do nothing.
`torch.is_grad_enabled()` decides, not `module.training`: a plain loop that forgets `model.train()` would
otherwise train end to end unnoticed.

Local gradients thus exist as soon as a forward ends, before the task loss has its backward. If that backward
never runs (validation without `torch.no_grad()`, a skipped batch, an error), an optimizer's step would apply
local gradients alone. The step raises instead, unless the gradients were cleared in between.
"""

from __future__ import annotations

import functools
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lopt.architectures import base_model
from lopt.compat import capture_paused, recompute_forward_only
from lopt.core.blocks import Block
from lopt.core.routers import RouterLoss
from lopt.losses.rows import Rows

if TYPE_CHECKING:
    from lopt.core.attach import LoPT


class BoundaryReached(Exception):
    """Ends a forward that has gone as far as it needs to; never leaves this package."""


@dataclass
class Forward:
    """All state of one training forward.

    Attributes:
        learns: False if the earlier blocks run without gradients in this forward.
        block_input: (B, T, H) input of the current block, until its local loss is computed.
        losses: The local loss of each block (from 0) that has learned.
        no_grad: Open while earlier blocks run without gradients; closed at the last boundary.
        token: Stands for this forward among those whose loss has had no backward.
        is_watched: True if that backward will be noticed.
    """

    rows: Rows
    routers: RouterLoss
    learns: bool
    block_input: Tensor | None = None
    losses: dict[int, Tensor] = field(default_factory=dict)
    no_grad: ExitStack = field(default_factory=ExitStack)
    token: object = field(default_factory=object)
    is_watched: bool = False


class Boundaries:
    """The hooks of one attached model.

    Attributes:
        hooks: All of them, to be removed.
        losses: The local losses of the last training forward, by block.
        call: The keyword arguments of the running call of the model, which has the labels.
    """

    def __init__(self, handle: LoPT) -> None:
        self._handle = handle
        self._forward: Forward | None = None
        self._unused: set[object] = set()  # tokens of training forwards whose loss had no backward
        self.losses: dict[int, Tensor] = {}
        self.call: dict[str, Any] = {}
        blocks, model, decoder = handle.blocks, handle.model, handle.blocks.decoder
        self.hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._enter_model, with_kwargs=True),
            model.register_forward_hook(self._leave_model, always_call=True),
            decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._leave_decoder, always_call=True),
            handle.blocks.layers[handle.blocks[-1].start].register_forward_hook(self._enter_last_block),
        ]
        _ATTACHED.add(self)
        for block in blocks[:-1]:
            enter = functools.partial(self._enter_block, block)
            leave = functools.partial(self._leave_block, block)
            self.hooks.append(blocks.layers[block.start].register_forward_pre_hook(enter, with_kwargs=True))
            self.hooks.append(blocks.layers[block.stop - 1].register_forward_hook(leave))

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.call = kwargs

    def _leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.call = {}

    def _enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._leave_decoder(module, args, None)  # a forward that Ctrl-C has ended, after which no hook ran
        if not torch.is_grad_enabled():
            return
        handle = self._handle
        rows = Rows.from_call(args, kwargs, self.call)
        recompute_forward_only([module, *handle.blocks.layers])
        if handle.learns_locally:
            handle.local_loss.check(rows)
        self.forget_cleared_gradients()
        config = base_model(handle.model).config.get_text_config()
        routers = RouterLoss(config, len(handle.blocks.layers), handle.router_coefficient)
        self._forward = Forward(rows, routers, handle.learns_locally)
        if not handle.learns_locally:
            self._forward.no_grad.enter_context(torch.no_grad())
        self.losses = self._forward.losses
        handle.current_block = handle.active_block or 0

    def _leave_decoder(self, module: nn.Module, args: tuple, output: Any) -> None:
        forward, self._forward = self._forward, None
        if forward is None:
            return
        forward.no_grad.close()
        if output is not None:
            self._watch(forward, output if isinstance(output, Tensor) else output[0])
        is_counted = output is None or forward.is_watched  # an error, or a backward that will be noticed
        if forward.losses and self._handle.active_block is None and is_counted:
            self._unused.add(forward.token)

    def _enter_block(self, block: Block, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        forward = self._forward
        if forward is not None and forward.learns and self._handle.active_block in (None, block.index):
            forward.block_input = (args[0] if args else kwargs["hidden_states"]).detach()

    def _leave_block(self, block: Block, module: nn.Module, args: tuple, output: Any) -> Any:
        forward, handle = self._forward, self._handle
        if forward is None:
            return None
        if not forward.learns:
            if block.index == len(handle.blocks) - 2:  # the last boundary: the last block always learns
                forward.no_grad.close()
            return None
        if handle.active_block not in (None, block.index):
            return None
        hidden = output[0] if isinstance(output, tuple | list) else output
        if block.index in handle.learning:
            self._learn(forward, block, hidden)
        else:
            forward.routers.release()
        handle.current_block = block.index + 1
        return (hidden.detach(), *output[1:]) if isinstance(output, tuple | list) else hidden.detach()

    def _learn(self, forward: Forward, block: Block, hidden: Tensor) -> None:
        """Compute the block's local loss and run its whole backward, after which its graph is gone."""
        handle = self._handle
        assert forward.block_input is not None
        if handle.on_boundary is not None:
            handle.on_boundary(block.index, hidden.detach(), forward.block_input, forward.rows.mask)
        prediction = handle.heads[block.index](hidden, forward.rows)
        loss = handle.local_loss.loss(prediction, hidden, forward.block_input, forward.rows)
        forward.losses[block.index] = loss.detach()
        weighted = handle.config.local_weight(handle.learners) * loss
        balance = forward.routers.take(forward.rows.mask)
        if balance is not None:
            weighted = weighted + balance
        # Recomputed layers must not be captured a second time, and a backward runs outside autocast.
        with capture_paused(), torch.autocast(hidden.device.type, enabled=False):
            (handle.loss_scale * weighted).backward()
        forward.routers.release()
        torch.clear_autocast_cache()  # or the casts of this block's weights would stay to the forward's end
        forward.block_input = None
        if handle.after_local_backward is not None:
            handle.after_local_backward(block.index)

    def _enter_last_block(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._forward is not None:  # a loss on hidden states inside the last block passes here as well
            self._watch(self._forward, output[0] if isinstance(output, tuple | list) else output)

    def _watch(self, forward: Forward, hidden: Tensor) -> None:
        """Notice the backward of this forward's loss when it passes `hidden`."""
        if forward.losses and hidden.requires_grad:
            forward.is_watched = True
            hidden.register_hook(lambda gradient, token=forward.token: self._unused.discard(token))

    def forget_cleared_gradients(self) -> None:
        """Forget forwards without a backward if their local gradients were cleared."""
        if self._unused and not self._local_gradients():
            self.forget_unused()

    def forget_unused(self) -> None:
        """Forget forwards without a backward, so that no step is refused for them."""
        self._unused.clear()

    def _local_gradients(self) -> set[int]:
        """Return the ids of the earlier blocks' parameters that have a gradient, not all of it zero."""
        parameters = (p for index in self._handle.learning for p in self._handle.block_parameters(index))
        given = ((id(p), p.grad) for p in parameters if p.grad is not None)
        # Ranks see different parts of a sharded gradient, so its values do not decide.
        return {key for key, gradient in given if isinstance(gradient, DTensor) or gradient.any()}

    def check_step(self, optimizer: Optimizer) -> None:
        """Raise a ValueError if `optimizer` would step local gradients whose forward had no backward."""
        if not self._unused:
            return
        if self._local_gradients() & {id(p) for group in optimizer.param_groups for p in group["params"]}:
            raise ValueError(
                f"{len(self._unused)} of the forwards with gradients on had no backward of its loss, and "
                "this step would use the gradients of its local losses: run validation under "
                "torch.no_grad(), or call optimizer.zero_grad() after a forward whose loss is not used"
            )


_ATTACHED: weakref.WeakSet[Boundaries] = weakref.WeakSet()


def _before_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    for boundaries in list(_ATTACHED):
        boundaries.check_step(optimizer)


register_optimizer_step_pre_hook(_before_step)  # of every optimizer in the process
