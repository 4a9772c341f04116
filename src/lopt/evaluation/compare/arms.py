"""The arms of a comparison, each one way to train, read from texts such as `lopt:num_blocks=4`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

from lopt.core.config import METHOD_ALIASES, METHODS, LoPTConfig
from lopt.residency import Residency

CUTS = ("num_blocks", "block_boundaries")
_PIPELINE = ("pipeline_size", "pipeline_depth")  # of several processes; a comparison runs in one
RESIDENCY_KEYS = tuple(f.name for f in fields(Residency) if f.name not in _PIPELINE)
METHOD_KEYS = (
    *(f.name for f in fields(LoPTConfig) if f.name not in (*RESIDENCY_KEYS, *_PIPELINE, "method")),
    *RESIDENCY_KEYS,
)
# A setting of an arm, its value (None: any), and settings of the command that it takes back.
_INSTEAD: tuple[tuple[str, str | None, dict[str, Any]], ...] = (
    ("num_blocks", None, {"block_boundaries": None}),  # which would otherwise override it
    ("stages", None, {"stage_layers": None}),
    ("stage_layers", None, {"stages": None}),
    (
        "schedule",
        "eager",
        {"stages": None, "stage_layers": None, "offload": "none", "optimizer_device": "auto"},
    ),
    ("offload", "none", {"optimizer_device": "auto"}),
    ("offload", "optimizer", {"optimizer_device": "auto"}),
)
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
    list[int]: "whole numbers joined by +, for example 6+12",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
}
_SHORT = {
    "num_blocks": "k=",
    "block_boundaries": "cut at ",
    "lambda_aux": "λ=",
    "learning_rate": "lr=",
    "frozen_blocks": "frozen=",
    "frozen_top": "top frozen=",
    "aux_loss": "",
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: in tables and plots, unique in a study.
        config: the method and its settings.
        changes: training and LoRA arguments that differ from those of the study, by name.
    """

    name: str
    config: LoPTConfig
    changes: Mapping[str, Any] = field(default_factory=dict)


def parse_arms(methods: Sequence[str], sweep: Sequence[str], base: LoPTConfig) -> list[Arm]:
    """Return arms from texts such as `lopt:num_blocks=4,lambda_aux=1` and sweeps such as `lambda_aux=0,1`.

    A sweep multiplies every arm whose method it applies to, unless the arm sets that value itself. Values of
    a list are joined by `+`: `block_boundaries=6+12`.

    Raises:
        ValueError: an unknown method or key, a value of the wrong type, two arms that are the same.
    """
    swept = [_sweep(text) for text in sweep]
    arms: dict[str, Arm] = {}
    for text in methods:
        method, given = _method(text)
        axes = [
            [(key, value) for value in values]
            for key, values in swept
            if _applies(key, method) and key not in given
        ]
        for extra in itertools.product(*axes):
            arm = _arm(method, {**given, **dict(extra)}, base)
            if arm.name in arms:
                raise ValueError(f"`methods` names the arm {arm.name!r} twice: leave one of them out")
            arms[arm.name] = arm
    for key, _ in swept:
        if not any(_applies(key, arm.config.method) for arm in arms.values()):
            raise ValueError(
                f"`sweep` {key} applies to none of the `methods` {' '.join(methods)}: leave it out"
            )
    return list(arms.values())


def _method(text: str) -> tuple[str, dict[str, Any]]:
    """Return the method and the settings that `text` names."""
    name, _, rest = text.partition(":")
    method = METHOD_ALIASES.get(name.strip(), name.strip())
    where = f"`methods` {text}"
    if method not in METHODS:
        raise ValueError(f"{where}: there is no method {name!r}: use {', '.join(METHODS)}")
    given: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, sign, value = (part.strip() for part in pair.partition("="))
        if not sign or not value:
            raise ValueError(f"{where}: write each setting as name=value, for example num_blocks=4")
        _check_key(where, key, [method])
        given[key] = _value(where, key, value)
    return method, given


def _sweep(text: str) -> tuple[str, list[Any]]:
    """Return the key and the values that `text` names."""
    key, sign, values = (part.strip() for part in text.partition("="))
    where = f"`sweep` {text}"
    if not sign or not values:
        raise ValueError(f"{where}: write it as name=value,value, for example lambda_aux=0,1,10")
    _check_key(where, key, METHODS)
    return key, [_value(where, key, value.strip()) for value in values.split(",")]


def _applies(key: str, method: str) -> bool:
    """Return whether `key` changes what `method` does."""
    if key in LORA_KEYS:
        return method == "lora"
    if key in CUTS:
        return method in ("lopt", "frozen")
    if key in ("clip", "tied_embeddings", "frozen_top"):
        return method != "lora"
    if key in RESIDENCY_KEYS:
        return True
    return key in TRAINING_KEYS or (key in METHOD_KEYS and method == "lopt")


def _check_key(where: str, key: str, methods: Sequence[str]) -> None:
    if not any(_applies(key, method) for method in methods):
        known = [k for k in (*METHOD_KEYS, *TRAINING_KEYS, *LORA_KEYS) if _applies(k, methods[0])]
        raise ValueError(f"{where}: {key!r} is no setting of {methods[0]}: use {', '.join(known)}")


def _value(where: str, key: str, text: str) -> Any:
    """Return `text` in the type of the setting `key`."""
    hint = (get_type_hints(LoPTConfig) | TRAINING_KEYS | LORA_KEYS)[key]
    kind = next((kind for kind in _KINDS if kind in (hint, *get_args(hint))), None)
    try:
        if kind == list[int]:
            return [int(part) for part in text.split("+")]
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value: Any = text if kind is None else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        raise ValueError(f"{where}: {key} must be {_KINDS[kind]} (got {text})") from None


def _arm(method: str, settings: Mapping[str, Any], base: LoPTConfig) -> Arm:
    own = {key: value for key, value in settings.items() if key in METHOD_KEYS}
    for key, value, others in _INSTEAD:
        if key in own and value in (None, own[key]):
            own = others | own
    if method != "lopt":  # it needs blocks that learn from local losses
        own["frozen_blocks"] = 0
    if method == "lora":
        own["frozen_top"] = 0
    changes = {key: value for key, value in settings.items() if key not in METHOD_KEYS}
    config = base.replace(method=method, **own)
    return Arm(_name(config, settings), config, changes)


def _name(config: LoPTConfig, settings: Mapping[str, Any]) -> str:
    """Return a method's name, its cut if it has one, and its own settings."""
    cuts = {key: settings[key] for key in CUTS if key in settings}
    if config.is_cut and not cuts:
        key = "block_boundaries" if config.block_boundaries is not None else "num_blocks"
        cuts = {key: getattr(config, key)}
    return " ".join(
        [config.method, *(_SHORT.get(k, f"{k}=") + _text(v) for k, v in {**cuts, **settings}.items())]
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
