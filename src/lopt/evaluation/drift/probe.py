"""The work of `lopt probe`: drift of tuned models from one base, with one model in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from lopt.core.blocks import split
from lopt.core.config import LoPTConfig
from lopt.evaluation.drift.reference import CANNOT, Drift, Reference
from lopt.evaluation.drift.states import windows
from lopt.evaluation.load import Loading, adapter_base
from lopt.files import read_json
from lopt.models.shapes import model_config


def probe(
    base: str,
    models: Mapping[str, str],
    texts: Sequence[str],
    loading: Loading,
    *,
    cut: LoPTConfig | None = None,
    tokens: int = 2048,
    window: int = 128,
    batch_size: int = 16,
) -> dict[str, Drift]:
    """Return the drift of every tuned model by its label.

    Args:
        base: folder or hub id of the base model.
        models: folders or hub ids of the tuned models, by label.
        texts: plain texts; `tokens` of each are read, `window` together, `batch_size` windows at a time.
        cut: where all tuned models have boundaries. Default: as in the lopt_config.json of each.

    Raises:
        ValueError: a model cannot be loaded, is not of the base's shape or reads the text differently.
    """
    trust = loading.trust_remote_code
    with naming_base():
        tokenizer, shape = loading.tokenizer(base), model_config(base, trust_remote_code=trust)
    rows = windows(tokenizer, texts, tokens, window)
    boundaries = {}
    for label, path in models.items():
        _check_shape(label, shape, model_config(adapter_base(path) or path, trust_remote_code=trust))
        if windows(loading.tokenizer(path), texts, tokens, window) != rows:
            raise ValueError(f"{label}: {CANNOT}, their tokenizers read the text as different tokens")
        boundaries[label] = _boundaries(path, cut, shape.get_text_config().num_hidden_layers)
    drifts = {}
    with tqdm(total=1 + len(models), desc="Models", unit="model") as bar:
        with naming_base():
            model: Any = loading.model(base)
        reference = Reference.of(model, tokenizer, texts, tokens=tokens, window=window, batch_size=batch_size)
        bar.update()
        for label, path in models.items():
            del model  # before the next one is loaded
            model = loading.model(path)
            drifts[label] = reference.drift(model, boundaries=boundaries[label])
            bar.update()
    return drifts


@contextmanager
def naming_base() -> Iterator[None]:
    """Let messages on a model that cannot be loaded name the argument `base`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub("`model_name_or_path`|--model_name_or_path", "`base`", str(error))) from error


def _check_shape(label: str, base: PreTrainedConfig, tuned: PreTrainedConfig) -> None:
    shapes = []
    for whole in (base, tuned):
        config = whole.get_text_config()
        layers, size = config.num_hidden_layers, config.hidden_size
        shapes.append(f"{config.model_type}, {layers} layers of {size} channels, {config.vocab_size} tokens")
    if shapes[0] != shapes[1]:
        raise ValueError(f"{label}: {CANNOT}, the base is {shapes[0]}, this one is {shapes[1]}")


def _boundaries(path: str, cut: LoPTConfig | None, layers: int) -> list[int]:
    """Return the layers at which blocks 2..k start.

    Raises:
        ValueError: `cut` is impossible for this model; its lopt_config.json is broken.
    """
    note = Path(path) / "lopt_config.json"
    if cut is None and note.is_file():
        try:
            cut = LoPTConfig(**read_json(note))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{note} cannot be read ({error}): give `num_blocks` instead") from error
    return [] if cut is None else [start for start, _ in split(layers, cut)[1:]]
