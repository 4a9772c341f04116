"""How often must earlier blocks learn? SFT on GSM8K with `local_every` = N, up to never.

The run of `cold_start.py` with its defaults (AdamW at 2e-5, batch 8, float32, loss on the answer only),
but earlier blocks learn on every N-th optimizer step: 1, 4, 16 or never, which is `frozen`. A seed draws
the heads and the order of the rows; runs of one seed see the same rows in the same order, after the same
head warm-up. Held out: GSM8K answers (adaptation), ARC questions and HellaSwag text (retention).

The results are written after every run, and runs that are there already are not repeated.

    python benchmarks/local_every.py --model PATH --data_dir ../shared/data
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from collections.abc import Iterable
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from statistics import mean, median, stdev

from transformers import AutoTokenizer

import cold_start
from lopt import LoPT, LoPTConfig
from lopt.reports.lines import line_plot
from lopt.reports.plots import standalone
from small_model import keep

EVERY = (1, 4, 16)
RUNS: dict[str, dict] = {"e2e": dict(method="e2e")}
for blocks in (2, 4):
    RUNS |= {f"N={every} k={blocks}": dict(num_blocks=blocks, local_every=every) for every in EVERY}
    RUNS[f"frozen k={blocks}"] = dict(method="frozen", num_blocks=blocks)
TEXTS = ("gsm8k", "arc", "hellaswag")


def held_out_rows(tokenizer, args: argparse.Namespace) -> dict[str, list]:
    """Batches of GSM8K questions with answers, ARC questions, HellaSwag text with the right ending."""
    folder = args.data_dir
    gsm8k = cold_start.questions(folder / "gsm8k/test.jsonl", args.rows, tokenizer, args.max_tokens)
    arc = cold_start.read(folder / "arc_challenge/test.jsonl", args.rows)
    hellaswag = cold_start.read(folder / "hellaswag/validation_detagged.jsonl", args.rows)
    texts = [f"{row['ctx']} {row['endings'][int(row['label'])]}" for row in hellaswag]
    pairs = (gsm8k, [("", row["question"]) for row in arc], [("", text) for text in texts])
    return {name: cold_start.encode(tokenizer, rows) for name, rows in zip(TEXTS, pairs, strict=True)}


def evaluate(model, held_out: dict[str, list]) -> dict[str, float]:
    return {name: cold_start.held_out(model, batches) for name, batches in held_out.items()}


def before(args: argparse.Namespace, held_out: dict[str, list]) -> dict[str, float]:
    """The losses of the model as it comes, which all runs share."""
    return evaluate(cold_start.start(LoPTConfig(num_blocks=1), args.model)[0], held_out)


def warm_up(handle: LoPT, batches: list, known: dict) -> dict:
    """The head warm-up of cold_start, once for all runs that share it."""
    if "heads" not in known:
        known["record"] = cold_start.warm_up(handle, batches)
        known["heads"] = {name: value.clone() for name, value in handle.heads.state_dict().items()}
    handle.heads.load_state_dict(known["heads"])
    return known["record"]


def run(name: str, seed: int, args: argparse.Namespace, rows: list, held_out: dict, warm: dict) -> dict:
    """One run: its settings, the held-out losses after it, and what every step recorded."""
    order = random.Random(seed).sample(rows, len(rows))
    batches = cold_start.encode(args.tokenizer, order)
    config = LoPTConfig(**RUNS[name])
    model, handle = cold_start.start(config, args.model, seed)
    record = []
    if handle.heads:
        record.append(warm_up(handle, batches, warm.setdefault((config.num_blocks, seed), {})))
    for row in cold_start.learn(model, handle, args, dict(train=batches)):
        if "loss" in row:
            record.append(row)
            print(name, "seed", seed, json.dumps(row)[:200], flush=True)
    return dict(config=RUNS[name], seed=seed, after=evaluate(model, held_out), record=record)


def step_seconds(runs: Iterable[dict]) -> tuple[float, float]:
    """A learning and a resting step, from the learning steps that a resting one follows, and those.

    Neighbours are slowed alike by other work on the machine, hence the median of their ratios. The
    first step, which also makes the optimizer's state, is left out.
    """
    steps = [[row for row in r["record"] if row.get("step", 0) > 1] for r in runs]
    pairs = [(a, b) for rows in steps for a, b in pairwise(rows) if a["local"] and not b["local"]]
    if not pairs:
        return nan, nan
    resting = median(b["seconds"] for _, b in pairs)
    return resting * median(a["seconds"] / b["seconds"] for a, b in pairs), resting


def seconds(name: str, runs: dict[str, dict]) -> float:
    """Seconds per step, averaged over the N steps of a cycle; frozen blocks rest in every step."""
    config = RUNS[name]
    if config.get("method") == "e2e":
        return median(
            row["seconds"] for r in by_name(runs)[name].values() for row in r["record"] if "loss" in row
        )
    learning, resting = step_seconds(
        r for r in runs.values() if r["config"].get("num_blocks") == config["num_blocks"]
    )
    return resting + (learning - resting) / config.get("local_every", inf)


def spread(values: list[float], digits: int = 4) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def by_name(runs: dict[str, dict]) -> dict[str, dict[int, dict]]:
    """Finished runs by name and seed, in the order of RUNS."""
    table: dict[str, dict[int, dict]] = {name: {} for name in RUNS}
    for key, result in runs.items():
        table[key.rpartition(" seed ")[0]][result["seed"]] = result
    return {name: seeds for name, seeds in table.items() if seeds}


def summarise(results: dict) -> None:
    """Print losses over seeds, and how far they are from those of frozen early blocks of the same seed."""
    table = by_name(results["runs"])
    rows: list[tuple[str, list[dict]]] = [("before", [results["before"]])]
    for name, seeds in table.items():
        rows.append((name, [r["after"] for r in seeds.values()]))
        frozen = table.get(f"frozen k={RUNS[name].get('num_blocks')}", {})
        if not name.startswith("frozen") and seeds.keys() & frozen.keys():
            rows.append(("  over frozen", [over(r, frozen[s]) for s, r in seeds.items() if s in frozen]))
    print(f"{'':14}", *(f"{text:>18}" for text in TEXTS))
    for label, losses in rows:
        print(f"{label:14}", *(f"{spread([loss[text] for loss in losses]):>18}" for text in TEXTS))
    print("seconds a step:", *(f"{name} {seconds(name, results['runs']):.1f};" for name in table))


def over(result: dict, reference: dict) -> dict[str, float]:
    return {text: result["after"][text] - reference["after"][text] for text in TEXTS}


def curve(seeds: list[dict], pace: float, window: int = 5) -> list[tuple[float, float]]:
    """Training loss, averaged over seeds and `window` steps, against seconds of training at `pace` a step."""
    losses = [[row["loss"] for row in r["record"] if "loss" in row] for r in seeds]
    means = [mean(step) for step in zip(*losses, strict=True)]
    return [(n * pace, mean(means[n - window : n])) for n in range(window, len(means) + 1)]


def draw(results: dict, picture: Path) -> None:
    """Training loss over time for k = 2, with the same seeds in every curve."""
    table = {name: seeds for name, seeds in by_name(results["runs"]).items() if name.endswith("k=2")}
    if not table:
        return
    shared = set.intersection(*(set(seeds) for seeds in table.values()))
    curves = {
        name.removesuffix(" k=2"): curve([seeds[s] for s in shared], seconds(name, results["runs"]))
        for name, seeds in table.items()
    }
    svg = line_plot(
        curves,
        title="Training loss on GSM8K over time, k = 2",
        x_label="seconds of training",
        y_label="nats per token, mean of 5 steps",
        alt="Training loss over time: the same curve for every N, run through faster the larger N is",
    )
    picture.write_text(standalone(svg) + "\n", encoding="utf-8")


def main() -> None:
    parser = cold_start.study_flags(__doc__, "gsm8k/, arc_challenge/, hellaswag/", "local_every.json")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=33, help="33: the first has learning rate 0")
    parser.add_argument("--rows", type=int, default=32, help="held-out rows of each kind")
    args = parser.parse_args()
    args.eval_every = args.steps

    args.tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = cold_start.questions(args.data_dir / "gsm8k/train.jsonl", 8 * 64, args.tokenizer, args.max_tokens)
    held_out = held_out_rows(args.tokenizer, args)
    results = json.loads(args.output.read_text()) if args.output.exists() else {"runs": {}}
    warm: dict[tuple[int, int], dict] = {}
    for seed in args.seeds:
        for name in args.runs:
            if f"{name} seed {seed}" in results["runs"]:
                continue
            results.setdefault("before", None)
            results["before"] = results["before"] or before(args, held_out)
            results["runs"][f"{name} seed {seed}"] = run(name, seed, args, rows, held_out, warm)
            results |= cold_start.setting(args)
            keep(args.output, results)
            gc.collect()  # a model and its handle point at each other, and each is gigabytes
    summarise(results)
    draw(results, args.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
