"""Where the causal LMs of transformers keep their parts: the decoder, its layers, what surrounds them.

Adding an unknown architecture is one line in `LAYOUTS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Layout:
    """Where a decoder keeps its layers and what comes after them.

    Every other module of the decoder feeds the first layer.

    Attributes:
        layers: Name of the decoder's list of layers.
        final: Names that the modules which the last layer's output passes through may have, in order.
    """

    layers: str = "layers"
    final: tuple[str, ...] = (
        *("norm", "norm_f", "ln_f", "final_norm", "final_layernorm", "final_layer_norm", "layer_norm"),
        *("embedding_norm", "project_out"),  # LFM 2; OPT
    )


# Keyed by `config.model_type`. Models laid out like Llama need no line.
LAYOUTS: dict[str, Layout] = {
    "gpt2": Layout("h"),
    "gptj": Layout("h"),
    "gpt_neo": Layout("h"),
    "gpt_bigcode": Layout("h"),
    "bloom": Layout("h"),
    "falcon": Layout("h"),
}


@dataclass(frozen=True)
class Decoder:
    """A decoder and its parts, in the order in which a hidden state passes through them.

    Attributes:
        module: The decoder itself.
        front: Every part that feeds the first layer: token and position embeddings and their norms.
        layers: The layers.
        tail: What the last layer's output passes through: the final norm, and what follows it.
    """

    module: nn.Module
    front: list[nn.Module]
    layers: list[nn.Module]
    tail: list[nn.Module]


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the causal LM itself, taken out of a PEFT wrapper if there is one.

    Raises:
        ValueError: `model` is not a model of transformers.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    unwrapped = model if unwrap is None else unwrap()
    if not isinstance(unwrapped, PreTrainedModel):
        raise ValueError(
            f"{type(unwrapped).__name__} is not a Hugging Face model: "
            "pass what AutoModelForCausalLM.from_pretrained returns"
        )
    return unwrapped


def compute_device(model: nn.Module) -> torch.device:
    """Return the device that `model` computes on; offloaded weights may be elsewhere."""
    base: Any = base_model(model)
    handle = getattr(base, "_lopt", None)
    return base.device if handle is None else handle.device


def find_decoder(model: PreTrainedModel) -> Decoder:
    """Return the decoder of a causal LM.

    Raises:
        ValueError: The model is an encoder, has no LM head or an unknown layout.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ValueError(f"{name} is not a decoder-only causal LM with a head: use a ...ForCausalLM model")
    decoder = model.get_decoder()
    layout = LAYOUTS.get(config.model_type, Layout())
    layers = getattr(decoder, layout.layers, None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{name} keeps its layers in an unknown place. If it is a decoder-only model, add one line: "
            f"lopt.architectures.LAYOUTS['{config.model_type}'] = Layout(layers=...)"
        )
    parts = dict(decoder.named_children())
    tail = [parts[key] for key in layout.final if parts.get(key) is not None]
    front = [part for part in parts.values() if part is not layers and part not in tail]
    return Decoder(decoder, front, list(layers), tail)
