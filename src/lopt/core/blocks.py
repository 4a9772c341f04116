"""Find the decoder of a Hugging Face causal LM, split it, say which parameter belongs to whom.

Adding an unknown architecture is one line in `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt.core.config import LoPTConfig


@dataclass(frozen=True)
class Layout:
    """Where a decoder keeps its layers and what comes after them.

    Every other module of the decoder (token and position embeddings and their norms) feeds the
    first layer and so belongs to block 1.
    """

    layers: str = "layers"
    final: tuple[str, ...] = ("norm",)


# Keyed by `config.model_type`. Models laid out like Llama need no line.
LAYOUTS: dict[str, Layout] = {
    "gpt2": Layout("h", ("ln_f",)),
    "gptj": Layout("h", ("ln_f",)),
    "gpt_neo": Layout("h", ("ln_f",)),
    "gpt_bigcode": Layout("h", ("ln_f",)),
    "bloom": Layout("h", ("ln_f",)),
    "falcon": Layout("h", ("ln_f",)),
    "gpt_neox": Layout("layers", ("final_layer_norm",)),
    "opt": Layout("layers", ("final_layer_norm", "project_out")),
    "phi": Layout("layers", ("final_layernorm",)),
}


@dataclass(frozen=True)
class Block:
    """Layers `start` (included) to `stop` (excluded) of the decoder; `index` counts from 0."""

    index: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"block {self.index + 1} (layers {self.start}-{self.stop - 1})"


class Blocks(Sequence[Block]):
    """The blocks of one model: where they begin and end and which parameters they own."""

    def __init__(self, model: nn.Module, config: LoPTConfig) -> None:
        base = base_model(model)
        self.decoder, layout = find_decoder(base)
        self.layers: list[nn.Module] = list(getattr(self.decoder, layout.layers))
        spans = split(len(self.layers), config)
        self._blocks = [Block(i, a, b) for i, (a, b) in enumerate(spans)]
        self._base, self._layout = base, layout
        self._owners()  # refuses layers that share weights

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index):
        return self._blocks[index]

    def first_layer(self, block: Block) -> nn.Module:
        """The layer whose input is the block's input."""
        return self.layers[block.start]

    def last_layer(self, block: Block) -> nn.Module:
        """The layer whose output is the block's output."""
        return self.layers[block.stop - 1]

    def owner(self, parameter: nn.Parameter) -> int:
        """Index of the block a parameter belongs to; what no layer, head or final norm has is block 1's."""
        return self._owners().get(id(parameter), 0)

    def parameters(self, model: nn.Module, index: int) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of `model` that belong to block `index`, in the model's order."""
        owners = self._owners()  # anew: untying and sharding put other parameters in the modules
        for name, parameter in model.named_parameters():
            if owners.get(id(parameter), 0) == index:
                yield name, parameter

    def tail(self) -> list[nn.Module]:
        """What the decoder puts the last layer's output through: the final norm, and what follows it."""
        return [m for name in self._layout.final if (m := getattr(self.decoder, name, None)) is not None]

    def _owners(self) -> dict[int, int]:
        """Map id(parameter) to block index."""
        base, last = self._base, len(self) - 1
        owner = {
            id(p): last
            for module in (base.get_output_embeddings(), *self.tail())
            for p in module.parameters()
        }
        # After the head: a matrix that the head shares with the embedding belongs to block 1.
        owner.update({id(p): 0 for p in base.get_input_embeddings().parameters()})
        layers: dict[int, int] = {}
        for block in self:
            for layer in self.layers[block.start : block.stop]:
                for parameter in layer.parameters():
                    if layers.setdefault(id(parameter), block.index) != block.index:
                        raise ValueError(
                            f"{type(base).__name__} shares weights between layers: "
                            "it cannot be cut into blocks"
                        )
        return owner | layers


def base_model(model: nn.Module) -> PreTrainedModel:
    """The causal LM itself, out of a PEFT wrapper if there is one."""
    unwrap: Any = getattr(model, "get_base_model", None)
    unwrapped = model if unwrap is None else unwrap()
    if not isinstance(unwrapped, PreTrainedModel):
        raise ValueError(
            f"{type(unwrapped).__name__} is not a Hugging Face model: "
            "pass what AutoModelForCausalLM.from_pretrained returns"
        )
    return unwrapped


def compute_device(model: nn.Module) -> torch.device:
    """Where `model` computes, which is not where weights are that wait in host memory."""
    base: Any = base_model(model)
    handle = getattr(base, "_lopt", None)
    return base.device if handle is None else handle.device


def find_decoder(model: PreTrainedModel) -> tuple[nn.Module, Layout]:
    """The module that holds the layers, and how it is laid out.

    Raises:
        ValueError: the model is an encoder, has no LM head or an unknown layout.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ValueError(f"{name} is not a decoder-only causal LM with a head: use a ...ForCausalLM model")
    decoder = model.get_decoder()
    layout = LAYOUTS.get(config.model_type, Layout())
    if not isinstance(getattr(decoder, layout.layers, None), nn.ModuleList):
        raise ValueError(
            f"{name} keeps its layers in an unknown place. If it is a decoder-only model, add one line: "
            f"lopt.core.blocks.LAYOUTS['{config.model_type}'] = Layout(layers=..., final=(...,))"
        )
    return decoder, layout


def split(num_layers: int, config: LoPTConfig) -> list[tuple[int, int]]:
    """Contiguous (start, stop) spans, as even as possible, earlier blocks taking the remainder.

    Raises:
        ValueError: the model has not layers enough, or no earlier block is left to learn.
    """
    if not config.is_cut:
        return [(0, num_layers)]
    starts = config.block_boundaries
    if starts is None:
        k = config.num_blocks
        if k > num_layers:
            raise ValueError(
                f"--num_blocks {k} is more than the model's {num_layers} layers: use {num_layers} or fewer"
            )
        size, rest = divmod(num_layers, k)
        starts = [b * size + min(b, rest) for b in range(1, k)]
    elif starts and starts[-1] >= num_layers:
        raise ValueError(
            f"--block_boundaries {starts}: the model has {num_layers} layers, "
            f"so the last boundary must be below {num_layers}"
        )
    frozen, most = config.frozen_blocks, max(0, len(starts) - 1)
    if config.is_local and frozen > most:
        raise ValueError(
            f"--frozen_blocks {frozen} of {len(starts) + 1} blocks leaves no earlier block that learns: "
            f"use {most} or fewer, or --method frozen"
        )
    return list(zip([0, *starts], [*starts, num_layers], strict=True))
