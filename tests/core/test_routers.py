"""What a running forward has captured is taken once per block (the gradients: test_attach)."""

from __future__ import annotations

import torch
from transformers.utils.output_capturing import _active_collector

from conftest import tiny
from lopt.compat import capture_paused
from lopt.core.routers import RouterLoss


def test_logits_are_taken_once_and_become_constants() -> None:
    config = tiny("mixtral").config
    routers = RouterLoss(config, num_layers=4)
    assert routers.take(None) is None
    logits = [torch.randn(6, 4, requires_grad=True) * 1 for _ in range(3)]
    collected = {"router_logits": logits[:2]}
    token = _active_collector.set(collected)
    try:
        assert routers.take(None).requires_grad
        routers.release()
        assert not any(x.requires_grad for x in collected["router_logits"])
        assert routers.take(None) is None
        collected["router_logits"].append(logits[2])
        assert routers.take(None) is not None
        with capture_paused():
            assert _active_collector.get() is None
        assert _active_collector.get() is collected
    finally:
        _active_collector.reset(token)
