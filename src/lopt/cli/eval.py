"""`lopt eval`: benchmarks and text losses of any number of models, and what they kept of a base."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from lopt.cli.arguments import BENCHMARKS, EvalArguments
from lopt.cli.parsing import parse
from lopt.cli.record import record_of
from lopt.models.load import DTYPES, resolve_model


def main(arguments: Sequence[str]) -> None:
    """Check everything that can be checked, then examine model after model."""
    (args,) = parse("eval", arguments)
    models = check(args)
    shots = fewshots(args.num_fewshot or [])

    from lopt.evaluation.run import run_evaluation  # after the checks: this import takes seconds

    begin = functools.cache(record_of("eval", arguments).write)  # once
    run_evaluation(args, models, shots, begin)


def check(args: EvalArguments) -> dict[str, str]:
    """Refuse what means nothing; returns folder or hub id by label, the base first.

    Raises:
        ValueError: a flag is missing, or its value is not possible.
    """
    names = args.model_name_or_path or []
    if not names:
        raise ValueError(
            "--model_name_or_path is missing: give folders, hub ids or gemma3-270m (the packaged model)"
        )
    if not args.tasks and not args.text:
        raise ValueError(f"nothing to measure: give --tasks ({BENCHMARKS}) or --text FILE")
    if args.param_dtype not in DTYPES:
        raise ValueError(f"--param_dtype {args.param_dtype} is not possible: use one of {', '.join(DTYPES)}")
    for flag, value, least in (
        ("--limit", args.limit, 1),
        ("--text_tokens", args.text_tokens, 2),
        ("--text_window", args.text_window, 2),
    ):
        if value is not None and value < least:
            raise ValueError(f"{flag} {value} is not possible: use {least} or more")
    if args.batch_size != "auto" and not (args.batch_size.isdigit() and int(args.batch_size) >= 1):
        raise ValueError(f"--batch_size {args.batch_size} is not possible: use auto, or 1 or more")
    if args.base is None:
        return labels(names)
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the report on --base needs matplotlib: pip install "lopt[eval]"')
    others = [name for name in names if name != args.base]
    if not others:
        raise ValueError(f"--base {args.base} is the only model: give others in --model_name_or_path")
    return labels([args.base, *others])


def labels(names: Sequence[str]) -> dict[str, str]:
    """A short name for each model, from the end of its path, as long as needed to tell it from the others.

    Raises:
        ValueError: a model is given twice.
    """
    paths = [resolve_model(name) for name in names]
    told = [str(Path(p).resolve()) if Path(p).is_dir() else p for p in paths]
    for name, path in zip(names, told, strict=True):
        if told.count(path) > 1:
            raise ValueError(f"--model_name_or_path {name} is given twice: leave one out")
    alias = ["/" not in name and not Path(name).exists() for name in names]
    shown = [name if short else path for name, path, short in zip(names, told, alias, strict=True)]
    for parts in range(1, 1 + max(path.count("/") + 1 for path in shown)):
        short = ["-".join(path.strip("/").split("/")[-parts:]) for path in shown]
        # A label becomes a folder: of the hub's "a/.." nothing but the letters.
        short = [re.sub(r"[^\w.-]+", "_", label).lstrip(".") or "model" for label in short]
        if len(set(short)) == len(short):
            break
    return dict(zip(short, paths, strict=True))


def fewshots(given: Sequence[str]) -> dict[str, int]:
    """`--num_fewshot name=shots ...` as a mapping.

    Raises:
        ValueError: it is written otherwise.
    """
    shots = {}
    for part in given:
        name, _, count = part.partition("=")
        if not name or not count.isdigit():
            raise ValueError(f"--num_fewshot {part} is not possible: write it as arc_challenge=25")
        shots[name] = int(count)
    return shots
