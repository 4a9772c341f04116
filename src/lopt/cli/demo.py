"""`lopt demo`: post-train a small real model on this machine, see what it learned and what it kept."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lopt.cli.output import check_output, spare_model
from lopt.cli.parsing import parse
from lopt.cli.record import Record
from lopt.core.config import LoPTConfig
from lopt.data.tasks import TASKS
from lopt.models.load import resolve_model
from lopt.models.packaged import PACKAGED_MODEL
from lopt.validation import check_choice, check_number


@dataclass
class DemoArguments:
    """What to play with. Every default is the demo of the README."""

    model: str = field(
        default=PACKAGED_MODEL, metadata={"help": "A folder, a hub id, or the packaged gemma3-270m."}
    )
    task: str = field(
        default="chain_sum", metadata={"help": "A reasoning-gym task: chain_sum or gsm_symbolic."}
    )
    method: Literal["lopt", "e2e", "frozen"] = field(
        default="lopt", metadata={"help": "What the earlier blocks learn from."}
    )
    num_blocks: int = field(default=2, metadata={"help": "k, the number of blocks."})
    steps: int = field(default=60, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=8, metadata={"help": "Problems per step."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate of the last block."})
    held_out: int = field(default=64, metadata={"help": "Problems kept back for the examination."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})
    seed: int = field(default=0, metadata={"help": "Seed of problems, heads and order."})
    output_dir: str = field(default="outputs/demo", metadata={"help": "Where model, figures and report go."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace an earlier demo in that folder."}
    )


def main(arguments: Sequence[str]) -> None:
    """Check the arguments, then run the demo."""
    (args,) = parse("demo", (DemoArguments,), arguments)
    for package in ("reasoning_gym", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ValueError('the demo needs a few more packages: pip install "lopt[demo]"')
    for name in ("steps", "batch_size", "held_out"):
        check_number(name, getattr(args, name), minimum=1)
    check_number("learning_rate", args.learning_rate, above=0)
    check_choice("task", args.task, TASKS)
    config = LoPTConfig(method=args.method, num_blocks=args.num_blocks)
    folder = Path(args.output_dir)

    from lopt.cli.training import check_cut  # after the checks: this import takes seconds

    try:
        check_output(args.output_dir, resume=None, overwrite=args.overwrite_output_dir)
        model = resolve_model(args.model)
        spare_model(args.output_dir, model, ("checkpoint-*", "model"))
        check_cut(model, [config])
    except ValueError as error:  # written for lopt sft
        message = re.sub("`model_name_or_path`|--model_name_or_path", "--model", str(error))
        raise ValueError(re.sub("go on with (`resume`|--resume), ", "", message)) from error

    from lopt.evaluation.demo import Demo
    from lopt.reports.demo import summary, write_demo_report

    Record.of("demo", (DemoArguments,), arguments).write(folder)
    names = ("model", "task", "steps", "batch_size", "learning_rate", "held_out", "seed", "trust_remote_code")
    results = Demo(config=config, **{name: getattr(args, name) for name in names}).run(folder)
    report = write_demo_report(results, folder)
    print(summary(results))
    print(f"\nReport: {report}\nFigures: {folder / 'results.json'}\nModel: {folder / 'model'}")
