"""Offload: host memory holds the optimizer state, and if asked for the weights, that no stage needs now."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lopt.core.attach import LoPT
from lopt.engine.host_optimizer import HostOptimizer
from lopt.engine.host_transfer import HostTransfer, TensorGroup
from lopt.engine.optimizer import BlockOptimizer
from lopt.engine.stages import Stage, Stages
from lopt.instruments.memory import free_memory


class Offload:
    """Decides what the device holds in the block-major schedule: one stage, or its optimizer state at least.

    Args:
        lopt: the handle on the model.
        stages: its stages.
        device: where it is trained.
        prefetch_bytes: device memory for what is on its way in or out.
        weights: whether weights are offloaded too (`offload="block"`), or optimizer state alone.

    Attributes:
        transfer: moves the tensors; pass it to an optimizer that steps on the device.
        optimizer: that optimizer, to be set when it exists; None if none steps on the device.
        host: steps in host memory; None if the device steps.
        weights: the offload of the weights, None if they stay on the device.
        stage: the stage that the device works on; None between optimizer steps.
    """

    def __init__(
        self, lopt: LoPT, stages: Stages, device: torch.device, prefetch_bytes: int, weights: bool
    ) -> None:
        self.transfer = HostTransfer(device, prefetch_bytes)
        self.optimizer: BlockOptimizer | None = None
        self.host: HostOptimizer | None = None
        self.weights = WeightsOffload(lopt, stages, self.transfer) if weights else None
        self.stage: Stage | None = None
        self._changed = False

    @classmethod
    def of_config(cls, lopt: LoPT, stages: Stages, device: torch.device) -> Offload | None:
        """Return the offload that the config of `lopt` asks for; None if everything stays on the device."""
        config = lopt.config
        if config.offload == "none":
            return None
        return cls(lopt, stages, device, int(config.prefetch_gib * 2**30), weights=config.offload == "block")

    def enter(self, stage: Stage, will_step: bool, following: Stage | None) -> None:
        """Turn to `stage` and fetch its weights; the stage before is released.

        Its state is prefetched if it is stepped now, and then the weights of `following`.
        """
        if stage is not self.stage:
            self.leave()
            self.stage = stage
            if self.weights is not None:
                self.weights.enter(stage)
        if will_step and self.optimizer is not None:
            self.transfer.prefetch(self.optimizer.state_groups(stage.index))
        if following is not None and self.weights is not None:
            self.transfer.prefetch(self.weights.groups(following))

    def has_changed(self) -> None:
        """Note that the weights of the present stage have been stepped on the device."""
        self._changed = True

    def leave(self) -> None:
        """Release the weights of the present stage."""
        if self.weights is not None and self.stage is not None:
            self.weights.leave(self.stage, self._changed)
        self.stage, self._changed = None, False

    def end_step(self) -> None:
        """End an optimizer step."""
        self.leave()
        self.transfer.synchronize()

    def synchronize(self) -> None:
        """Bring the values of all that is offloaded into host memory."""
        self.leave()
        if self.weights is not None:
            self.weights.release_all()
        self.transfer.synchronize()
        if self.host is not None:
            self.host.wait()

    def close(self) -> None:
        """Unpin host memory, which otherwise happens when nobody uses model and optimizer any more.

        All values stay in host memory.
        """
        self.synchronize()
        self.transfer.close()


class WeightsOffload:
    """Keeps the weights of an attached model in host memory except those of the active stage.

    From the first optimizer step on a block's reconstruction head is offloaded with the block's last stage.
    Between optimizer steps every weight is in host memory, so callbacks and checkpoints see the real values.
    A host optimizer may still be at work on them until `Offload.synchronize`.

    A forward outside the block-major schedule (evaluation, generation, a reference model that shares the
    weights, the head warm-up) fetches all weights if the device has room for them, and one layer after the
    other if not; then it can only run without gradients.
    """

    def __init__(self, lopt: LoPT, stages: Stages, transfer: HostTransfer) -> None:
        self._lopt = lopt
        self._transfer = transfer
        blocks = lopt.blocks
        self._by_module: dict[nn.Module, list[TensorGroup]] = {}
        self._groups: list[list[TensorGroup]] = []
        self._members: dict[TensorGroup, list[nn.Parameter]] = {}
        offloaded: dict[nn.Parameter, TensorGroup] = {}
        for stage in stages:
            groups: dict[TensorGroup, None] = {}
            for module in stages.modules(stage):
                own = [p for p in module.parameters() if p not in offloaded and not p.is_meta]
                self._by_module[module] = []
                for learns in (True, False):  # apart, so that what does not learn is never copied out
                    if part := [p for p in own if p.requires_grad == learns]:
                        group = TensorGroup.of_parameters(part)
                        self._by_module[module].append(group)
                        offloaded |= dict.fromkeys(part, group)
                        self._members[group] = part
                # A shared matrix is in two stages.
                groups |= dict.fromkeys(offloaded[p] for p in module.parameters() if p in offloaded)
            self._groups.append(list(groups))
        of_layers = {group for layer in blocks.layers for group in self._by_module[layer]}
        self._ends = [group for group in self._members if group not in of_layers]
        self._lens = [group for module in blocks.tail for group in self._by_module.get(module, [])]
        self._stages = stages
        # Of the present stage, whose graph holds on to its weights:
        self._entered: dict[TensorGroup, None] = {}
        self._all_fetched = False
        self._heads_offloaded = False
        for group in self._members:
            transfer.store(group)
        lopt.offload_device = transfer.device
        move_rest(lopt.model, offloaded.keys(), transfer.device)
        lopt.hooks.append(blocks.decoder.register_forward_pre_hook(self._before_decoder))
        for layer in blocks.layers:
            lopt.hooks.append(layer.register_forward_pre_hook(self._before_layer))
            lopt.hooks.append(layer.register_forward_hook(self._after_layer))

    @property
    def nbytes(self) -> int:
        """Bytes of all that is offloaded."""
        return sum(group.nbytes for group in self._members)

    def groups(self, stage: Stage) -> list[TensorGroup]:
        """Return the weights of `stage`, its block's head included where it is offloaded."""
        return self._groups[stage.index]

    def stepped(self, stage: Stage, parameters: Collection[nn.Parameter]) -> list[TensorGroup]:
        """Return the weights of `stage` that a step of `parameters` changes.

        These are not adapted weights, and not a matrix that another stage owns and steps.
        """
        members = self._members
        return [group for group in self._groups[stage.index] if any(p in parameters for p in members[group])]

    def enter(self, stage: Stage) -> None:
        """Fetch the weights of `stage`, and those that its local loss looks at."""
        self.release_all()
        self._offload_heads()
        groups = list(self._groups[stage.index])
        if self._lopt.config.aux_loss == "next_token" and stage.closes and stage.block in self._lopt.learning:
            for group in self._groups[-1]:  # rows of the LM head are read from host memory
                self._transfer.wait_until_final(group)
            groups += self._lens
        self._entered = dict.fromkeys(groups)
        for group in groups:
            self._transfer.fetch(group)

    def leave(self, stage: Stage, changed: bool) -> None:
        """Release the weights that were fetched for the present stage, stepped if `changed`."""
        stepped = self.stepped(stage, set(self._stages.parameters(stage))) if changed else []
        for group in self._entered:
            self._transfer.release(group, group in stepped)
        self._entered = {}

    def fetch_all(self) -> bool:
        """Fetch all weights if the device has room for them; returns whether they are there."""
        if not self._all_fetched and self.nbytes < 0.9 * free_memory(self._transfer.device):
            for group in self._members:
                self._transfer.fetch(group)
            self._all_fetched = True
        return self._all_fetched

    def release_all(self) -> None:
        """Release all weights; after `fetch_all` anything may have changed them, so their values go out."""
        for group in self._members:
            self._transfer.release(group, changed=self._all_fetched)
        self._all_fetched = False

    def _offload_heads(self) -> None:
        """Offload each head with its block; before the first optimizer step they warm up together."""
        if self._heads_offloaded:
            return
        self._heads_offloaded = True
        for index, head in enumerate(self._lopt.heads):
            if all(p.is_meta for p in head.parameters()):  # another process of a pipeline has it
                continue
            group = TensorGroup.of_parameters(parameters := list(head.parameters()))
            self._transfer.store(group)
            self._groups[self._stages.of_block(index)[-1].index].append(group)
            self._members[group] = parameters

    def _before_decoder(self, module: nn.Module, args: tuple) -> None:
        if self._lopt.active_block is not None or self.fetch_all():
            return
        if torch.is_grad_enabled():
            raise RuntimeError("the weights do not fit on the device together: run this without gradients")
        for group in self._ends:
            self._transfer.fetch(group)

    def _before_layer(self, layer: nn.Module, args: tuple) -> None:
        if self._lopt.active_block is None and not self._all_fetched:
            for group in self._by_module[layer]:
                self._transfer.fetch(group)

    def _after_layer(self, layer: nn.Module, args: tuple, output: Any) -> None:
        if self._lopt.active_block is None and not self._all_fetched:
            for group in self._by_module[layer]:
                if group not in self._entered:
                    self._transfer.release(group, changed=False)


def move_rest(model: nn.Module, offloaded: Any, device: torch.device) -> None:
    """Move buffers, and parameters that are not offloaded, to the device; the meta device keeps its own."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for parameter in model.parameters():
        if parameter not in offloaded and not parameter.is_meta:
            parameter.data = parameter.data.to(device)
