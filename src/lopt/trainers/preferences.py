"""What DPO is given, checked before it: TRL fails on much of it late, or learns something else from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import islice
from typing import Any

from datasets import Dataset
from trl import DPOConfig

from lopt.core.config import LoPTConfig
from lopt.data.messages import read_messages
from lopt.data.notes import Notes
from lopt.data.rows import column_error, column_names
from lopt.validation import LARGEST_COUNT, check_choice, check_number

logger = logging.getLogger(__name__)

_ANSWERS = ("chosen", "rejected")
# What TRL compares with in the first step.
_LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
           "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")  # fmt: skip
_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_LOOK_AHEAD = 1_000  # rows of a stream that are looked at


def check_preference_numbers(args: DPOConfig) -> None:
    """Refuse numbers by which nothing could be learned, or that fail in a step.

    Raises:
        ValueError: with the argument and its bounds.
    """
    check_number("beta", 0 if args.beta is None else args.beta, above=0)
    check_number("label_smoothing", args.label_smoothing, minimum=0, below=0.5)
    check_number("max_length", args.max_length, minimum=2)
    check_number("ld_alpha", args.ld_alpha, minimum=0, maximum=1)
    multiple: Any = args.pad_to_multiple_of
    check_number("pad_to_multiple_of", multiple, minimum=1)
    check_number("discopop_tau", args.discopop_tau, above=0)
    check_number("ref_model_sync_steps", args.ref_model_sync_steps, minimum=1)
    check_number("max_steps", args.max_steps, maximum=LARGEST_COUNT)
    check_number("num_train_epochs", args.num_train_epochs, maximum=LARGEST_COUNT)
    if not args.loss_type:
        raise ValueError("`loss_type` is empty: name a loss, such as sigmoid")
    for loss in args.loss_type:
        check_choice("loss_type", loss, _LOSSES)
    check_choice("f_divergence_type", args.f_divergence_type, _DIVERGENCES)
    weights = args.loss_weights or ()
    for weight in weights:
        check_number("loss_weights", weight)
    if weights and not any(weights):
        raise ValueError("`loss_weights` are all 0, so that nothing would be learned: give one that is not")


def check_preference_method(config: LoPTConfig) -> None:
    """Refuse a local loss that would learn from rejected answers.

    Raises:
        ValueError: with the argument, and the one to give instead.
    """
    if config.is_local and config.aux_loss == "next_token":
        raise ValueError(
            "`aux_loss` next_token would teach earlier blocks rejected answers as well: use `aux_loss` recon"
        )


def check_preferences(rows: Any, name: str) -> None:
    """Refuse rows that are no preferences, and warn of those that teach nothing.

    Args:
        rows: with the columns `chosen` and `rejected`; of a stream the first 1,000 are looked at.
        name: of the rows, for messages.

    Raises:
        ValueError: with the row, its column and what is wrong with it; or no row prefers anything.
    """
    names = column_names(rows)
    columns = [column for column in ("prompt", *_ANSWERS) if column in names]
    if "prompt" not in names:
        logger.warning(
            "the %s rows have no column `prompt` (they have %s): what `chosen` and `rejected` begin with "
            "alike is taken for the prompt", name, ", ".join(f"`{column}`" for column in names),
        )  # fmt: skip
    count = equal = empty = 0
    for row in islice(rows.select_columns(columns), None if isinstance(rows, Dataset) else _LOOK_AHEAD):
        try:
            _check_row({column: row[column] for column in columns})
        except ValueError as error:
            raise ValueError(f"row {count} (from 0) of the {name} rows, {error}") from error
        count += 1
        equal += row["chosen"] == row["rejected"]
        empty += any(_is_empty(row[column]) for column in _ANSWERS)
    if count == equal:
        what = "in all of them `chosen` equals `rejected`" if count else "there are none"
        raise ValueError(f"the {name} rows prefer nothing, {what}: give others")
    for found, what in ((equal, "equal `chosen` and `rejected`"), (empty, "an empty `chosen` or `rejected`")):
        if found:
            logger.warning(
                "%d of %d %s rows have %s: remove them, if it is not meant", found, count, name, what
            )


def check_left(rows: Any, prepared: Any, name: str) -> None:
    """Say how many rows are left out as their prompt alone is too long; refuse it if none is left.

    Args:
        rows: as they were given.
        prepared: as the trainer has prepared them.
        name: of the rows, for messages.
    """
    if not isinstance(prepared, Dataset) or len(prepared) == len(rows):
        return
    why = "their prompt alone is as long as `max_length`"
    if not len(prepared):
        raise ValueError(f"all {len(rows)} {name} rows are left out, {why}: raise it, or shorten the prompts")
    logger.warning("%d of %d %s rows are left out, %s", len(rows) - len(prepared), len(rows), name, why)


def _check_row(row: Mapping[str, Any]) -> None:
    kinds = {}
    for column, value in row.items():
        if not isinstance(value, (str, list)):
            kind = type(value).__name__
            raise column_error(
                column, f"must be text or a list of messages, not {kind}: fill it or remove the row"
            )
        kinds[column] = "text" if isinstance(value, str) else "messages"
        if isinstance(value, str):
            continue
        messages = read_messages(value, column, None, Notes())
        if not all("role" in turn for turn in value):  # ShareGPT's, which `preference_rows` makes messages of
            raise column_error(column, "has a message without a role: give {role, content}")
        if column in _ANSWERS and messages[-1]["role"] != "assistant":
            raise column_error(
                column, f"must end in an assistant message, not in one of {messages[-1]['role']}"
            )
        if column in _ANSWERS and row.get("prompt") and value[: len(row["prompt"])] == row["prompt"]:
            raise column_error(column, "begins with the messages of `prompt`: leave the column `prompt` out")
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"`{column}` {kind}" for column, kind in kinds.items())
        raise ValueError(f"mixes text and messages ({found}): make them alike")


def _is_empty(answer: Any) -> bool:
    parts = [answer] if isinstance(answer, str) else [turn.get("content") or "" for turn in answer]
    calls = not isinstance(answer, str) and any(turn.get("tool_calls") for turn in answer)
    return not calls and not any(part if not isinstance(part, str) else part.strip() for part in parts)
