"""`lopt compare`: methods × seeds on one data set and one budget, with the cells, the tables and a page."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt.cli.arguments import CompareArguments, DataArguments, ModelArguments
from lopt.cli.output import spare_model
from lopt.cli.parsing import parse
from lopt.cli.record import record_of
from lopt.cli.rows import SFTRows, sft_rows
from lopt.cli.sft import check
from lopt.cli.training import check_cut
from lopt.core.config import LoPTConfig
from lopt.evaluation.compare.arms import Arm, parse_arms
from lopt.evaluation.texts import read_texts
from lopt.models.load import load_model, resolve_model
from lopt.reliability.provenance import fingerprint
from lopt.reliability.record import RUN_JSON, RUN_YAML
from lopt.reliability.secrets import redacted
from lopt.trainers.checks import check_numbers, check_settings
from lopt.trainers.config import LoPTSFTConfig

if TYPE_CHECKING:  # evaluation takes seconds to import
    from lopt.evaluation.compare.arm_run import Bench
    from lopt.evaluation.compare.metrics import Yardsticks

HELD_OUT_ROWS = 64
DRIFT_ROWS = 8
SETTING = "setting.json"  # says that a folder is a comparison
# What a comparison writes, and --overwrite_output_dir removes; anything else in the folder is the user's.
WRITTEN = (SETTING, "base.json", "cells", "runs", "models", "compare.json", "report.html", "pareto.svg",
           RUN_YAML, RUN_JSON)  # fmt: skip
# Flags that change no figure: where things go and what is said on the way.
_NO_MATTER = ("output_dir", "run_name", "report_to", "disable_tqdm", "logging", "log_", "seed", "data_seed",
              "hub_", "push_", "save_", "eval_", "do_", "project", "trackio", "local_rank",
              "distributed_state", "deepspeed_plugin")  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Parse, check everything that can be checked cheaply, then run the cells that are not there yet."""
    compare, model_args, data_args, run_args, config, args = parse("compare", arguments)
    arms = parse_arms(compare.methods, compare.sweep, config)
    data_args.held_out = data_args.held_out or HELD_OUT_ROWS
    check(model_args, data_args, args)
    _check(compare, arms, config, args)
    texts = read_texts(compare.retention_text, compare.text_tokens, "--retention_text")
    folder = _folder(args)

    from lopt.evaluation.compare.study import Study  # evaluation takes seconds to import

    name = str(model_args.model_name_or_path)
    model_args.model_name_or_path = resolve_model(name)
    where = dict(revision=model_args.model_revision, trust_remote_code=args.trust_remote_code)
    check_cut(model_args.model_name_or_path, [arm.config for arm in arms], **where)
    spare_model(str(folder), model_args.model_name_or_path, WRITTEN)
    rows = sft_rows(model_args, data_args, args)
    bench = _bench(model_args, args, rows, arms, _yardsticks(compare, rows, texts))
    if compare.keep_models:
        bench.keep_models = folder / "models"
    setting = _setting(name, bench, compare, model_args, data_args, config)
    if run_args.overwrite_output_dir and folder.exists():  # only now: nothing is lost to a mistake
        for part in WRITTEN:
            path = folder / part
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    study = Study(bench, arms, compare.seeds, setting, folder)
    study.check_folder()
    record_of("compare", arguments).write(folder)
    results = study.run()
    print(_summary(results))
    print(f"\nReport: {folder / 'report.html'}\nFigures: {folder / 'compare.json'}")


def _check(compare: CompareArguments, arms: Sequence[Arm], config: LoPTConfig, args: LoPTSFTConfig) -> None:
    """Refuse what is known to be impossible before anything is read."""
    if config.method != "lopt":
        raise ValueError(f"--method {config.method} is for lopt sft: here --methods names what is compared")
    if not compare.seeds or len(set(compare.seeds)) < len(compare.seeds):
        raise ValueError(f"--seeds {' '.join(map(str, compare.seeds))}: give one or more, each once")
    for flag, value in (("--limit", compare.limit), ("--text_tokens", compare.text_tokens)):
        if value is not None and value < 2:
            raise ValueError(f"{flag} {value} is not possible: use 2 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("lopt compare runs in one process: start it without torchrun or accelerate launch")
    if any(arm.config.method == "lora" for arm in arms) and importlib.util.find_spec("peft") is None:
        raise ValueError('--methods lora needs peft: pip install "lopt[peft]", or leave lora out')
    for package in ("matplotlib", "lm_eval") if _tasks(compare) else ("matplotlib",):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f'lopt compare needs {package}: pip install "lopt[eval]"')
    check_numbers(args)
    for arm in arms:
        check_settings(args, arm.config)
    if _tasks(compare):
        from lopt.evaluation.harness import check_tasks

        check_tasks(_tasks(compare), compare.data_dir)


def _tasks(compare: CompareArguments) -> list[str]:
    return [*compare.adaptation_tasks, *compare.retention_tasks]


def _folder(args: LoPTSFTConfig) -> Path:
    """The output folder. A comparison that is there goes on, one that is not ours stays untouched."""
    folder = Path(str(args.output_dir))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: choose a folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / SETTING).is_file():
        raise ValueError(f"--output_dir {folder} holds something else: choose a new folder")
    return folder


def _bench(
    model_args: ModelArguments, args: LoPTSFTConfig, rows: SFTRows, arms: Sequence[Arm], yardsticks: Any
) -> Bench:
    """What all cells share; the model is loaded anew for each."""
    from lopt.evaluation.compare.arm_run import Bench

    return Bench(
        load=lambda: load_model(
            str(model_args.model_name_or_path),
            dtype=model_args.param_dtype,
            revision=model_args.model_revision,
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
        ),
        args=args,
        train=rows.train,
        held_out=rows.held_out,
        tokenizer=rows.tokenizer,
        lora={
            "r": model_args.lora_r,
            "lora_alpha": model_args.lora_alpha,
            "target_modules": model_args.lora_target_modules or "all-linear",
        },
        yardsticks=yardsticks,
        cycle=max(arm.config.local_every for arm in arms),
    )


def _yardsticks(compare: CompareArguments, rows: SFTRows, texts: Mapping[str, str]) -> Yardsticks:
    from lopt.evaluation.compare.metrics import Yardsticks

    held_out = [row for _, row in zip(range(DRIFT_ROWS), rows.held_out, strict=False)]
    return Yardsticks(
        tokenizer=rows.tokenizer,
        retention=compare.retention_tasks,
        adaptation=compare.adaptation_tasks,
        texts=texts,
        text_tokens=compare.text_tokens,
        drift_texts=list(texts.values()) or [_words(row) for row in held_out],
        data_dir=None if compare.data_dir is None else Path(compare.data_dir),
        limit=compare.limit,
    )


def _setting(
    name: str,
    bench: Bench,
    compare: CompareArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    config: LoPTConfig,
) -> dict[str, Any]:
    """What identifies a study: with the same, its cells can stand beside each other."""
    texts = bench.yardsticks.texts
    return {
        "model": name,
        "model_flags": {
            "dtype": model_args.param_dtype,
            "revision": model_args.model_revision,
            **bench.lora,
        },
        "data": {
            "source": data_args.dataset_preset
            or data_args.dataset_name
            or [Path(file).name for file in data_args.train_file or ()],
            "rows": [len(bench.train), fingerprint(bench.train)],
            "held_out": [len(bench.held_out), fingerprint(bench.held_out)],
        },
        "method": {k: v for k, v in asdict(config).items() if v != getattr(LoPTConfig(), k)},
        "training": _changed(bench.args),
        "measured": {
            "adaptation_tasks": compare.adaptation_tasks,
            "retention_tasks": compare.retention_tasks,
            "limit": compare.limit,
            "texts": {k: [len(v), compare.text_tokens] for k, v in texts.items()},
        },
    }


def _changed(args: LoPTSFTConfig) -> dict[str, Any]:
    """Training flags that differ from their defaults and matter."""
    plain = vars(LoPTSFTConfig(output_dir="x"))
    kept = {k: v for k, v in vars(args).items() if not k.startswith(("_", *_NO_MATTER))}
    return {
        k: v if isinstance(v, (int, float, str)) else str(redacted(v))
        for k, v in kept.items()
        if v != plain.get(k)
    }


def _words(row: Mapping[str, Any]) -> str:
    """A row as plain text."""
    if "messages" in row:
        return "\n".join(str(message["content"]) for message in row["messages"])
    return "".join(_content(row[key]) for key in ("text", "prompt", "completion") if key in row)


def _content(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(str(message["content"]) for message in value)


def _summary(results: Mapping[str, Any]) -> str:
    """The table on the terminal."""
    summary = results["summary"]
    keys = [
        k for k in ("loss", "token_accuracy", "forgetting", "retained", "drift") if k in summary["measures"]
    ]
    titles = {"loss": "task loss", "token_accuracy": "accuracy", "retained": "scores kept"}
    width = max(map(len, results["arms"]), default=0) + 2
    head = " " * width + "".join(f"{titles.get(key, key):>18}" for key in keys)
    lines = [head + f"{'peak GiB':>10}{'s/step':>8}{'TFLOP':>8}"]
    for name, figures in summary["arms"].items():
        cost = summary["cost"].get(name)
        text = f"{name:{width}}" + "".join(f"{_cell(figures[key]):>18}" for key in keys)
        if cost is not None:
            text += f"{cost['peak_bytes'] / 2**30:10.2f}{cost['seconds_per_step']:8.2f}"
            text += f"{cost['flops_per_step'] / 1e12:8.2f}"
        lines.append(text)
    return "\n".join(["", *lines])


def _cell(figures: Mapping[str, Any]) -> str:
    if figures["value"] is None:
        return "–"
    half = "" if figures["low"] is None else f" ± {(figures['high'] - figures['low']) / 2:.3f}"
    return f"{figures['value']:.3f}{half}"
