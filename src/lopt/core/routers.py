"""Mixture-of-experts: the load-balancing loss of a block's routers belongs to that block.

transformers collects the logits of all routers during the forward and turns them into one loss at
the end. By then an earlier block's graph is gone, so its share is taken here, at its boundary:
`coefficient · (routers in the block / layers of the model) · load balancing over the block`,
which keeps the pressure on each router what it is end to end. The last block's share stays the
model's own loss, in which the earlier logits are constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

# Private, but the only place where a running forward keeps what it has captured so far.
from transformers.utils.output_capturing import _active_collector


class RouterLoss:
    """Takes router logits out of a running forward, block by block."""

    def __init__(self, config: PretrainedConfig, num_layers: int) -> None:
        self._config = config
        self._num_layers = num_layers
        self._seen = 0

    def start(self) -> None:
        """Call when a forward enters its first layer."""
        self._seen = 0

    def take(self, mask: Tensor | None) -> Tensor | None:
        """The weighted loss over the routers since the last boundary; None if none are captured."""
        logits = _captured()[self._seen :]
        if not logits:
            return None
        config = self._config
        loss = load_balancing_loss_func(
            tuple(logits),  # type: ignore[arg-type]
            config.num_experts,
            config.num_experts_per_tok,
            mask,
        )
        assert isinstance(loss, Tensor)
        return getattr(config, "router_aux_loss_coef", 0.0) * len(logits) / self._num_layers * loss

    def release(self) -> None:
        """Turn the captured logits into constants, once their block's backward is done."""
        logits = _captured()
        logits[self._seen :] = [x.detach() for x in logits[self._seen :]]
        self._seen = len(logits)


@contextmanager
def capture_paused() -> Iterator[None]:
    """A backward that recomputes checkpointed layers must not be captured a second time."""
    token = _active_collector.set(None)
    try:
        yield
    finally:
        _active_collector.reset(token)


def _captured() -> list[Tensor]:
    collected = _active_collector.get()
    return [] if collected is None else collected.get("router_logits", [])
