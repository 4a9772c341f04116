"""Load and save models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lopt.models.packaged import PACKAGED_MODEL, packaged_model
from lopt.models.template_check import check_template
from lopt.models.trust import UntrustedError, check_folder, check_kernels, refused_code

ALIASES = {
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
}
DTYPES = ("float32", "bfloat16", "float16", "auto")


def resolve_model(name: str) -> str:
    """A folder or hub id for an alias, the packaged model's name, a folder or a hub id.

    Raises:
        ValueError: `name` looks like a folder and there is none.
    """
    if name == PACKAGED_MODEL:
        return str(packaged_model())
    if name in ALIASES:
        return ALIASES[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or os.path.exists(name):
        raise ValueError(
            f"--model_name_or_path {name} is not a folder: give one that holds config.json and weights"
        )
    return name


def read_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, weights: bool = False
) -> PreTrainedConfig:
    """The config of any model, which may be a config.json; no code that comes with it runs unless trusted.

    Args:
        weights: refuse a folder whose weights could not be loaded, too.

    Raises:
        UntrustedError: see `lopt.models.trust`.
        OSError, ValueError: as `AutoConfig` raises them.
    """
    path = name if Path(name).is_file() else resolve_model(name)
    local = Path(path).exists()
    if Path(path).is_dir():
        check_folder(path, weights=weights, name=name)
    where: dict[str, Any] = dict(revision=revision, trust_remote_code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=local, **where)
    except ValueError as error:
        raise refused_code(name, error) or error from error
    return config


def empty_model(config: PreTrainedConfig, **options: Any) -> Any:
    """A model with this config and random weights; code that came with the config runs only if trusted."""
    trusted = type(config).__module__.startswith("transformers_modules")
    options = {"attn_implementation": "eager", **options}  # a config may name a kernel, to be fetched and run
    return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted, **options)


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a decoder-only causal LM from safetensors.

    Args:
        name: alias, folder or hub id (see `resolve_model`).
        dtype: of the weights. float32 keeps what small steps add; bfloat16 halves the memory and
            needs an optimizer that does not round small steps away (`lopt.engine.optimizer`).

    Raises:
        ValueError: not found, not reachable, not a decoder-only causal LM, not safetensors, or with code of
            its own and no `trust_remote_code`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--param_dtype {dtype} is not possible: use one of {', '.join(DTYPES)}")
    where: dict[str, Any] = dict(revision=revision, trust_remote_code=trust_remote_code)
    config = load_config(name, weights=True, **where)
    check_kernels(name, config, attn_implementation)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve_model(name),
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below, in a line
            output_loading_info=True,
            **where,
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error
    except SafetensorError as error:
        raise ValueError(
            f"--model_name_or_path {name}: its weights are damaged ({_first_line(error)}): get them again"
        ) from error
    model, told = loaded
    _check_complete(name, told)
    return model


def load_config(name: str, **where: Any) -> PreTrainedConfig:
    """The config of a decoder-only causal LM; arguments as for `read_config`, errors as for `load_model`."""
    resolve_model(name)  # a folder or a hub id, not a config.json
    try:
        config = read_config(name, **where)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # whatever a config.json may hold
        raise _cannot_load(name, error) from error
    check_causal(name, config)
    return config


def _check_complete(name: str, told: Mapping[str, Any]) -> None:
    """Refuse weights that transformers would fill in at random, with no more than a warning."""
    wrong = [f"{key} is {list(there)}, not {list(here)}" for key, there, here in told["mismatched_keys"]]
    wrong += [f"{key} is missing" for key in sorted(told["missing_keys"])]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"--model_name_or_path {name}: its weights do not fit its config.json: {wrong[0]}{more}. Get "
            "both from one place, with a head (...ForCausalLM)"
        )


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model; a missing pad token becomes the end-of-text token.

    Raises:
        ValueError: there is none, or it has no end-of-text token.
    """
    path = resolve_model(name)
    where: dict[str, Any] = dict(revision=revision, trust_remote_code=trust_remote_code)
    config = None
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():  # an adapter's
        check_folder(path, weights=False, name=name)
    else:
        config = load_config(name, **where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
    except (OSError, ValueError) as error:
        if refused := refused_code(name, error):
            raise refused from error
        raise ValueError(
            f"the tokenizer of {name} cannot be loaded: {_first_line(error)}: put its files "
            "beside config.json"
        ) from error
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer of {name} has no end-of-text token: set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_template(name, tokenizer)
    if config is not None:
        _check_vocabulary(name, tokenizer, config.get_text_config().vocab_size)
    return tokenizer


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse tokens that the embedding of `rows` rows has no row for.

    Added tokens do not count unless they end or pad a text: some tokenizers, as Gemma 3's, have a few for
    images that their text models never see.
    """
    added = set(tokenizer.get_added_vocab().values())
    used = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id} - {None}
    most = max((used | set(tokenizer.get_vocab().values())) - (added - used))
    if most >= rows:
        raise ValueError(
            f"the tokenizer of {name} has a token {most}, and the model's embedding {rows} rows: give the "
            "tokenizer that belongs to it, or call model.resize_token_embeddings and save it"
        )


def save_model(
    model: nn.Module, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Save what `AutoModelForCausalLM.from_pretrained` loads, with no trace of lopt.

    Raises:
        ValueError: `folder` holds a model already.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model already: choose another folder")
    save: Any = model.save_pretrained
    save(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_causal(name: str, config: Any) -> None:
    """Refuse encoders by their config, before any weight is read."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    bidirectional = architecture.endswith(
        ("MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification")
    )
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hasattr(config, "auto_map")
    if config.is_encoder_decoder or bidirectional or not known:
        raise ValueError(
            f"--model_name_or_path {name} is a {architecture or config.model_type}, "
            "not a decoder-only causal LM: use a model whose architecture ends in ForCausalLM or LMHeadModel"
        )


def _cannot_load(name: str, error: Exception) -> ValueError:
    if isinstance(error, UntrustedError):
        return error
    if refused := refused_code(name, error):
        return refused
    if "safetensors" in str(error) and not Path(resolve_model(name)).is_dir():
        return UntrustedError(
            f"--model_name_or_path {name} has no weights in safetensors on the hub, pickles are not read: "
            'convert them (docs/guide.md, "From .bin to safetensors"), or name a --model_revision with them'
        )
    return ValueError(
        f"--model_name_or_path {name} cannot be loaded: {_first_line(error)}. Give a folder with config.json "
        "and safetensors, a hub id or an alias"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".: ")
