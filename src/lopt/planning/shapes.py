"""Shapes without weights: the configs of models that have a short name, and how large a model's parts are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from lopt.architectures import shares_embeddings
from lopt.core.blocks import Blocks, split
from lopt.core.config import LoPTConfig
from lopt.core.objective import ReconstructionHead
from lopt.models.load import check_causal, empty_model, read_config
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


def model_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
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


@dataclass(frozen=True)
class Stage:
    """A block, by the elements of its weights.

    Attributes:
        where: "first", "middle", "last", "resting" for a middle one that does not learn or, if there is one
            block only, "whole".
        layers: of every layer. rest: of embedding, final norm and LM head, as far as they are its own.
        head: of its reconstruction head. learns: whether its weights are trained.
        tensors: its weights on the meta device, in the model's order. head_tensors: its head's.
    """

    where: str
    layers: list[int]
    rest: int
    head: int
    learns: bool
    tensors: list[Tensor]
    head_tensors: list[Tensor]

    @property
    def weights(self) -> int:
        """Elements of its part of the model."""
        return sum(self.layers) + self.rest


@dataclass(frozen=True)
class Sizes:
    """How large the parts of a model are: their weights on the meta device.

    Attributes:
        layer_tensors: of every layer. embedding_tensors: all that feeds the first layer. tail_tensors:
            final norm, and the LM head if it has a matrix of its own. tied_tensors: that matrix if it is
            the embedding's. head_tensors: one reconstruction head's.
        buffers: in bytes.
    """

    layer_tensors: list[list[Tensor]]
    embedding_tensors: list[Tensor]
    tail_tensors: list[Tensor]
    tied_tensors: list[Tensor]
    head_tensors: list[Tensor]
    buffers: int

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Sizes:
        """Counted on the model itself, on the meta device, with weights of `dtype`."""
        with torch.device("meta"):
            model = empty_model(config, dtype=dtype)
            head = ReconstructionHead(config.get_text_config().hidden_size)
        count = len(Blocks(model, LoPTConfig(method="e2e")).layers)
        blocks = Blocks(model, LoPTConfig(num_blocks=count))
        layers: list[list[Tensor]] = [list(layer.parameters()) for layer in blocks.layers]
        inside = {id(p) for layer in layers for p in layer}
        owned = [[p for _, p in blocks.parameters(model, b.index) if id(p) not in inside] for b in blocks]
        return cls(
            layer_tensors=layers,
            embedding_tensors=list(owned[0]),
            tail_tensors=list(owned[-1]) if count > 1 else [],
            tied_tensors=[model.get_output_embeddings().weight] if shares_embeddings(model) else [],
            head_tensors=list(head.parameters()),
            buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
        )

    @cached_property
    def layers(self) -> list[int]:
        """Elements of every layer."""
        return [_elements(layer) for layer in self.layer_tensors]

    def stages(
        self, method: Literal["lopt", "frozen", "e2e"], num_blocks: int, frozen_blocks: int = 0
    ) -> list[Stage]:
        """The blocks of a method; two blocks or more untie embedding and LM head.

        Raises:
            ValueError: more blocks than layers, or all earlier blocks of lopt frozen.
        """
        cut = LoPTConfig(method=method, num_blocks=num_blocks, frozen_blocks=frozen_blocks)
        spans = split(len(self.layers), cut)
        last, stages = len(spans) - 1, []
        for index, (start, stop) in enumerate(spans):
            learns = index == last or (method != "frozen" and index >= frozen_blocks)
            between = "middle" if learns else "resting"
            inner = "first" if index == 0 else "last" if index == last else between
            ends = self.embedding_tensors if index == 0 else []
            tail = self.tail_tensors + (self.tied_tensors if last else []) if index == last else []
            own = [p for layer in self.layer_tensors[start:stop] for p in layer]
            head = self.head_tensors if method == "lopt" and learns and index < last else []
            stages.append(
                Stage(
                    where=inner if last else "whole",
                    layers=self.layers[start:stop],
                    rest=_elements(ends) + _elements(tail),
                    head=_elements(head),
                    learns=learns,
                    tensors=[*ends, *own, *tail],
                    head_tensors=head,
                )
            )
        return stages

    @property
    def model(self) -> int:
        """Elements of all weights as they are published."""
        return sum(self.layers) + _elements(self.embedding_tensors) + _elements(self.tail_tensors)


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
