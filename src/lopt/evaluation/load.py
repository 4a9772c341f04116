"""A model to be examined, from a folder, the hub or an adapter's folder; refused early if it cannot fit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lopt.instruments.memory import format_bytes, free_host_memory
from lopt.models.load import empty_model, load_model, load_tokenizer, read_config, resolve_model
from lopt.models.untrusted import UntrustedError, check_folder


def adapter_base(path: str) -> str | None:
    """The model that an adapter's folder belongs to, None if `path` is no such folder.

    Raises:
        ValueError: peft is missing, or the folder does not name its base.
    """
    config = Path(path) / "adapter_config.json"
    if not config.is_file() or (Path(path) / "config.json").is_file():
        return None
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f'{path} holds an adapter, which needs peft: pip install "lopt[peft]"')
    try:
        base = dict(json.loads(config.read_text(encoding="utf-8"))).get("base_model_name_or_path")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config} is broken ({error}): save the adapter again") from error
    if not base:
        raise ValueError(f"{config} does not say which model it belongs to: set base_model_name_or_path")
    return resolve_model(str(base))


def load_examinee(
    path: str,
    *,
    dtype: str,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model at `path`, on the GPU if there is one; an adapter is put into its base.

    Raises:
        ValueError: see `load_model`; the weights need more memory than is free.
    """
    base = adapter_base(path)
    if base is not None:
        check_folder(path, weights=True)
    where: Any = dict(revision=None if base else revision, trust_remote_code=trust_remote_code)
    check_memory(base or path, dtype, **where)
    model = load_model(base or path, dtype=dtype, attn_implementation=attn_implementation, **where)
    if base is not None:
        load: Any = model.load_adapter
        load(path)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # type: ignore[arg-type]


def load_examinees_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`; that of its base for an adapter that has none of its own."""
    base = adapter_base(path)
    own = base is None or any(Path(path).glob("tokenizer*"))
    return load_tokenizer(path if own else str(base), revision=revision, trust_remote_code=trust_remote_code)


def check_memory(path: str, dtype: str, **options: Any) -> None:
    """Refuse a model whose weights alone are more than what is free.

    Raises:
        ValueError: with what would fit; what `lopt.models.untrusted` refuses. A config that cannot be
            read is left to `load_model`.
    """
    try:
        config = read_config(path, weights=True, **options)
        with torch.device("meta"):
            shape = empty_model(config)
    except UntrustedError:
        raise
    except (OSError, ValueError):
        return
    count = sum(parameter.numel() for parameter in shape.parameters())
    wanted = getattr(config, "dtype", None) or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    need, free = count * wanted.itemsize, free_host_memory()
    where = "host memory"
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < free:
        free, where = torch.cuda.mem_get_info()[0], "GPU memory"
    if need <= free:
        return
    half = count * 2
    fix = (
        f"--param_dtype bfloat16 needs {format_bytes(half)}" if half <= free < need else "use a smaller model"
    )
    raise ValueError(
        f"{path} needs {format_bytes(need)} for its weights in {str(wanted).removeprefix('torch.')} and "
        f"{format_bytes(free)} of {where} are free: {fix}"
    )
