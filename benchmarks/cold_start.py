"""A cold start must not harm: the first steps of SFT on GSM8K, by method and number of blocks.

Full-parameter AdamW at 2e-5 with warm-up and decay, batch 8, float32, loss on the answer only. Every
run sees the same rows (those of at most --max_tokens, for the sake of a CPU) in the same order. Before
and after: the loss on held-out GSM8K answers and on ARC questions, which have nothing to do with them.

    python benchmarks/cold_start.py --model PATH --data_dir ../shared/data
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from lopt import LoPT, LoPTConfig, attach
from lopt.engine.clipping import clip_gradients
from lopt.reports.lines import line_plot
from lopt.reports.plots import standalone
from small_model import flags, keep

RUNS: dict[str, dict] = {
    "e2e": dict(method="e2e"),
    "published k=2": dict(num_blocks=2, lr_k1=2e-5, head_warmup_steps=0, clip="global"),
    **{f"frozen k={k}": dict(method="frozen", num_blocks=k) for k in (2, 3, 4)},
    **{f"lopt k={k}": dict(num_blocks=k) for k in (2, 3, 4)},
}
BATCH, LEARNING_RATE = 8, 2e-5


def read(path: Path, count: int) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def encode(tokenizer, pairs: list[tuple[str, str]]) -> list[dict[str, torch.Tensor]]:
    """Batches of (B, T) token ids, masks and labels; the prompt of each pair is not a label."""
    batches = []
    for start in range(0, len(pairs), BATCH):
        rows = []
        for prompt, completion in pairs[start : start + BATCH]:
            left = tokenizer(prompt)["input_ids"]
            right = tokenizer(completion, add_special_tokens=False)["input_ids"]
            rows.append((left + right, [-100] * len(left) + right))
        width = max(len(ids) for ids, _ in rows)
        pad = [(ids + [0] * (width - len(ids)), labels + [-100] * (width - len(ids))) for ids, labels in rows]
        mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]
        batches.append(
            dict(
                input_ids=torch.tensor([ids for ids, _ in pad]),
                labels=torch.tensor([labels for _, labels in pad]),
                attention_mask=torch.tensor(mask),
            )
        )
    return batches


def questions(path: Path, count: int, tokenizer, max_tokens: int) -> list[tuple[str, str]]:
    """The first `count` GSM8K rows that are short enough, as prompt and completion."""
    rows = [
        (f"Question: {r['question']}\nAnswer:", f" {r['answer']}{tokenizer.eos_token}")
        for r in read(path, 5000)
    ]
    return [(p, c) for p, c in rows if len(tokenizer(p + c)["input_ids"]) <= max_tokens][:count]


def task_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the labels; logits only where there is one."""
    hidden = model.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).last_hidden_state
    labels = batch["labels"][:, 1:]
    where = labels != -100
    return cross_entropy(model.lm_head(hidden[:, :-1][where]).float(), labels[where])


@torch.no_grad()
def held_out(model, batches) -> float:
    losses = [(task_loss(model, b).item(), (b["labels"][:, 1:] != -100).sum().item()) for b in batches]
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


def start(config: LoPTConfig, path: str, seed: int = 0) -> tuple[torch.nn.Module, LoPT]:
    """The model in training mode, cut as configured; `seed` draws its heads."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    return model, attach(model, config)


def warm_up(handle: LoPT, batches: list) -> dict:
    """Warm the heads up; returns a thinned record of their losses and the time it took."""
    started = time.perf_counter()
    warmup = handle.warm_up_heads(batches)
    seconds = time.perf_counter() - started
    return dict(head_warmup=warmup[:: max(1, len(warmup) // 20)], head_warmup_seconds=seconds)


def learn(
    model: torch.nn.Module, handle: LoPT, args: argparse.Namespace, data: dict[str, list]
) -> Iterator[dict]:
    """The steps over `data["train"]`; everything else in `data` is held out and evaluated."""
    optimizer = torch.optim.AdamW(handle.parameter_groups(LEARNING_RATE), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 3, args.schedule_steps)
    for step in range(args.steps + 1):
        if step % args.eval_every == 0 or step == args.steps:
            losses = {name: held_out(model, batches) for name, batches in data.items() if name != "train"}
            yield dict(step=step, **losses)
        if step == args.steps:
            return
        handle.learns_locally = step % handle.config.local_every == 0
        started = time.perf_counter()
        loss = task_loss(model, data["train"][step])
        loss.backward()
        norms = clip_gradients(handle, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        local = [x.item() for x in handle.local_losses()]
        seconds = time.perf_counter() - started
        yield dict(step=step + 1, loss=loss.item(), local=local, norms=norms.tolist(), seconds=seconds)


def train(name: str, args: argparse.Namespace, data: dict[str, list]) -> Iterator[dict]:
    model, handle = start(LoPTConfig(**{**RUNS[name], **json.loads(args.override)}), args.model)
    yield warm_up(handle, data["train"])
    yield from learn(model, handle, args, data)


def setting(args: argparse.Namespace) -> dict:
    """Return the settings that a result depends on, in words."""
    rows = f"rows of at most {args.max_tokens} tokens, batch {BATCH}, {args.steps} steps, AdamW 2e-5"
    return dict(settings=rows)


def summarise(runs: dict[str, dict], picture: Path) -> None:
    """Print the table of docs/experiments.md and draw the curves for k = 2."""
    print(f"{'run':16} {'training, last 5':>18} {'GSM8K':>8} {'ARC':>8}")
    for name, run in runs.items():
        steps = [row for row in run["record"] if "loss" in row]
        end = [row for row in run["record"] if "gsm8k" in row][-1]
        last = sum(row["loss"] for row in steps[-5:]) / 5
        print(f"{name:16} {last:18.3f} {end['gsm8k']:8.3f} {end['arc']:8.3f}")
    shown = {name: run for name, run in runs.items() if "k=" not in name or "k=2" in name}
    curves = {
        name: [(row["step"], row["loss"]) for row in run["record"] if "loss" in row]
        for name, run in shown.items()
    }
    alt = "Training loss over the first steps by method; the published start does not come down"
    svg = line_plot(curves, title="Training loss, GSM8K", x_label="step", y_label="nats per token", alt=alt)
    picture.write_text(standalone(svg) + "\n", encoding="utf-8")


def study_flags(description: str | None, data: str, results: str) -> argparse.ArgumentParser:
    """Return a parser with the flags for the model and the data that a study of the cold start needs."""
    parser = flags(description, results)
    parser.add_argument(
        "--model", required=True, help="folder of a causal LM, e.g. the packaged Gemma 3 270M"
    )
    parser.add_argument("--data_dir", type=Path, required=True, help=f"holds {data}")
    parser.add_argument("--schedule_steps", type=int, default=50, help="length of the learning-rate schedule")
    parser.add_argument("--max_tokens", type=int, default=128, help="leave out longer rows of GSM8K")
    return parser


def main() -> None:
    parser = study_flags(__doc__, "gsm8k/ and arc_challenge/", "cold_start.json")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eval_every", type=int, default=20)
    parser.add_argument("--override", default="{}", help="JSON with LoPTConfig fields for every run")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    qa = questions(args.data_dir / "gsm8k/train.jsonl", 8 * 64, tokenizer, args.max_tokens)
    test = questions(args.data_dir / "gsm8k/test.jsonl", 32, tokenizer, args.max_tokens)
    arc = [("", r["question"]) for r in read(args.data_dir / "arc_challenge/test.jsonl", 32)]
    data = dict(train=encode(tokenizer, qa), gsm8k=encode(tokenizer, test), arc=encode(tokenizer, arc))

    results = json.loads(args.output.read_text()) if args.output.exists() else {"runs": {}}
    results |= setting(args)
    for name in args.runs:
        record: list[dict] = []
        for row in train(name, args, data):
            record.append(row)
            print(name, json.dumps(row)[:200], flush=True)
        results["runs"][name] = {"config": RUNS[name] | json.loads(args.override), "record": record}
        keep(args.output, results)
        gc.collect()  # a model and its handle point at each other, and each is gigabytes
    summarise(results["runs"], args.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
