"""Shapes without weights: the configs of models that have a short name, and how large a model's parts are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lopt.blocks import Blocks, split
from lopt.config import LoPTConfig
from lopt.models import ALIASES, check_causal, resolve_model, shares_embeddings
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
        config = AutoConfig.from_pretrained(where, revision=revision, local_files_only=Path(where).exists())
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--model_name_or_path {name} has no readable config: {reason}. Give a folder, a config.json, a "
            f"hub id or one of {', '.join(SHAPES)}"
        ) from error
    check_causal(name, config)
    return config


@dataclass(frozen=True)
class Stage:
    """A block, by the elements of its weights.

    Attributes:
        where: "first", "middle", "last" or, if there is one block only, "whole".
        layers: of every layer. rest: of embedding, final norm and LM head, as far as they are its own.
        head: of its reconstruction head. learns: whether its weights are trained.
    """

    where: str
    layers: list[int]
    rest: int
    head: int
    learns: bool

    @property
    def weights(self) -> int:
        """Elements of its part of the model."""
        return sum(self.layers) + self.rest


@dataclass(frozen=True)
class Sizes:
    """How large the parts of a model are, in elements.

    Attributes:
        layers: every layer. embedding: all that feeds the first layer. tail: final norm, and the LM head
            if it has a matrix of its own. tied: that matrix if it is the embedding's, else 0.
        buffers: in bytes. head: one reconstruction head.
    """

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

    def stages(self, method: Literal["lopt", "frozen", "e2e"], num_blocks: int) -> list[Stage]:
        """The blocks of a method; two blocks or more untie embedding and LM head.

        Raises:
            ValueError: more blocks than layers.
        """
        spans = split(len(self.layers), LoPTConfig(method=method, num_blocks=num_blocks))
        last, tail = len(spans) - 1, self.tail + (self.tied if len(spans) > 1 else 0)
        stages = []
        for index, (start, stop) in enumerate(spans):
            inner = "first" if index == 0 else "last" if index == last else "middle"
            stages.append(
                Stage(
                    where=inner if last else "whole",
                    layers=self.layers[start:stop],
                    rest=self.embedding * (index == 0) + tail * (index == last),
                    head=self.head if method == "lopt" and index < last else 0,
                    learns=index == last or method != "frozen",
                )
            )
        return stages

    @property
    def model(self) -> int:
        """Elements of all weights as they are published."""
        return sum(self.layers) + self.embedding + self.tail


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
