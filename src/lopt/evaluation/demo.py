"""The demo: a real model learns a procedural task by several methods; what each gained and what it kept.

Held-out problems of the task measure adaptation; a text that has nothing to do with it, Python's
own documentation (PSF licence, in every Python), measures retention. Every method starts from the same
weights and sees the same problems in the same order.
"""

from __future__ import annotations

import gc
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
        arms: the methods and their blocks, by name.
        steps, batch_size: optimizer steps of each, and problems in each step.
        learning_rate: of the last block.
        held_out: problems that are kept back for the evaluation.
    """

    model: str
    task: str
    arms: Mapping[str, LoPTConfig]
    steps: int
    batch_size: int
    learning_rate: float
    held_out: int
    seed: int
    trust_remote_code: bool = False

    def run(
        self,
        folder: Path,
        shown: Callable[[LoPTSFTTrainer], AbstractContextManager[Any]] = nullcontext,
    ) -> dict[str, Any]:
        """Evaluate, then train and evaluate by each method; writes `results.json`, which is returned.

        The model of the first method is saved in `model/`.

        Args:
            shown: makes the context in which a trainer trains, to show how it goes.
        """
        tokenizer = load_tokenizer(self.model, trust_remote_code=self.trust_remote_code)
        count = self.steps * self.batch_size
        train, held_out = train_and_held_out(self.task, count, self.held_out, self.seed)
        print(
            f"{self.model} learns {self.task} by {', '.join(self.arms)}: {self.steps} steps of "
            f"{self.batch_size} problems each, evaluated on {len(held_out)} others. "
            "Retention: loss on Python's documentation."
        )
        started = time.perf_counter()
        evaluation = TaskEvaluation(self.task, held_out, tokenizer)
        before: dict[str, Any] = {}
        answers: dict[str, list[str]] = {}
        arms: list[dict[str, Any]] = []
        for name, config in self.arms.items():
            trainer = self._trainer(config, tokenizer, train, folder)
            if not before:
                before, answers["before"] = evaluation.run(trainer.model, "Evaluation before")
            print(f"\n{name}", flush=True)
            curve = _Curve(evaluation, every=-(-self.steps // 2))
            trainer.add_callback(curve)
            with shown(trainer):
                trainer.train()
            after, answers[name] = evaluation.run(trainer.model, f"Evaluation of {name}")
            points = [_point(0, before), *curve.points, _point(self.steps, after)]
            if not arms:
                trainer.save_model(str(folder / "model"))
            arms.append({"name": name, **_facts(trainer), "after": after, "curve": points})
            del trainer, curve
            gc.collect()  # a model and its handle point at each other, and each is gigabytes
        results = {
            **self._setting(),
            "before": before,
            "arms": arms,
            "samples": _samples(held_out, answers),
            "total_seconds": time.perf_counter() - started,
        }
        write_json(folder / "results.json", results)
        return results

    def _trainer(
        self,
        config: LoPTConfig,
        tokenizer: PreTrainedTokenizerBase,
        problems: list[Problem],
        folder: Path,
    ) -> LoPTSFTTrainer:
        return LoPTSFTTrainer(
            load_model(self.model, trust_remote_code=self.trust_remote_code),
            # The shared embedding is 168 of the packaged model's 268 million parameters: freezing it saves
            # a third of a step's time (docs/experiments.md).
            lopt_config=config.replace(tied_embeddings="freeze"),
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
            train_dataset=training_rows(problems),
            processing_class=tokenizer,
        )

    def _setting(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key != "arms"}
        return {
            "title": "LoPT demo",
            "date": date.today().isoformat(),
            "model": self.model,
            "task": self.task,
            "settings": own,
            "versions": versions(("lopt", "torch", "transformers", "trl", "reasoning-gym")),
            "device": device(),
        }


def _facts(trainer: LoPTSFTTrainer) -> dict[str, Any]:
    """Return what a run was and what it took."""
    config, peak = trainer.lopt.config, trainer.throughput.peak
    return {
        "method": config.method,
        "config": config.changed() | {"lr_k1": config.early_learning_rate(trainer.args.learning_rate)},
        "blocks": [f"layers {b.start}-{b.stop - 1}" for b in trainer.lopt.blocks],
        "head_warmup": [
            {"step": i, "local_loss": row} for i, row in enumerate(trainer.head_warmup_history, start=1)
        ],
        "train": _training_log(trainer),
        "memory": asdict(peak) if peak is not None else {},
        "seconds_per_step": median_high(row["seconds_per_step"] for row in _steps(trainer)),
    }


def training_rows(problems: list[Problem]) -> Dataset:
    """Return problems as rows to train on, in their order."""
    return Dataset.from_list([{"prompt": prompt(p), "completion": f" {p.solution}"} for p in problems])


class TaskEvaluation:
    """Held-out loss, exact answers and retention of a model.

    Args:
        task: a key of `MAX_NEW_TOKENS`.
        problems: held out, of that task.
    """

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

    def run(self, model: PreTrainedModel, label: str | None = None) -> tuple[dict[str, Any], list[str]]:
        """Return all figures, and the model's answers; `label` is that of the progress bar, if any."""
        prompts = [p for p, _ in self.pairs]
        answers = complete(model, self.tokenizer, prompts, self.max_new_tokens, progress=label)
        correct = sum(is_correct(a, p) for a, p in zip(answers, self.problems, strict=True))
        total = len(self.problems)
        figures = {**self.losses(model), "accuracy": correct / total, "correct": correct, "total": total}
        return figures, answers


class _Curve(TrainerCallback):
    """Held-out and retention loss during the run, on the problems of the evaluation."""

    def __init__(self, evaluation: TaskEvaluation, every: int) -> None:
        self.evaluation, self.every = evaluation, every
        self.points: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.points.append(_point(state.global_step, self.evaluation.losses(model)))


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


def _samples(problems: list[Problem], answers: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """Return the first problems with their answers, whatever the outcome: a selection would flatter."""
    return [
        {
            "question": p.question,
            "reference": p.solution,
            "answers": [
                {"by": name, "text": texts[index].strip(), "correct": is_correct(texts[index], p)}
                for name, texts in answers.items()
            ],
        }
        for index, p in enumerate(problems[:SAMPLES])
    ]
