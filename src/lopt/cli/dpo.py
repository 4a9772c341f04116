"""`lopt dpo`: preferences (DPO) by LoPT, end to end, with frozen early blocks or with LoRA."""

from __future__ import annotations

from collections.abc import Sequence

from lopt.cli.checks import check_run
from lopt.cli.display.run import screen_for
from lopt.cli.noise import at_log_level
from lopt.cli.parsing import parse
from lopt.cli.record import record_of
from lopt.cli.retention import check_retention
from lopt.cli.rows import dpo_rows
from lopt.cli.sft import check
from lopt.cli.training import load_reference_alike, prepare, run
from lopt.reliability.stop import obeying
from lopt.trainers import LoPTDPOTrainer
from lopt.trainers.preferences import check_preference_method, check_preference_numbers


def main(arguments: Sequence[str]) -> None:
    """Parse, check everything that can be checked cheaply, then load, train, evaluate and save."""
    model_args, data_args, run_args, retention_args, screen_args, config, args = parse("dpo", arguments)
    with obeying(run_args.limit), at_log_level(args), screen_for(screen_args, args) as screen:
        check(model_args, data_args, args)
        check_preference_numbers(args)
        check_preference_method(config)
        check_run(model_args, data_args, config, args)
        retention = check_retention(retention_args, config, args)
        checkpoint = prepare(model_args, run_args, config, args)
        rows = dpo_rows(model_args, data_args, args)
        load_reference_alike(args, model_args)
        record = record_of("dpo", arguments)
        run(LoPTDPOTrainer, rows, model_args, config, args, checkpoint, record, screen, retention)
