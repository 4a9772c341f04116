"""The head warm-up: random heads would send noise into pretrained blocks, so the heads learn first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lopt.core.boundaries import BoundaryReached
from lopt.losses.rows import Rows, channel_rms

if TYPE_CHECKING:
    from lopt.core.attach import LoPT

_INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "seq_idx")


def warm_up_heads(
    handle: LoPT,
    batches: Iterable[Mapping[str, Any]],
    steps: int,
    learning_rate: float,
    progress: Callable[[int, list[float]], None] | None,
) -> list[list[float]]:
    """Train the heads for `steps` steps while the blocks stay as they are; return every step's losses.

    Channels of a residual stream differ in scale by orders of magnitude, so a head predicts in units of each
    channel's root mean square over the first batch, which is multiplied into its last layer at the end, also
    after an error. A head that has learned already predicts without units: it is converted first.
    """
    optimizer = torch.optim.AdamW(handle.heads.parameters(), lr=learning_rate, weight_decay=0.0)
    heads: list[Any] = [handle.heads[index] for index in handle.learning]
    aux = handle.local_loss
    history: list[list[float]] = []
    scales: list[Tensor] = []
    try:
        for step, batch in enumerate(itertools.islice(itertools.cycle(batches), steps), start=1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - (step - 1) / steps)
            states, rows = boundary_states(handle, batch)
            # Autocast is for the blocks: it would keep casts of heads, and float16 lose gradients.
            with torch.autocast(handle.device.type, enabled=False):
                if not scales:
                    scales = [channel_rms(aux.prediction_scale(*pair), rows.mask) for pair in states]
                    _scale_learned(heads, [1 / scale for scale in scales])
                losses = [
                    aux.loss(scale * head(block_output), block_output, block_input, rows)
                    for head, scale, (block_output, block_input) in zip(heads, scales, states, strict=True)
                ]
                torch.stack(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(torch.stack(losses).tolist())
            if progress is not None:
                progress(step, history[-1])
    finally:
        _scale_learned(heads, scales)
    if not history:
        raise ValueError("warm_up_heads needs at least one batch: pass some training batches")
    return history


def _scale_learned(heads: list[Any], factors: list[Tensor]) -> None:
    """Multiply the predictions of the heads that have learned by `factors` (H,) each."""
    for head, factor in zip(heads, factors, strict=False):
        if head.has_learned:
            head.scale_output(factor)


@torch.no_grad()
def boundary_states(handle: LoPT, batch: Mapping[str, Any]) -> tuple[list[tuple[Tensor, Tensor]], Rows]:
    """Return output and input (B, T, H) of every earlier block that learns, and the token rows of `batch`."""
    model, blocks = handle.model, handle.blocks
    sharded = isinstance(model, FSDPModule)
    inputs = {k: v.to(handle.device) for k, v in batch.items() if k in _INPUTS and v is not None}
    labels = batch.get("labels")
    rows = Rows.from_call((), inputs, {} if labels is None else {"labels": labels.to(handle.device)})
    handle.local_loss.check(rows)
    states: list[tuple[Tensor, Tensor]] = []
    block_input: Tensor

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Detached, since `enable_input_require_grads` marks embeddings even where gradients are off.
        nonlocal block_input
        block_input = (args[0] if args else kwargs["hidden_states"]).detach()

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal block_input
        hidden = output[0] if isinstance(output, tuple | list) else output
        states.append((hidden, block_input))
        block_input = hidden  # the learning blocks are contiguous: it is the next one's input
        if len(states) == len(handle.learning) and not sharded:  # FSDP2 must see its root enter and leave
            raise BoundaryReached

    learning = [blocks[index] for index in handle.learning]
    hooks = [blocks.layers[b.start].register_forward_pre_hook(enter, with_kwargs=True) for b in learning[:1]]
    hooks += [blocks.layers[block.stop - 1].register_forward_hook(leave) for block in learning]
    training = model.training
    model.eval()
    try:
        if sharded:
            model(**inputs, use_cache=False, logits_to_keep=1)
        else:
            blocks.decoder(**inputs, use_cache=False)
    except BoundaryReached:
        pass
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return states, rows
