"""Load the weights of some blocks of a model, as a process of a pipeline does."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from lopt.core.blocks import Blocks
from lopt.core.config import LoPTConfig
from lopt.models.load import empty_model, load_config
from lopt.models.names import resolve_model
from lopt.models.weight_files import INDEX, WHOLE
from lopt.tied_embeddings import shares_embeddings


def load_part(
    name: str,
    config: LoPTConfig,
    blocks: Collection[int],
    *,
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal LM with the weights of `blocks`; all other weights are on the meta device.

    Only the files that hold them are fetched from the hub, and only their tensors are read.

    Args:
        name: Folder or hub id.
        config: How the model is cut.
        blocks: Indices (from 0) of the blocks to load.
        dtype: Of the weights; "auto" is that of the config.
        revision, attn_implementation, trust_remote_code: As of `lopt.models.load.load_model`.

    Raises:
        ValueError: As `load_model`; or the files name a weight differently than the model does.
    """
    source: dict[str, Any] = dict(revision=revision, trust_remote_code=trust_remote_code)
    shape = load_config(name, weights=True, **source)
    named: Any = {"auto": shape.dtype or torch.float32}.get(str(dtype), dtype)
    dtype = getattr(torch, named) if isinstance(named, str) else named
    assert isinstance(dtype, torch.dtype)
    with init_empty_weights(include_buffers=False):
        model = empty_model(shape, dtype=dtype, attn_implementation=attn_implementation)
    model.config.name_or_path = name
    model.tie_weights()  # anew: each weight has been replaced by an empty one
    model.eval()
    path = resolve_model(name)
    if cached_file(path, "generation_config.json", **_OPTIONAL, **source):
        model.generation_config = GenerationConfig.from_pretrained(path, **source)
    places = _places(path, source)
    wanted = _own_parameters(model, config, blocks)
    missing = sorted(wanted - places.keys())
    if missing:
        raise ValueError(
            f"`model_name_or_path` {name}: its files have no {missing[0]}, which a process of a pipeline "
            "reads by this name: load the whole model with transformers and save it again"
        )
    loaded: dict[nn.Parameter, nn.Parameter] = {}
    for key, value in _read(path, {key: places[key] for key in wanted}, source):
        empty = model.get_parameter(key)
        loaded[empty] = _loaded(name, key, empty, value.to(dtype))
    replace_parameters(model, loaded)
    return model


@torch.no_grad()
def read_part(model: nn.Module, folder: str | Path) -> None:
    """Read the weights that `model` has, those not on the meta device, from a folder in safetensors.

    Raises:
        ValueError: The folder does not have them all.
    """
    own = {name: p for name, p in model.named_parameters() if not p.is_meta}
    places = _places(str(folder), {})
    if missing := sorted(own.keys() - places.keys()):
        raise ValueError(f"{folder} has no weights for {missing[0]}: it is of another model")
    for key, value in _read(str(folder), {key: places[key] for key in own}, {}):
        own[key].copy_(value)


def _read(path: str, places: Mapping[str, str], source: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors by name, file by file; `places` has the file of each."""
    for file in sorted(set(places.values())):
        with safe_open(str(cached_file(path, file, **source)), framework="pt") as tensors:
            for key in sorted(key for key, place in places.items() if place == file):
                yield key, tensors.get_tensor(key)


def replace_parameters(model: nn.Module, others: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put other parameters in the place of some, in all modules that share them."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in others:
                setattr(module, name, others[parameter])


_OPTIONAL: dict[str, Any] = dict(_raise_exceptions_for_missing_entries=False)


def _places(path: str, source: dict[str, Any]) -> dict[str, str]:
    """Return the file of every tensor of a model in safetensors."""
    if index := cached_file(path, INDEX, **_OPTIONAL, **source):
        return json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    whole = cached_file(path, WHOLE, **source)
    with safe_open(str(whole), framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), WHOLE)


def _own_parameters(model: Any, config: LoPTConfig, blocks: Collection[int]) -> set[str]:
    """Return the names of the parameters of `blocks`, and of the matrix that is their LM head."""
    cut = Blocks(model, config)
    own = {name for index in blocks for name, _ in cut.parameters(model, index)}
    if len(cut) - 1 in blocks and shares_embeddings(model):
        matrix = model.get_input_embeddings().weight
        own |= {name for name, parameter in model.named_parameters() if parameter is matrix}
    return own


def _loaded(name: str, key: str, empty: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
    """Return the parameter `key` with its value."""
    if empty.shape != value.shape:
        raise ValueError(
            f"`model_name_or_path` {name}: its weights do not fit its config.json: {key} is "
            f"{list(value.shape)}, not {list(empty.shape)}: get both from one place"
        )
    return nn.Parameter(value, requires_grad=empty.requires_grad)
