"""Real accuracy: methods × seeds on a procedural task until it is learned, what is right and kept over steps.

Accuracy is of greedy answers to held-out problems. Kept: the loss of Python's documentation, and of rows
{question, answer} (`--retention_rows`). Several processes with one `--output` share the runs; started again,
what is missing is run.

    python benchmarks/accuracy.py --model smollm2-135m --output accuracy.json
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from transformers import TrainerCallback

from lopt import LoPTConfig, LoPTSFTTrainer
from lopt.cli.rows import retention_rows
from lopt.data.procedural import Problem, train_and_held_out
from lopt.evaluation.compare.arm_run import adapters
from lopt.evaluation.compare.arms import LORA_KEYS, Arm, parse_arms
from lopt.evaluation.compare.study import share
from lopt.evaluation.demo import MAX_NEW_TOKENS, TaskEvaluation, training_rows
from lopt.evaluation.loss import completion_loss
from lopt.files import read_json
from lopt.models.load import load_model, load_tokenizer, resolve_model
from lopt.trainers.config import LoPTSFTConfig
from small_model import RESULTS, keep

ARMS = [
    "lopt:num_blocks=2", "e2e", "frozen:num_blocks=2", "lora:learning_rate=2e-4", "frozen:num_blocks=4",
    "lopt:num_blocks=4", "lopt:num_blocks=4,aux_loss=predicted_gradient", "e2e:learning_rate=5e-6",
    "frozen:block_boundaries=10,frozen_top=10",
]  # fmt: skip
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


class Measures:
    """What is measured on a model in training."""

    def __init__(self, args: argparse.Namespace, tokenizer: Any, problems: list[Problem]) -> None:
        self.tokenizer, self.evaluation = tokenizer, TaskEvaluation(args.task, problems, tokenizer)
        self.rows = retention_rows(args.retention_rows, tokenizer, args.limit)

    def of(self, model: Any, step: int) -> dict[str, Any]:
        """Return accuracy, and losses in nats per token."""
        figures, _ = self.evaluation.run(model)
        found = {"step": step} | {key: figures[key] for key in ("accuracy", "loss", "retention_loss")}
        return found | {n: completion_loss(model, self.tokenizer, rows) for n, rows in self.rows.items()}


class Curve(TrainerCallback):
    """Measures every so many steps and after the last."""

    def __init__(self, measures: Measures, every: int, start: dict[str, Any]) -> None:
        self.measures, self.every, self.points = measures, every, [start]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.points.append(self.measures.of(model, state.global_step))


def run(args: argparse.Namespace, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
    """Train an arm with a seed, which chooses problems, their order and heads; return its curve."""
    gc.collect()  # the model before and its handle point at each other
    tokenizer, model = load_tokenizer(args.model), load_model(args.model)
    if args.device == "cuda":
        model = model.to("cuda")
    count = args.steps * args.batch_size
    train, held_out = train_and_held_out(args.task, count, args.held_out, seed)
    measures = Measures(args, tokenizer, held_out)
    start = measures.of(model, 0)
    rate = arm.changes.get("learning_rate", args.learning_rate)
    trainer = LoPTSFTTrainer(
        model,
        lopt_config=arm.config,
        args=LoPTSFTConfig(
            output_dir=str(folder / "runs"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=rate,
            warmup_steps=3,
            lr_scheduler_type="cosine",
            logging_steps=1,
            save_strategy="no",
            seed=seed,
            disable_tqdm=True,
            report_to="none",
            bf16=False,
            tf32=args.device == "cuda" or None,
            use_cpu=args.device == "cpu",
        ),
        train_dataset=training_rows(train),
        processing_class=tokenizer,
        peft_config=adapters(arm, LORA),
    )
    curve = Curve(measures, args.every, start)
    trainer.add_callback(curve)
    started = time.perf_counter()
    trainer.train()
    return {"arm": arm.name, "seed": seed, "curve": curve.points, "seconds": time.perf_counter() - started}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation over seeds, of every measure at every step, by arm."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(each["arm"] for each in runs):
        curves = [each["curve"] for each in runs if each["arm"] == name]
        rows = found[name] = []
        for points in zip(*curves, strict=True):
            row: dict[str, Any] = {"step": points[0]["step"]}
            for key in points[0]:
                values = [point[key] for point in points]
                spread = stdev(values) if len(values) > 1 else None
                row |= {} if key == "step" else {key: [mean(values), spread]}
            rows.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="chain_sum", choices=list(MAX_NEW_TOKENS))
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-5)
    parser.add_argument("--held_out", type=int, default=256)
    parser.add_argument("--retention_rows", nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--folder", help="of the runs (default: beside --output)")
    parser.add_argument("--output", default=str(RESULTS / "accuracy.json"))
    args = parser.parse_args()
    name, args.model = args.model, resolve_model(args.model)
    arms = parse_arms(args.arms, [], LoPTConfig(tied_embeddings="freeze"))
    if unknown := {key for arm in arms for key in arm.changes} - {"learning_rate", *LORA_KEYS}:
        raise ValueError(f"--arms: {', '.join(sorted(unknown))} cannot differ between arms here")
    folder = Path(args.folder or Path(args.output).with_suffix(""))
    settings = {k: v for k, v in vars(args).items() if k not in ("output", "folder", "retention_rows")}
    settings |= {"model": name, "retention_rows": [Path(file).name for file in args.retention_rows]}
    shared = {k: v for k, v in settings.items() if k not in ("arms", "seeds")}
    share({folder / "settings.json": lambda: shared})
    if read_json(folder / "settings.json") != shared:
        raise ValueError(f"{folder} has runs with other settings: choose another --folder")
    parts = {}
    for seed, arm in itertools.product(args.seeds, arms):
        path = folder / f"{arm.name.replace(' ', '_').replace('=', '')}-{seed}.json"
        parts[path] = functools.partial(run, args, arm, seed, folder)
    share(parts)
    runs = [read_json(path) for path in parts]
    keep(Path(args.output), {"settings": settings, "summary": summary(runs), "runs": runs})


if __name__ == "__main__":
    main()
