"""`lopt demo`: post-train a small real model on this machine, see what it learned and what it kept."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from lopt.cli.flag_names import renamed
from lopt.cli.output import check_output, spare_model
from lopt.cli.parsing import parse
from lopt.cli.record import record_of
from lopt.cli.report_flags import DemoArguments
from lopt.core.config import LoPTConfig
from lopt.data.procedural import TASKS
from lopt.evaluation.compare.arms import parse_arms
from lopt.models.load import resolve_model
from lopt.validation import check_choice, check_number

METHODS = ("lopt", "e2e", "frozen")

ROWS = 8
"""Rows of the table of a run that is short and logged in every step."""


def main(arguments: Sequence[str]) -> None:
    """Check the arguments, then run the demo."""
    (args,) = parse("demo", arguments)
    for package in ("reasoning_gym", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ValueError('the demo needs a few more packages: pip install "lopt[demo]"')
    for name in ("steps", "batch_size", "held_out"):
        check_number(name, getattr(args, name), minimum=1)
    check_number("learning_rate", args.learning_rate, above=0)
    check_choice("task", args.task, TASKS)
    arms = _arms(args)
    folder = Path(args.output_dir)

    from lopt.cli.training import check_cut  # after the checks: this import takes seconds

    with renamed(model_name_or_path="model"):
        overwrite = args.overwrite_output_dir
        check_output(args.output_dir, resume=None, overwrite=overwrite, resumable=False)
        model = resolve_model(args.model)
        spare_model(args.output_dir, model, ("checkpoint-*", "model"))
        check_cut(model, list(arms.values()))

    from lopt.cli.display.progress import shown
    from lopt.cli.display.screen import Screen
    from lopt.evaluation.demo import Demo
    from lopt.reports.demo import summary, write_demo_report

    record_of("demo", arguments).write(folder)
    names = ("model", "task", "steps", "batch_size", "learning_rate", "held_out", "seed", "trust_remote_code")
    demo = Demo(arms=arms, **{name: getattr(args, name) for name in names})
    with renamed(model_name_or_path="model"), Screen().open() as screen:
        results = demo.run(folder, lambda trainer: shown(trainer, screen, "demo", ROWS))
    report = write_demo_report(results, folder)
    print(summary(results))
    first = next(iter(arms))
    print(f"\nReport: {report}\nFigures: {folder / 'results.json'}\nModel ({first}): {folder / 'model'}")


def _arms(args: DemoArguments) -> dict[str, LoPTConfig]:
    """Return the configs of the methods by name.

    Raises:
        ValueError: no method, an unknown one, or one twice.
    """
    if not args.methods or len(set(args.methods)) < len(args.methods):
        raise ValueError(f"--methods {' '.join(args.methods)}: give one or more, each once")
    for method in args.methods:
        check_choice("methods", method, METHODS)
    return {
        arm.name: arm.config for arm in parse_arms(args.methods, [], LoPTConfig(num_blocks=args.num_blocks))
    }
