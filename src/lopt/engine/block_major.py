"""The block-major schedule: all micro-batches of an optimizer step pass through one block at a time.

A block's gradient is final when its own backward is done. So block 1 can take all micro-batches, be clipped,
stepped and offloaded, and only then block 2 begins, fed by the boundaries that were stashed.

Each pass is a forward of the model as the caller makes it, in which one block runs: the layers of the blocks
before it return what they are given, and its own input is taken from the stash. Masks, rotary embeddings and
layer types stay the library's.
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

    For each block in order: `enter` it, run every micro-batch through it (`run_early`, and for the last block
    `last_block`), clip and step it, `leave` it; then `end_step`. docs/memory.md has a whole loop.

    Args:
        lopt: The handle.
        offload: Moves what the current block does not need to host memory; None moves nothing.

    Attributes:
        stash: For each micro-batch the output (B, T, H) of the last block that it went through; in host
            memory if weights are offloaded.
    """

    def __init__(self, lopt: LoPT, offload: Offload | None = None) -> None:
        self.stash: dict[int, Tensor] = HostStash() if offload and offload.weights else {}
        self._lopt = lopt
        self._offload = offload
        self._embedding: Any = base_model(lopt.model).get_input_embeddings()
        self._slot = 0
        self._beside: tuple[None, ...] | None = None  # what layers return beside a hidden state, if tuples
        layers = lopt.blocks.layers
        for block in lopt.blocks[1:]:
            # Ahead of the handle's own hook, which must see the real input.
            feed = layers[block.start].register_forward_pre_hook(
                self._input_hook(block), with_kwargs=True, prepend=True
            )
            lopt.hooks.append(feed)
        for block in lopt.blocks[:-1]:
            lopt.hooks.append(layers[block.stop - 1].register_forward_hook(self._output_hook(block)))

    def enter(self, block: Block) -> None:
        """Prepare `block`: all micro-batches pass through it next."""
        if self._offload is not None:
            self._offload.enter(block.index, self._learns(block))

    def leave(self, block: Block) -> None:
        """Put `block` away, after its step if it learns in this optimizer step."""
        if self._offload is not None:
            self._offload.leave(block.index, self._learns(block))

    def end_step(self) -> None:
        """Finish the optimizer step, after the last block's; offloaded weights are in host memory then."""
        if self._offload is not None:
            self._offload.synchronize()

    def run_early(self, block: Block, slot: int, forward: Callable[[], Any]) -> Tensor | None:
        """Run micro-batch `slot` through an earlier block, with its local backward if it learns.

        Args:
            block: An earlier block.
            slot: Number of the micro-batch.
            forward: Calls the model on the micro-batch; the call is ended at the block's boundary.

        Returns:
            The local loss, detached and not weighted; None if the block does not learn.
        """
        learns = self._learns(block)
        with self._running(block, slot), torch.set_grad_enabled(learns), suppress(BoundaryReached):
            forward()
        return self._lopt.local_losses()[0] if learns else None

    @contextmanager
    def last_block(self, slot: int) -> Iterator[None]:
        """Within, a forward of the model runs the last block alone, on micro-batch `slot`."""
        with self._running(self._lopt.blocks[-1], slot):
            yield
        del self.stash[slot]

    def _learns(self, block: Block) -> bool:
        is_last = block.index == len(self._lopt.blocks) - 1
        return is_last or (self._lopt.learns_locally and block.index in self._lopt.learning)

    @contextmanager
    def _running(self, block: Block, slot: int) -> Iterator[None]:
        """Within, a forward runs `block` alone: replaced `forward` methods skip what comes before it."""
        self._slot, self._lopt.active_block = slot, block.index
        replaced: dict[Any, Callable[..., Any]] = {
            layer: self._skip_layer for layer in self._lopt.blocks.layers[: block.start]
        }
        if replaced:
            replaced[self._embedding] = self._skip_embedding
        own: dict[Any, Any] = {module: vars(module).get("forward") for module in replaced}
        for module, forward in replaced.items():
            module.forward = forward
        try:
            yield
        finally:
            self._lopt.active_block = None
            for module, forward in own.items():
                del module.forward
                if forward is not None:
                    module.forward = forward

    def _skip_embedding(self, input_ids: Tensor) -> Tensor:
        """Return zeros (B, T, E) in place of an embedding that no layer reads."""
        weight = self._embedding.weight
        return weight.new_zeros((*input_ids.shape, weight.shape[1]), device=input_ids.device)

    def _skip_layer(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self._beside is None else (hidden_states, *self._beside)

    def _input_hook(self, block: Block) -> Callable[..., Any]:
        def take_from_stash(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
            if self._lopt.active_block != block.index:
                return None
            hidden = self.stash[self._slot]
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return take_from_stash

    def _output_hook(self, block: Block) -> Callable[..., None]:
        def stash(module: Any, args: tuple, output: Any) -> None:
            if self._lopt.active_block == block.index:
                in_tuple = isinstance(output, tuple | list)
                # Block 1 comes first, before any layer is skipped.
                self._beside = (None,) * (len(output) - 1) if in_tuple else None
                self.stash[self._slot] = output[0] if in_tuple else output
                raise BoundaryReached

        return stash


class HostStash(dict[int, Tensor]):
    """Boundaries in host memory; on a GPU pinned, and copied on the computation's own stream."""

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
