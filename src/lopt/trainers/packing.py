"""Rows that share one sequence must not see each other: tried on the model itself, before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lopt.architectures import base_model
from lopt.compat import kernel_names

FIRST, OTHER, SECOND = [3, 4, 5, 6], [6, 5, 3, 3], [4, 6, 3, 5]
"""Token ids of two different first rows and of the one that follows."""


def check_packing(trainer: Any) -> None:
    """Refuse a trainer whose rows share a sequence where its model lets one see the other.

    The model is given two short rows as the trainer's collator joins them. Its logits for the second must not
    depend on what is in the first, and must be those for the second alone.

    Raises:
        ValueError: Rows see each other with `packing` or `padding_free`, or would in an evaluation.
    """
    args, joined = trainer.args, getattr(trainer, "padding_free", False)
    if getattr(args, "eval_packing", False) and not joined and args.packing_strategy != "wrapped":
        raise ValueError(
            "`eval_packing` without `packing`: packed rows of the evaluation would see each other: leave it "
            "out, or add `packing`"
        )
    if not joined or any(parameter.is_meta for parameter in trainer.model.parameters()):
        return
    argument = "packing" if args.packing else "padding_free"
    base = base_model(trainer.model)
    reason = f"it does so by `attn_implementation` {_kernel(base)}"
    try:
        apart = not rows_see_each_other(trainer.model, trainer.data_collator)
    except ValueError as error:  # some architectures say themselves that they cannot keep rows apart
        apart, reason = False, str(error).splitlines()[0]
    if not apart:
        raise ValueError(
            f"`{argument}`: {type(base).__name__} lets rows in one sequence see each other: leave it out "
            f"({reason})"
        )


@torch.no_grad()
def rows_see_each_other(model: Any, collate: Any) -> bool:
    """Return whether a row's logits depend on the row before it in the same sequence.

    Args:
        collate: Makes a batch of rows (`input_ids` and `seq_lengths`) as for training.
    """
    device = next(model.parameters()).device

    def logits(*rows: list[int]) -> Tensor:
        row = {"input_ids": [i for ids in rows for i in ids], "seq_lengths": [len(ids) for ids in rows]}
        batch = {k: v for k, v in collate([row]).items() if k != "labels"}
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return model(**inputs, use_cache=False).logits[0, -len(SECOND) :].float()

    with _runnable(model, device):
        alone, after_one, after_other = logits(SECOND), logits(FIRST, SECOND), logits(OTHER, SECOND)
    # A row that is seen changes logits by a tenth and more, and the rounding of other shapes by far less.
    changes = (after_one - after_other).norm(), (after_one - alone).norm()
    return bool(max(changes) > torch.finfo(model.dtype).eps ** 0.5 * alone.norm())


def _kernel(base: Any) -> str:
    return str(kernel_names(base.config)["attn_implementation"])


@contextmanager
def _runnable(model: Any, device: torch.device) -> Iterator[None]:
    """Within, `model` is in eval mode and runs where its weights are.

    With `offload` block that is a CPU, for which there is no flash attention: PyTorch's stands in for it.
    """
    base = base_model(model)
    kernel, modes = _kernel(base), [(module, module.training) for module in model.modules()]
    swapped = device.type == "cpu" and "flash" in kernel
    if swapped:
        base.set_attn_implementation("sdpa")
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        if swapped:
            base.set_attn_implementation(kernel)
