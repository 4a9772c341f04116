"""`lopt compare [dpo]`: methods × seeds on one data set and one budget, their figures and a page."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt.cli.checks import check_cut
from lopt.cli.flag_names import renamed
from lopt.cli.flags import DataArguments, ModelArguments, RunArguments
from lopt.cli.folder import for_pairs
from lopt.cli.noise import at_log_level
from lopt.cli.output import check_writable, spare_model
from lopt.cli.parsing import check_effect, parse
from lopt.cli.record import record_of
from lopt.cli.report_flags import CompareArguments
from lopt.cli.rows import SFTRows, dpo_rows, retention_rows, sft_rows
from lopt.cli.sft import check
from lopt.cli.training import load, load_reference_alike
from lopt.core.config import LoPTConfig
from lopt.data.columns import needed_columns
from lopt.data.load import load_rows
from lopt.data.templates import as_text
from lopt.evaluation.compare.arms import Arm, parse_arms
from lopt.evaluation.texts import read_texts
from lopt.models.load import resolve_model
from lopt.models.names import PACKAGES
from lopt.reliability.provenance import fingerprint
from lopt.reliability.record import RUN_JSON, RUN_YAML
from lopt.reliability.secrets import redacted
from lopt.trainers.checks import check_numbers, check_settings
from lopt.trainers.config import LoPTDPOConfig, LoPTSFTConfig
from lopt.trainers.preferences import check_preference_method, check_preference_numbers
from lopt.validation import check_number

if TYPE_CHECKING:  # evaluation takes seconds to import
    from lopt.evaluation.compare.arm_run import Setup

HELD_OUT_ROWS = 64
DRIFT_ROWS = 8
MARKS = ("setting.json", "compare.json")  # either marks the folder of a comparison
# What a comparison writes, and --overwrite_output_dir removes; other files in the folder are the user's.
WRITTEN = (*MARKS, "base.json", "cells", "runs", "models", "report.html", "pareto.svg", "reach.svg",
           RUN_YAML, RUN_JSON)  # fmt: skip
# Prefixes of flags that change no figure: where output goes, what is logged, when a single run is evaluated.
# Of data_seed and eval_packing, which do, `_identity` takes care.
_OUTPUT_ONLY = ("output_dir", "run_name", "report_to", "disable_tqdm", "logging", "log_", "seed", "data_seed",
              "hub_", "push_", "save_", "eval_", "do_", "project", "trackio", "local_rank",
              "distributed_state", "deepspeed_plugin")  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Check everything that can be checked cheaply, then run the arms × seeds that have no results yet."""
    command, words = for_pairs("compare", arguments)
    parsed = parse(command, words)
    with at_log_level(parsed[-1]):
        _run(command, words, *parsed)


def _run(
    command: str,
    arguments: Sequence[str],
    compare: CompareArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    config: LoPTConfig,
    args: LoPTSFTConfig | LoPTDPOConfig,
) -> None:
    arms = parse_arms(compare.methods, compare.sweep, config)
    data_args.held_out = data_args.held_out or HELD_OUT_ROWS
    check(model_args, data_args, args)
    _check(compare, arms, config, args)
    benchmark_rows = _check_tasks(compare)
    _check_run(run_args, args)
    texts = read_texts(compare.retention_text, compare.text_tokens, "retention_text")
    folder = _folder(args)

    from lopt.evaluation.compare.study import Study  # after the checks: these imports take seconds
    from lopt.reports.compare import summary_table, write_report

    name = str(model_args.model_name_or_path)
    model_args.model_name_or_path = resolve_model(name)
    where = dict(revision=model_args.model_revision, trust_remote_code=args.trust_remote_code)
    check_cut(model_args.model_name_or_path, [arm.config for arm in arms], **where)
    spare_model(str(folder), model_args.model_name_or_path, WRITTEN)
    pairs = isinstance(args, LoPTDPOConfig)
    rows = (dpo_rows if pairs else sft_rows)(model_args, data_args, args)
    if pairs:
        load_reference_alike(args, model_args)
    setup = _setup(model_args, args, rows, arms, compare, texts)
    setting = _setting(name, setup, compare, model_args, data_args, config)
    setting |= _identity(name, setup, compare, model_args, benchmark_rows)
    if run_args.overwrite_output_dir and folder.exists():  # only now: no mistake above costs any results
        for part in WRITTEN:
            path = folder / part
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    study = Study(setup, arms, compare.seeds, setting, folder)
    study.check_folder()
    record_of(command, arguments).write(folder)
    results = study.run()
    report = write_report(results, folder)
    print("\n" + summary_table(results))
    print(f"\nReport: {report}\nFigures: {folder / 'compare.json'}")


def _check(
    compare: CompareArguments, arms: Sequence[Arm], config: LoPTConfig, args: LoPTSFTConfig | LoPTDPOConfig
) -> None:
    """Refuse what is known to be impossible before anything is read."""
    if config.method != "lopt":
        raise ValueError(f"--method {config.method} is for lopt sft: here --methods names what is compared")
    if not compare.seeds or len(set(compare.seeds)) < len(compare.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, compare.seeds))}: give one or more, each once")
    for seed in compare.seeds:
        check_number("seeds", seed, minimum=0, maximum=2**32 - 1)
    check_number("limit", compare.limit, minimum=2)
    check_number("text_tokens", compare.text_tokens, minimum=2)
    check_effect(
        compare,
        adaptation_tasks_or_retention_tasks_or_retention_rows=("limit",),
        adaptation_tasks_or_retention_tasks=("data_dir",),
        retention_text=("text_tokens",),
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("lopt compare runs in one process: start it without torchrun or accelerate launch")
    if any(c.schedule == "pipeline" for c in (config, *(arm.config for arm in arms))):
        raise ValueError("lopt compare runs in one process: use --schedule block_major instead of pipeline")
    if any(arm.config.method == "lora" for arm in arms) and importlib.util.find_spec("peft") is None:
        raise ValueError('--methods lora needs peft: pip install "lopt[peft]", or leave lora out')
    tasks = [*compare.adaptation_tasks, *compare.retention_tasks]
    for package in ("matplotlib", "lm_eval") if tasks else ("matplotlib",):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f'lopt compare needs {package}: pip install "lopt[eval]"')
    check_numbers(args)
    if isinstance(args, LoPTDPOConfig):
        check_preference_numbers(args)
    for arm in arms:
        check_settings(args, arm.config)
        if isinstance(args, LoPTDPOConfig):
            check_preference_method(arm.config)


def _check_tasks(compare: CompareArguments) -> str | None:
    """Refuse benchmarks that cannot be run; return a hash of their local rows, None for rows of the hub."""
    both = [*compare.adaptation_tasks, *compare.retention_tasks]
    if not both:
        return None
    from lopt.evaluation.tasks import check_tasks, load_tasks, task_identity

    rows: list[str] = []
    for flag in ("adaptation_tasks", "retention_tasks"):
        with renamed(tasks=flag):
            tasks = getattr(compare, flag)
            if tasks and compare.data_dir is not None:
                loaded = load_tasks(tasks, compare.data_dir).tasks.values()
                rows += [task_identity(task)["rows"] for task in loaded]
            elif tasks:
                check_tasks(tasks, None)
    with renamed(tasks="retention_tasks"):  # now only a task that --adaptation_tasks has too
        check_tasks(both, None)
    return fingerprint(rows) if rows else None


def _check_run(run_args: RunArguments, args: LoPTSFTConfig | LoPTDPOConfig) -> None:
    """Refuse flags of a single run, which a comparison does not look at."""
    given = (
        ("max_time", run_args.max_time),
        ("resume", run_args.resume not in (None, "auto")),
        ("resume_from_checkpoint", args.resume_from_checkpoint),
        ("push_to_hub", args.push_to_hub),
        ("load_best_model_at_end", args.load_best_model_at_end),
    )
    for name, asked in given:
        if asked:
            raise ValueError(
                f"--{name} is for a single run: leave it out (a comparison that is started again goes on)"
            )


def _folder(args: LoPTSFTConfig | LoPTDPOConfig) -> Path:
    """Return the output folder: new, empty, or of a comparison that is continued."""
    folder = Path(str(args.output_dir))
    check_writable(folder)
    # Names with a dot are files that another process of this comparison is about to write.
    others = folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())
    if others and not any((folder / name).is_file() for name in MARKS):
        raise ValueError(f"--output_dir {folder} holds something else: choose a new folder")
    return folder


def _setup(
    model_args: ModelArguments,
    args: LoPTSFTConfig | LoPTDPOConfig,
    rows: SFTRows,
    arms: Sequence[Arm],
    compare: CompareArguments,
    texts: Mapping[str, str],
) -> Setup:
    """Return what all arm runs share; the model is loaded anew for each."""
    from lopt.evaluation.compare.arm_run import Setup
    from lopt.evaluation.compare.metrics import Metrics

    held_out = itertools.islice(rows.held_out, DRIFT_ROWS)
    return Setup(
        load=lambda: load(model_args, args),
        args=args,
        train=rows.train,
        held_out=rows.held_out,
        tokenizer=rows.tokenizer,
        lora={
            "r": model_args.lora_r,
            "lora_alpha": model_args.lora_alpha,
            "target_modules": model_args.lora_target_modules or "all-linear",
        },
        metrics=Metrics(
            tokenizer=rows.tokenizer,
            retention=compare.retention_tasks,
            adaptation=compare.adaptation_tasks,
            texts=texts,
            text_tokens=compare.text_tokens,
            rows=retention_rows(compare.retention_rows, rows.tokenizer, compare.limit),
            drift_texts=list(texts.values()) or [_plain_text(row) for row in held_out],
            data_dir=None if compare.data_dir is None else Path(compare.data_dir),
            limit=compare.limit,
        ),
        cycle=max(arm.config.local_every for arm in arms),
        keep_models=Path(str(args.output_dir)) / "models" if compare.keep_models else None,
    )


def _setting(
    name: str,
    setup: Setup,
    compare: CompareArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    config: LoPTConfig,
) -> dict[str, Any]:
    """Return what identifies a study: its arm runs can be compared if they share all of this."""
    texts = setup.metrics.texts
    return {
        "model": name,
        "model_flags": {
            "dtype": model_args.param_dtype,
            "revision": model_args.model_revision,
            **setup.lora,
        },
        "data": {
            "source": data_args.dataset_preset
            or data_args.dataset_name
            or data_args.data_mix
            or [Path(file).name for file in data_args.train_file or ()],
            "rows": [len(setup.train), fingerprint(setup.train)],
            "held_out": [len(setup.held_out), fingerprint(setup.held_out)],
        },
        "method": config.changed(),
        "training": _changed(setup.args),
        "measured": {
            "adaptation_tasks": compare.adaptation_tasks,
            "retention_tasks": compare.retention_tasks,
            "limit": compare.limit,
            "texts": {k: [len(v), compare.text_tokens] for k, v in texts.items()},
            **({"rows": {k: len(v) for k, v in kept.items()}} if (kept := setup.metrics.rows) else {}),
        },
    }


def _identity(
    name: str,
    setup: Setup,
    compare: CompareArguments,
    model_args: ModelArguments,
    benchmark_rows: str | None,
) -> dict[str, Any]:
    """Return what else identifies a study; settings of older versions have none of these keys.

    Rows are hashed as they are in their files: a chat template may put the date into them.
    """
    rows = {
        key: fingerprint(itertools.islice(load_rows(file, choose=needed_columns), compare.limit))
        for key, file in zip(setup.metrics.rows, compare.retention_rows, strict=True)
    }
    return {
        "model_files": _model_files(name, model_args, setup.args.trust_remote_code),
        "texts": {key: fingerprint([text]) for key, text in setup.metrics.texts.items()},
        "retention_rows": rows,
        "benchmark_rows": benchmark_rows,
        "data_seed": setup.args.data_seed,
        "eval_packing": getattr(setup.args, "eval_packing", None),
    }


def _model_files(name: str, model_args: ModelArguments, trust_remote_code: bool) -> dict[str, str] | None:
    """Return what identifies a model, also on another machine; None for a packaged one, whose name does."""
    from lopt.evaluation.store import model_identity

    path, revision = str(model_args.model_name_or_path), model_args.model_revision
    return None if name in PACKAGES else model_identity(path, revision, trust_remote_code, whole=True)


def _changed(args: LoPTSFTConfig | LoPTDPOConfig) -> dict[str, Any]:
    """Return training arguments that differ from their defaults and may change a figure."""
    plain = vars(type(args)(output_dir="x"))
    kept = {k: v for k, v in vars(args).items() if not k.startswith(("_", *_OUTPUT_ONLY))}
    return {
        k: v if isinstance(v, (int, float, str)) else str(redacted(v))
        for k, v in kept.items()
        if v != plain.get(k)
    }


def _plain_text(row: Mapping[str, Any]) -> str:
    """Return a formatted row as plain text."""
    parts = [row["messages"]] if "messages" in row else [
        row[key] for key in ("text", "prompt", "completion", "chosen") if key in row
    ]  # fmt: skip
    return "".join(as_text(part) for part in parts)
