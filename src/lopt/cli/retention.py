"""From the retention flags of a training command to its callback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments

from lopt.cli.flag_names import renamed
from lopt.cli.flags import RetentionArguments
from lopt.cli.parsing import check_effect
from lopt.core.config import LoPTConfig
from lopt.evaluation.retention_callback import RetentionCallback, check_whole_model
from lopt.evaluation.texts import read_texts
from lopt.validation import check_number

MakeCallback = Callable[[Any], RetentionCallback]
"""From a trainer to its callback."""


def check_retention(
    retention: RetentionArguments, config: LoPTConfig, args: TrainingArguments
) -> MakeCallback | None:
    """Read texts and check benchmarks before any work; return the maker of the callback, None if not needed.

    Raises:
        ValueError: a text or a benchmark that does not exist, a value out of range, flags without effect.
        ImportError: lm-evaluation-harness is missing.
    """
    r = retention
    check_number("retention_tokens", r.retention_tokens, minimum=2)
    check_number("retention_limit", r.retention_limit, minimum=1)
    check_number("retention_every", r.retention_every, minimum=1)
    check_number("max_forgetting", r.max_forgetting, minimum=0)
    if r.max_forgetting is not None and not r.retention_text:
        raise ValueError("--max_forgetting is in nats per token of text: add --retention_text")
    if r.retention_data_dir is not None and not r.retention_tasks:
        raise ValueError("--retention_data_dir holds rows for benchmarks: add --retention_tasks")
    check_effect(r, retention_tasks=("retention_limit",), retention_text=("retention_tokens",))
    if not r.retention_text and not r.retention_tasks:
        if r.retention_every is not None:
            raise ValueError("--retention_every: add --retention_text or --retention_tasks")
        return None
    if r.retention_tasks:
        from lopt.evaluation.harness import check_tasks

        with renamed(tasks="retention_tasks", data_dir="retention_data_dir", texts="retention_text"):
            check_whole_model(config.offload == "block", args)
            check_tasks(r.retention_tasks, r.retention_data_dir)
    return functools.partial(
        RetentionCallback,
        texts=read_texts(r.retention_text or [], r.retention_tokens, "retention_text"),
        tokens=r.retention_tokens,
        tasks=r.retention_tasks or (),
        data_dir=r.retention_data_dir,
        limit=r.retention_limit,
        every=r.retention_every,
        max_forgetting=r.max_forgetting,
    )
