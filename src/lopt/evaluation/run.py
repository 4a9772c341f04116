"""What `lopt eval` does: model after model, task after task, then the table and the comparison."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lopt.evaluation.load import adapter_base, check_memory, load_examinee, load_examinees_tokenizer
from lopt.evaluation.loss import text_windows
from lopt.evaluation.outcomes import Evaluation, cut_prompts, merge
from lopt.evaluation.store import Store, file_name, model_identity, plain
from lopt.evaluation.text import TextTask, evaluate_text
from lopt.files import write_text
from lopt.reliability.provenance import versions
from lopt.reports.retention import results_table, write_retention

_PACKAGES = ("lopt", "lm_eval", "transformers", "torch")


@dataclass(frozen=True)
class Work:
    """A task: its name, what makes its results what they are, and how it is run."""

    name: str
    identity: dict[str, Any]
    task: Any


def run_evaluation(
    args: Any,
    models: Mapping[str, str],
    shots: Mapping[str, int],
    begin: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Examine `models` (path by label, the base first if there is one) as the flags of `lopt eval` say.

    `begin` is called with the output folder whenever a model is about to be examined.

    Raises:
        ValueError: before any model is loaded, what can be told by then.
    """
    if args.num_fewshot and not args.tasks:
        raise ValueError("--num_fewshot goes with --tasks: give both or neither")
    works, loaded = _works(args, shots)
    _check_tokenizers(args, models, works)
    stores = {
        label: Store(Path(args.output_dir) / label, _settings(args, path), args.overwrite_output_dir)
        for label, path in models.items()
    }
    missing = {
        label: [work for work in works if not store.finished(work.name, work.identity)]
        for label, store in stores.items()
    }
    report = Path(args.output_dir)
    _check_report(report, args, models)
    _check_models(args, [models[label] for label, left in missing.items() if left])
    for store in stores.values():
        store.drop_stale()
    for label, store in stores.items():
        done = len(works) - len(missing[label])
        print(f"{label}: {len(works)} tasks" + (f", {done} of them finished before" if done else ""))
        if missing[label]:
            model, tokenizer = _load(args, models[label])
            begin(report)
            _examine(args, model, tokenizer, store, missing[label])
            del model  # before the next one is loaded
        _write_results(args, models[label], store, works, loaded)
    evaluations = {label: _collect(store, works, loaded) for label, store in stores.items()}
    for label, evaluation in evaluations.items():
        if remark := cut_prompts(evaluation.results):
            print(f"{label}: {remark}")
    print("\n" + results_table(evaluations))
    if args.base:
        base = next(iter(evaluations))
        told = write_retention(report, base, evaluations)
        print("\n" + told + f"\n\nReport: {report / 'report.html'}")


def _works(args: Any, shots: Mapping[str, int]) -> tuple[list[Work], Any]:
    """Every single task (of MMLU every subject), checked and with its rows."""
    works, loaded = [], None
    if args.tasks:
        from lopt.evaluation.tasks import load_tasks, task_identity

        loaded = load_tasks(args.tasks, args.data_dir, shots)
        works = [Work(name, task_identity(task), task) for name, task in loaded.tasks.items()]
    for path in args.text or []:
        text = TextTask(Path(path), args.text_tokens, args.text_window)
        works.append(Work(text.name, text.identity(), text))
    names = [file_name(work.name) for work in works]
    for work, name in zip(works, names, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"--text: two files are called {work.task.path.stem}: rename one")
    return works, loaded


def _check_tokenizers(args: Any, models: Mapping[str, str], works: list[Work]) -> None:
    """Refuse a run that could compare nothing."""
    texts = [work.task for work in works if isinstance(work.task, TextTask)]
    if not args.base or len(texts) < len(works) or not texts:
        return
    first, *others = (_tokenizer(args, path) for path in models.values())
    for label, other in zip(list(models)[1:], others, strict=True):
        if all(windows(first, text) != windows(other, text) for text in texts):
            raise ValueError(
                f"{label} and the base have different tokenizers, so that their losses per token on --text "
                "measure different things: compare accuracies with --tasks, or leave --base out"
            )


def _check_models(args: Any, paths: list[str]) -> None:
    """Refuse models that cannot be examined, before the first one is."""
    for path in paths:
        if args.apply_chat_template and not _tokenizer(args, path).chat_template:
            raise ValueError(f"--apply_chat_template: {path} has no chat template: leave the flag out")
        base = adapter_base(path)
        revision = None if base else args.model_revision
        check_memory(
            base or path, args.param_dtype, revision=revision, trust_remote_code=args.trust_remote_code
        )


def windows(tokenizer: Any, text: TextTask) -> list[list[int]]:
    """The windows of token ids that a model with this tokenizer is examined on."""
    return text_windows(tokenizer, text.read(), text.tokens, text.window)


def _settings(args: Any, path: str) -> dict[str, Any]:
    """What all tasks of a model share and what decides its results."""
    base = adapter_base(path)
    model: dict[str, Any] = {"files": model_identity(path, args.model_revision, args.trust_remote_code)}
    if base is not None:
        model["base"] = model_identity(base, trust_remote_code=args.trust_remote_code)
    return {
        "model": model,
        "param_dtype": args.param_dtype,
        "attn_implementation": args.attn_implementation,
        "limit": args.limit,
        "apply_chat_template": args.apply_chat_template,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": versions(_PACKAGES),
    }


def _tokenizer(args: Any, path: str) -> Any:
    return load_examinees_tokenizer(
        path, revision=args.model_revision, trust_remote_code=args.trust_remote_code
    )


def _load(args: Any, path: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    tokenizer = _tokenizer(args, path)
    model = load_examinee(
        path,
        dtype=args.param_dtype,
        revision=args.model_revision,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    return model, tokenizer


def _examine(args: Any, model: Any, tokenizer: Any, store: Store, missing: list[Work]) -> None:
    """Run what is missing and keep each task's results at once."""
    size = args.batch_size if args.batch_size == "auto" else int(args.batch_size)
    for number, work in enumerate(missing, start=1):
        start = time.perf_counter()
        print(f"  {work.name} ({number} of {len(missing)})", file=sys.stderr)
        if isinstance(work.task, TextTask):
            part = evaluate_text(model, tokenizer, work.task, None if size == "auto" else size)
        else:
            from lopt.evaluation.harness import run_task

            part = run_task(
                model,
                tokenizer,
                work.task,
                limit=args.limit,
                batch_size=size,
                apply_chat_template=args.apply_chat_template,
            )
        part.results["seconds"] = {work.name: round(time.perf_counter() - start, 2)}
        store.save(work.name, work.identity, part)


def _collect(store: Store, works: list[Work], loaded: Any) -> Evaluation:
    """All results asked for, groups and their means included."""
    parts = {work.name: store.read(work.name) for work in works}
    if loaded is None:
        return merge(parts)
    from lopt.evaluation.harness import combine

    return combine(parts, loaded)


def _write_results(args: Any, path: str, store: Store, works: list[Work], loaded: Any) -> None:
    """`results.json` in the harness's form; what earlier runs with the same settings measured stays in it."""
    whole = _collect(store, works, loaded).results
    file = store.folder / "results.json"
    old = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for key, value in old.items():
        if isinstance(value, dict) and key not in ("config", "versions_of_packages"):
            whole[key] = {**value, **whole.get(key, {})}
    settings = store.settings
    whole["config"] = {
        "model": "hf",
        "model_args": {"pretrained": path, "dtype": args.param_dtype, "revision": args.model_revision},
        "batch_size": args.batch_size,
        "device": settings["device"],
        "limit": args.limit,
        "apply_chat_template": args.apply_chat_template,
    }
    whole["model_source"], whole["model_name"] = "hf", path
    whole["lm_eval_version"] = settings["versions"].get("lm_eval")
    whole["transformers_version"] = settings["versions"].get("transformers")
    whole["date"] = time.time()
    write_text(file, json.dumps(whole, indent=1, default=plain) + "\n")


def _check_report(folder: Path, args: Any, models: Mapping[str, str]) -> None:
    """Refuse to replace a comparison of other models."""
    file = folder / "retention.json"
    if not args.base or not file.is_file() or args.overwrite_output_dir:
        return
    old = json.loads(file.read_text(encoding="utf-8"))
    there, here = [old["base"], *old["models"]], list(models)
    if there != here:
        raise ValueError(
            f"--output_dir {folder} holds a comparison of {', '.join(there)}: choose another folder, or "
            "replace it with --overwrite_output_dir"
        )
