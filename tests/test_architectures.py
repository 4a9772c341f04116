"""Where decoders keep their parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from conftest import batch_of, tiny
from lopt.architectures import find_decoder


def test_a_decoder_is_its_parts_in_their_order(architecture: str) -> None:
    """What feeds the first layer, the layers, and what runs after the last layer, as a forward shows it."""
    model = tiny(architecture)
    decoder = find_decoder(model)
    order: list[nn.Module] = []
    for module in decoder.module.modules():
        module.register_forward_hook(lambda module, args, output: order.append(module))
    with torch.no_grad():
        model(**batch_of([5]))
    first, last = (
        max(i for i, m in enumerate(order) if m is layer) for layer in (decoder.layers[0], decoder.layers[-1])
    )
    with_parameters = [m for m in decoder.module.children() if any(True for _ in m.parameters())]
    assert decoder.tail and all(order.index(module) > last for module in decoder.tail)
    before = [m for m in with_parameters if m not in decoder.tail and not isinstance(m, nn.ModuleList)]
    assert before and all(order.index(module) < first for module in before)


def test_an_encoder_is_refused() -> None:
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    with pytest.raises(ValueError, match="add one line"):
        find_decoder(BertLMHeadModel(BertConfig(**sizes, is_decoder=True)))
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=2, num_heads=2, vocab_size=50)
    )
    with pytest.raises(ValueError, match="not a decoder-only"):
        find_decoder(t5)
