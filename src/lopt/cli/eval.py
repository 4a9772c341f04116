"""`lopt eval`: benchmarks and text losses of any number of models, and what they kept of a base."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from lopt.cli.output import check_apart
from lopt.cli.parsing import check_effect, parse
from lopt.cli.record import record_of
from lopt.cli.report_flags import BENCHMARKS, EvalArguments
from lopt.evaluation.names import model_labels
from lopt.models.load import DTYPES, resolve_model
from lopt.validation import check as check_value
from lopt.validation import check_choice, check_number


def main(arguments: Sequence[str]) -> None:
    """Check everything that can be checked cheaply, then evaluate model after model."""
    (args,) = parse("eval", arguments)
    models = check(args)
    num_fewshot = fewshots(args.num_fewshot or [])

    from lopt.evaluation.load import Loading  # after the checks: these imports take seconds
    from lopt.evaluation.outcomes import cut_prompts
    from lopt.evaluation.run import EvaluationRun
    from lopt.evaluation.text import TextTask
    from lopt.reports.eval import results_table, write_retention

    folder = Path(args.output_dir)
    loading = Loading(args.param_dtype, args.model_revision, args.attn_implementation, args.trust_remote_code)
    evaluations = EvaluationRun(
        models,
        folder,
        loading,
        against_base=args.base is not None,
        tasks=args.tasks or (),
        data_dir=args.data_dir,
        num_fewshot=num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        batch_size=args.batch_size if args.batch_size == "auto" else int(args.batch_size),
        texts=[TextTask(Path(path), args.text_tokens, args.text_window) for path in args.text or ()],
        overwrite=args.overwrite_output_dir,
    ).run(functools.cache(record_of("eval", arguments).write))  # written once
    for label, evaluation in evaluations.items():
        if remark := cut_prompts(evaluation.results):
            print(f"{label}: {remark}")
    print("\n" + results_table(evaluations))
    if args.base is not None:
        print("\n" + write_retention(folder, next(iter(models)), evaluations))
        print(f"\nReport: {folder / 'report.html'}")


def check(args: EvalArguments) -> dict[str, str]:
    """Refuse impossible flags; return folder or hub id by label, the base first.

    Raises:
        ValueError: a flag is missing, or its value is not possible.
    """
    names = args.model_name_or_path or []
    if not names:
        raise ValueError(
            "--model_name_or_path is missing: give folders, hub ids, gemma3-270m or smollm2-135m"
        )
    if not args.tasks and not args.text:
        raise ValueError(f"nothing to measure: give --tasks ({BENCHMARKS}) or --text FILE")
    check_choice("param_dtype", args.param_dtype, DTYPES)
    check_number("limit", args.limit, minimum=1)
    check_number("text_tokens", args.text_tokens, minimum=2)
    check_number("text_window", args.text_window, minimum=2)
    check_effect(
        args,
        tasks=("num_fewshot", "limit", "data_dir", "apply_chat_template"),
        text=("text_tokens", "text_window"),
    )
    check_apart(args.output_dir, "eval")
    size = args.batch_size
    check_value(size == "auto" or (size.isdigit() and int(size) >= 1), "batch_size", size, "auto, or >= 1")
    if args.base is None:
        return labels(names)
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the report on --base needs matplotlib: pip install "lopt[eval]"')
    others = [name for name in names if name != args.base]
    if not others:
        raise ValueError(f"--base {args.base} is the only model: give others in --model_name_or_path")
    return labels([args.base, *others])


def labels(names: Sequence[str]) -> dict[str, str]:
    """Return folders or hub ids by label: the end of each path, as long as needed to be unique.

    Raises:
        ValueError: a model is given twice.
    """
    paths = [resolve_model(name) for name in names]
    whole = [str(Path(p).resolve()) if Path(p).is_dir() else p for p in paths]
    for name, path in zip(names, whole, strict=True):
        if whole.count(path) > 1:
            raise ValueError(f"--model_name_or_path {name} is given twice: leave one out")
    # An alias is a label itself; the folder or hub id that it stands for is not shown.
    aliases = ["/" not in name and not Path(name).exists() for name in names]
    shown = [name if alias else path for name, path, alias in zip(names, whole, aliases, strict=True)]
    return dict(zip(model_labels(shown), paths, strict=True))


def fewshots(given: Sequence[str]) -> dict[str, int]:
    """Return `--num_fewshot name=shots ...` as a mapping.

    Raises:
        ValueError: it is written otherwise.
    """
    shots = {}
    for part in given:
        name, _, count = part.partition("=")
        check_value(bool(name) and count.isdigit(), "num_fewshot", part, "such as arc_challenge=25")
        shots[name] = int(count)
    return shots
