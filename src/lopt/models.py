"""Load and save models, and part or join an embedding that is shared with the LM head."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


def shares_embeddings(model: PreTrainedModel) -> bool:
    """Whether the LM head and the token embedding are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def untie_embeddings(model: PreTrainedModel) -> None:
    """Give the LM head a matrix of its own, equal to the embedding's; saved untied from then on."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    _set_tying(model, False)


def retie_embeddings(model: PreTrainedModel) -> bool:
    """Join head and embedding again if they are still equal; says whether it did."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not torch.equal(embedding.weight, head.weight):
        return False
    head.weight = embedding.weight
    _set_tying(model, True)
    return True


def _set_tying(model: PreTrainedModel, tied: bool) -> None:
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
