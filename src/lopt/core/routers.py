"""Mixture-of-experts: the load-balancing loss of a block's routers belongs to that block.

transformers makes one loss of all routers' logits at the end of the forward, when an earlier block's graph
is gone. So its share is taken at its boundary: `coefficient · (routers in the block / layers of the model) ·
load balancing over the block`, so that each router is balanced as strongly as end to end. The last block's
share stays the model's own loss, in which the earlier logits are constants.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lopt.compat import captured_outputs


class RouterLoss:
    """Takes router logits out of one running forward, block by block.

    Args:
        config: The model's.
        num_layers: Of the whole model.
        coefficient: Weight of the load-balancing loss; None takes the config's.
    """

    def __init__(self, config: PretrainedConfig, num_layers: int, coefficient: float | None = None) -> None:
        self._config = config
        self._num_layers = num_layers
        own = getattr(config, "router_aux_loss_coef", 0.0)
        self._coefficient: float = own if coefficient is None else coefficient
        self._taken = 0

    def take(self, mask: Tensor | None) -> Tensor | None:
        """Return the weighted loss over the routers since the last boundary; None if none are captured."""
        logits = captured_outputs().get("router_logits", [])[self._taken :]
        if not logits:
            return None
        config: Any = self._config
        loss = load_balancing_loss_func(tuple(logits), config.num_experts, config.num_experts_per_tok, mask)
        assert isinstance(loss, Tensor)
        return self._coefficient * len(logits) / self._num_layers * loss

    def release(self) -> None:
        """Turn the captured logits into constants, once their block's backward is done."""
        logits = captured_outputs().get("router_logits", [])
        logits[self._taken :] = [x.detach() for x in logits[self._taken :]]
        self._taken = len(logits)
