"""An embedding shared with the LM head: untie it for training, tie it again afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def shares_embeddings(model: PreTrainedModel) -> bool:
    """Return True if the LM head and the token embedding are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def separate_embeddings(model: PreTrainedModel, how: str, num_blocks: int) -> bool:
    """Untie or freeze an embedding that is shared with the LM head; return True if it was untied.

    Args:
        model: The causal LM.
        how: "untie" gives the head a copy, "freeze" keeps the one matrix and does not train it.
        num_blocks: With one block, which owns both, a matrix that is trained stays shared.
    """
    if will_untie(model, how, num_blocks):
        untie_embeddings(model)
        return True
    if how == "freeze" and shares_embeddings(model):
        model.get_input_embeddings().weight.requires_grad_(False)
    return False


def will_untie(model: PreTrainedModel, how: str, num_blocks: int) -> bool:
    """Return True if `separate_embeddings` would give the LM head a copy: if the embedding is trained."""
    embedding: Any = model.get_input_embeddings()
    return how == "untie" and num_blocks > 1 and shares_embeddings(model) and embedding.weight.requires_grad


def untie_embeddings(model: PreTrainedModel) -> None:
    """Give the LM head a copy of the embedding's matrix; the model is saved untied from then on."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    _set_tying(model, False)


def retie_embeddings(model: PreTrainedModel) -> bool:
    """Tie head and embedding again if their values are still equal; return True if they were."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if not torch.equal(embedding.weight, head.weight):
        return False
    head.weight = embedding.weight
    _set_tying(model, True)
    return True


def _set_tying(model: PreTrainedModel, tied: bool) -> None:
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
