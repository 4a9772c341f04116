"""The optimizer's step in a plan: its state, what it adds while it steps, and what is offloaded meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lopt import compat
from lopt.engine.host_transfer import HostTransfer, TensorGroup
from lopt.engine.optimizer import PART_BYTES, part_bytes_within, split_into_parts
from lopt.engine.rounding import ROUNDED_AT_ONCE
from lopt.planning.run import Bytes, Run
from lopt.planning.sizes import BlockSizes, elements

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


def state_bytes(run: Run, weights: int, heads: int = 0) -> int:
    """Return the bytes of optimizer state for so many elements of weights and of (float32) heads."""
    tensors, extra, _ = OPTIMIZERS[run.optimizer]
    each = tensors * run.state_dtype.itemsize + extra
    return each * (weights + heads) + 4 * weights * (run.masters and run.dtype == torch.bfloat16)


def temporary_bytes(run: Run, part: Sequence[Tensor]) -> int:
    """Return the bytes that stepping a part adds, beside its state and gradients in the weights' dtype."""
    tensors, _, made = OPTIMIZERS[run.optimizer]
    count = elements(part)
    total = 4 * made * count * (run.device == "cuda")  # there the step works on all of a part at once
    if run.state_dtype != torch.float32:
        total += 4 * tensors * count
    if any(t.dtype == torch.bfloat16 for t in part):
        total += 4 * count * (1 if run.masters else 2)
        total += 0 if run.masters else 4 * min(max(t.numel() for t in part), ROUNDED_AT_ONCE)
    return total


def parts_of(block: BlockSizes, part_bytes: int = PART_BYTES) -> Sequence[Sequence[Tensor]]:
    """Return what of a block is stepped together, in order; nothing of one that does not learn."""
    if not block.learns:
        return []
    groups = [
        {"params": [t for t in tensors if (t.ndim >= 2) == matrices]}
        for tensors in (block.tensors, block.head)
        for matrices in (True, False)
    ]
    return split_into_parts(groups, part_bytes, lambda tensor: 0)


def follow_offload(
    run: Run, blocks: list[BlockSizes], prefetch: int, weights: bool
) -> list[tuple[int, list[Bytes]]]:
    """Take the real `HostTransfer`, with tensors that have no memory, through an optimizer step.

    Args:
        prefetch: bytes of device memory for what is on its way.
        weights: whether weights are offloaded too.

    Returns:
        By block: the bytes on their way while its micro-batches run, and gradients, optimizer and transfers
        in the step of each of its parts.
    """
    with compat.fake_tensors():
        return list(_follow(run, blocks, prefetch, weights))


def _follow(
    run: Run, blocks: list[BlockSizes], prefetch: int, offload_weights: bool
) -> Iterator[tuple[int, list[Bytes]]]:
    transfer = HostTransfer(torch.device("cpu"), prefetch)

    def stored(nbytes: int) -> TensorGroup:
        group = TensorGroup.of_parameters([torch.empty(nbytes, dtype=torch.uint8)])
        transfer.store(group)
        return group

    def part_state(part: Sequence[Tensor]) -> int:
        heads = elements(t for t in part if t.dtype != run.dtype)
        return state_bytes(run, elements(part) - heads, heads)

    parts = [parts_of(block, part_bytes_within(prefetch)) for block in blocks]
    states = [[stored(part_state(part)) for part in own] for own in parts]
    weights: list[list[TensorGroup]] = []
    for block in blocks:
        sizes = [elements(t) * run.dtype.itemsize for t in ([*block.before, *block.after], *block.layers)]
        weights.append([stored(n) for n in (*sizes, 4 * block.head_weights) if n and offload_weights])
    for index, own in enumerate(parts):
        for group in weights[index]:
            transfer.fetch(group)
        transfer.prefetch(states[index])
        transfer.prefetch(weights[index + 1] if index + 1 < len(weights) else [])
        working, steps = transfer.bytes_in_flight, []
        left = sum(t.nbytes for part in own for t in part)
        for part, group in zip(own, states[index], strict=True):
            transfer.fetch(group)
            gradients = sum(t.nbytes for t in part)
            widened = any(
                t.dtype == torch.bfloat16 for t in part
            )  # their gradients are freed as they are copied
            added = part_state(part) + temporary_bytes(run, part)
            left_now = left - gradients if widened else left
            steps.append(Bytes(gradients=left_now, optimizer=added, transfers=transfer.bytes_in_flight))
            left -= gradients
            transfer.release(group)
        for group in weights[index]:
            transfer.release(group)
        yield working, steps
