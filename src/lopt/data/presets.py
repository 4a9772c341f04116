"""Named public data sets: where they are, which columns count, under which licence."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lopt.models.packaged import cache_folder


@dataclass(frozen=True)
class Preset:
    """A data set on the Hub that has a short name here.

    Attributes:
        name: The short name.
        hub_id: Its name on the Hub.
        config: Its configuration there, where it has several.
        split: The split to train on.
        columns: The columns that are used; a local copy must have them, whatever else it holds.
        use: What it is meant for. Rows for "dpo" are pairs of answers. Those for "grpo" have an answer that
            can be checked, and serve "sft" too.
        licence: Its licence, in a few words.
    """

    name: str
    hub_id: str
    columns: tuple[str, ...]
    use: Literal["sft", "dpo", "grpo"]
    licence: str
    config: str | None = None
    split: str = "train"


SHUFFLE_BUFFER = 1_000
"""Rows that the order of a stream is drawn from, by default."""

PRESETS = {
    preset.name: preset
    for preset in (
        Preset("metamathqa", "meta-math/MetaMathQA", ("query", "response"), "sft", "MIT"),
        Preset(
            "alpaca",
            "tatsu-lab/alpaca",
            ("instruction", "input", "output"),
            "sft",
            "CC BY-NC 4.0 (research only, no commercial use)",
        ),
        Preset(
            "tulu3",
            "allenai/tulu-3-sft-mixture",
            ("messages",),
            "sft",
            "ODC-BY 1.0 (parts are under other licences, some of them non-commercial)",
        ),
        Preset(
            "ultrafeedback",
            "HuggingFaceH4/ultrafeedback_binarized",
            ("chosen", "rejected"),  # each with the prompt
            "dpo",
            "MIT",
            split="train_prefs",
        ),
        Preset(
            "tulu3_preferences",
            "allenai/llama-3.1-tulu-3-8b-preference-mixture",
            ("chosen", "rejected"),
            "dpo",
            "ODC-BY 1.0 (parts are under other licences, some of them non-commercial)",
        ),
        Preset("gsm8k", "openai/gsm8k", ("question", "answer"), "grpo", "MIT", config="main"),
        Preset("numinamath", "AI-MO/NuminaMath-CoT", ("problem", "solution"), "grpo", "Apache-2.0"),
    )
}


def check_columns(preset: Preset, found: Iterable[str], where: str) -> None:
    """Refuse rows that cannot be a copy of the preset.

    Args:
        found: The columns that there are.
        where: What has these columns, for the message: a file or the Hub.

    Raises:
        ValueError: columns are missing.
    """
    found = list(found)
    missing = [name for name in preset.columns if name not in found]
    if missing:
        raise ValueError(
            f"`dataset_preset` {preset.name}: {where} has no column {', '.join(missing)} "
            f"(it has {', '.join(found) or 'none'}): give a copy of {preset.hub_id}, "
            "or leave `dataset_preset` out to have the columns recognised"
        )


def show_licence(preset: Preset) -> None:
    """Print the preset's licence, once per machine: a file in the cache folder remembers it."""
    seen = cache_folder() / "licences_shown" / preset.name
    if seen.exists() or os.environ.get("RANK", "0") != "0":
        return
    terms = f"https://huggingface.co/datasets/{preset.hub_id}"
    print(f"{preset.name} is {preset.hub_id}, licence: {preset.licence}. Terms: {terms}")
    try:
        seen.parent.mkdir(parents=True, exist_ok=True)
        seen.touch()
    except OSError:
        return  # the cache cannot be written to: the line is printed again next time
