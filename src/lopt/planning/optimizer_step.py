"""The optimizer's step in a plan: its state, and what it adds while it steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lopt.engine.optimizer import PART_BYTES, split_into_parts
from lopt.engine.rounding import ROUNDED_AT_ONCE
from lopt.planning.run import Run
from lopt.planning.sizes import BlockSizes, elements, size_of

# State tensors per parameter, bytes beside them (quantized state), and tensors that a step makes on a
# GPU for a part's parameters at once.
OPTIMIZERS = {
    "adamw_torch_fused": (2, 0, 0),
    "adamw_torch": (2, 0, 1),
    "sgd": (0, 0, 0),
    "adagrad": (1, 0, 2),
    "rmsprop": (1, 0, 1),
    "adamw_bnb_8bit": (0, 2, 0),
    "adamw_torch_8bit": (0, 2, 0),
    "adamw_torch_4bit": (0, 1, 0),
    "lion_32bit": (0, 4, 0),
    "lion_8bit": (0, 1, 0),
}


def state_of(run: Run, tensors: Iterable[Tensor]) -> int:
    """Return the bytes of optimizer state for weights, heads and adapters."""
    kinds, extra, _ = OPTIMIZERS[run.optimizer]
    each = kinds * run.state_dtype.itemsize + extra
    return sum(t.numel() * (each + 4 * (bool(run.masters) and t.dtype == torch.bfloat16)) for t in tensors)


def temporary_bytes(run: Run, part: Sequence[Tensor]) -> int:
    """Return the bytes that stepping a part adds, beside its state and gradients in the weights' dtype.

    Random bits to round a weight come when its float32 gradient has gone, and are no larger; those to round
    state come before.
    """
    kinds, _, made = OPTIMIZERS[run.optimizer]
    count, rounded = elements(part), [t.numel() for t in part if t.dtype == torch.bfloat16]
    total = 4 * made * count * (run.device == "cuda")  # there the step works on all of a part at once
    if run.state_dtype != torch.float32:
        total += 4 * kinds * count + 4 * min(max((t.numel() for t in part), default=0), ROUNDED_AT_ONCE)
    total += 4 * sum(rounded) * (1 if run.masters else 2)
    return total


def traffic_of(run: Run, part: Sequence[Tensor]) -> tuple[int, int]:
    """Return what stepping a part takes, wherever it is stepped.

    Returns:
        Bytes that are read (weights, gradients, state) and written (weights, state), and how many numbers are
        rounded stochastically.
    """
    weights, narrow = size_of(part), elements(t for t in part if t.dtype == torch.bfloat16)
    rounded = 0 if run.masters else narrow
    rounded += OPTIMIZERS[run.optimizer][0] * elements(part) * (run.state_dtype == torch.bfloat16)
    return 3 * weights + 2 * state_of(run, part), rounded


def parts_of(block: BlockSizes, part_bytes: int = PART_BYTES) -> Sequence[Sequence[Tensor]]:
    """Return what of a block is stepped together, in order; nothing of one that does not learn."""
    heads = {id(t) for t in block.head}
    groups = [
        {"params": [t for t in block.trained if (id(t) in heads) == head and (t.ndim >= 2) == matrices]}
        for head in (False, True)
        for matrices in (True, False)
    ]
    return split_into_parts(groups, part_bytes, lambda tensor: 0)
