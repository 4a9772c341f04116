"""The head warm-up under autocast: blocks run as in training, heads learn in their own precision."""

from __future__ import annotations

import pytest
import torch

from conftest import batch_of, tiny
from lopt import LoPTConfig, attach


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_for_the_blocks(dtype: torch.dtype) -> None:
    """Heads learn as well as without: no cast of one is kept, and no gradient falls below float16's least."""
    batches = [batch_of([12, 9], seed=seed) for seed in range(4)]
    ends: dict[bool, list[float]] = {}
    heads: set[torch.dtype] = set()
    for enabled in (False, True):
        torch.manual_seed(0)
        model = tiny("llama")
        handle = attach(model, LoPTConfig(num_blocks=3))
        seen: set[torch.dtype] = set()
        in_block, in_head = model.model.layers[0].self_attn.v_proj, handle.heads[0].down
        for module, found in ((in_block, seen), (in_head, heads)):
            module.register_forward_hook(lambda *call, found=found: found.add(call[-1].dtype))
        with torch.autocast("cpu", dtype, enabled=enabled):
            history = handle.warm_up_heads(batches, steps=30)
        assert seen == {dtype if enabled else torch.float32}
        assert all(after < 0.97 * before for before, after in zip(history[0], history[-1], strict=True))
        ends[enabled] = history[-1]
    assert heads == {torch.float32}
    assert ends[True] == pytest.approx(ends[False], rel=0.02)
