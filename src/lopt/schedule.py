"""The block-major schedule: all micro-batches of an optimizer step pass through one block at a time.

A block's gradient is final when its own backward is done, so block 1 can take all micro-batches, be
clipped, stepped and put away, and only then block 2 comes, fed by the boundaries that were stashed.

Each stage is a forward of the model as the caller makes it, of which one block runs: the layers of
the blocks before it hand on what they are given, and its own input is taken from the stash. Masks,
rotary embeddings and layer types stay the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor

from lopt.attach import BoundaryReached, LoPT
from lopt.blocks import Block


class BlockMajor:
    """Runs the blocks of an attached model one at a time.

    Attributes:
        stash: for each micro-batch the output (B, T, H) of the block it went through last.
    """

    def __init__(self, lopt: LoPT) -> None:
        self.stash: dict[int, Tensor] = {}
        self._lopt = lopt
        self._slot = 0
        self._tuples = False
        for block in lopt.blocks[1:]:
            first = lopt.blocks.first_layer(block)
            # Ahead of the handle's own hook, which must see the real input.
            hook = first.register_forward_pre_hook(self._feed(block), with_kwargs=True, prepend=True)
            lopt.hooks.append(hook)
        for block in lopt.blocks[:-1]:
            lopt.hooks.append(lopt.blocks.last_layer(block).register_forward_hook(self._keep(block)))

    def run_early(self, block: Block, slot: int, forward: Callable[[], Any]) -> Tensor:
        """Let micro-batch `slot` pass through an earlier block, with its local backward.

        Args:
            forward: calls the model on the micro-batch; it is ended at the block's boundary.

        Returns:
            The local loss, detached, not weighted.
        """
        with self._only(block, slot), suppress(BoundaryReached):
            forward()
        (loss,) = self._lopt.local_losses()
        return loss

    @contextmanager
    def last_block(self, slot: int) -> Iterator[None]:
        """Within, a forward of the model runs the last block alone on micro-batch `slot`."""
        with self._only(self._lopt.blocks[-1], slot):
            yield
        del self.stash[slot]

    @contextmanager
    def _only(self, block: Block, slot: int) -> Iterator[None]:
        self._slot, self._lopt.only = slot, block.index
        before = self._lopt.blocks.layers[: block.start]
        own = [vars(layer).get("forward") for layer in before]
        for layer in before:
            layer.forward = self._hand_on
        try:
            yield
        finally:
            self._lopt.only = None
            for layer, forward in zip(before, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _hand_on(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if self._tuples else hidden_states

    def _feed(self, block: Block) -> Callable[..., Any]:
        def feed(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            if self._lopt.only != block.index:
                return None
            hidden = self.stash[self._slot]
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return feed

    def _keep(self, block: Block) -> Callable[..., None]:
        def keep(module: Any, args: tuple, output: Any) -> None:
            if self._lopt.only == block.index:
                self._tuples = isinstance(output, tuple)  # block 1 comes first, before any layer hands on
                self.stash[self._slot] = output[0] if self._tuples else output
                raise BoundaryReached

        return keep
