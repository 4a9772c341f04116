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
from lopt import LoPTConfig
from lopt.architectures import find_decoder, position_limit
from lopt.core.blocks import Blocks
from tiny_models import small_config, small_configs


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


def decoder_names(model: nn.Module) -> list[str]:
    """The names of a decoder's tail, as its own children are called."""
    decoder = find_decoder(model)
    names = {module: name for name, module in decoder.module.named_modules()}
    return [names[module] for module in decoder.tail]


# Those of all that fail on a row longer than `max_position_embeddings`.
POSITIONS = {
    *("biogpt", "codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "openai-gpt", "opt"),
    *(
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "marian",
        "mbart",
        "mvp",
        "pegasus",
        "plbart",
    ),
    *("prophetnet", "trocr"),
}


def test_every_causal_lm_of_transformers_has_its_tail_in_the_last_block_or_is_refused() -> None:
    """On the meta device; scripts/model_table.py trains them all."""
    tails: dict[str, list[str]] = {}
    tables: set[str] = set()
    refused: dict[str, str] = {}
    for config_class, model_class in small_configs():
        try:
            with torch.device("meta"):
                model = model_class(small_config(config_class))
        except Exception:  # what cannot be built so small is not looked at
            continue
        try:
            tails[config_class.model_type] = decoder_names(model)
            if position_limit(model):
                tables.add(config_class.model_type)
            blocks = Blocks(model, LoPTConfig(num_blocks=2))
        except ValueError as error:
            refused[config_class.model_type] = str(error)
            continue
        owned = [name for b in blocks for name, _ in blocks.parameters(model, b.index)]
        assert sorted(owned) == sorted(name for name, _ in model.named_parameters()), model_class
        assert all(blocks.owner(p) == 1 for module in blocks.tail for p in module.parameters()), model_class
    assert len(tails) > 100
    for name, tail in {
        "biogpt": ["layer_norm"], "falcon_h1": ["final_layernorm"], "gpt_neox_japanese": ["final_layer_norm"],
        "jamba": ["final_layernorm"], "lfm2": ["embedding_norm"], "nemotron_h": ["norm_f"],
        "persimmon": ["final_layernorm"], "recurrent_gemma": ["final_norm"], "xglm": ["layer_norm"],
        "nanochat": ["norm"], "rwkv": ["ln_out"], "mpt": ["norm_f"],
    }.items():  # fmt: skip
        assert tails[name] == tail, name
    assert tables == POSITIONS
    assert {name: reason for name, reason in refused.items() if "\n" in reason} == {}
    for name in ("bert", "roberta", "xlm", "hrm_text", "zaya", "gemma3n_text", "deepseek_v4"):
        assert name in refused


def test_layers_that_run_twice_and_parts_that_never_run_are_refused() -> None:
    model = tiny("llama")
    layers = model.model.layers
    model.model.extra = nn.Linear(2, 2)
    assert model.model.extra not in find_decoder(model).front
    with pytest.raises(ValueError, match=r"belong to no block, such as model\.extra\.weight"):
        Blocks(model, LoPTConfig())
    del model.model.extra
    hook = layers[1].register_forward_hook(lambda module, args, output: layers[0](output))
    with pytest.raises(ValueError, match="does not run each of its layers once, in order"):
        find_decoder(model)
    hook.remove()
    model.train().model.embed_tokens.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    find_decoder(model)
    assert modes == [m.training for m in model.modules()] and torch.equal(state, torch.get_rng_state())
    assert not any("forward" in vars(layer) or layer._forward_pre_hooks for layer in layers)
