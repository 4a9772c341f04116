"""One micro-batch in one stage: a forward of the model in which that stage alone runs.

The layers before the stage return what they are given, its input comes from the stash, and behind it the
forward is ended. Masks, rotary embeddings and layer types stay the library's. A forward without gradients (of
a reference model that shares the weights, of an evaluation) is left alone. In a pipeline it runs the layers
of this process, from the hidden state that the process before has sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lopt.architectures import base_model
from lopt.compat import recompute_forward_only
from lopt.core.attach import LoPT
from lopt.core.blocks import Block
from lopt.core.boundaries import BoundaryReached
from lopt.engine.links import Link
from lopt.engine.random_state import RandomState, random_numbers, random_state, set_random_state
from lopt.engine.stages import Stage, Stages
from lopt.engine.stash import Stash

NO_BLOCK = -1
"""In place of a block's index: a forward that no boundary cuts."""
FIRST_INPUT = -1
"""Place in the stash of the input of block 1's first layer, in the midst of its first stage."""


@dataclass
class Pass:
    """One micro-batch in one stage.

    Attributes:
        with_graph: Gradients are recorded.
        feeds: What the layers of these numbers are given in place of their input, (B, T, H).
        output: (B, T, H) what came out of the stage.
        relays: It is no pass of an optimizer step: all stages of a process in a pipeline, without gradients.
        exact: No local loss is computed, and the gradient by the stage's input is wanted, also at a boundary.
    """

    stage: Stage
    slot: int
    with_graph: bool
    relays: bool = False
    exact: bool = False
    feeds: dict[int, Tensor] = field(default_factory=dict)
    output: Tensor | None = None


class StagePasses:
    """Lets forwards of an attached model run one stage.

    Args:
        lopt: The handle.
        stages: The stages.
        stash: Where their inputs are, and the gradients of those go.
        learns: Returns whether a block learns in this optimizer step, by its index.
        link: To the neighbours in a pipeline, None outside of one.
        own: The stages that this process runs.

    Attributes:
        seed_of: Returns the seed of the random numbers of a micro-batch, by its number.
    """

    def __init__(
        self,
        lopt: LoPT,
        stages: Stages,
        stash: Stash,
        learns: Callable[[int], bool],
        link: Link | None,
        own: Sequence[Stage],
    ) -> None:
        self.seed_of: Callable[[int], int] = lambda slot: slot
        self._lopt = lopt
        self._stages = stages
        self._stash = stash
        self._learns = learns
        self._link = link
        self._whole = _together(own)
        embedding: nn.Module = base_model(lopt.model).get_input_embeddings()
        # What feeds the first layer, but for what has no weights, as rotary embeddings, which layers read.
        front = dict.fromkeys([*lopt.blocks.front, embedding])
        self._front = [module for module in front if next(module.parameters(), None) is not None]
        self._random: dict[tuple[int, int], RandomState] = {}  # before each stage, by stage and micro-batch
        self._pass: Pass | None = None  # that the next forward with gradients is
        self._running: Pass | None = None
        self._own_forwards: dict[Any, Any] = {}
        decoder, layers = lopt.blocks.decoder, lopt.blocks.layers
        # Ahead of the handle's own hooks, which must see the pass and its real input.
        lopt.hooks.append(
            decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True, prepend=True)
        )
        lopt.hooks.append(decoder.register_forward_hook(self._leave_decoder, always_call=True))
        for index, layer in enumerate(layers):
            enter = partial(self._enter_layer, index)
            lopt.hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        lopt.hooks.append(layers[-1].register_forward_hook(self._leave_last_layer))

    @property
    def now(self) -> Pass | None:
        """What the running forward is; None outside of one."""
        return self._running

    def begin_step(self) -> None:
        """Forget the random states of the optimizer step before."""
        self._random.clear()

    @contextmanager
    def running(self, stage: Stage, slot: int, with_graph: bool, exact: bool = False) -> Iterator[Pass]:
        """Within, a forward with gradients on runs `stage` alone."""
        self._pass = Pass(stage, slot, with_graph, exact=exact)
        try:
            with random_numbers(self._lopt.device, self.seed_of(slot)):
                yield self._pass
                self._random.setdefault((stage.index + 1, slot), random_state(self._lopt.device))
        finally:
            self._stop_running()
            self._pass = None

    def _inputs(self, one: Pass) -> dict[int, Tensor]:
        """Return what is fed to layers in this pass: the stage's input, and for a local loss the block's."""
        stage = one.stage
        feeds: dict[int, Tensor] = {}
        if stage.index == 0:
            return feeds
        block = self._lopt.blocks[stage.block]
        if one.with_graph and not one.exact and self._has_local_loss(stage) and stage.start > block.start:
            feeds[block.start] = self._stash.get(self._place_of_input(block), one.slot)
        leaf = self._stash.get(stage.index, one.slot)
        if one.with_graph and (one.exact or self._stages.reaches_back(stage)):
            leaf.requires_grad_()
            leaf.register_post_accumulate_grad_hook(partial(self._keep_gradient, stage.index, one.slot))
        feeds[stage.start] = leaf
        return feeds

    def _has_local_loss(self, stage: Stage) -> bool:
        return stage.closes and stage.block in self._lopt.learning

    def _keeps_first_input(self, one: Pass) -> bool:
        """Return whether a later stage has the local loss of block 1, which is about this input."""
        stage = one.stage
        early = stage.index == 0 and stage.stop > 0 and not stage.closes and not one.with_graph
        return early and 0 in self._lopt.learning and self._learns(0)

    def _place_of_input(self, block: Block) -> int:
        """Return the place in the stash of the input (B, T, H) of a block's first layer."""
        opening: Stage = self._stages.of_block(block.index)[0]
        if opening.index > 0:
            return opening.index
        return 1 if opening.stop == 0 else FIRST_INPUT

    def _keep_gradient(self, stage: int, slot: int, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self._stash.put(stage, slot, leaf.grad)
        leaf.grad = None

    # -- hooks ---------------------------------------------------------------------------------------

    def _enter_decoder(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._stop_running()  # a forward that Ctrl-C has ended
        one = self._pass
        if one is not None and torch.is_grad_enabled():
            one.feeds = self._inputs(one)
            self._lopt.active_block = NO_BLOCK if one.exact else one.stage.block
        elif self._link is not None:
            one = self._relayed(self._link, (*args, *kwargs.values()))
        else:
            return
        layers = self._lopt.blocks.layers
        replaced: dict[Any, Callable[..., Any]] = {
            layer: self._skip_layer for layer in layers[: one.stage.start]
        }
        if one.stage.index > 0:
            replaced |= {module: partial(self._run_empty, module, module.forward) for module in self._front}
        if one.stage.start == len(layers):
            replaced[layers[-1]] = partial(self._skip_to, one.feeds[len(layers)])
        self._running = one
        self._own_forwards = {module: vars(module).get("forward") for module in replaced}
        for module, forward in replaced.items():
            module.forward = forward
        if one.with_graph:
            recompute_forward_only([self._lopt.blocks.decoder, *layers])
        elif not one.relays:
            torch.set_grad_enabled(False)

    def _relayed(self, link: Link, inputs: tuple) -> Pass:
        """Return the pass of a forward without gradients, with its input from the process before.

        Args:
            inputs: Of the decoder, the first of which has the shape (B, T) or (B, T, H).
        """
        one = Pass(self._whole, -1, with_graph=False, relays=True)
        if not link.is_first:
            shape = next(value.shape[:2] for value in inputs if isinstance(value, Tensor))
            link.expect([(shape[0], shape[1])])
            one.feeds[self._whole.start] = link.receive()
        return one

    def _leave_decoder(self, module: Any, args: tuple, output: Any) -> None:
        self._stop_running()

    def _stop_running(self) -> None:
        """Give the model its own forwards back."""
        if self._running is None:
            return
        for module, forward in self._own_forwards.items():
            del module.forward
            if forward is not None:
                module.forward = forward
        if not self._running.relays:
            self._lopt.active_block = None
            torch.set_grad_enabled(True)
        self._running, self._own_forwards = None, {}

    def _enter_layer(self, index: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        one = self._running
        if one is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0 and self._keeps_first_input(one):
            self._stash.put(FIRST_INPUT, one.slot, hidden)
        if index == one.stage.stop and one.stage.index + 1 < len(self._stages):
            one.output = hidden
            raise BoundaryReached
        if index not in one.feeds:
            return None
        if index == one.stage.start:
            self._continue_random(one)
        hidden = one.feeds[index]
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def _continue_random(self, one: Pass) -> None:
        """Go on where the stage before has ended; what feeds the first layer may have drawn some."""
        before = self._random.get((one.stage.index, one.slot))
        if before is not None:  # in a pipeline another process has run it
            set_random_state(self._lopt.device, before)

    def _leave_last_layer(self, module: Any, args: tuple, output: Any) -> None:
        one = self._running
        layers = len(self._lopt.blocks.layers)
        if one is not None and one.stage.start == layers:
            self._continue_random(one)
        if one is not None and one.stage.stop == layers and one.stage.index + 1 < len(self._stages):
            one.output = output[0] if isinstance(output, tuple | list) else output
            raise BoundaryReached

    def _run_empty(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what `forward` of `module` does, with zeros for weights that this stage does not hold.

        No layer reads it, but the decoder computes with it. The zeros take no memory.
        """
        own = [
            (part, name, p) for part in module.modules() for name, p in part.named_parameters(recurse=False)
        ]
        try:
            for part, name, p in own:
                if p.is_floating_point():
                    zero = torch.zeros((), dtype=p.dtype, device=self._lopt.device).expand(p.shape)
                    setattr(part, name, nn.Parameter(zero, requires_grad=False))
            return forward(*args, **kwargs)
        finally:
            for part, name, p in own:
                setattr(part, name, p)

    def _skip_layer(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._lopt.blocks.layer_output(hidden_states)

    def _skip_to(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._skip_layer(hidden)


def _together(stages: Sequence[Stage]) -> Stage:
    """Return stages that follow each other as one; it is the model's first or last if one of them is."""
    first, last = stages[0], stages[-1]
    return replace(last, index=first.index if first.index == 0 else last.index, start=first.start, opens=True)
