"""The head warm-up under autocast: blocks run as in training, heads learn in their own precision."""

from __future__ import annotations

import copy
from contextlib import suppress

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


@pytest.mark.parametrize("aux_loss", ["recon", "next_token"])
@pytest.mark.parametrize("between", ["nothing", "an error", "a checkpoint"])
def test_a_second_warm_up_goes_on_from_the_first(aux_loss: str, between: str) -> None:
    """Also where channels are far from 1 in size, so that a factor too much would show."""
    model, batches = tiny("llama"), [batch_of([12, 9], seed=seed) for seed in range(4)]
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(torch.logspace(-3, 5, model.config.hidden_size))
    handle = attach(model, LoPTConfig(num_blocks=3, aux_loss=aux_loss))
    first: list[list[float]] = []

    def follow(step: int, losses: list[float]) -> None:
        first.append(losses)
        if between == "an error" and step == 30:
            raise MemoryError

    with suppress(MemoryError):
        handle.warm_up_heads(batches, steps=30, progress=follow)
    if between == "a checkpoint":
        heads = handle.heads.state_dict()
        handle.detach()
        handle = attach(model, LoPTConfig(num_blocks=3, aux_loss=aux_loss))
        handle.heads.load_state_dict(heads)
    model(**batches[0]).loss.backward()
    reached = [float(loss) for loss in handle.local_losses()]
    model.zero_grad(), handle.heads.zero_grad()
    second = handle.warm_up_heads(batches, steps=30)
    assert second[0] == pytest.approx(reached, rel=1e-4)
    if aux_loss == "recon":
        assert all(after < before for before, after in zip(first[-1], second[-1], strict=True))


def test_an_error_in_the_first_step_leaves_new_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = attach(tiny("llama"), LoPTConfig())
    before = copy.deepcopy(handle.heads.state_dict())
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        handle.warm_up_heads([batch_of([5, 3])])
    assert all(torch.equal(before[key], value) for key, value in handle.heads.state_dict().items())
