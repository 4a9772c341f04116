"""The demo: a real model learns a procedural task by LoPT; what it gained and what it kept.

Held-out problems of the task measure adaptation; a text that has nothing to do with it, Python's
own documentation (PSF licence, in every Python), measures retention.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from lopt.core.config import LoPTConfig
from lopt.data.procedural import Problem, is_correct, prompt, train_and_held_out
from lopt.evaluation import complete, completion_loss, text_loss
from lopt.files import write_text
from lopt.instruments.memory import format_bytes
from lopt.models.load import load_model, load_tokenizer
from lopt.reliability.provenance import device, versions
from lopt.reports.demo import write_demo_report
from lopt.reports.page import clean
from lopt.trainers import LoPTSFTTrainer
from lopt.trainers.config import LoPTSFTConfig

if TYPE_CHECKING:
    from lopt.cli.arguments import DemoArguments

RETENTION_TOKENS = 1024
MAX_NEW_TOKENS = {"chain_sum": 56, "gsm_symbolic": 200}
SAMPLES = 3


def run_demo(args: DemoArguments) -> dict[str, Any]:
    """Measure, train, measure again, save `results.json`, `report.html` and the model."""
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    model = load_model(args.model, trust_remote_code=args.trust_remote_code)
    train, held_out = train_and_held_out(args.task, args.steps * args.batch_size, args.held_out, args.seed)
    print(
        f"{args.model} learns {args.task} by {args.method}: {args.steps} steps of {args.batch_size} "
        f"problems, examined on {len(held_out)} others. Retention: loss on Python's documentation."
    )
    started = time.perf_counter()
    exam = _Exam(args.task, held_out, tokenizer)
    before, answers_before = exam.sit(model, "Examination before")
    trainer = _trainer(args, model, tokenizer, train)
    watch = _Watch(exam, model, every=-(-args.steps // 3))
    trainer.add_callback(watch)
    trainer.train()
    after, answers_after = exam.sit(model, "Examination after ")
    seconds = time.perf_counter() - started

    folder = Path(args.output_dir)
    results = {
        **_facts(args, trainer, model),
        "before": before,
        "after": after,
        "samples": _samples(held_out, answers_before, answers_after),
        "train": _training_log(trainer),
        "curve": [_point(0, before), *watch.points, _point(args.steps, after)],
        "total_seconds": seconds,
    }
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    trainer.save_model(str(folder / "model"))
    _print_summary(results, write_demo_report(results, folder), folder)
    return results


class _Exam:
    """Held-out loss, exact answers and retention of a model."""

    def __init__(self, task: str, problems: list[Problem], tokenizer: PreTrainedTokenizerBase) -> None:
        from pydoc_data.topics import topics

        self.problems, self.tokenizer = problems, tokenizer
        self.max_new_tokens = MAX_NEW_TOKENS[task]
        self.text = "\n\n".join(topics[name] for name in ("assert", "lambda", "import", "with"))
        self.pairs = [(prompt(p), f" {p.solution}{tokenizer.eos_token}") for p in problems]

    def losses(self, model: PreTrainedModel) -> dict[str, float]:
        """Mean loss of held-out solutions and of unrelated text, in nats per token."""
        return {
            "loss": completion_loss(model, self.tokenizer, self.pairs),
            "retention_loss": text_loss(model, self.tokenizer, self.text, tokens=RETENTION_TOKENS),
        }

    def sit(self, model: PreTrainedModel, label: str) -> tuple[dict[str, Any], list[str]]:
        """All figures, and the model's answers."""
        prompts = [p for p, _ in self.pairs]
        answers = complete(model, self.tokenizer, prompts, self.max_new_tokens, progress=label)
        correct = sum(is_correct(a, p) for a, p in zip(answers, self.problems, strict=True))
        total = len(self.problems)
        return {
            **self.losses(model),
            "accuracy": correct / total,
            "correct": correct,
            "total": total,
        }, answers


class _Watch(TrainerCallback):
    """Held-out and retention loss during the run, on the problems of the examination."""

    def __init__(self, exam: _Exam, model: PreTrainedModel, every: int) -> None:
        self.exam, self.model, self.every = exam, model, every
        self.points: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.points.append(_point(state.global_step, self.exam.losses(self.model)))


def _point(step: int, figures: dict[str, Any]) -> dict[str, float]:
    return {"step": step, "loss": figures["loss"], "retention_loss": figures["retention_loss"]}


def _trainer(
    args: DemoArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]
) -> LoPTSFTTrainer:
    rows = Dataset.from_list([{"prompt": prompt(p), "completion": f" {p.solution}"} for p in problems])
    return LoPTSFTTrainer(
        model,
        # The shared embedding is 168 of the packaged model's 268 million parameters: to keep it as
        # it is saves a third of a step (docs/experiments.md).
        lopt_config=LoPTConfig(method=args.method, num_blocks=args.num_blocks, tied_embeddings="freeze"),
        args=LoPTSFTConfig(
            output_dir=args.output_dir,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=max(1, args.steps // 20),
            lr_scheduler_type="cosine",
            logging_steps=1,
            save_strategy="no",
            seed=args.seed,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def _facts(args: DemoArguments, trainer: LoPTSFTTrainer, model: PreTrainedModel) -> dict[str, Any]:
    config = trainer.lopt.config
    peak = trainer.throughput.peak
    rates = [row["seconds_per_step"] for row in trainer.state.log_history if "seconds_per_step" in row]
    return {
        "title": "LoPT demo",
        "date": date.today().isoformat(),
        "model": args.model,
        "task": args.task,
        "method": config.method,
        "num_blocks": len(trainer.lopt.blocks),
        "blocks": [f"layers {b.start}-{b.stop - 1}" for b in trainer.lopt.blocks],
        "settings": {
            **{k: v for k, v in asdict(args).items() if k not in ("output_dir", "overwrite_output_dir")},
            **{k: v for k, v in asdict(config).items() if k not in ("method", "num_blocks")},
            "lr_k1": config.early_learning_rate(args.learning_rate),
        },
        "versions": versions(("lopt", "torch", "transformers", "trl", "reasoning-gym")),
        "device": device(),
        "head_warmup": [
            {"step": i, "local_loss": row} for i, row in enumerate(trainer.head_warmup_history, start=1)
        ],
        "memory": asdict(peak) if peak is not None else {},
        "seconds_per_step": sorted(rates)[len(rates) // 2],
    }


def _training_log(trainer: LoPTSFTTrainer) -> list[dict[str, Any]]:
    k = len(trainer.lopt.blocks)
    rows = []
    for row in trainer.state.log_history:
        if "seconds_per_step" not in row:
            continue
        rows.append(
            {
                "step": row["step"],
                "loss": row["loss"],
                "local_loss": [
                    row[f"local_loss/block_{b}"] for b in range(1, k) if f"local_loss/block_{b}" in row
                ],
                "gradient_share": [row.get(f"grad_share/block_{b}", 1.0) for b in range(1, k + 1)],
                "seconds": row["seconds_per_step"],
                "tokens_per_second": row["tokens_per_second"],
            }
        )
    return rows


def _samples(problems: list[Problem], before: list[str], after: list[str]) -> list[dict[str, Any]]:
    """The first problems, whatever came of them: a choice would flatter."""
    rows = zip(problems[:SAMPLES], before, after, strict=False)
    return [
        {
            "question": p.question,
            "reference": p.solution,
            "before": a.strip(),
            "after": z.strip(),
            "before_correct": is_correct(a, p),
            "after_correct": is_correct(z, p),
        }
        for p, a, z in rows
    ]


def _print_summary(results: dict[str, Any], report: Path, folder: Path) -> None:
    before, after = results["before"], results["after"]
    for sample in results["samples"]:
        print(f"\n{sample['question']}\n  before: {_short(sample['before'])}")
        print(f"  after:  {_short(sample['after'])}")
    print("\n                              before    after")
    print(f"held-out loss               {before['loss']:8.3f} {after['loss']:8.3f}")
    exact = [f"{r['correct']}/{r['total']}" for r in (before, after)]
    print(f"held-out exact answers      {exact[0]:>8} {exact[1]:>8}")
    print(f"retention loss              {before['retention_loss']:8.3f} {after['retention_loss']:8.3f}")
    if results["memory"]:
        print(f"peak of live bytes          {format_bytes(sum(results['memory'].values())):>17}")
    print(f"seconds per step (median)   {results['seconds_per_step']:17.2f}")
    print(f"seconds in all              {results['total_seconds']:17.0f}")
    print(f"\nReport: {report}\nFigures: {folder / 'results.json'}\nModel: {folder / 'model'}")


def _short(text: str) -> str:
    line = clean(" | ".join(text.splitlines()))  # a model's words give no command to a terminal
    return line if len(line) <= 100 else line[:97] + "..."
