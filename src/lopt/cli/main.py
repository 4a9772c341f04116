"""`lopt COMMAND`: find the command, and turn a user's mistake into one line and exit code 2."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Collection, Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from traceback import walk_tb

from lopt.cli.flag_names import flags_in_logs, with_flags
from lopt.cli.noise import brief_bars, quiet
from lopt.reliability.stop import EXIT_STOPPED, Stopped
from lopt.requirements import check_installed
from lopt.version import __version__

# Command -> what it does. Each lives in lopt.cli.<command> and has `main(arguments)`.
COMMANDS = {
    "sft": "supervised fine-tuning by LoPT, end to end, with frozen early blocks or LoRA",
    "dpo": "preferences between two answers, by the same methods",
    "grpo": "reinforcement learning from checked answers, by the same methods",
    "chat": "talk to a model in the terminal, beside its base if asked",
    "merge": "a run of adapters as one plain model",
    "eval": "benchmarks, and what a model gained and lost against its base",
    "compare": "methods side by side: what each learns, keeps and costs, over seeds",
    "report": "the page of a run again, or several runs side by side",
    "probe": "how far tuned models moved from their base: hidden states and weights, layer by layer",
    "plan": "what a run will need: memory by part, FLOPs, traffic, from the model's config alone",
    "data": "download public data sets, preview what the model is trained on",
    "demo": "post-train a small real model on this machine and see what it learned and kept",
}
SHOWN = ("sft", "dpo", "grpo", "demo")
"""Commands that draw a screen of their own (`lopt.cli.display`)."""
SUBCOMMANDS = {
    "data download": "fetch public data sets into the cache or into Parquet files",
    "data preview": "show what lopt sft with the same flags trains on, token by token",
    "data preview dpo": "show the pairs that lopt dpo with the same flags trains on",
    "compare dpo": "methods side by side on pairs, as lopt dpo trains on them",
}
USAGE = "usage: lopt {0} [--flag value ...]   (lopt {0} --help lists the flags)\n\ncommands:\n{1}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code (2 for a user's mistake, or where nothing can be printed)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _main(arguments)
        if sys.stdout is not None:  # as it is where it was closed from the start
            sys.stdout.flush()
    except OSError as error:  # of printing: `run` answers for any other
        print(f"lopt: error: standard output cannot be written to: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more
        return 2
    return code


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage("COMMAND", COMMANDS))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"lopt {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        message = f"there is no command {command!r}: use one of {', '.join(COMMANDS)}"
        print(f"lopt: error: {message}", file=sys.stderr)
        return 2
    return run(command, rest)


def run(command: str, arguments: Sequence[str]) -> int:
    """Run `lopt.cli.<command>` and return the exit code; LOPT_DEBUG=1 shows where an error comes from."""
    try:
        quiet()
        _check_place(arguments)
        if not _show_help(command, arguments):
            check_installed()
            with flags_in_logs(lambda message: _in_flags(message, command, arguments)):
                with brief_bars() if command in SHOWN else nullcontext():
                    module = import_module(f"lopt.cli.{command}")
                module.main(list(arguments))
    except BrokenPipeError:
        raise  # of standard output
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("LOPT_DEBUG"):
            raise
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f"[rank {rank}] "
        print(f"{where}lopt {command}: error: {_one_line(error, command, arguments)}", file=sys.stderr)
        return 2
    except Exception as error:
        culprit = _culprit(error)
        if os.environ.get("LOPT_DEBUG") or culprit is None:
            raise
        message = _one_line(error, command, arguments)[:500]
        print(f"lopt {command}: error: {culprit}: {message}", file=sys.stderr)
        return 2
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nlopt {command}: {_one_line(stop, command, arguments)}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print(f"\nlopt {command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _check_place(arguments: Sequence[str]) -> None:
    """Refuse what libraries would trip over: a folder that is gone, names not in UTF-8, a broken launch."""
    try:
        os.getcwd()
    except OSError as error:
        raise ValueError(f"the current folder is gone ({error.strerror}): change into another") from error
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdigit():
            raise ValueError(f"the variable {name} must be a number (got {os.environ[name]}): unset it")
    for word in arguments:
        if not word.isascii() and any(0xDC80 <= ord(character) <= 0xDCFF for character in word):
            raise ValueError(
                f"{word!a} is not UTF-8: rename the file, or set PYTHONUTF8=1 where the locale is not UTF-8"
            )


def _usage(command: str, names: dict[str, str]) -> str:
    width = max(map(len, names))
    return USAGE.format(command, "\n".join(f"  {name:{width}} {what}" for name, what in names.items()))


def _show_help(command: str, arguments: Sequence[str]) -> bool:
    """Print the help if the arguments ask for it; return whether they do."""
    every = "--help-all" in arguments
    if not every and "--help" not in arguments and "-h" not in arguments:
        return False
    name = _full_name(command, arguments)
    if name == "data":
        subcommands = {
            name.removeprefix("data "): what for name, what in SUBCOMMANDS.items() if "data" in name
        }
        print(_usage("data SUBCOMMAND", subcommands))
        return True
    from lopt.cli.help import help_page

    print(help_page(name, {**COMMANDS, **SUBCOMMANDS}[name], every=every))
    return True


def _full_name(command: str, arguments: Sequence[str]) -> str:
    """Return the command with its subcommand, if it has one and the arguments begin with it."""
    names = (" ".join([command, *arguments[:words]]) for words in (2, 1))
    return next((name for name in names if name in SUBCOMMANDS), command)


def _one_line(error: BaseException, command: str, arguments: Sequence[str]) -> str:
    """Return the message in one line, with flags for arguments, and without secrets or control characters.

    It may quote a command line, a model or a data set.
    """
    from lopt.cli.caches import cache_problem
    from lopt.reliability.secrets import known_secrets, redact
    from lopt.reports.page import clean

    message = " ".join((cache_problem(error) or str(error)).split())
    return clean(redact(_in_flags(message, command, arguments), known_secrets(arguments)))


def _in_flags(message: str, command: str, arguments: Sequence[str]) -> str:
    """Return a message of the library with the command's flags in place of arguments."""
    if "`" not in message:
        return message
    from lopt.cli.flags import OWN, ChatArguments

    name = _full_name(command, arguments)
    flags: Collection[str] = ()
    with suppress(ImportError):  # the error may be that transformers or TRL cannot be imported
        if name != "data":
            from lopt.cli.parsing import flag_types

            flags = flag_types(name)
    # The flags of lopt chat have names of columns: `prompt`, `system`.
    groups = {group for groups in OWN.values() for group in groups} - {ChatArguments}
    return with_flags(message, flags, {field.name for group in groups for field in fields(group)})


def _culprit(error: Exception) -> str | None:
    """Return what failed if it came with a model or a checkpoint; None for a mistake of ours."""
    if type(error).__module__ == "jinja2.exceptions":  # raised by the template, or by its sandbox
        return "the model's chat template failed"
    if isinstance(error, pickle.UnpicklingError):  # torch.load(weights_only=True)
        return "a file was refused that holds more than data; nothing of it was run"
    if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "huggingface_hub"):
        return "the hub cannot be used"
    if isinstance(error.__cause__, ImportError):  # as TRL raises it for what it imports when it is used
        return "a library cannot be imported, install it anew"
    places = [frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__)]
    if any(Path(place).match("transformers/integrations/integration_utils.py") for place in places):
        return "what the run is reported to failed, correct it or leave it out of `report_to`"
    return None


if __name__ == "__main__":
    sys.exit(main())
