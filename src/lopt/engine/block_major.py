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

import torch
from torch import Tensor

from lopt.architectures import base_model
from lopt.core.attach import LoPT
from lopt.core.blocks import Block
from lopt.core.boundaries import BoundaryReached
from lopt.engine.offload import Offload
from lopt.instruments.memory import host_tensor


class BlockMajor:
    """Runs the blocks of an attached model one at a time.

    For each block in order: `enter` it, let every micro-batch pass (`run_early`, and for the last block
    `last_block`), clip and step it, `leave` it; then `end_step`. docs/memory.md has a whole loop.

    Args:
        lopt: the handle.
        offload: moves what the block at work does not need to host memory.

    Attributes:
        stash: for each micro-batch the output (B, T, H) of the block it went through last; in host
            memory if weights are.
    """

    def __init__(self, lopt: LoPT, offload: Offload | None = None) -> None:
        self.stash: dict[int, Tensor] = HostStash() if offload and offload.weights else {}
        self._lopt = lopt
        self._offload = offload
        self._embedding: Any = base_model(lopt.model).get_input_embeddings()
        self._slot = 0
        self._tuples = False
        for block in lopt.blocks[1:]:
            first = lopt.blocks.layers[block.start]
            # Ahead of the handle's own hook, which must see the real input.
            hook = first.register_forward_pre_hook(self._feed(block), with_kwargs=True, prepend=True)
            lopt.hooks.append(hook)
        for block in lopt.blocks[:-1]:
            lopt.hooks.append(lopt.blocks.layers[block.stop - 1].register_forward_hook(self._keep(block)))

    def enter(self, block: Block) -> None:
        """All micro-batches go through `block` next."""
        if self._offload is not None:
            self._offload.enter(block.index, self._learns(block))

    def leave(self, block: Block) -> None:
        """They have, and the block has been stepped, if it learns in this optimizer step."""
        if self._offload is not None:
            self._offload.leave(block.index, self._learns(block))

    def end_step(self) -> None:
        """The last block has been stepped: weights that travel are in host memory."""
        if self._offload is not None:
            self._offload.settle()

    def _learns(self, block: Block) -> bool:
        rests = not self._lopt.learns_locally or block.index not in self._lopt.learning
        return not rests or block.index == len(self._lopt.blocks) - 1

    def run_early(self, block: Block, slot: int, forward: Callable[[], Any]) -> Tensor | None:
        """Let micro-batch `slot` pass through an earlier block, with its local backward if it learns.

        Args:
            forward: calls the model on the micro-batch; it is ended at the block's boundary.

        Returns:
            The local loss, detached, not weighted; None if the block does not learn.
        """
        learns = self._learns(block)
        with self._only(block, slot), torch.set_grad_enabled(learns), suppress(BoundaryReached):
            forward()
        return self._lopt.local_losses()[0] if learns else None

    @contextmanager
    def last_block(self, slot: int) -> Iterator[None]:
        """Within, a forward of the model runs the last block alone on micro-batch `slot`."""
        with self._only(self._lopt.blocks[-1], slot):
            yield
        del self.stash[slot]

    @contextmanager
    def _only(self, block: Block, slot: int) -> Iterator[None]:
        self._slot, self._lopt.active_block = slot, block.index
        stand_ins: dict[Any, Callable[..., Any]] = {
            layer: self._hand_on for layer in self._lopt.blocks.layers[: block.start]
        }
        if stand_ins:
            stand_ins[self._embedding] = self._no_embedding
        own: dict[Any, Any] = {module: vars(module).get("forward") for module in stand_ins}
        for module, forward in stand_ins.items():
            module.forward = forward
        try:
            yield
        finally:
            self._lopt.active_block = None
            for module, forward in own.items():
                del module.forward
                if forward is not None:
                    module.forward = forward

    def _no_embedding(self, input_ids: Tensor) -> Tensor:
        """In place of an embedding that nobody reads: zeros (B, T, E)."""
        weight = self._embedding.weight
        return weight.new_zeros((*input_ids.shape, weight.shape[1]), device=input_ids.device)

    def _hand_on(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if self._tuples else hidden_states

    def _feed(self, block: Block) -> Callable[..., Any]:
        def feed(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            if self._lopt.active_block != block.index:
                return None
            hidden = self.stash[self._slot]
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return feed

    def _keep(self, block: Block) -> Callable[..., None]:
        def keep(module: Any, args: tuple, output: Any) -> None:
            if self._lopt.active_block == block.index:
                self._tuples = isinstance(output, tuple)  # block 1 comes first, before any layer hands on
                self.stash[self._slot] = output[0] if self._tuples else output
                raise BoundaryReached

        return keep


class HostStash(dict[int, Tensor]):
    """Boundaries in host memory: pinned and copied on the computation's own stream if that is a GPU's."""

    def __init__(self) -> None:
        super().__init__()
        self._device = torch.device("cpu")

    def __setitem__(self, slot: int, boundary: Tensor) -> None:
        self._device = boundary.device
        on_gpu = self._device.type == "cuda"
        copy = host_tensor(lambda: torch.empty_like(boundary, device="cpu", pin_memory=on_gpu))
        super().__setitem__(slot, copy.copy_(boundary, non_blocking=True))

    def __getitem__(self, slot: int) -> Tensor:
        host = super().__getitem__(slot)
        return torch.empty_like(host, device=self._device).copy_(host, non_blocking=True)
