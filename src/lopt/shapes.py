"""Shapes without weights: the configs of models that have a short name, and how large a model's parts are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lopt.blocks import Blocks
from lopt.config import LoPTConfig
from lopt.models import ALIASES, resolve_model, shares_embeddings
from lopt.objective import ReconstructionHead
from lopt.packaged import PACKAGED_MODEL

# As in the published config.json files: what decides about bytes and FLOPs.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": dict(
        model_type="qwen3", hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=True,
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
}  # fmt: skip


def model_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of an alias (or what it stands for), a folder, a config.json or a hub id.

    Raises:
        ValueError: not found, not reachable, or not a config.
    """
    long_names = {hub_id: alias for alias, hub_id in ALIASES.items()}
    shape = SHAPES.get(long_names.get(name, name))
    if shape is not None:
        options = dict(shape)
        return AutoConfig.for_model(options.pop("model_type"), **options)
    path = Path(name).expanduser()
    where = str(path) if path.is_file() else resolve_model(name)
    try:
        return AutoConfig.from_pretrained(where, revision=revision, local_files_only=Path(where).exists())
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--model_name_or_path {name} has no readable config: {reason}. Give a folder, a config.json, a "
            f"hub id or one of {', '.join(SHAPES)}"
        ) from error


@dataclass
class Sizes:
    """Elements of the weights of a model: `layers` one by one, the `embedding` with all that goes into
    the first layer, the `tail` (final norm, LM head if it has a matrix of its own), the matrix that the
    LM head shares with the embedding (`tied`, else 0); `buffers` in bytes; `head` one reconstruction head."""

    layers: list[int]
    embedding: int
    tail: int
    tied: int
    buffers: int
    head: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Sizes:
        """Counted on the model itself, on the meta device."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            head = ReconstructionHead(config.get_text_config().hidden_size)
        count = len(Blocks(model, LoPTConfig(method="e2e")).layers)
        blocks = Blocks(model, LoPTConfig(num_blocks=count))
        layers = [_elements(layer) for layer in blocks.layers]
        owned = [sum(p.numel() for _, p in blocks.parameters(model, b.index)) for b in blocks]
        tied = model.get_output_embeddings().weight.numel() if shares_embeddings(model) else 0
        return cls(
            layers=layers,
            embedding=owned[0] - layers[0],
            tail=owned[-1] - layers[-1] if count > 1 else 0,
            tied=tied,
            buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
            head=_elements(head),
        )

    @property
    def model(self) -> int:
        """Elements of all weights as they are published."""
        return sum(self.layers) + self.embedding + self.tail


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
