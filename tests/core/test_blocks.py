"""Splitting, and who owns what."""

from __future__ import annotations

import pytest
from torch import nn

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
    with pytest.raises(ValueError, match=r"`num_blocks` must be <= 4, .* \(got 5\)"):
        split(4, LoPTConfig(num_blocks=5))
    with pytest.raises(ValueError, match="`block_boundaries` must be < 4"):
        split(4, LoPTConfig(block_boundaries=[2, 4]))


def test_owners(architecture: str) -> None:
    model = tiny(architecture, tie_word_embeddings=False)
    blocks = Blocks(model, LoPTConfig(num_blocks=2))
    first = {n for n, _ in blocks.parameters(model, 0)}
    last = {n for n, _ in blocks.parameters(model, 1)}
    assert first.isdisjoint(last) and len(first | last) == len(list(model.parameters()))
    outside = {n for n in first | last if not any(f".{i}." in n for i in range(4))}
    for name in outside:
        is_final = any(
            word in name for word in ("lm_head", "embed_out", "final", "ln_f", "model.norm", "embedding_norm")
        )
        assert (name in last) == is_final, name
    assert any("emb" in n or "wte" in n for n in first)


def test_a_parameter_of_no_block_or_of_two_is_refused() -> None:
    model = tiny("llama")
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"belong to no block, such as extra\.weight"):
        Blocks(model, LoPTConfig())
    Blocks(model, LoPTConfig(method="e2e"))
    model = tiny("llama")
    model.model.layers[3].mlp = model.model.layers[0].mlp
    with pytest.raises(ValueError, match="shares weights between blocks"):
        Blocks(model, LoPTConfig())
    model = tiny("llama")
    model.model.layers[1].input_layernorm = model.model.norm  # of the last block, in the first
    with pytest.raises(ValueError, match="shares weights between blocks"):
        Blocks(model, LoPTConfig())
