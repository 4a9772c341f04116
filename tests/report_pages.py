"""One page of every kind from known data; `hurt` replaces every text in it that is not ours."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

from evaluation.test_retention import made
from lopt.evaluation.drift import Drift, LayerDrift
from lopt.reports.compare import write_report
from lopt.reports.demo import write_demo_report
from lopt.reports.drift import drift_page
from lopt.reports.eval import write_retention
from lopt.reports.retention import write_curves
from lopt.reports.run import write_run_page
from lopt.reports.run_data import RunData
from lopt.reports.runs import write_runs_page

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
Hurt = Callable[[str], str]


def demo(folder: Path, hurt: Hurt = str) -> Path:
    found = json.loads((RESULTS / "demo.json").read_text())
    for key in ("title", "model", "task", "device", "date"):
        found[key] = hurt(found[key])
    for arm in found["arms"]:
        arm |= {key: hurt(arm[key]) for key in ("name", "method")}
        arm["blocks"] = [hurt(name) for name in arm["blocks"]]
        for key in ("config", "memory"):
            arm[key] = {hurt(name): value for name, value in arm[key].items()}
    for key in ("settings", "versions"):
        found[key] = {hurt(name): hurt(str(value)) for name, value in found[key].items()}
    for sample in found["samples"]:
        sample |= {name: hurt(sample[name]) for name in ("question", "reference")}
        for answer in sample["answers"]:
            answer |= {name: hurt(answer[name]) for name in ("by", "text")}
    return write_demo_report(found, folder)


def compare(folder: Path, hurt: Hurt = str) -> Path:
    text = (RESULTS / "compare_gsm8k.json").read_text()
    found = json.loads(text)
    names = [*found["arms"], *found["base"]["items"], found["setting"]["model"], found["cells"][0]["device"]]
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(json.dumps(name), json.dumps(hurt(name)))
    found = json.loads(text)
    found["setting"] |= {hurt("a setting"): {hurt("inner"): [hurt("value")]}}
    return write_report(found, folder)


def evaluation(folder: Path, hurt: Hurt = str) -> Path:
    tasks = {hurt(f"a_task_with_a_rather_long_name_{i}"): [1.0, 0.0] * 20 for i in range(12)}
    tasks[f"text:{hurt('notes')}"] = [1.0, 2.0] * 20
    tuned = {name: [0.0, 1.0, 1.0, 1.0] * 10 for name in tasks}
    asked = [(hurt("Question?"), hurt(" no")), (hurt("Question?"), hurt(" yes"))]
    answers = {"arguments": asked, "target": "1", "doc": {hurt("key"): hurt("value")}}
    models = {hurt("base"): made(tasks, **answers), hurt("a-model-with-a-name"): made(tuned, **answers)}
    models[hurt("other")] = made(tuned, doc_hash="another", **answers)
    write_retention(folder, hurt("base"), models)
    return folder / "report.html"


def probe(folder: Path, hurt: Hurt = str) -> Path:
    layers = [LayerDrift(hurt(f"layer {i}"), *(0.1 * i,) * 9) for i in range(30)]
    weights = {name: 0.01 for name in (*(layer.name for layer in layers), "block 1", "all", hurt("head"))}
    names = ("mine", "a-model-with-a-name")
    drifts = {hurt(name): Drift(layers, weights, [at], 1024) for at, name in enumerate(names, start=14)}
    path = folder / "report.html"
    facts = {hurt("tokens"): hurt("1024"), "base": "x" * 90}
    path.write_text(drift_page(drifts, hurt("base"), [hurt("notes")], facts), encoding="utf-8")
    return path


def retention(folder: Path, hurt: Hurt = str) -> Path:
    loss, task = f"retention/{hurt('notes')}_loss", f"retention/{hurt('arc')}_acc"
    rows = [{"step": i, loss: 2 + i / 9, "retention/change": i / 9, task: 0.5} for i in range(9)]
    write_curves(rows, folder, stopped=hurt("stopped"))
    ET.parse(folder / "retention.svg")
    return folder / "retention.html"


def run_data(hurt: Hurt, name: str) -> RunData:
    log = {"loss": 3.0, "eval_loss": 2.5, "reward": 0.5, "learning_rate": 2e-5, "grad_norm": 1e3}
    log |= {"local_loss/block_1": 1e5, "local_loss/block_2": 1e-3, "grad_share/block_1": 0.2}
    log |= {"tokens_per_second": 1e4, "peak_memory_gib": 3.2, f"retention/{hurt('notes')}_loss": 2.0}
    history = [{"step": i, **{key: value / (1 + i / 100) for key, value in log.items()}} for i in range(400)]
    blocks = [{"start": 6 * i, "stop": 6 * i + 6, "learns": hurt("recon loss")} for i in range(3)]
    facts = {
        "model": hurt("model"), "architecture": hurt("Llama"), "dtype": hurt("float32"),
        "parameters": 268_098_176, "trained": 100_326_016, "method": "lopt",
        "blocks": blocks, "steps": 500, "rows": 1000, "cut": 3,
        "max_length": 1024, "lengths": {"width": 50, "counts": [i % 7 for i in range(24)], "longest": 1199},
    }  # fmt: skip
    answers = [{"completion": hurt("an answer " * 20), "reward": 0.5}] * 3
    data = {
        "command": hurt("grpo"), "facts": facts, "warnings": {hurt("a warning"): 2},
        "memory": {hurt("optimizer"): 2**30}, "head_warmup": [[1.0, 2.0], [0.5, 1.0]],
        "changed": {hurt("flag"): [hurt("value")]}, "seconds": 12.0,
        "samples": {"first": {"step": 1, "prompt": hurt("Question?"), "completions": answers}},
    }  # fmt: skip
    attempt = {"date": hurt("2026-01-01"), "command": hurt("lopt grpo --output_dir /a/long/path"),
               "resumed_from": f"{hurt('out')}/checkpoint-200", "environment": {hurt("device"): hurt("CPU")},
               "versions": {hurt("torch"): hurt("2.13.0")}}  # fmt: skip
    settings = {hurt("learning_rate"): hurt(name)}
    return RunData(hurt(name), history, data, {"settings": settings, "attempts": [attempt]})


def run(folder: Path, hurt: Hurt = str) -> Path:
    return write_run_page(folder, run_data(hurt, "a-run"))


def runs(folder: Path, hurt: Hurt = str) -> Path:
    return write_runs_page(folder, [run_data(hurt, "a-run"), run_data(hurt, "a-run-with-a-longer-name")])


PAGES = [demo, compare, evaluation, probe, retention, run, runs]
