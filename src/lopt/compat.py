"""Every private or version-dependent name of the libraries underneath, each with what breaks without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# -- transformers: output capturing ----------------------------------------------------------------
# `transformers.utils.output_capturing._active_collector`, a ContextVar. Seen in 5.23. A running forward keeps
# there what it has captured so far. Without it the routers of earlier blocks get no load-balancing loss, and
# a backward that recomputes checkpointed layers captures their logits a second time.


def captured_outputs(name: str) -> list[Any]:
    """Return the list, which may be changed, of the outputs `name` that the running forward has captured."""
    from transformers.utils.output_capturing import _active_collector

    collected = _active_collector.get()
    return [] if collected is None else collected.get(name, [])


@contextmanager
def capture_paused() -> Iterator[None]:
    """Within, nothing is captured."""
    from transformers.utils.output_capturing import _active_collector

    token = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(token)


# -- transformers: gradient checkpointing ------------------------------------------------------------
# `GradientCheckpointingLayer._gradient_checkpointing_func`, a partial of `torch.utils.checkpoint.checkpoint`.
# Seen in 5.23. Without it reentrant checkpointing, which gives no gradient behind a boundary, is not noticed.


def checkpoints_reentrantly(layer: Any) -> bool:
    """Return True if `layer` would use reentrant gradient checkpointing in its next forward."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    active = getattr(layer, "gradient_checkpointing", False) and layer.training
    return bool(active and getattr(function, "keywords", {}).get("use_reentrant"))
