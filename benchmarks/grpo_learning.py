"""GRPO learns: the reward of a small model over a run, by method and seed.

A byte-level Llama of half a million parameters learns one-digit sums by SFT on a mixture: half of the
answers are worked out step by step, half are guesses. It goes on by GRPO with nothing but the
checker's verdict, from which it can learn that working a sum out pays. Every method starts from the
same weights and sees the same problems in the same order. It takes about half an hour on a CPU.

    python benchmarks/grpo_learning.py
"""

from __future__ import annotations

import gc
import math
import random
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lopt import LoPTConfig, LoPTGRPOTrainer, LoPTSFTTrainer
from lopt.data.procedural import Problem, train_and_held_out
from lopt.evaluation import complete
from lopt.reports.lines import line_plot
from lopt.reports.plots import standalone
from lopt.rewards import REWARDS
from lopt.rewards.answers import MARK
from lopt.trainers.config import LoPTGRPOConfig, LoPTSFTConfig
from small_model import byte_tokenizer, flags, keep

METHODS: dict[str, LoPTConfig] = {
    "e2e": LoPTConfig(method="e2e"),
    "lopt k=2": LoPTConfig(num_blocks=2),
    "lopt k=4": LoPTConfig(num_blocks=4),
    "frozen k=2": LoPTConfig(method="frozen", num_blocks=2),
}
TASK, GROUP, PROMPTS, LENGTH = "chain_sum", 8, 8, 32


def prompt(problem: Problem) -> str:
    """The sum alone, as in "4 - 1 - 7 =": a byte-level model need not read the sentence around it."""
    return problem.question.rpartition(": ")[2]


def terms(problem: Problem) -> int:
    """Numbers in the sum; three at most keep the answers short."""
    return len(problem.solution.splitlines())


def new_model(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=288, num_hidden_layers=4,
            num_attention_heads=3, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def common(steps: int, rate: float, seed: int) -> dict[str, Any]:
    return dict(
        output_dir=tempfile.mkdtemp(), max_steps=steps, learning_rate=rate, seed=seed, logging_steps=1,
        lr_scheduler_type="constant_with_warmup", warmup_steps=10, save_strategy="no", report_to="none",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip


def pre_warm(model: LlamaForCausalLM, tokenizer: Any, problems: list, steps: int) -> None:
    guess = random.Random(0)
    answers = [p.solution if i % 2 else f"{MARK} {guess.randint(-9, 27)}" for i, p in enumerate(problems)]
    rows = [{"prompt": prompt(p), "completion": f" {a}"} for p, a in zip(problems, answers, strict=True)]
    settings = common(steps, 2e-3, 0) | dict(per_device_train_batch_size=32, logging_steps=100)
    trainer = LoPTSFTTrainer(
        model,
        args=LoPTSFTConfig(**settings),
        lopt_config=LoPTConfig(method="e2e"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.lopt.detach()


def accuracy(model: Any, tokenizer: Any, problems: list) -> float:
    texts = complete(model, tokenizer, [prompt(p) for p in problems], max_new_tokens=LENGTH, batch_size=128)
    return mean(REWARDS["procedural"](None, texts, answer=[p.answer for p in problems]))


def run(
    model: Any, tokenizer: Any, config: LoPTConfig, data: tuple[list, list], args: Any, seed: int
) -> dict:
    train, held_out = data
    rows = [{"prompt": prompt(p), "answer": p.answer} for p in train]
    settings = common(args.steps, args.learning_rate, seed) | dict(
        per_device_train_batch_size=GROUP * PROMPTS, num_generations=GROUP, max_completion_length=LENGTH,
        loss_type="grpo", beta=0.0,
    )  # fmt: skip
    before = accuracy(model, tokenizer, held_out)
    trainer = LoPTGRPOTrainer(
        model,
        reward_funcs=REWARDS["procedural"],
        args=LoPTGRPOConfig(**settings),
        lopt_config=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    log = [row for row in trainer.state.log_history if "reward" in row]
    after = accuracy(trainer.model, tokenizer, held_out)
    return dict(
        reward=[row["reward"] for row in log],
        local_loss=[row.get("local_loss/block_1") for row in log],
        seconds_per_step=mean(row["seconds_per_step"] for row in log),
        held_out=(before, after),
    )


def gain(rewards: list[float]) -> tuple[float, float]:
    """Mean reward of the first and of the last fifth of the steps."""
    part = len(rewards) // 5
    return mean(rewards[:part]), mean(rewards[-part:])


def summarise(results: dict) -> None:
    """Rise of the reward over all seeds, with the 95 % interval of the mean (Student's t)."""
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}
    for name, runs in results["runs"].items():
        ends = [gain(r["reward"]) for r in runs.values()]
        rise = [b - a for a, b in ends]
        wide = t.get(len(rise), math.inf) * stdev(rise) / math.sqrt(len(rise)) if len(rise) > 1 else math.inf
        held = [mean(r["held_out"][i] for r in runs.values()) for i in (0, 1)]
        results["summary"][name] = dict(
            first_fifth=mean(a for a, _ in ends), last_fifth=mean(b for _, b in ends), rise=mean(rise),
            interval=wide, held_out_before=held[0], held_out_after=held[1],
        )  # fmt: skip
        print(f"{name:12}", {k: round(v, 3) for k, v in results["summary"][name].items()}, flush=True)


def draw(results: dict, path: Path, width: int = 10) -> None:
    curves = {}
    for name, runs in results["runs"].items():
        steps = list(zip(*(r["reward"] for r in runs.values()), strict=True))
        smooth = [mean(x for s in steps[max(0, i - width + 1) : i + 1] for x in s) for i in range(len(steps))]
        curves[name] = [(i + 1, y) for i, y in enumerate(smooth)]
    svg = line_plot(
        curves,
        title=f"Reward ({len(runs)} seeds, mean of {width} steps)",
        x_label="step",
        y_label="share of right answers",
        alt="Mean reward over the steps of GRPO by method; all rise",
    )
    path.write_text(standalone(svg) + "\n", encoding="utf-8")


def main() -> None:
    parser = flags(__doc__, "grpo_learning.json")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--warm_steps", type=int, default=900)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    args = parser.parse_args()

    tokenizer = byte_tokenizer()
    problems, kept = train_and_held_out(TASK, 3000, 600, seed=0)
    warm, held_out = ([p for p in part if terms(p) <= 3] for part in (problems, kept))
    start = new_model(tokenizer)
    pre_warm(start, tokenizer, warm, args.warm_steps)
    print("pre-warmed, held-out accuracy", accuracy(start, tokenizer, held_out), flush=True)
    results: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if k != "output"}
        | dict(group=GROUP, prompts=PROMPTS),
        "runs": {name: {} for name in args.methods},
        "summary": {},
    }
    for seed in args.seeds:
        for name in args.methods:
            model = new_model(tokenizer)  # no copy: TRL's forward of `start` would stay bound to `start`
            model.load_state_dict(start.state_dict())
            outcome = run(model, tokenizer, METHODS[name], (warm, held_out), args, seed)
            results["runs"][name][str(seed)] = outcome
            first, last = gain(outcome["reward"])
            print(f"{name} seed {seed}: reward {first:.3f} to {last:.3f}, held out {outcome['held_out']}, "
                  f"{outcome['seconds_per_step']:.2f} s a step", flush=True)  # fmt: skip
            keep(args.output, results)
            gc.collect()
    summarise(results)
    keep(args.output, results)
    draw(results, args.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
