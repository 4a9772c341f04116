"""From flags to the rows that a run trains on."""

from __future__ import annotations

from typing import Any, NamedTuple

from lopt.cli.arguments import DataArguments, ModelArguments
from lopt.data import format_rows, load_rows, split_held_out
from lopt.models import load_tokenizer, resolve_model


class SFTRows(NamedTuple):
    """Formatted rows, not yet tokenized.

    `read` is how many rows were read before empty ones were dropped; None of a stream.
    """

    train: Any
    held_out: Any
    tokenizer: Any
    read: int | None


def read_rows(data_args: DataArguments, seed: int) -> Any:
    """The rows that the flags name, as they are in the source: a `Dataset` or a stream."""
    return load_rows(
        train_file=data_args.train_file,
        dataset_name=data_args.dataset_name,
        dataset_config=data_args.dataset_config,
        split=data_args.dataset_split,
        revision=data_args.dataset_revision,
        max_samples=data_args.max_samples,
        seed=seed,
        preset=data_args.dataset_preset,
        streaming=data_args.streaming,
        shuffle_buffer=data_args.shuffle_buffer,
    )


def sft_rows(model_args: ModelArguments, data_args: DataArguments, args: Any) -> SFTRows:
    """Rows and tokenizer of an SFT run; rows first, since they fail first."""
    rows = read_rows(data_args, args.seed)
    read = None if data_args.streaming else len(rows)
    model_args.model_name_or_path = resolve_model(str(model_args.model_name_or_path))
    tokenizer = load_tokenizer(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    rows = format_rows(rows, tokenizer, assistant_only=args.assistant_only_loss)
    train, held_out = split_held_out(rows, data_args.held_out, args.seed)
    return SFTRows(train, held_out, tokenizer, read)


def check_rows(data_args: DataArguments, max_steps: int) -> None:
    """Refuse what a stream cannot do, before any work.

    Raises:
        ValueError: `--streaming` without `--max_steps`, or with a share held out.
    """
    if not data_args.streaming:
        return
    if max_steps < 1:
        raise ValueError("--streaming needs --max_steps: a stream does not say how many rows it has")
    if 0 < data_args.held_out < 1:
        raise ValueError(
            f"--held_out {data_args.held_out} is a share, and with --streaming the number of rows is "
            "unknown: give a whole number of rows"
        )
