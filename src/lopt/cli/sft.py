"""`lopt sft`: supervised fine-tuning by LoPT, end to end, with frozen early blocks or with LoRA."""

from __future__ import annotations

from collections.abc import Sequence

from lopt.cli.checks import check_evaluation, check_model, check_run
from lopt.cli.display.run import screen_for
from lopt.cli.flags import DataArguments, ModelArguments
from lopt.cli.noise import at_log_level
from lopt.cli.parsing import parse
from lopt.cli.record import record_of
from lopt.cli.retention import check_retention
from lopt.cli.rows import check_rows, sft_rows
from lopt.cli.training import prepare, run
from lopt.reliability.stop import obeying
from lopt.trainers import LoPTSFTTrainer
from lopt.trainers.config import LoPTDPOConfig, LoPTSFTConfig
from lopt.validation import check_number


def main(arguments: Sequence[str]) -> None:
    """Parse, check everything that can be checked cheaply, then load, train, evaluate and save."""
    model_args, data_args, run_args, retention_args, screen_args, config, args = parse("sft", arguments)
    with obeying(run_args.limit), at_log_level(args), screen_for(screen_args, args) as screen:
        check(model_args, data_args, args)
        check_run(model_args, data_args, config, args)
        retention = check_retention(retention_args, config, args)
        checkpoint = prepare(model_args, run_args, config, args)
        rows = sft_rows(model_args, data_args, args)
        record = record_of("sft", arguments)
        run(LoPTSFTTrainer, rows, model_args, config, args, checkpoint, record, screen, retention)


def check(model_args: ModelArguments, data_args: DataArguments, args: LoPTSFTConfig | LoPTDPOConfig) -> None:
    """Check what model and data flags say together, and carry it over into `args`.

    Raises:
        ValueError: No model, a sequence length that leaves nothing to predict, an impossible stream.
    """
    check_model(model_args)
    if data_args.max_seq_length is not None:
        if args.max_length not in (type(args).max_length, data_args.max_seq_length):
            raise ValueError(
                f"--max_seq_length {data_args.max_seq_length} and --max_length {args.max_length} are two "
                "names of one length: give one of them"
            )
        args.max_length = data_args.max_seq_length
    check_number("max_length", args.max_length, minimum=2)
    check_rows(data_args, args.max_steps)
    check_evaluation(data_args, args)
