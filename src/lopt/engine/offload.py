"""Offload: host memory holds the optimizer state, and if asked for the weights, that no block needs now."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lopt.architectures import base_model
from lopt.core.attach import LoPT
from lopt.engine.host_transfer import HostTransfer, TensorGroup
from lopt.engine.optimizer import BlockOptimizer
from lopt.instruments.memory import free_memory


class Offload:
    """Decides what the device holds in the block-major schedule: one block, or its optimizer state at least.

    Args:
        lopt: the handle on the model.
        device: where it is trained.
        prefetch_bytes: device memory for what is on its way in or out.
        weights: whether weights are offloaded too (`offload="block"`), or optimizer state alone.

    Attributes:
        transfer: moves the tensors; pass it to the optimizer.
        optimizer: that optimizer, to be set when it exists.
        weights: the offload of the weights, None if they stay on the device.
    """

    def __init__(self, lopt: LoPT, device: torch.device, prefetch_bytes: int, weights: bool) -> None:
        self.transfer = HostTransfer(device, prefetch_bytes)
        self.optimizer: BlockOptimizer | None = None
        self.weights = WeightsOffload(lopt, self.transfer) if weights else None

    def enter(self, block: int, learns: bool) -> None:
        """Fetch the weights of block `block` (from 0); prefetch its state if it learns, and the next one."""
        following = self.weights.enter(block) if self.weights is not None else []
        if learns and self.optimizer is not None:
            self.transfer.prefetch(self.optimizer.state_groups(block))
        self.transfer.prefetch(following)

    def leave(self, block: int, learns: bool) -> None:
        """Release the weights of block `block`, which has been stepped if it learns."""
        if self.weights is not None:
            self.weights.leave(block, changed=learns)

    def synchronize(self) -> None:
        """Bring the values of all that is offloaded into host memory."""
        if self.weights is not None:
            self.weights.leave(len(self.weights.blocks) - 1, changed=True)
            self.weights.release_all()
        self.transfer.synchronize()

    def close(self) -> None:
        """Unpin host memory, which otherwise happens when nobody uses model and optimizer any more.

        All values stay in host memory.
        """
        self.synchronize()
        self.transfer.close()


class WeightsOffload:
    """Keeps the large weights of an attached model in host memory except those of the active block.

    Layers, the token embedding and the LM head are offloaded, and from the first optimizer step on a
    block's reconstruction head with it; norms and position embeddings are small and stay. Between
    optimizer steps every offloaded weight is in host memory, so callbacks and checkpoints see the real
    values.

    A forward outside the block-major schedule (evaluation, generation, the head warm-up) fetches all
    weights if the device has room for them, and one layer after the other if not; then it can only run
    without gradients.

    Attributes:
        blocks: the groups of every block, in order.
    """

    def __init__(self, lopt: LoPT, transfer: HostTransfer) -> None:
        self._lopt = lopt
        self._transfer = transfer
        base, blocks = base_model(lopt.model), lopt.blocks
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        self._by_module: dict[nn.Module, TensorGroup] = {}
        offloaded: dict[nn.Parameter, TensorGroup] = {}
        for module in (embedding, *blocks.layers, head):
            own = [p for p in module.parameters() if p not in offloaded]
            # A head tied to the embedding has none of its own.
            group = TensorGroup.of_parameters(own) if own else offloaded[next(module.parameters())]
            offloaded |= dict.fromkeys(own, group)
            self._by_module[module] = group
        self._ends = [self._by_module[embedding], self._by_module[head]]
        self.blocks = [
            [self._by_module[layer] for layer in blocks.layers[block.start : block.stop]] for block in blocks
        ]
        self.blocks[0].insert(0, self._ends[0])
        self.blocks[-1].append(self._ends[1])
        self._learning = dict.fromkeys(offloaded.values(), False)
        self._learning |= {group: True for p, group in offloaded.items() if p.requires_grad}
        self._all_fetched = False
        self._heads_offloaded = False
        for group in self._learning:
            transfer.store(group)
        lopt.offload_device = transfer.device
        _move_rest(lopt.model, offloaded.keys(), transfer.device)
        lopt.hooks.append(blocks.decoder.register_forward_pre_hook(self._before_decoder))
        for layer in blocks.layers:
            lopt.hooks.append(layer.register_forward_pre_hook(self._before_layer))
            lopt.hooks.append(layer.register_forward_hook(self._after_layer))

    @property
    def nbytes(self) -> int:
        """Bytes of all that is offloaded."""
        return sum(group.nbytes for group in self._learning)

    def enter(self, block: int) -> list[TensorGroup]:
        """Fetch the weights of block `block` and return the groups of the next block."""
        if block == 0:
            self.release_all()
            self._offload_heads()
        for group in self.blocks[block]:
            self._transfer.fetch(group)
        return self.blocks[block + 1] if block + 1 < len(self.blocks) else []

    def _offload_heads(self) -> None:
        """Offload each head with its block; before the first optimizer step they warm up together."""
        if self._heads_offloaded:
            return
        self._heads_offloaded = True
        for index, head in enumerate(self._lopt.heads):
            group = TensorGroup.of_parameters(head.parameters())
            self._transfer.store(group)
            self.blocks[index].append(group)
            self._learning[group] = True

    def leave(self, block: int, changed: bool) -> None:
        """Release the weights of block `block`."""
        for group in self.blocks[block]:
            self._transfer.release(group, changed and self._learning[group])

    def fetch_all(self) -> bool:
        """Fetch all weights if the device has room for them; returns whether they are there."""
        if not self._all_fetched and self.nbytes < 0.9 * free_memory(self._transfer.device):
            for group in self._learning:
                self._transfer.fetch(group)
            self._all_fetched = True
        return self._all_fetched

    def release_all(self) -> None:
        """Release all weights; after `fetch_all` anything may have changed them, so their values go out."""
        for group in self._learning:
            self._transfer.release(group, changed=self._all_fetched)
        self._all_fetched = False

    def _before_decoder(self, module: nn.Module, args: tuple) -> None:
        if self._lopt.active_block is not None or self.fetch_all():
            return
        if torch.is_grad_enabled():
            raise RuntimeError("the weights do not fit on the device together: run this without gradients")
        for group in self._ends:
            self._transfer.fetch(group)

    def _before_layer(self, layer: nn.Module, args: tuple) -> None:
        if self._lopt.active_block is None and not self._all_fetched:
            self._transfer.fetch(self._by_module[layer])

    def _after_layer(self, layer: nn.Module, args: tuple, output: Any) -> None:
        if self._lopt.active_block is None and not self._all_fetched:
            self._transfer.release(self._by_module[layer], changed=False)


def _move_rest(model: nn.Module, offloaded: Any, device: torch.device) -> None:
    """Move buffers, and parameters that are not offloaded, to the device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for parameter in model.parameters():
        if parameter not in offloaded:
            parameter.data = parameter.data.to(device)
