"""`lopt grpo`: reinforcement learning from checked answers (GRPO) by LoPT, end to end or frozen."""

from __future__ import annotations

from collections.abc import Sequence

from lopt.cli.arguments import (
    DataArguments,
    ModelArguments,
    RetentionArguments,
    RunArguments,
    TaskArguments,
    parse,
)
from lopt.cli.retention import check_retention
from lopt.cli.rows import check_task, grpo_rows
from lopt.cli.training import check_evaluation, check_run, prepare, run
from lopt.config import LoPTConfig
from lopt.stop import obeying
from lopt.trainers import LoPTGRPOTrainer
from lopt.trainers.config import LoPTGRPOConfig


def main(arguments: Sequence[str]) -> None:
    """Parse, check everything that can be checked cheaply, then load, train, evaluate and save."""
    groups = (ModelArguments, DataArguments, TaskArguments, RunArguments, RetentionArguments)
    model_args, data_args, task_args, run_args, retention_args, config, args = parse(
        "grpo", (*groups, LoPTConfig, LoPTGRPOConfig), arguments
    )
    with obeying(run_args.limit):
        check_task(task_args, data_args)
        check(data_args, args)
        check_run(model_args, config, args)
        retention = check_retention(retention_args, config, args)
        checkpoint = prepare(model_args, run_args, config, args)
        rows = grpo_rows(model_args, data_args, task_args, args)
        if model_args.model_revision is not None:  # what TRL loads the reference model with
            args.model_init_kwargs = {**(args.model_init_kwargs or {}), "revision": model_args.model_revision}
        run(LoPTGRPOTrainer, rows, model_args, config, args, checkpoint, retention, reward_funcs=rows.rewards)


def check(data_args: DataArguments, args: LoPTGRPOConfig) -> None:
    """Check what the data flags and the trainer's say together.

    Raises:
        ValueError: a sequence length, which GRPO has two of; evaluation batches without whole groups.
    """
    if data_args.max_seq_length is not None:
        raise ValueError("--max_seq_length is for lopt sft: use --max_prompt_length, --max_completion_length")
    check_evaluation(data_args, args)
    if not data_args.held_out:
        return
    group = args.num_generations_eval or args.num_generations or 1
    rows = args.per_device_eval_batch_size * args.world_size
    if rows % group:
        raise ValueError(
            f"--held_out: {group} generations do not divide the {rows} rows of an evaluation batch: change "
            "--per_device_eval_batch_size or --num_generations_eval"
        )
