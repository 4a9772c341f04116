"""Put boundaries on a live model: each block's backward runs inside the forward.

Four kinds of hooks do it, and no forward is rewritten:

- before the model: note the labels it is given, if any;
- before the decoder: note which tokens are real, and what they are;
- before a block's first layer: note the block's input;
- after a block's last layer: compute the local loss, run its backward at once (which frees the
  block's graph) and hand the detached hidden state to the next block.

Where gradients are off (evaluation, generation, log-probabilities of a reference) they do nothing.
The switch is `torch.is_grad_enabled()`, not `module.training`: a plain loop that forgets
`model.train()` would otherwise train end to end without a word.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from lopt.core.blocks import Block, Blocks, base_model
from lopt.core.config import LoPTConfig
from lopt.core.objective import AUX_LOSSES, ReconstructionHead, Rows, channel_rms
from lopt.core.routers import RouterLoss, capture_paused
from lopt.models.load import retie_embeddings, shares_embeddings, untie_embeddings

_INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")


def attach(model: nn.Module, config: LoPTConfig | None = None) -> LoPT:
    """Cut `model` into blocks and give every block but the last a local loss of its own.

    Args:
        model: a decoder-only causal LM of transformers, or a PEFT model around one. It is changed
            in place and its outputs stay bit for bit what they were.
        config: default `LoPTConfig()`: two blocks, λ = 10.

    Returns:
        The handle, which also undoes everything: `handle.detach()`.

    Raises:
        ValueError: not a decoder-only causal LM, more blocks than layers, already attached.
    """
    return LoPT(model, config or LoPTConfig())


class LoPT:
    """A model with boundaries on it.

    Attributes:
        blocks: the `Blocks`, in order.
        heads: one head per earlier block, in order, an identity for one of `config.frozen_blocks` (empty
            unless method is lopt).
        learning: indices of the earlier blocks that learn.
        loss_scale: factor on the local losses of the next forward. With gradient accumulation set
            it to what scales the task loss, for example this micro-batch's share of the tokens.
        hooks: everything that hangs on the model's modules; `detach` removes it.
        only: index of the one block that a forward is for (`lopt.engine.block_major`); None for all.
        learns_locally: whether earlier blocks learn in the next forward. If not, they run without
            gradients, as on the steps between those of `config.local_every`, which trainers count.
        at: index of the block that a training forward is at, or was at last; None before the first.
        look: called with the index of an earlier block that learns, its output, its input (B, T, H) and the
            mask (B, T) or None, before its local loss.
        after_local_backward: called with the index of an earlier block when its gradients of this
            forward are complete; `lopt.engine.reduction` averages them over ranks there.
    """

    def __init__(self, model: nn.Module, config: LoPTConfig) -> None:
        if getattr(base_model(model), "_lopt", None) is not None:
            raise ValueError("this model has boundaries already: call .detach() on its LoPT handle first")
        self.model = model
        self.config = config
        self.blocks = Blocks(model, config)
        self.loss_scale = 1.0
        self.only: int | None = None
        self.learns_locally = True
        self.at: int | None = None
        self.look: Callable[[int, Tensor, Tensor, Tensor | None], None] | None = None
        self.after_local_backward: Callable[[int], None] | None = None
        self._device: torch.device | None = None
        self._trainable = {name: p.requires_grad for name, p in model.named_parameters()}
        self._untied = self._part_embeddings()
        self.learning = range(config.frozen_blocks, len(self.blocks) - 1) if config.is_local else range(0)
        self.heads = nn.ModuleList(self._new_head(b) for b in self.blocks[:-1] if config.is_local)
        self._losses: list[Tensor | None] = [None] * len(self.heads)
        self._routers = RouterLoss(base_model(model).config.get_text_config(), len(self.blocks.layers))
        self._target: Tensor | None = None
        self._rows = Rows(None)
        self._labels: Tensor | None = None
        self._objective = AUX_LOSSES[config.aux_loss](
            self.blocks.tail(), base_model(model).get_output_embeddings()
        )
        self._observe: Callable[[int, Tensor], None] | None = None
        self._resting = False
        self.hooks = self._add_hooks() if config.is_local and len(self.blocks) > 1 else []
        self._freeze(self.blocks[:-1] if config.method == "frozen" else self.blocks[: config.frozen_blocks])
        base: Any = base_model(model)
        base._lopt = self

    # -- what users call -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where it computes, which is not where offloaded weights are (`lopt.engine.offload`)."""
        return self._device or next(itertools.chain(self.heads.parameters(), self.model.parameters())).device

    @device.setter
    def device(self, device: torch.device) -> None:
        self._device = device

    def local_losses(self) -> list[Tensor]:
        """ℓ_b of every earlier block that learns, from the last training forward; detached, not weighted."""
        return [loss for loss in self._losses if loss is not None]

    def parameter_groups(
        self, learning_rate: float, lr_k1: float | None = None, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Optimizer groups: `learning_rate` for the last block, `lr_k1` for all else.

        The last block comes first, so that what reads the rate of group 0 reads `learning_rate`;
        the groups of heads (`"heads": True`) come at the end. Weight decay is for matrices only.
        `lr_k1` defaults to the config's.
        """
        config = self.config if lr_k1 is None else self.config.replace(lr_k1=lr_k1)
        early = config.early_learning_rate(learning_rate)
        groups: list[dict[str, Any]] = []
        for block in reversed(self.blocks):
            rate = learning_rate if block.index == len(self.blocks) - 1 else early
            parameters = self._own_parameters(block.index)
            groups += _groups(parameters, weight_decay, lr=rate, block=block.index, heads=False)
        for index, head in enumerate(self.heads):
            groups += _groups(list(head.parameters()), weight_decay, lr=early, block=index, heads=True)
        return groups

    def block_parameters(self, index: int) -> list[nn.Parameter]:
        """The trainable parameters of block `index` (from 0) and of its head."""
        heads = list(self.heads[index].parameters()) if index < len(self.heads) else []
        return self._own_parameters(index) + heads

    def _own_parameters(self, index: int) -> list[nn.Parameter]:
        return [p for _, p in self.blocks.parameters(self.model, index) if p.requires_grad]

    def warm_up_heads(
        self,
        batches: Iterable[Mapping[str, Any]],
        steps: int | None = None,
        learning_rate: float | None = None,
        progress: Callable[[int, list[float]], None] | None = None,
    ) -> list[list[float]]:
        """Let the heads alone learn the local objective from the unchanged blocks.

        A head that is still random would send noise into a pretrained block. The forward stops at
        the last boundary and keeps no graph; model, gradients and random state are left alone.
        Channels of a residual stream differ in size by orders of magnitude, so a head is trained
        in units of each channel's root mean square, which its last layer takes over at the end.

        Args:
            batches: model inputs (`input_ids` (B, T), `attention_mask` (B, T), ...; other keys
                but `labels` are ignored), taken in turn and again from the first when they run out.
            steps: default `config.head_warmup_steps`.
            learning_rate: peak of AdamW's rate, which falls linearly to zero; default
                `config.head_warmup_lr`.
            progress: called after each step with its number (from 1) and the local losses.

        Returns:
            The local losses of every step, one per earlier block that learns.

        Raises:
            ValueError: `batches` is empty.
        """
        steps = self.config.head_warmup_steps if steps is None else steps
        rate = self.config.head_warmup_lr if learning_rate is None else learning_rate
        if not self.heads or not steps:
            return []
        optimizer = torch.optim.AdamW(self.heads.parameters(), lr=rate, weight_decay=0.0)
        heads = [self.heads[index] for index in self.learning]
        history: list[list[float]] = []
        units: list[Tensor] = []
        for step, batch in enumerate(itertools.islice(itertools.cycle(batches), steps), start=1):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - (step - 1) / steps)
            pairs, rows = self._boundaries(batch)
            units = units or [channel_rms(self._objective.units_of(*pair), rows.mask) for pair in pairs]
            losses = [
                self._objective.loss(unit * head(pair[0]), *pair, rows)
                for head, unit, pair in zip(heads, units, pairs, strict=True)
            ]
            torch.stack(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append([loss.item() for loss in losses])
            if progress is not None:
                progress(step, history[-1])
        if not history:
            raise ValueError("warm_up_heads needs at least one batch: pass some training batches")
        for head, unit in zip(heads, units, strict=True):
            assert isinstance(head, ReconstructionHead)
            head.scale_output(unit)
        return history

    def detach(self) -> nn.Module:
        """Remove every boundary and return the plain model.

        Parameters are trainable again where they were, and embeddings that were parted are joined
        again if training has not made them differ.
        """
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if self._untied:
            retie_embeddings(base_model(self.model))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._trainable.get(name, True))
        base: Any = base_model(self.model)
        base._lopt = None
        return self.model

    # -- set-up ----------------------------------------------------------------------------------

    def _part_embeddings(self) -> bool:
        """Block 1 owns the embedding and block k the head, so one matrix cannot serve both."""
        model = base_model(self.model)
        shared = shares_embeddings(model) and model.get_input_embeddings().weight.requires_grad
        if shared and self.config.tied_embeddings == "freeze":
            model.get_input_embeddings().weight.requires_grad_(False)
            return False
        if not shared or len(self.blocks) == 1:
            return False
        untie_embeddings(model)
        return True

    def _freeze(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            for _, parameter in self.blocks.parameters(self.model, block.index):
                parameter.requires_grad_(False)

    def _new_head(self, block: Block) -> nn.Module:
        if block.index not in self.learning:
            return nn.Identity()
        weight = next(p for p in self.blocks.last_layer(block).parameters() if p.is_floating_point())
        size = base_model(self.model).config.get_text_config().hidden_size
        # Heads are small; in float32 they follow the small steps that bfloat16 would round away.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return ReconstructionHead(size, device=weight.device, dtype=dtype)

    def _add_hooks(self) -> list[RemovableHandle]:
        decoder = self.blocks.decoder
        hooks = [
            self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            # Also after an error: gradients must not stay off.
            decoder.register_forward_hook(self._after_decoder, always_call=True),
        ]
        for block in self.blocks[:-1]:
            before = functools.partial(self._before_block, block)
            after = functools.partial(self._after_block, block)
            first, last = self.blocks.first_layer(block), self.blocks.last_layer(block)
            hooks.append(first.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(last.register_forward_hook(after))
        return hooks

    # -- hooks -----------------------------------------------------------------------------------

    def _active(self, block: Block | None = None) -> bool:
        if block is not None and self.only not in (None, block.index):
            return False
        return self._observe is not None or torch.is_grad_enabled()

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._labels = kwargs.get("labels")

    def _before_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._active():
            return
        self._losses, self.at = [None] * len(self.heads), self.only or 0
        if not self.learns_locally and self._observe is None:
            self._resting = True
            torch.set_grad_enabled(False)
            return
        self._routers.start()
        self._rows = Rows.given(args, kwargs, self._labels)
        self._objective.check(self._rows)
        for layer in self.blocks.layers:
            _refuse_reentrant(layer)

    def _after_decoder(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._labels = None  # they are those of this forward
        if self._resting:
            self._wake_up()

    def _wake_up(self) -> None:
        self._resting = False
        torch.set_grad_enabled(True)

    def _before_block(self, block: Block, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._active(block):
            self._target = (args[0] if args else kwargs["hidden_states"]).detach()

    def _after_block(self, block: Block, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._resting and block.index == len(self.heads) - 1:
            self._wake_up()  # the last block learns in every step
            return None
        if not self._active(block):
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if self._observe is not None:
            self._observe(block.index, hidden)
            return None
        if block.index in self.learning:
            self._learn(block, hidden)
        free, self.at = hidden.detach(), block.index + 1
        return (free, *output[1:]) if isinstance(output, tuple) else free

    def _learn(self, block: Block, hidden: Tensor) -> None:
        """The block's own objective and its whole backward; its graph is gone afterwards."""
        assert self._target is not None
        if self.look is not None:
            self.look(block.index, hidden.detach(), self._target, self._rows.mask)
        guess = self.heads[block.index](hidden)
        loss = self._objective.loss(guess, hidden, self._target, self._rows)
        self._losses[block.index] = loss.detach()
        objective = self.config.lambda_aux / len(self.learning) * loss
        routers = self._routers.take(self._rows.mask)
        if routers is not None:
            objective = objective + routers
        with capture_paused(), torch.autocast(hidden.device.type, enabled=False):
            (self.loss_scale * objective).backward()
        self._routers.release()
        torch.clear_autocast_cache()  # or the casts of this block's weights would stay to the forward's end
        self._target = None
        if self.after_local_backward is not None:
            self.after_local_backward(block.index)

    def _boundaries(self, batch: Mapping[str, Any]) -> tuple[list[tuple[Tensor, Tensor]], Rows]:
        """Output and input (B, T, H) of every earlier block that learns, on `batch`, and its rows."""
        pairs: list[tuple[Tensor, Tensor]] = []
        sharded = isinstance(self.model, FSDPModule)

        def observe(index: int, hidden: Tensor) -> None:
            assert self._target is not None
            if index in self.learning:
                pairs.append((hidden, self._target))
            if index == len(self.heads) - 1 and not sharded:
                raise BoundaryReached  # nothing beyond the last boundary is needed

        training = self.model.training
        inputs = {k: v.to(self.device) for k, v in batch.items() if k in _INPUTS and v is not None}
        labels = batch.get("labels")
        self._labels = None if labels is None else labels.to(self.device)
        self._observe = observe
        self.model.eval()
        try:
            with torch.no_grad():
                if sharded:  # FSDP2 must see its root enter and leave
                    self.model(**inputs, use_cache=False, logits_to_keep=1)
                else:
                    self.blocks.decoder(**inputs, use_cache=False)
        except BoundaryReached:
            pass
        finally:
            self._observe = None
            self.model.train(training)
        return pairs, self._rows


class BoundaryReached(Exception):
    """Ends a forward that has gone as far as it needs to; never leaves this package."""


def _groups(parameters: list[nn.Parameter], weight_decay: float, **settings: Any) -> list[dict[str, Any]]:
    """Matrices, which decay, and the rest, which does not, as optimizer groups."""
    matrices = [p for p in parameters if p.ndim >= 2]
    rest = [p for p in parameters if p.ndim < 2]
    pairs = ((matrices, weight_decay), (rest, 0.0))
    return [{"params": members, "weight_decay": decay, **settings} for members, decay in pairs if members]


def _refuse_reentrant(layer: nn.Module) -> None:
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    if not getattr(layer, "gradient_checkpointing", False) or not layer.training:
        return
    if isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant"):
        raise ValueError(
            "reentrant gradient checkpointing silently gives no gradient behind a boundary: "
            'use gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
