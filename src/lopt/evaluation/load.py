"""Models to evaluate, from a folder, the hub or an adapter's folder; refused early if they cannot fit."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lopt.files import read_json
from lopt.instruments.memory import HOST, format_bytes, free_memory
from lopt.messages import error_text
from lopt.models.load import empty_model, load_model, load_tokenizer, read_config, resolve_model
from lopt.models.untrusted import UntrustedError, check_folder
from lopt.reliability.finite import non_finite_weights


@dataclass(frozen=True)
class Loading:
    """How models are loaded for evaluation.

    Attributes:
        param_dtype: "float32", "bfloat16", "float16" or "auto".
        model_revision: on the hub; the base of an adapter is always the newest.
        attn_implementation, trust_remote_code: as in `lopt.load_model`.
    """

    param_dtype: str = "float32"
    model_revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def model(self, path: str) -> PreTrainedModel:
        """Return the model at `path`, on the GPU if there is one; an adapter is put into its base.

        Raises:
            ValueError: see `load_model`; the weights need more memory than is free, or are not finite.
        """
        self.check_memory(path)
        base = adapter_base(path)
        if base is not None:
            check_folder(path, weights=True)
        model: Any = self._load(base or path, self._source(base))
        if base is not None:
            try:
                model.load_adapter(path)
            except (SafetensorError, RuntimeError) as error:  # damaged, or of other sizes
                raise ValueError(
                    f"the adapter {path} cannot be loaded onto {base} ({error_text(error)}): get both again, "
                    "from one place"
                ) from error
        if bad := non_finite_weights(model):
            raise ValueError(
                f"the model {path} holds numbers that are not finite: {bad}. Its files are damaged, or the "
                "run that wrote them had diverged: take another copy of it"
            )
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def on_host(self, path: str) -> PreTrainedModel:
        """Return the model at `path`, which is no adapter's, where it was loaded; errors of `load_model`."""
        return self._load(path, self._source(None))

    def _load(self, path: str, source: dict[str, Any]) -> PreTrainedModel:
        return load_model(
            path, dtype=self.param_dtype, attn_implementation=self.attn_implementation, **source
        )

    def tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer at `path`; that of its base for an adapter that has none of its own."""
        base = adapter_base(path)
        own = base is None or any(Path(path).glob("tokenizer*"))
        return load_tokenizer(
            path if own else str(base),
            revision=self.model_revision,
            trust_remote_code=self.trust_remote_code,
        )

    def check_memory(self, path: str) -> None:
        """Refuse a model whose weights alone are larger than the free memory.

        Raises:
            ValueError: the model does not fit, or `lopt.models.untrusted` refuses it. A config that cannot be
                read is left to `load_model`.
        """
        base = adapter_base(path)
        try:
            config = read_config(base or path, weights=True, **self._source(base))
            with torch.device("meta"):
                shape = empty_model(config)
        except UntrustedError:
            raise
        except (OSError, ValueError):
            return
        count = sum(parameter.numel() for parameter in shape.parameters())
        own = getattr(config, "dtype", None) or torch.float32
        dtype = own if self.param_dtype == "auto" else getattr(torch, self.param_dtype)
        need, free, where = count * dtype.itemsize, free_memory(HOST), "host memory"
        if torch.cuda.is_available() and (on_gpu := free_memory(torch.device("cuda"))) < free:
            free, where = on_gpu, "GPU memory"
        if need <= free:
            return
        fix = "use a smaller model"
        if count * 2 <= free < need:
            fix = f"`param_dtype` bfloat16 needs {format_bytes(count * 2)}"
        raise ValueError(
            f"{base or path} needs {format_bytes(need)} for its weights in "
            f"{str(dtype).removeprefix('torch.')} and {format_bytes(free)} of {where} are free: {fix}"
        )

    def _source(self, base: str | None) -> dict[str, Any]:
        revision = None if base else self.model_revision
        return {"revision": revision, "trust_remote_code": self.trust_remote_code}


def adapter_base(path: str) -> str | None:
    """Return the model that an adapter's folder belongs to, None if `path` is no such folder.

    Raises:
        ValueError: peft is missing, or the folder does not name its base.
    """
    config = Path(path) / "adapter_config.json"
    if not config.is_file() or (Path(path) / "config.json").is_file():
        return None
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f'{path} holds an adapter, which needs peft: pip install "lopt[peft]"')
    try:
        base = dict(read_json(config)).get("base_model_name_or_path")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config} is broken ({error}): save the adapter again") from error
    if not base:
        raise ValueError(f"{config} does not say which model it belongs to: set base_model_name_or_path")
    return resolve_model(str(base))
