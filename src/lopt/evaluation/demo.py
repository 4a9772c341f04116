"""The demo: a real model learns a procedural task by LoPT; what it gained and what it kept.

Held-out problems of the task measure adaptation; a text that has nothing to do with it, Python's
own documentation (PSF licence, in every Python), measures retention.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median_high
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from lopt.core.config import LoPTConfig
from lopt.data.procedural import Problem, is_correct, prompt, train_and_held_out
from lopt.evaluation.generate import complete
from lopt.evaluation.loss import completion_loss, text_loss
from lopt.files import write_json
from lopt.models.load import load_model, load_tokenizer
from lopt.reliability.provenance import device, versions
from lopt.trainers import LoPTSFTTrainer
from lopt.trainers.config import LoPTSFTConfig

RETENTION_TOKENS = 1024
MAX_NEW_TOKENS = {"chain_sum": 56, "gsm_symbolic": 200}
SAMPLES = 3


@dataclass(frozen=True)
class Demo:
    """A run of the demo.

    Attributes:
        model: a folder, a hub id or the packaged model.
        task: a procedural task of `lopt.data`, a key of `MAX_NEW_TOKENS`.
        config: method and blocks.
        steps, batch_size: optimizer steps, and problems in each.
        learning_rate: of the last block.
        held_out: problems that are kept back for the evaluation.
    """

    model: str
    task: str
    config: LoPTConfig
    steps: int
    batch_size: int
    learning_rate: float
    held_out: int
    seed: int
    trust_remote_code: bool = False

    def run(
        self, folder: Path, shown: Callable[[LoPTSFTTrainer], AbstractContextManager[Any]] = nullcontext
    ) -> dict[str, Any]:
        """Evaluate, train and evaluate again; writes `results.json`, which is returned, and `model/`.

        Args:
            shown: makes the context in which a trainer trains, to show how it goes.
        """
        tokenizer = load_tokenizer(self.model, trust_remote_code=self.trust_remote_code)
        model = load_model(self.model, trust_remote_code=self.trust_remote_code)
        count = self.steps * self.batch_size
        train, held_out = train_and_held_out(self.task, count, self.held_out, self.seed)
        print(
            f"{self.model} learns {self.task} by {self.config.method}: {self.steps} steps of "
            f"{self.batch_size} problems, evaluated on {len(held_out)} others. "
            "Retention: loss on Python's documentation."
        )
        started = time.perf_counter()
        evaluation = _Evaluation(self.task, held_out, tokenizer)
        before, answers_before = evaluation.run(model, "Evaluation before")
        trainer = self._trainer(model, tokenizer, train, folder)
        curve = _Curve(evaluation, model, every=-(-self.steps // 3))
        trainer.add_callback(curve)
        with shown(trainer):
            trainer.train()
        after, answers_after = evaluation.run(model, "Evaluation after ")
        results = {
            **self._facts(trainer),
            "before": before,
            "after": after,
            "samples": _samples(held_out, answers_before, answers_after),
            "train": _training_log(trainer),
            "curve": [_point(0, before), *curve.points, _point(self.steps, after)],
            "total_seconds": time.perf_counter() - started,
        }
        write_json(folder / "results.json", results)
        trainer.save_model(str(folder / "model"))
        return results

    def _trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        problems: list[Problem],
        folder: Path,
    ) -> LoPTSFTTrainer:
        rows = [{"prompt": prompt(p), "completion": f" {p.solution}"} for p in problems]
        return LoPTSFTTrainer(
            model,
            # The shared embedding is 168 of the packaged model's 268 million parameters: freezing it saves
            # a third of a step's time (docs/experiments.md).
            lopt_config=self.config.replace(tied_embeddings="freeze"),
            args=LoPTSFTConfig(
                output_dir=str(folder),
                max_steps=self.steps,
                per_device_train_batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                warmup_steps=max(1, self.steps // 20),
                lr_scheduler_type="cosine",
                logging_steps=1,
                save_strategy="no",
                seed=self.seed,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    def _facts(self, trainer: LoPTSFTTrainer) -> dict[str, Any]:
        config, peak = trainer.lopt.config, trainer.throughput.peak
        own = {key: value for key, value in vars(self).items() if key != "config"}
        method = {key: value for key, value in asdict(config).items() if key not in ("method", "num_blocks")}
        return {
            "title": "LoPT demo",
            "date": date.today().isoformat(),
            "model": self.model,
            "task": self.task,
            "method": config.method,
            "num_blocks": len(trainer.lopt.blocks),
            "blocks": [f"layers {b.start}-{b.stop - 1}" for b in trainer.lopt.blocks],
            "settings": {
                **own,
                "method": self.config.method,
                "num_blocks": self.config.num_blocks,
                **method,
                "lr_k1": config.early_learning_rate(self.learning_rate),
            },
            "versions": versions(("lopt", "torch", "transformers", "trl", "reasoning-gym")),
            "device": device(),
            "head_warmup": [
                {"step": i, "local_loss": row} for i, row in enumerate(trainer.head_warmup_history, start=1)
            ],
            "memory": asdict(peak) if peak is not None else {},
            "seconds_per_step": median_high(row["seconds_per_step"] for row in _steps(trainer)),
        }


class _Evaluation:
    """Held-out loss, exact answers and retention of a model."""

    def __init__(self, task: str, problems: list[Problem], tokenizer: PreTrainedTokenizerBase) -> None:
        from pydoc_data.topics import topics

        self.problems, self.tokenizer = problems, tokenizer
        self.max_new_tokens = MAX_NEW_TOKENS[task]
        self.text = "\n\n".join(topics[name] for name in ("assert", "lambda", "import", "with"))
        self.pairs = [(prompt(p), f" {p.solution}{tokenizer.eos_token}") for p in problems]

    def losses(self, model: PreTrainedModel) -> dict[str, float]:
        """Return the mean loss of held-out solutions and of unrelated text, in nats per token."""
        return {
            "loss": completion_loss(model, self.tokenizer, self.pairs),
            "retention_loss": text_loss(model, self.tokenizer, self.text, tokens=RETENTION_TOKENS),
        }

    def run(self, model: PreTrainedModel, label: str) -> tuple[dict[str, Any], list[str]]:
        """Return all figures, and the model's answers; `label` is that of the progress bar."""
        prompts = [p for p, _ in self.pairs]
        answers = complete(model, self.tokenizer, prompts, self.max_new_tokens, progress=label)
        correct = sum(is_correct(a, p) for a, p in zip(answers, self.problems, strict=True))
        total = len(self.problems)
        figures = {**self.losses(model), "accuracy": correct / total, "correct": correct, "total": total}
        return figures, answers


class _Curve(TrainerCallback):
    """Held-out and retention loss during the run, on the problems of the evaluation."""

    def __init__(self, evaluation: _Evaluation, model: PreTrainedModel, every: int) -> None:
        self.evaluation, self.model, self.every = evaluation, model, every
        self.points: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.points.append(_point(state.global_step, self.evaluation.losses(self.model)))


def _point(step: int, figures: Mapping[str, Any]) -> dict[str, float]:
    return {"step": step, "loss": figures["loss"], "retention_loss": figures["retention_loss"]}


def _steps(trainer: LoPTSFTTrainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "seconds_per_step" in row]


def _training_log(trainer: LoPTSFTTrainer) -> list[dict[str, Any]]:
    blocks = range(1, len(trainer.lopt.blocks) + 1)
    return [
        {
            "step": row["step"],
            "loss": row["loss"],
            "local_loss": [v for b in blocks if (v := row.get(f"local_loss/block_{b}")) is not None],
            "gradient_share": [row.get(f"grad_share/block_{b}", 1.0) for b in blocks],
            "seconds": row["seconds_per_step"],
            "tokens_per_second": row["tokens_per_second"],
        }
        for row in _steps(trainer)
    ]


def _samples(problems: list[Problem], before: list[str], after: list[str]) -> list[dict[str, Any]]:
    """Return the first problems with their answers, whatever the outcome: a selection would flatter."""
    return [
        {
            "question": p.question,
            "reference": p.solution,
            "before": a.strip(),
            "after": z.strip(),
            "before_correct": is_correct(a, p),
            "after_correct": is_correct(z, p),
        }
        for p, a, z in zip(problems[:SAMPLES], before, after, strict=False)
    ]
