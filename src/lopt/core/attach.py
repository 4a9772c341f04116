"""Attach the method to a live model; `LoPT` is the handle on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lopt.architectures import base_model
from lopt.core.blocks import Block, Blocks
from lopt.core.boundaries import Boundaries
from lopt.core.config import LoPTConfig
from lopt.core.warmup import warm_up_heads
from lopt.losses.next_token import NextToken
from lopt.losses.predicted_gradient import PredictedGradient
from lopt.losses.reconstruction import Reconstruction
from lopt.tied_embeddings import retie_embeddings, separate_embeddings

AUX_LOSSES: dict[str, Any] = {
    "recon": Reconstruction,
    "next_token": NextToken,
    "predicted_gradient": PredictedGradient,
}
"""The local losses by their name in `LoPTConfig.aux_loss`."""


def attach(model: nn.Module, config: LoPTConfig | None = None) -> LoPT:
    """Cut `model` into blocks and give every block but the last a local loss of its own.

    Args:
        model: A decoder-only causal LM of transformers, or a PEFT model around one. It is changed in place,
            and its outputs stay bit for bit what they were.
        config: Default `LoPTConfig()`: two blocks, λ = 10.

    Returns:
        The handle, whose `detach()` undoes everything.

    Raises:
        ValueError: The model is no decoder-only causal LM, cannot be cut so, or is attached already.
    """
    return LoPT(model, config or LoPTConfig())


class LoPT:
    """The handle on an attached model.

    Attributes:
        blocks: The `Blocks`, in order.
        heads: One head per earlier block (`Identity` if it is frozen); empty unless `method` is lopt.
        learning: Indices (from 0) of the earlier blocks that learn, in a pipeline those of this process.
        learners: Number of earlier blocks that learn, in all processes.
        local_loss: Computes ℓ_b (`lopt.losses`).
        loss_scale: Factor on the local losses of the next forward. With gradient accumulation set it to the
            factor on this micro-batch's task loss, for example its share of the tokens.
        router_coefficient: Weight of the load-balancing loss of earlier blocks' routers; None takes that in
            the model's config.
        learns_locally: False if earlier blocks run without gradients in the next forward, as between the
            steps of `config.local_every`, which trainers count.
        active_block: Index of the only block that the next forward is for (block-major); None for all.
        current_block: Index of the block that a training forward is in, or was in last; None at first.
        on_boundary: Called with the index of an earlier block that learns, its output and input (B, T, H) and
            the mask (B, T) or None, before its local loss is computed.
        after_local_backward: Called with the index of an earlier block when its gradients of this forward are
            complete.
        offload_device: Set by offloading: where the model computes while its weights are elsewhere.
        hooks: Every hook that attaching made; `detach` removes them.
    """

    def __init__(self, model: nn.Module, config: LoPTConfig) -> None:
        base: Any = base_model(model)
        if getattr(base, "_lopt", None) is not None:
            raise ValueError("this model is attached already: call .detach() on its LoPT handle first")
        self.model = model
        self.config = config
        self.blocks = Blocks(model, config)
        self.learning = range(config.frozen_blocks, len(self.blocks) - 1) if config.is_local else range(0)
        self.learners = len(self.learning)
        self.loss_scale = 1.0
        self.router_coefficient: float | None = None
        self.learns_locally = True
        self.active_block: int | None = None
        self.current_block: int | None = None
        self.on_boundary: Callable[[int, Tensor, Tensor, Tensor | None], None] | None = None
        self.after_local_backward: Callable[[int], None] | None = None
        self.offload_device: torch.device | None = None
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        for module in self.blocks.top(config.frozen_top):
            module.requires_grad_(False)
        self._untied = separate_embeddings(base, config.tied_embeddings, len(self.blocks))
        self.local_loss = AUX_LOSSES[config.aux_loss](self.blocks.tail, base.get_output_embeddings())
        self.heads = nn.ModuleList(self._new_head(b) for b in self.blocks[:-1] if config.is_local)
        self._boundaries = Boundaries(self) if len(self.heads) else None
        self.hooks: list[RemovableHandle] = [] if self._boundaries is None else self._boundaries.hooks
        for module in self.blocks.others:
            module.requires_grad_(False)
        frozen = len(self.blocks) - 1 if config.method == "frozen" else config.frozen_blocks
        for block in self.blocks[:frozen]:
            for _, parameter in self.blocks.parameters(model, block.index):
                parameter.requires_grad_(False)
        base._lopt = self

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        parameters = itertools.chain(self.heads.parameters(), self.model.parameters())
        return self.offload_device or next(parameters).device

    def local_losses(self) -> list[Tensor]:
        """Return ℓ_b of each earlier block that learned in the last training forward, not weighted."""
        return [] if self._boundaries is None else list(self._boundaries.losses.values())

    def block_parameters(self, index: int) -> list[nn.Parameter]:
        """Return the trainable parameters of block `index` (from 0) and of its head."""
        heads = list(self.heads[index].parameters()) if index < len(self.heads) else []
        return self._own_parameters(index) + heads

    def _own_parameters(self, index: int) -> list[nn.Parameter]:
        return [p for _, p in self.blocks.parameters(self.model, index) if p.requires_grad]

    def parameter_groups(
        self, learning_rate: float, lr_k1: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Return optimizer groups: `learning_rate` for the last block, `lr_k1` for all others.

        `lr_k1` defaults to the config's, which defaults to a share of `learning_rate`.

        The last block comes first, so that what reads the rate of group 0 reads `learning_rate`; the groups
        of heads (`"heads": True`) come last. Weight decay is for matrices only.
        """
        config = self.config if lr_k1 is None else self.config.replace(lr_k1=lr_k1)
        early = config.early_learning_rate(learning_rate)
        last = len(self.blocks) - 1
        parts = [(b.index, False, self._own_parameters(b.index)) for b in reversed(self.blocks)]
        parts += [(index, True, list(head.parameters())) for index, head in enumerate(self.heads)]
        groups: list[dict[str, Any]] = []
        for block, heads, parameters in parts:
            rate = early if heads or block < last else learning_rate
            matrices = [p for p in parameters if p.ndim >= 2]
            rest = [p for p in parameters if p.ndim < 2]
            for params, decay in ((matrices, weight_decay), (rest, 0.0)):
                if params:
                    group = dict(params=params, weight_decay=decay, lr=rate, block=block, heads=heads)
                    groups.append(group)
        return groups

    def warm_up_heads(
        self,
        batches: Iterable[Mapping[str, Any]],
        steps: int | None = None,
        learning_rate: float | None = None,
        progress: Callable[[int, list[float]], None] | None = None,
    ) -> list[list[float]]:
        """Let the heads alone learn the local loss from the unchanged blocks.

        The forward stops at the last boundary and keeps no graph; model and random state do not change. Heads
        that have learned already, by a call before, in training or from a checkpoint, go on from there.

        Args:
            batches: Model inputs (`input_ids` (B, T), `attention_mask` (B, T), ...; other keys but `labels`
                are ignored), taken in turn and again from the first when they run out.
            steps: Default `config.head_warmup_steps`.
            learning_rate: AdamW's first rate, which falls linearly to 0; default `config.head_warmup_lr`.
            progress: Called after each step with its number (from 1) and the local losses.

        Returns:
            The local losses of every step, one per earlier block that learns.

        Raises:
            ValueError: `batches` is empty.
        """
        steps = self.config.head_warmup_steps if steps is None else steps
        rate = self.config.head_warmup_lr if learning_rate is None else learning_rate
        if self._boundaries is None or not steps or next(self.heads.parameters(), None) is None:
            return []
        self._boundaries.forget_cleared_gradients()
        return warm_up_heads(self, batches, steps, rate, progress)

    def detach(self) -> nn.Module:
        """Remove every boundary and return the plain model.

        Parameters are trainable again where they were, and untied embeddings are tied again if training has
        not made them differ.
        """
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        if self._boundaries is not None:
            self._boundaries.forget_unused()
        base: Any = base_model(self.model)
        if self._untied:
            retie_embeddings(base)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trainable.get(name, True))
        base._lopt = None
        return self.model

    def _new_head(self, block: Block) -> nn.Module:
        if block.index not in self.learning:
            return nn.Identity()
        # Quantized weights are integers.
        weight = next(p for p in self.blocks.layers[block.stop - 1].parameters() if p.is_floating_point())
        size = base_model(self.model).config.get_text_config().hidden_size
        device = None if weight.is_meta else weight.device  # a head is real where its block is elsewhere
        # Heads are small; in float32 they follow the small steps that bfloat16 would round away.
        return self.local_loss.new_head(size, device, torch.promote_types(weight.dtype, torch.float32))
