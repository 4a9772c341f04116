"""`lopt demo`: post-train a small real model on this machine, see what it learned and what it kept."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from lopt.cli.output import check_output, spare_model
from lopt.cli.parsing import parse
from lopt.cli.record import record_of
from lopt.core.config import LoPTConfig
from lopt.data.procedural import TASKS
from lopt.models.load import resolve_model


def main(arguments: Sequence[str]) -> None:
    """Check the arguments, then run the demo."""
    (args,) = parse("demo", arguments)
    for package in ("reasoning_gym", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ValueError('the demo needs a few packages more: pip install "lopt[demo]"')
    for flag, value in (
        ("--steps", args.steps),
        ("--batch_size", args.batch_size),
        ("--held_out", args.held_out),
    ):
        if value < 1:
            raise ValueError(f"{flag} {value} is not possible: use 1 or more")
    if args.task not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, not {args.task}")
    if not 0 < args.learning_rate < float("inf"):
        raise ValueError(f"--learning_rate {args.learning_rate} is not possible: use a finite number above 0")
    config = LoPTConfig(method=args.method, num_blocks=args.num_blocks)

    from lopt.cli.training import check_cut  # after the checks: this import takes seconds

    try:
        check_output(args.output_dir, resume=None, overwrite=args.overwrite_output_dir)
        model = resolve_model(args.model)
        spare_model(args.output_dir, model, ("checkpoint-*", "model"))
        check_cut(model, [config])
    except ValueError as error:  # they know the flags of lopt sft
        told = str(error).replace("`model_name_or_path`", "`model`").replace("go on with --resume, ", "")
        raise ValueError(told) from error

    from lopt.evaluation.demo import run_demo

    record_of("demo", arguments).write(Path(args.output_dir))
    run_demo(args)
