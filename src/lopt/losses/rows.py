"""The token rows of a forward: which tokens are real, and what they are.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """What local losses need to know of the token rows of one forward.

    Attributes:
        mask: (B, T), true or 1 at real tokens; None if every token is real.
        ids: (B, T) token ids; None if the model is given embeddings.
        positions: (B or 1, T) position ids, which restart where a packed row begins; None if not given.
        labels: (B, T), -100 where a token is not trained on; None if the model is given none.
    """

    mask: Tensor | None
    ids: Tensor | None = None
    positions: Tensor | None = None
    labels: Tensor | None = None

    @classmethod
    def from_call(cls, args: tuple, kwargs: Mapping[str, Any], call: Mapping[str, Any]) -> Rows:
        """Read them from the arguments of a call of the decoder.

        Args:
            args, kwargs: The arguments.
            call: Those of the model around it, which has the labels. A multimodal one embeds the tokens and
                makes the masks itself.

        Raises:
            ValueError: The attention mask does not say which tokens are real.
        """
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        inputs = kwargs.get("inputs_embeds") if ids is None else ids
        if isinstance(mask, Mapping):
            mask = call.get("attention_mask")
        if mask is not None and inputs is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise ValueError(
                    "local losses need the 2-D attention mask (batch, tokens) that says which tokens are "
                    "real: pass that one to the model"
                )
            mask = mask[:, -inputs.shape[1] :]  # a cache makes the mask longer than this call's tokens
        ids = call.get("input_ids") if ids is None else ids
        return cls(None if inputs is None else mask, ids, kwargs.get("position_ids"), call.get("labels"))


def channel_rms(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return the root mean square (H,) over real tokens of `hidden` (B, T, H), in float32 or better."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    rows = wide.flatten(0, 1) if mask is None else wide[mask.bool()]
    return rows.square().mean(0).sqrt().clamp(min=torch.finfo(wide.dtype).tiny)
