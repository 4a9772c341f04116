"""Splitting, and who owns what."""

from __future__ import annotations

import pytest
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from conftest import tiny
from lopt import LoPTConfig
from lopt.core.blocks import Blocks, split


@pytest.mark.parametrize(
    ("layers", "k", "sizes"), [(18, 4, [5, 5, 4, 4]), (28, 2, [14, 14]), (7, 3, [3, 2, 2]), (4, 4, [1] * 4)]
)
def test_split_is_even_and_the_earlier_blocks_take_the_rest(layers: int, k: int, sizes: list[int]) -> None:
    spans = split(layers, LoPTConfig(num_blocks=k))
    assert [b - a for a, b in spans] == sizes
    assert spans[0][0] == 0 and spans[-1][1] == layers


def test_explicit_boundaries() -> None:
    assert split(18, LoPTConfig(block_boundaries=[6, 7])) == [(0, 6), (6, 7), (7, 18)]
    assert split(18, LoPTConfig(method="e2e", num_blocks=4)) == [(0, 18)]
    with pytest.raises(ValueError, match="--num_blocks 5 is more than the model's 4"):
        split(4, LoPTConfig(num_blocks=5))
    with pytest.raises(ValueError, match="--block_boundaries"):
        split(4, LoPTConfig(block_boundaries=[2, 4]))


def test_owners(architecture: str) -> None:
    model = tiny(architecture, tie_word_embeddings=False)
    blocks = Blocks(model, LoPTConfig(num_blocks=2))
    first = {n for n, _ in blocks.parameters(model, 0)}
    last = {n for n, _ in blocks.parameters(model, 1)}
    assert first.isdisjoint(last) and len(first | last) == len(list(model.parameters()))
    outside = {n for n in first | last if not any(f".{i}." in n for i in range(4))}
    for name in outside:
        is_final = any(word in name for word in ("lm_head", "embed_out", "final", "ln_f", "model.norm"))
        assert (name in last) == is_final, name
    assert any("emb" in n or "wte" in n for n in first)


def test_an_encoder_is_refused() -> None:
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    with pytest.raises(ValueError, match="add one line"):
        Blocks(BertLMHeadModel(BertConfig(**sizes, is_decoder=True)), LoPTConfig())
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=2, num_heads=2, vocab_size=50)
    )
    with pytest.raises(ValueError, match="not a decoder-only"):
        Blocks(t5, LoPTConfig())
