"""The task's exact gradients at the boundaries, to which predicted gradients are fitted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lopt.core.attach import LoPT
from lopt.losses.predicted_gradient import labelled
from lopt.losses.rows import Rows

NO_BLOCK = -1  # a forward that no boundary cuts


def boundary_gradients(handle: LoPT, batch: Mapping[str, Any]) -> tuple[list[tuple[Tensor, Tensor]], Rows]:
    """Return output and gradient of the mean task loss (B, T, H) of every earlier block that learns.

    The forward runs in one piece, from the first of these boundaries on with a graph; the gradient passes
    activations only, and no parameter gets one.

    Args:
        batch: `input_ids` and `labels` (B, T), `attention_mask`, ...

    Returns:
        Pairs in the order of the blocks, and the token rows.
    """
    inputs = {name: value.to(handle.device) for name, value in batch.items() if isinstance(value, Tensor)}
    labels = inputs.pop("labels")
    rows = Rows(inputs.get("attention_mask"), inputs["input_ids"], inputs.get("position_ids"), labels)
    with _kept(handle) as states:
        loss = _task_loss(handle.model, inputs, rows)
        gradients = torch.autograd.grad(loss, states)
    return [(state.detach(), gradient) for state, gradient in zip(states, gradients, strict=True)], rows


def _task_loss(model: Any, inputs: Mapping[str, Tensor], rows: Rows) -> Tensor:
    """Return the mean cross-entropy over the labels, with logits only where some row has one."""
    places, labels = labelled(rows)
    at = places % inputs["input_ids"].shape[1]
    columns = at.unique()
    logits = model(**inputs, logits_to_keep=columns, use_cache=False).logits
    chosen = logits[places // inputs["input_ids"].shape[1], torch.searchsorted(columns, at)]
    return cross_entropy(chosen.float(), labels)


@contextmanager
def _kept(handle: LoPT) -> Iterator[list[Tensor]]:
    """Within, a forward fills the list with the outputs of the blocks that learn, the first one a leaf."""
    blocks = handle.blocks
    states: list[Tensor] = []

    def leave(module: Any, args: tuple, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple | list) else output
        states.append(hidden if states else hidden.detach().requires_grad_())
        return (states[-1], *output[1:]) if isinstance(output, tuple | list) else states[-1]

    ends = [blocks.layers[blocks[index].stop - 1] for index in handle.learning]
    hooks = [end.register_forward_hook(leave) for end in ends]
    learning = [parameter for parameter in handle.model.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    active, handle.active_block = handle.active_block, NO_BLOCK
    try:
        with torch.enable_grad():
            yield states
    finally:
        handle.active_block = active
        for hook in hooks:
            hook.remove()
        for parameter in learning:
            parameter.requires_grad_(True)
