"""`lopt grpo`: reinforcement learning from checked answers (GRPO) by LoPT, end to end or frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lopt.cli.checks import check_evaluation, check_run
from lopt.cli.display.run import screen_for
from lopt.cli.flags import DataArguments
from lopt.cli.noise import at_log_level
from lopt.cli.parsing import parse
from lopt.cli.record import record_of
from lopt.cli.retention import check_retention
from lopt.cli.rows import check_task, grpo_rows
from lopt.cli.training import load_reference_alike, prepare, run
from lopt.reliability.stop import obeying
from lopt.trainers import LoPTGRPOTrainer
from lopt.trainers.config import LoPTGRPOConfig


def main(arguments: Sequence[str]) -> None:
    """Parse, check everything that can be checked cheaply, then load, train, evaluate and save."""
    model_args, data_args, task_args, run_args, retention_args, screen_args, config, args = parse(
        "grpo", arguments
    )
    with obeying(run_args.limit), at_log_level(args), screen_for(screen_args, args) as screen:
        check_task(task_args, data_args)
        check(data_args, args)
        check_run(model_args, data_args, config, args)
        retention = check_retention(retention_args, config, args)
        checkpoint = prepare(model_args, run_args, config, args)
        rows = grpo_rows(model_args, data_args, task_args, args)
        _check_metric(args, rows.rewards)
        if args.beta or model_args.model_revision is not None:
            load_reference_alike(args, model_args)
        record = record_of("grpo", arguments)
        rewards = {"reward_funcs": rows.rewards}
        run(LoPTGRPOTrainer, rows, model_args, config, args, checkpoint, record, screen, retention, **rewards)


def check(data_args: DataArguments, args: LoPTGRPOConfig) -> None:
    """Check what the data flags and the trainer's say together.

    Raises:
        ValueError: A sequence length, of which GRPO has two; evaluation batches without whole groups.
    """
    if data_args.max_seq_length is not None:
        raise ValueError("--max_seq_length is for lopt sft: use --max_prompt_length, --max_completion_length")
    if args.remove_unused_columns:
        raise ValueError("--remove_unused_columns takes away the columns that rewards read: leave it out")
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


def _check_metric(args: LoPTGRPOConfig, rewards: Sequence[Any]) -> None:
    """Refuse to choose the best model by a reward that the run does not have."""
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    known = [f"rewards/{reward.__name__}/{figure}" for reward in rewards for figure in ("mean", "std")]
    if metric.startswith("rewards/") and metric not in known:
        raise ValueError(f"--metric_for_best_model {metric} is no reward here: use one of {', '.join(known)}")
