"""Load and save models and tokenizers, with the checks that give a user's mistake a name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from lopt.files import follow_umask
from lopt.models.chat_template import check_chat_template
from lopt.models.generation_config import check_generation_file
from lopt.models.names import DTYPES, resolve_model
from lopt.models.untrusted import UntrustedError, check_folder, check_kernels, remote_code_error
from lopt.models.weight_files import check_weight_files, dropped_layers
from lopt.validation import check_choice

logger = logging.getLogger(__name__)

_ADAPTER = "adapter_config.json"
_BAD_CONFIG = (KeyError, TypeError, AttributeError, AssertionError, ZeroDivisionError)
"""What transformers raises besides OSError and ValueError where a JSON file of a model holds anything."""


def read_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, weights: bool = False
) -> PreTrainedConfig:
    """Return the config of any model, which may be a config.json; its own code runs only if trusted.

    Args:
        weights: Refuse a folder whose weights could not be loaded, too.

    Raises:
        UntrustedError: see `lopt.models.untrusted`.
        OSError, ValueError: as `AutoConfig` raises them.
    """
    path = name if Path(name).is_file() else resolve_model(name)
    if Path(path).is_dir():
        check_folder(path, weights=weights, name=name)
    try:
        config = AutoConfig.from_pretrained(
            path,
            local_files_only=Path(path).exists(),
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except (StrictDataclassError, KeyError) as error:  # no ValueError, and of several lines
        raise ValueError(" ".join(str(error).split())) from error
    except ValueError as error:
        raise remote_code_error(name, error) or error from error
    if weights and Path(path).is_dir():
        check_files(Path(path), name, config)
    return config


def empty_model(config: PreTrainedConfig, **options: Any) -> Any:
    """Return a model with this config and random weights; its own code runs only if trusted."""
    trusted = type(config).__module__.startswith("transformers_modules")
    options = {"attn_implementation": "eager", **options}  # a config may name a kernel, to be fetched and run
    return auto_class(config).from_config(config, trust_remote_code=trusted, **options)


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class that loads a model as it was saved: whole, if its language model is a part of it."""
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    saved = config.architectures[0] if config.architectures else whole
    return AutoModelForImageTextToText if whole is not None and saved == whole else AutoModelForCausalLM


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
        name: Alias, folder or hub id (see `lopt.models.names.resolve_model`).
        dtype: Dtype of the weights. float32 keeps what small steps add; bfloat16 halves the memory and
            needs an optimizer that does not round small steps away (`lopt.engine.optimizer`).
        revision: Branch, tag or commit on the hub.
        attn_implementation: As transformers names it; None for its default.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ValueError: the model is not found, not reachable, not a decoder-only causal LM or not in safetensors,
            or it comes with code and `trust_remote_code` is False.
    """
    check_choice("param_dtype", dtype, DTYPES)
    source: dict[str, Any] = dict(revision=revision, trust_remote_code=trust_remote_code)
    config = load_config(name, weights=True, **source)
    if (Path(resolve_model(name)) / _ADAPTER).is_file():  # it would be loaded too, and nothing else trained
        raise _adapter_error(name)
    check_kernels(name, config, attn_implementation)
    try:
        loaded: Any = auto_class(config).from_pretrained(
            resolve_model(name),
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported by `_check_complete`, in one line
            output_loading_info=True,
            **source,
        )
    except (OSError, ValueError, *_BAD_CONFIG) as error:
        raise _loading_error(name, error) from error
    except SafetensorError as error:
        raise ValueError(
            f"`model_name_or_path` {name}: its weights are damaged ({_first_line(error)}): get them again"
        ) from error
    model, loading_info = loaded
    if not Path(resolve_model(name)).is_dir():  # only now are its files here
        found = try_to_load_from_cache(resolve_model(name), "config.json", revision=revision)
        check_files(Path(str(found)).parent, name, config)
    _check_complete(name, loading_info, model)
    return model


def load_config(name: str, **options: Any) -> PreTrainedConfig:
    """Return the config of a decoder-only causal LM; options as of `read_config`, errors of `load_model`."""
    folder = Path(resolve_model(name))  # or a hub id, but not a config.json
    if (folder / _ADAPTER).is_file() and not (folder / "config.json").is_file():
        raise _adapter_error(name)
    try:
        config = read_config(name, **options)
    except (OSError, ValueError, *_BAD_CONFIG) as error:
        raise _loading_error(name, error) from error
    check_causal(name, config)
    return config


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model; a missing pad token becomes the end-of-text token.

    Raises:
        ValueError: there is no tokenizer, it has no end-of-text token or tokens that the model does not have,
            or its chat template does not come to an end.
    """
    path = resolve_model(name)
    source: dict[str, Any] = dict(revision=revision, trust_remote_code=trust_remote_code)
    config = None
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():  # an adapter's
        check_folder(path, weights=False, name=name)
    else:
        config = load_config(name, **source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
    except (OSError, ValueError, *_BAD_CONFIG) as error:
        raise remote_code_error(name, error) or ValueError(
            f"the tokenizer of {name} cannot be loaded: {_first_line(error)}: put its files "
            "beside config.json"
        ) from error
    if tokenizer.eos_token is None:
        raise ValueError(
            f"the tokenizer of {name} has no end-of-text token: set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_chat_template(name, tokenizer)
    if config is not None:
        _check_vocabulary(name, tokenizer, config.get_text_config().vocab_size)
    return tokenizer


def load_chat_template(source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template of a file, or of the tokenizer of another model, as TRL takes it.

    Args:
        tokenizer: Of the model that the template is for.

    Raises:
        ValueError: the file is none that TRL reads, is no text or does not come to an end; or there is no
            such tokenizer, or it has no template.
    """
    argument, path = f"`chat_template_path` {source}", Path(source)
    if not path.is_file():
        if path.suffix in (".jinja", ".j2"):
            raise ValueError(f"{argument} does not exist: check the path")
        found = load_tokenizer(source).chat_template
        if not isinstance(found, str):
            raise ValueError(f"{argument}: its tokenizer has no chat template, or several: give a file")
        return found
    if not source.endswith((".jinja", ".j2")):
        raise ValueError(f"{argument} must end in .jinja or .j2, or name a model: rename the file")
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{argument} cannot be read: {_first_line(error)}: give a file in UTF-8") from error
    trial = copy.copy(tokenizer)
    trial.chat_template = template
    check_chat_template(source, trial)
    return template


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
    follow_umask(folder.glob("*.safetensors"))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_causal(name: str, config: Any) -> None:
    """Raise a ValueError if `config` is not that of a decoder-only causal LM, before any weight is read."""
    architecture = (getattr(config, "architectures", None) or [""])[0]
    bidirectional = architecture.endswith(
        ("MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification")
    )
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hasattr(config, "auto_map")
    known = known or auto_class(config) is AutoModelForImageTextToText
    if config.is_encoder_decoder or bidirectional or not known:
        raise ValueError(
            f"`model_name_or_path` {name} is a {architecture or config.model_type}, "
            "not a decoder-only causal LM: use a model whose architecture ends in ForCausalLM or LMHeadModel"
        )
    for size in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        value = getattr(config.get_text_config(), size, None)
        if isinstance(value, int) and value < 1:
            raise ValueError(
                f"`model_name_or_path` {name} has {size} {value} in its config.json: correct it, or get the "
                "file again"
            )
    for part in (config, config.get_text_config()):
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, (int, float)) and not 0 <= value <= 1:
                raise ValueError(
                    f"`model_name_or_path` {name} has {key} {value} in its config.json, which is no "
                    "probability: correct it, or get the file again"
                )


def check_files(folder: Path, name: str, config: PreTrainedConfig) -> None:
    """Refuse files of a model that would be read as something else, or not at all, without a word.

    Raises:
        ValueError: of `check_weight_files` and `check_generation_file`.
    """
    check_weight_files(folder, name, quantized=getattr(config, "quantization_config", None) is not None)
    check_generation_file(folder, name)


def _check_complete(name: str, loading_info: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse weights that transformers would fill in at random or drop, with no more than a warning."""
    wrong = [f"{key} is {list(file)}, not {list(own)}" for key, file, own in loading_info["mismatched_keys"]]
    wrong += [f"{key} is missing" for key in sorted(loading_info["missing_keys"])]
    unused = sorted(loading_info["unexpected_keys"])
    # Layers that predict further tokens have numbers behind those of the decoder.
    further: Any = getattr(model.config, "num_nextn_predict_layers", None) or 0
    wrong += [
        f"{key} belongs to a layer that it does not have"
        for key in dropped_layers(unused, dict(model.named_parameters()), further)
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"`model_name_or_path` {name}: its weights do not fit its config.json: {wrong[0]}{more}. Get "
            "both from one place, with a head (...ForCausalLM)"
        )
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        logger.warning(
            "%s: its files have %s%s, which its model does not use: the saved model is without",
            name, unused[0], more,
        )  # fmt: skip


def _check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse tokens beyond the `rows` rows of the embedding.

    Added tokens do not count unless they begin, end or pad a text: some tokenizers, as Gemma 3's, have a few
    for images that their text models never see.
    """
    added = set(tokenizer.get_added_vocab().values())
    used = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id} - {None}
    highest = max((used | set(tokenizer.get_vocab().values())) - (added - used))
    if highest >= rows:
        raise ValueError(
            f"the tokenizer of {name} has a token {highest}, and the model's embedding {rows} rows: give the "
            "tokenizer that belongs to it, or call model.resize_token_embeddings and save it"
        )


def _adapter_error(name: str) -> ValueError:
    return ValueError(
        f"`model_name_or_path` {name} holds an adapter ({_ADAPTER}), and a whole model is needed: make one "
        "of it with `lopt merge`, and name that folder"
    )


def _loading_error(name: str, error: Exception) -> ValueError:
    """Return the error to raise where transformers raised `error`."""
    if isinstance(error, UntrustedError):
        return error
    if refused := remote_code_error(name, error):
        return refused
    if "safetensors" in str(error) and not Path(resolve_model(name)).is_dir():
        return UntrustedError(
            f"`model_name_or_path` {name} has no weights in safetensors on the hub, pickles are not read: "
            'convert them ("From .bin to safetensors" in the documentation), or name a `model_revision` that '
            "has them"
        )
    return ValueError(
        f"`model_name_or_path` {name} cannot be loaded: {_first_line(error)}. Give a folder with config.json "
        "and safetensors, a hub id or an alias"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, KeyError):  # whose text is the key
        return f"a file of it has an unknown or missing {lines[0]}"
    return lines[0].rstrip(".: ")
