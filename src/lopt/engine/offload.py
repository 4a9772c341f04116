"""`--offload`: host memory holds what the device does not need now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lopt.architectures import base_model
from lopt.core.attach import LoPT
from lopt.engine.host_transfer import Cargo, Conveyor
from lopt.engine.optimizer import BlockOptimizer
from lopt.instruments.memory import in_host_memory


class Offload:
    """What the device holds in the block-major schedule: one block, or its optimizer state at least.

    Args:
        lopt: the handle on the model.
        device: where it is trained.
        ahead: bytes of device memory for what is on its way in or out.
        weights: whether weights travel as well (`block`), or optimizer state alone (`optimizer`).

    Attributes:
        conveyor: for the optimizer, whose state it moves.
        optimizer: that optimizer, as soon as there is one.
        weights: the weights that travel, if they do.
    """

    def __init__(self, lopt: LoPT, device: torch.device, ahead: int, weights: bool) -> None:
        self.conveyor = Conveyor(device, ahead)
        self.optimizer: BlockOptimizer | None = None
        self.weights = WeightsOffload(lopt, self.conveyor) if weights else None

    def enter(self, block: int, learns: bool) -> None:
        """Block `block` (from 0) is next: its weights come in, ahead of time its state and what follows."""
        following = self.weights.enter(block) if self.weights is not None else []
        if learns and self.optimizer is not None:
            self.conveyor.expect(self.optimizer.state_cargo(block))
        self.conveyor.expect(following)

    def leave(self, block: int, learns: bool) -> None:
        """Block `block` is done, and stepped if it learns."""
        if self.weights is not None:
            self.weights.leave(block, changed=learns)

    def settle(self) -> None:
        """Until host memory holds the values of all that travels."""
        if self.weights is not None:
            self.weights.leave(len(self.weights.blocks) - 1, changed=True)
            self.weights.rest()
        self.conveyor.settle()


class WeightsOffload:
    """Keeps the large weights of an attached model in host memory but for the block at work.

    Layers, the token embedding and the LM head travel, and from the first optimizer step on a block's
    reconstruction head with it; norms and position embeddings are small and stay. Between optimizer
    steps every weight that travels is in host memory, so callbacks and checkpoints see the real values.

    A forward outside a stage of the block-major schedule (evaluation, generation, the head warm-up)
    brings all weights in if the device has room for them, and one layer after the other if not; then
    it can only run without gradients.
    """

    def __init__(self, lopt: LoPT, conveyor: Conveyor) -> None:
        self._lopt = lopt
        self._conveyor = conveyor
        base, blocks = base_model(lopt.model), lopt.blocks
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        self._by_module: dict[nn.Module, Cargo] = {}
        seen: dict[nn.Parameter, Cargo] = {}
        for module in (embedding, *blocks.layers, head):
            own = [p for p in module.parameters() if p not in seen]
            cargo = _weights(own) if own else seen[next(module.parameters())]  # a head tied to the embedding
            seen |= dict.fromkeys(own, cargo)
            self._by_module[module] = cargo
        self._ends = [self._by_module[embedding], self._by_module[head]]
        self.blocks = [
            [self._by_module[layer] for layer in blocks.layers[block.start : block.stop]] for block in blocks
        ]
        self.blocks[0].insert(0, self._ends[0])
        self.blocks[-1].append(self._ends[1])
        self._learning = {c: any(p.requires_grad for p in seen if seen[p] is c) for c in seen.values()}
        self._whole = False
        self._heads_travel = False
        for cargo in self._learning:
            conveyor.store(cargo)
        lopt.offload_device = conveyor.device
        _rest_on(lopt.model, conveyor.device)
        lopt.hooks.append(blocks.decoder.register_forward_pre_hook(self._before_decoder))
        for layer in blocks.layers:
            lopt.hooks.append(layer.register_forward_pre_hook(self._before_layer))
            lopt.hooks.append(layer.register_forward_hook(self._after_layer))

    @property
    def nbytes(self) -> int:
        """Bytes of all that travels."""
        return sum(cargo.nbytes for cargo in self._learning)

    def enter(self, block: int) -> list[Cargo]:
        """Weights of block `block` onto the device; returns those of the next block."""
        if block == 0:
            self.rest()
            self._let_heads_travel()
        for cargo in self.blocks[block]:
            self._conveyor.take(cargo)
        return self.blocks[block + 1] if block + 1 < len(self.blocks) else []

    def _let_heads_travel(self) -> None:
        """Each head with its block; before, they warm up together."""
        if self._heads_travel:
            return
        self._heads_travel = True
        for index, head in enumerate(self._lopt.heads):
            cargo = _weights(list(head.parameters()))
            self._conveyor.store(cargo)
            self.blocks[index].append(cargo)
            self._learning[cargo] = True

    def leave(self, block: int, changed: bool) -> None:
        """Weights of block `block` off the device."""
        for cargo in self.blocks[block]:
            self._conveyor.give_back(cargo, changed and self._learning[cargo])

    def bring_in(self) -> bool:
        """All weights onto the device, if it has room for them; says whether it did."""
        if not self._whole and self.nbytes < free_device_memory(self._conveyor.device):
            for cargo in self._learning:
                self._conveyor.take(cargo)
            self._whole = True
        return self._whole

    def rest(self) -> None:
        """All weights in host memory; those of a whole model go out, whoever may have changed them."""
        for cargo in self._learning:
            self._conveyor.give_back(cargo, changed=self._whole)
        self._whole = False

    def _before_decoder(self, module: nn.Module, args: tuple) -> None:
        if self._lopt.active_block is not None or self.bring_in():
            return
        if torch.is_grad_enabled():
            raise RuntimeError("the weights do not fit on the device together: run this without gradients")
        for cargo in self._ends:
            self._conveyor.take(cargo)

    def _before_layer(self, layer: nn.Module, args: tuple) -> None:
        if self._lopt.active_block is None and not self._whole:
            self._conveyor.take(self._by_module[layer])

    def _after_layer(self, layer: nn.Module, args: tuple, output: Any) -> None:
        if self._lopt.active_block is None and not self._whole:
            self._conveyor.give_back(self._by_module[layer], changed=False)


def free_device_memory(device: torch.device) -> float:
    """Bytes that can still be allocated on a GPU, nine tenths of them; without limit on a CPU."""
    if device.type != "cuda":
        return float("inf")
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 0.9 * (free + cached)


def _weights(parameters: list[nn.Parameter]) -> Cargo:
    def put(tensors: list[Tensor]) -> None:
        for parameter, tensor in zip(parameters, tensors, strict=True):
            parameter.data = tensor

    return Cargo(lambda: [parameter.data for parameter in parameters], put)


def _rest_on(model: nn.Module, device: torch.device) -> None:
    """Move what does not travel (it is not marked as host memory) to the device."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer is not None:
                setattr(module, name, buffer.to(device))
    for parameter in model.parameters():
        if not in_host_memory(parameter):
            parameter.data = parameter.data.to(device)
