"""The work of `lopt eval`: model after model, task after task, every result kept on disk at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lopt.evaluation.load import Loading, adapter_base
from lopt.evaluation.loss import text_windows
from lopt.evaluation.names import file_name
from lopt.evaluation.outcomes import Evaluation, merge
from lopt.evaluation.store import Store, model_identity, plain
from lopt.evaluation.text import TextTask, evaluate_text
from lopt.files import read_json, write_json
from lopt.reliability.provenance import versions

_PACKAGES = ("lopt", "lm_eval", "transformers", "torch")


class Work(NamedTuple):
    """A task of the harness or a text: its name, what identifies its results, and how it is run."""

    name: str
    identity: dict[str, Any]
    task: Any


@dataclass(frozen=True)
class EvaluationRun:
    """Which models are evaluated, on what and how.

    Attributes:
        models: folder or hub id by label.
        folder: of all results, with one folder per model.
        against_base: whether the first model is the base that the others are compared with.
        tasks, data_dir, num_fewshot, limit, apply_chat_template: see `lopt.evaluation.harness.evaluate`.
        batch_size: sequences in a batch, or "auto".
        texts: plain texts whose losses are measured.
        overwrite: replace results that were made with other settings.
    """

    models: Mapping[str, str]
    folder: Path
    loading: Loading
    against_base: bool = False
    tasks: Sequence[str] = ()
    data_dir: str | None = None
    num_fewshot: Mapping[str, int] | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    batch_size: int | str = "auto"
    texts: Sequence[TextTask] = ()
    overwrite: bool = False

    def run(self, on_start: Callable[[Path], object] = lambda folder: None) -> dict[str, Evaluation]:
        """Evaluate what has no results yet and return all results by label.

        Args:
            on_start: called with `folder` each time that a model has been loaded.

        Raises:
            ValueError: a setting is impossible; as far as possible this is found before a model is loaded.
        """
        works, loaded = self._works()
        self._check_tokenizers(works)
        stores = {
            label: Store(self.folder / label, self._settings(path), self.overwrite)
            for label, path in self.models.items()
        }
        missing = {
            label: [work for work in works if not store.finished(work.name, work.identity)]
            for label, store in stores.items()
        }
        self._check_report()
        self._check_models([self.models[label] for label, left in missing.items() if left])
        for store in stores.values():
            store.drop_stale()
        evaluations = {}
        for label, store in stores.items():
            done = len(works) - len(missing[label])
            count = f"{len(works)} task{'s' * (len(works) != 1)}"
            print(f"{label}: {count}" + (f", {done} of them finished before" if done else ""))
            if missing[label]:
                self._evaluate(self.models[label], store, missing[label], on_start)
            evaluations[label] = _collect(store, works, loaded)
            self._write_results(self.models[label], store, evaluations[label].results)
        return evaluations

    def _works(self) -> tuple[list[Work], Any]:
        """Return every single task (of MMLU every subject), checked, and the harness's own objects."""
        works, loaded = [], None
        if self.tasks:
            from lopt.evaluation.tasks import load_tasks, task_identity

            loaded = load_tasks(self.tasks, self.data_dir, self.num_fewshot)
            works = [Work(name, task_identity(task), task) for name, task in loaded.tasks.items()]
        works += [Work(text.name, text.identity(), text) for text in self.texts]
        names = [file_name(work.name) for work in works]
        for work, name in zip(works, names, strict=True):
            if names.count(name) > 1:
                raise ValueError(f"`text`: two files are called {work.task.path.stem}: rename one")
        return works, loaded

    def _check_tokenizers(self, works: list[Work]) -> None:
        """Refuse a comparison of text losses alone if the tokenizers make all of them incomparable."""
        texts = [work.task for work in works if isinstance(work.task, TextTask)]
        if not self.against_base or len(texts) < len(works) or not texts:
            return
        windows = {
            label: [text_windows(self.loading.tokenizer(path), t.read(), t.tokens, t.window) for t in texts]
            for label, path in self.models.items()
        }
        base = next(iter(windows.values()))
        for label, others in windows.items():
            if all(own != other for own, other in zip(base, others, strict=True)):
                raise ValueError(
                    f"{label} and the base have different tokenizers, so that their losses per token on "
                    "`text` measure different things: compare accuracies with `tasks`, or leave `base` out"
                )

    def _check_report(self) -> None:
        """Refuse to replace a comparison of other models."""
        file = self.folder / "retention.json"
        if not self.against_base or not file.is_file() or self.overwrite:
            return
        old = read_json(file)
        there = [old["base"], *old["models"]]
        if there != list(self.models):
            raise ValueError(
                f"`output_dir` {self.folder} holds a comparison of {', '.join(there)}: choose another "
                "folder, or replace it with `overwrite_output_dir`"
            )

    def _check_models(self, paths: list[str]) -> None:
        """Refuse models that cannot be evaluated, before the first one is."""
        for path in paths:
            if self.apply_chat_template and not self.loading.tokenizer(path).chat_template:
                raise ValueError(f"`apply_chat_template`: {path} has no chat template: leave it out")
            self.loading.check_memory(path)

    def _settings(self, path: str) -> dict[str, Any]:
        """Return what all tasks of a model share and what decides its results."""
        how, base = self.loading, adapter_base(path)
        model: dict[str, Any] = {"files": model_identity(path, how.model_revision, how.trust_remote_code)}
        if base is not None:
            model["base"] = model_identity(base, trust_remote_code=how.trust_remote_code)
        return {
            "model": model,
            "param_dtype": how.param_dtype,
            "attn_implementation": how.attn_implementation,
            "limit": self.limit,
            "apply_chat_template": self.apply_chat_template,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "versions": versions(_PACKAGES),
        }

    def _evaluate(
        self, path: str, store: Store, missing: list[Work], on_start: Callable[[Path], object]
    ) -> None:
        """Load a model, run what is missing and keep each task's results at once."""
        tokenizer, model = self.loading.tokenizer(path), self.loading.model(path)
        on_start(self.folder)
        for number, work in enumerate(missing, start=1):
            start = time.perf_counter()
            print(f"  {work.name} ({number} of {len(missing)})", file=sys.stderr)
            if isinstance(work.task, TextTask):
                size = self.batch_size if isinstance(self.batch_size, int) else None
                part = evaluate_text(model, tokenizer, work.task, size)
            else:
                from lopt.evaluation.harness import run_task

                part = run_task(
                    model,
                    tokenizer,
                    work.task,
                    limit=self.limit,
                    batch_size=self.batch_size,
                    apply_chat_template=self.apply_chat_template,
                )
            part.results["seconds"] = {work.name: round(time.perf_counter() - start, 2)}
            store.save(work.name, work.identity, part)

    def _write_results(self, path: str, store: Store, results: Mapping[str, Any]) -> None:
        """Write `results.json` in the harness's form; earlier results with the same settings stay in it."""
        whole, settings = dict(results), store.settings
        file = store.folder / "results.json"
        for key, value in (read_json(file) if file.is_file() else {}).items():
            if isinstance(value, dict) and key not in ("config", "versions_of_packages"):
                whole[key] = {**value, **whole.get(key, {})}
        arguments = {
            "pretrained": path,
            "dtype": self.loading.param_dtype,
            "revision": self.loading.model_revision,
        }
        whole["config"] = {
            "model": "hf",
            "model_args": arguments,
            "batch_size": str(self.batch_size),
            "device": settings["device"],
            "limit": self.limit,
            "apply_chat_template": self.apply_chat_template,
        }
        whole["model_source"], whole["model_name"] = "hf", path
        whole["lm_eval_version"] = settings["versions"].get("lm_eval")
        whole["transformers_version"] = settings["versions"].get("transformers")
        whole["date"] = time.time()
        write_json(file, whole, default=plain)


def _collect(store: Store, works: list[Work], loaded: Any) -> Evaluation:
    """Return all results asked for, groups and their means included."""
    parts = {work.name: store.read(work.name) for work in works}
    if loaded is None:
        return merge(parts)
    from lopt.evaluation.harness import combine

    return combine(parts, loaded)
