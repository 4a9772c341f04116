"""Hidden states (S, N, H) and weights of a model, kept in files that are mapped into memory.

S = 1 + layers: the input of the first layer, then the output of each layer; the last is the input of the
final norm. N = tokens, H = hidden size. They are kept in files, since those of a 7B model and its weights do
not fit into memory beside a second model; they are read one layer at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lopt.architectures import base_model, compute_device
from lopt.core.blocks import Blocks
from lopt.core.config import LoPTConfig
from lopt.evaluation.loss import text_windows

END_TO_END = LoPTConfig(method="e2e")
_OTHER_ADAPTERS = "only plain LoRA adapters can be compared as they are: merge these into the model first"


def windows(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int, window: int
) -> list[list[int]]:
    """Return the token ids of the first `tokens` tokens of every text, `window` at a time.

    Every window starts with the tokenizer's first special token, if it has one (not counted).

    Raises:
        ValueError: a text is too short.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [start + ids for text in texts for ids in text_windows(tokenizer, text, tokens, window)]


@torch.no_grad()
def record_states(
    model: nn.Module, rows: Sequence[Sequence[int]], skip: int, batch_size: int, file: Path
) -> Tensor:
    """Return hidden states (S, N, H) of `model` on `rows` of token ids, written to `file`.

    Boundaries of an attached model have no effect here; the model's mode and the random state are restored.

    Args:
        rows: without padding; all tokens but the first `skip` of each are kept.

    Raises:
        ValueError: a row is longer than the model's positions, or its architecture is not known.
    """
    base: Any = base_model(model)
    blocks, config = Blocks(model, END_TO_END), base.config.get_text_config()
    longest, limit = max(map(len, rows)), getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(f"`window`: the model has {limit} positions, {longest} tokens are too many")
    count = sum(len(row) - skip for row in rows)
    dtype = torch.promote_types(next(base.parameters()).dtype, torch.float32)
    states = mapped(file, (1 + len(blocks.layers), count, config.hidden_size), dtype)
    at, keep = 0, torch.empty(0, dtype=torch.bool)

    def record(index: int, hidden: Tensor) -> None:
        kept = hidden[keep.to(hidden.device)]
        states[index, at : at + len(kept)] = kept.to("cpu", dtype)

    def after(index: int, module: nn.Module, args: tuple, output: Any) -> None:
        record(index, output[0] if isinstance(output, tuple | list) else output)

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        record(0, args[0] if args else kwargs["hidden_states"])

    hooks = [blocks.layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    for number, layer in enumerate(blocks.layers, start=1):
        hooks.append(layer.register_forward_hook(functools.partial(after, number)))
    training, device = model.training, compute_device(model)
    model.eval()
    try:
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            width = max(map(len, part))
            ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in part])
            mask = torch.arange(width) < torch.tensor([[len(row)] for row in part])
            keep = mask & (torch.arange(width) >= skip)
            blocks.decoder(input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False)
            at += int(keep.sum())
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return states


class NamedWeight(NamedTuple):
    """A weight of the plain model; `key` is the same for all names of one matrix."""

    name: str
    key: int
    value: Tensor


def record_weights(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Return a copy of all weights by name, mapped files in `folder`; names of one matrix share one copy."""
    folder.mkdir()
    copies: dict[int, Tensor] = {}
    named: dict[str, Tensor] = {}
    for name, key, value in effective_weights(model):
        if key not in copies:
            copies[key] = mapped(folder / str(len(copies)), tuple(value.shape), value.dtype).copy_(value)
        named[name] = copies[key]
    return named


def effective_weights(model: nn.Module) -> Iterator[NamedWeight]:
    """Yield the weights of the plain model: a tied matrix under all its names, LoRA added in.

    Raises:
        ValueError: adapters of another kind.
    """
    base = base_model(model)
    for name, parameter in base.named_parameters(remove_duplicate=False):
        owner, _, kind = name.rpartition(".")
        value = parameter.detach()
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            value = _with_adapters(base.get_submodule(owner), value) if kind == "weight" else value
        elif ".lora_" in f".{owner}":
            continue  # added to its layer's weight
        elif ".modules_to_save." in name or ".original_module." in name:
            raise ValueError(f"{name}: {_OTHER_ADAPTERS}")
        yield NamedWeight(f"{owner}.{kind}", id(parameter), value)


def _with_adapters(layer: Any, weight: Tensor) -> Tensor:
    """Return `weight` of the layer under a PEFT layer with its LoRA adapters added in."""
    if not hasattr(layer, "get_delta_weight") or any(getattr(layer, "use_dora", {}).values()):
        raise ValueError(f"{type(layer).__name__}: {_OTHER_ADAPTERS}")
    if layer.merged or layer.disable_adapters:
        return weight
    active = [adapter for adapter in layer.active_adapters if adapter in layer.scaling]
    return weight + sum(layer.get_delta_weight(adapter).detach().to(weight) for adapter in active)


def mapped(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a new tensor that is stored in `file`."""
    size = torch.Size(shape).numel()
    return torch.from_file(str(file), shared=True, size=size, dtype=dtype).view(shape)
