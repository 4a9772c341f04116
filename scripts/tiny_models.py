"""Every causal LM of transformers as a small random model, by enumeration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

# What these arguments are called in most configs. A config gets those that it has.
SIZES: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
MORE: dict[str, Any] = dict(
    moe_intermediate_size=16, shared_expert_intermediate_size=16, n_routed_experts=4, num_experts=4,
    num_local_experts=4, num_experts_per_tok=2, ffn_dim=48, word_embed_proj_dim=32, d_inner=64,
    vocab_size_per_layer_input=97, encoder_layers=1, decoder_layers=4, decoder_ffn_dim=48,
    encoder_ffn_dim=48, decoder_attention_heads=4, encoder_attention_heads=4,
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    index_n_heads=2, n_group=1, topk_group=1, rotary_dim=4,
    index_head_dim=16, o_lora_rank=16, dff=48, dim_ff=48, dim_head=8, num_heads=4,
    mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, num_layers=4, is_decoder=True,
    image_size=28, patch_size=14,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip
# What a model type needs besides.
SPECIAL: dict[str, dict[str, Any]] = {
    "dots1": dict(n_shared_experts=1, first_k_dense_replace=1),
    "dots3_note_text": dict(num_key_value_heads=4, per_layer_config={}),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4), ffn_config=dict(ffn_hidden_size=48)),
    "kimi_linear": dict(linear_head_dim=8, linear_num_heads=4, num_experts_per_token=2),
    "qwen4_exp_text": dict(
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=8,
        indexer_compress_ratio=2,
        output_gate_type="sigmoid",
    ),
    "cohere_compass_text": dict(
        rope_parameters=dict(full_attention=dict(rope_theta=1e4, rope_type="default"))
    ),
    "inkling_text": dict(swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8),
    "blt": dict(encoder_hash_byte_group_vocab=97),
    "falcon_h1": dict(mamba_d_ssm=64),
    "zamba2": dict(layer_types=["mamba", "hybrid"] * 2, use_shared_attention_adapter=False),
    "falcon": dict(head_dim=None),
    "gemma3n_text": dict(num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"] * 2),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1, state_size=16),
    "prophetnet": dict(num_hidden_layers=None, num_encoder_layers=1, num_decoder_layers=4),
    "xlnet": dict(max_position_embeddings=None),
    "zaya": dict(num_experts_per_tok=1),
}


def small_configs() -> Iterator[tuple[type[PreTrainedConfig], type[PreTrainedModel]]]:
    """Yield every config class and its causal LM; a class that stands for several model types once."""
    for config, classes in dict(MODEL_FOR_CAUSAL_LM_MAPPING.items()).items():
        model = classes[0] if isinstance(classes, tuple | list) else classes
        if issubclass(config, model.config_class):  # or the model takes the text part of this config
            yield config, model


def small_config(config: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return a small config of this class.

    Raises:
        Exception: of any kind: it does not take these sizes.
    """
    known = set(inspect.signature(config).parameters) | set(getattr(config, "attribute_map", {}))
    parts = {}
    for key, part in config.sub_configs.items():
        kind = type(getattr(config(), key)) if part is AutoConfig else part
        parts[key] = small_config(kind) if issubclass(kind, PreTrainedConfig) else None
    more = {key: value for key, value in MORE.items() if key in known}
    sizes = SIZES | more | parts | SPECIAL.get(config.model_type, {})
    if "kv_lora_rank" in known:  # latent attention has as many keys as queries
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes = {key: value for key, value in sizes.items() if value is not None}
    try:
        made = config(**_kinds_of_layers(config, sizes["num_hidden_layers"]) | sizes)
    except Exception:  # of any kind: some configs take them in their own order only, or not at all
        made = config(**sizes)
    for key, value in vars(made).items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(made, key, 0.0)
    return made


def _kinds_of_layers(config: type[PreTrainedConfig], count: int) -> dict[str, list[str]]:
    """Return the lists that name each layer's kind, with every kind in turn."""
    kinds: dict[str, list[str]] = {}
    for key in ("layer_types", "mlp_layer_types"):
        found = list(dict.fromkeys(getattr(config(), key, None) or []))
        if len(found) > 1:
            kinds[key] = (found * count)[:count]
    return kinds


def small_model(config: PreTrainedConfig, model: type[PreTrainedModel], seed: int = 0) -> PreTrainedModel:
    """Return the model with random weights, the same for the same arguments, in training mode."""
    torch.manual_seed(seed)
    made = model(config).train()
    for parameter in made.parameters():  # the stock initialisation is too flat to tell errors apart
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter.data, std=0.2)
    return made


def small_model_of(model_type: str, **changes: Any) -> PreTrainedModel:
    """Return the small causal LM of a model type, with some settings of its config changed."""
    kinds = {config.model_type: (config, model) for config, model in small_configs()}
    config, model = kinds[model_type]
    made = small_config(config)
    for key, value in changes.items():
        setattr(made, key, value)
    return small_model(made, model)
