"""The arms of a comparison: one way to train each, read from `--methods` and `--sweep`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

from lopt.core.config import METHOD_ALIASES, METHODS, LoPTConfig

CUTS = ("num_blocks", "block_boundaries")
METHOD_KEYS = tuple(f.name for f in fields(LoPTConfig) if f.name != "method")
# What may differ between arms that see the same rows in the same order and take the same number of steps.
TRAINING_KEYS: dict[str, type] = {
    "learning_rate": float,
    "lr_scheduler_type": str,
    "warmup_steps": float,
    "weight_decay": float,
    "max_grad_norm": float,
    "adam_beta1": float,
    "adam_beta2": float,
    "adam_epsilon": float,
    "optim": str,
    "gradient_checkpointing": bool,
}
LORA_KEYS: dict[str, type] = {"lora_r": int, "lora_alpha": int}
_KINDS: dict[Any, str] = {
    int: "use a whole number",
    float: "use a finite number",
    bool: "use true or false",
    list[int]: "use whole numbers joined by +, for example 6+12",
}
_SHORT = {
    "num_blocks": "k",
    "block_boundaries": "cut at",
    "lambda_aux": "λ",
    "learning_rate": "lr",
    "frozen_blocks": "frozen",
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: what tables and plots call it, unique in a study.
        config: the method and its settings.
        changes: training and LoRA flags that differ from the command's, by name.
    """

    name: str
    config: LoPTConfig
    changes: Mapping[str, Any] = field(default_factory=dict)


def parse_arms(methods: Sequence[str], sweep: Sequence[str], base: LoPTConfig) -> list[Arm]:
    """Arms from texts such as `lopt:num_blocks=4,lambda_aux=1` and sweeps such as `lambda_aux=0,0.1,1`.

    A sweep multiplies every arm that its key matters to. Values of a list are joined by `+`:
    `block_boundaries=6+12`.

    Raises:
        ValueError: an unknown method or key, a value of the wrong type, two arms that are the same.
    """
    swept = [_sweep(text) for text in sweep]
    arms: dict[str, Arm] = {}
    for text in methods:
        method, given = _method(text)
        grid = [[(key, value) for value in values] for key, values in swept if _matters(key, method)]
        for extra in itertools.product(*(axis for axis in grid if axis[0][0] not in given)):
            arm = _arm(method, {**given, **dict(extra)}, base)
            if arm.name in arms:
                raise ValueError(f"--methods names the arm {arm.name!r} twice: leave one of them out")
            arms[arm.name] = arm
    for key, _ in swept:
        if not any(_matters(key, arm.config.method) for arm in arms.values()):
            raise ValueError(f"--sweep {key} matters to none of --methods {' '.join(methods)}: leave it out")
    return list(arms.values())


def _method(text: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = text.partition(":")
    method = METHOD_ALIASES.get(name.strip(), name.strip())
    if method not in METHODS:
        raise ValueError(f"--methods {text}: there is no method {name!r}: use {', '.join(METHODS)}")
    given: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, sign, value = (part.strip() for part in pair.partition("="))
        if not sign or not value:
            raise ValueError(f"--methods {text}: write each setting as name=value, for example num_blocks=4")
        if not _matters(key, method):
            raise ValueError(f"--methods {text}: {_unknown(key, method)}")
        given[key] = _value(key, value)
    return method, given


def _sweep(text: str) -> tuple[str, list[Any]]:
    key, sign, values = (part.strip() for part in text.partition("="))
    if not sign or not values:
        raise ValueError(f"--sweep {text}: write it as name=value,value, for example lambda_aux=0,1,10")
    if not any(_matters(key, method) for method in METHODS):
        raise ValueError(f"--sweep {text}: {_unknown(key, 'lopt')}")
    return key, [_value(key, value.strip()) for value in values.split(",")]


def _matters(key: str, method: str) -> bool:
    """Whether `key` changes what `method` does."""
    if key in TRAINING_KEYS:
        return True
    if key in LORA_KEYS:
        return method == "lora"
    if key in CUTS:
        return method in ("lopt", "frozen")
    if key in ("clip", "tied_embeddings"):
        return key in METHOD_KEYS and method != "lora"
    return key in METHOD_KEYS and method == "lopt"


def _unknown(key: str, method: str) -> str:
    known = [k for k in (*METHOD_KEYS, *TRAINING_KEYS, *LORA_KEYS) if _matters(k, method)]
    return f"{key!r} is nothing that {method} can be given: use {', '.join(known)}"


def _value(key: str, text: str) -> Any:
    hints = get_type_hints(LoPTConfig) | TRAINING_KEYS | LORA_KEYS
    kinds = [kind for kind in (hints[key], *get_args(hints[key])) if kind in _KINDS]
    try:
        if list[int] in kinds:
            return [int(part) for part in text.split("+")]
        if int in kinds:
            return int(text)
        if float in kinds and math.isfinite(float(text)):
            return float(text)
        if bool in kinds:
            return {"true": True, "false": False}[text.lower()]
    except (ValueError, KeyError):
        raise ValueError(f"{key}={text} is not possible: {_KINDS[kinds[0]]}") from None
    if float in kinds:
        raise ValueError(f"{key}={text} is not possible: {_KINDS[float]}")
    return text


def _arm(method: str, settings: Mapping[str, Any], base: LoPTConfig) -> Arm:
    own = {key: value for key, value in settings.items() if key in METHOD_KEYS}
    if "num_blocks" in own:
        own.setdefault("block_boundaries", None)  # or the command's would win over it
    if method != "lopt":  # these belong to blocks that learn on their own
        own |= {"schedule": "eager", "offload": "none", "frozen_blocks": 0}
    changes = {key: value for key, value in settings.items() if key not in METHOD_KEYS}
    config = base.replace(method=method, **own)
    return Arm(_name(config, settings), config, changes)


def _name(config: LoPTConfig, settings: Mapping[str, Any]) -> str:
    parts: list[tuple[str, Any]] = []
    if config.is_cut and not any(key in settings for key in CUTS):
        key = "block_boundaries" if config.block_boundaries is not None else "num_blocks"
        parts.append((key, getattr(config, key)))
    parts += [(key, settings[key]) for key in (*CUTS, *_rest(settings)) if key in settings]
    return " ".join([config.method, *(_word(key, value) for key, value in parts)])


def _word(key: str, value: Any) -> str:
    if key == "aux_loss":
        return str(value)
    return f"{_SHORT.get(key, key)}{' ' if key == 'block_boundaries' else '='}{_written(value)}"


def _rest(settings: Mapping[str, Any]) -> Iterable[str]:
    return (key for key in settings if key not in CUTS)


def _written(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
