"""`lopt COMMAND`: finds the command and turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Sequence

from lopt.reliability.secrets import known_secrets, redact
from lopt.reliability.stop import EXIT_STOPPED, Stopped
from lopt.reports.page import clean
from lopt.version import __version__

# Command -> what it does. Each lives in lopt.cli.<command> and has `main(arguments)`.
COMMANDS = {
    "sft": "supervised fine-tuning by LoPT, end to end, with frozen early blocks or LoRA",
    "grpo": "reinforcement learning from checked answers, by the same methods",
    "eval": "benchmarks, and what a model gained and lost against its base",
    "compare": "methods side by side: what each learns, keeps and costs, over seeds",
    "probe": "how far tuned models moved from their base: hidden states and weights, layer by layer",
    "plan": "what a run will need: memory by part, FLOPs, traffic, from the model's config alone",
    "data": "download public data sets, preview what the model is trained on",
    "demo": "post-train a small real model on this machine and see what it learned and kept",
}
USAGE = "usage: lopt COMMAND [--flag value ...]   (lopt COMMAND --help lists the flags)\n\ncommands:\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (2 for a user's mistake)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE + "\n".join(f"  {name:8} {what}" for name, what in COMMANDS.items()))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"lopt {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(
            f"lopt: error: there is no command {command!r}: use one of {', '.join(COMMANDS)}", file=sys.stderr
        )
        return 2
    return run(command, rest)


def run(command: str, arguments: Sequence[str]) -> int:
    """Run `lopt.cli.<command>`; LOPT_DEBUG=1 shows where an error comes from."""
    try:
        importlib.import_module(f"lopt.cli.{command}").main(list(arguments))
    except (ValueError, ImportError, OSError) as error:
        if os.environ.get("LOPT_DEBUG"):
            raise
        message = _one_line(error, arguments)
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f"[rank {rank}] "
        print(f"{where}lopt {command}: error: {message}", file=sys.stderr)
        return 2
    except Exception as error:
        culprit = _culprit(error)
        if os.environ.get("LOPT_DEBUG") or culprit is None:
            raise
        print(f"lopt {command}: error: {culprit}: {_one_line(error, arguments)[:500]}", file=sys.stderr)
        return 2
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nlopt {command}: {stop}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print(f"\nlopt {command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _one_line(error: Exception, arguments: Sequence[str]) -> str:
    """It may quote a command line, a model or a data set: no token and no command to the terminal."""
    return clean(redact(" ".join(str(error).split()), known_secrets(arguments)))


def _culprit(error: Exception) -> str | None:
    """What came from elsewhere and was stopped where nobody expects it; None for a mistake of ours."""
    if type(error).__module__ == "jinja2.exceptions":  # its own words, or the sandbox's
        return "the model's chat template failed"
    if isinstance(error, pickle.UnpicklingError):  # torch.load(weights_only=True)
        return "a file was refused that holds more than data; nothing of it was run"
    return None


if __name__ == "__main__":
    sys.exit(main())
