"""Models known by name, as configs without weights, and the config of any other model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from lopt.models.load import check_causal, read_config
from lopt.models.names import ALIASES, resolve_model
from lopt.models.packaged import PACKAGED_MODEL
from lopt.models.untrusted import UntrustedError

# As in the published config.json files: what decides about bytes and FLOPs.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": dict(
        model_type="qwen3", hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": dict(
        model_type="qwen3", hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=False,
    ),
    "qwen3-14b": dict(
        model_type="qwen3", hidden_size=5120, intermediate_size=17408, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=False,
    ),
    "qwen3-32b": dict(
        model_type="qwen3", hidden_size=5120, intermediate_size=25600, num_hidden_layers=64,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=False,
    ),
    "qwen2.5-7b": dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    ),
    "qwen2.5-32b": dict(
        model_type="qwen2", hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
        num_attention_heads=40, num_key_value_heads=8, vocab_size=152064, tie_word_embeddings=False,
    ),
    "llama3.1-8b": dict(
        model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    ),
    PACKAGED_MODEL: dict(
        model_type="gemma3_text", hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, vocab_size=262144,
        sliding_window=512, tie_word_embeddings=True,
    ),
    "smollm2-135m": dict(
        model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    ),
}  # fmt: skip


def model_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the config of an alias (or what it stands for), a folder, a config.json or a hub id.

    Raises:
        ValueError: not found, not reachable, not a config, or not of a decoder-only causal LM.
    """
    long_names = {hub_id: alias for alias, hub_id in ALIASES.items()}
    shape = SHAPES.get(long_names.get(name, name))
    if shape is not None:
        options = dict(shape)
        return AutoConfig.for_model(options.pop("model_type"), **options)
    path = Path(name).expanduser()
    where = str(path) if path.is_file() else resolve_model(name)
    try:
        config = read_config(where, revision=revision, trust_remote_code=trust_remote_code)
    except UntrustedError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"`model_name_or_path` {name} has no readable config: {reason}. Give a folder, a config.json, a "
            f"hub id or one of {', '.join(SHAPES)}"
        ) from error
    check_causal(name, config)
    return config
