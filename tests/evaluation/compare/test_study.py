"""A whole comparison by the command line: what it writes, that it goes on, that its figures are true."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopt.cli.main import main
from lopt.evaluation import text_losses
from lopt.evaluation.compare import arm_run
from lopt.evaluation.compare.metrics import answer_loss
from lopt.evaluation.compare.study import _once
from lopt.evaluation.compare.summary import COSTS, summarise
from lopt.evaluation.statistics import mean_interval, paired_difference
from lopt.reports.compare import findings
from pages import ParsedPage

Compare = Callable[..., int]
TEXT = "Some text that has nothing to do with sums. " * 8
ARMS = ["e2e", "lopt", "lopt:num_blocks=4,local_every=2", "frozen", "lora:learning_rate=1e-2,lora_r=4"]


@pytest.fixture(scope="module")
def compare(tiny_folder: Path, sums_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Compare:
    text = tmp_path_factory.mktemp("text") / "other.txt"
    text.write_text(TEXT)

    def run(folder: Path, *flags: str, methods: list[str] = ARMS, seeds: tuple[str, ...] = ("0", "1")) -> int:
        settings = {
            "--model_name_or_path": tiny_folder, "--train_file": sums_file, "--held_out": 8,
            "--max_steps": 6, "--learning_rate": 1e-3, "--head_warmup_steps": 3,
            "--per_device_train_batch_size": 4, "--output_dir": folder, "--retention_text": text,
            "--retention_rows": sums_file, "--limit": 6, "--disable_tqdm": "true",
        }  # fmt: skip
        given = [str(part) for pair in settings.items() for part in pair]
        return main(["compare", *given, "--methods", *methods, "--seeds", *seeds, *flags])

    return run


@pytest.fixture(scope="module")
def study(compare: Compare, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "out"
    assert compare(folder, "--keep_models") == 0
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_all_arms_see_the_same_rows_and_only_their_parameters_move(study: Path) -> None:
    results = read(study / "compare.json")
    cells = {(c["arm"], c["seed"]): c for c in results["cells"]}
    assert len(cells) == 10 and list(results["summary"]["arms"]) == results["arms"]
    for seed in (0, 1):  # before the first step all models are the base
        first = {round(c["curve"]["loss"][0], 4) for (_, s), c in cells.items() if s == seed}
        assert len(first) == 1
    assert cells["e2e", 0]["curve"]["loss"] != cells["e2e", 1]["curve"]["loss"]
    frozen, e2e = cells["frozen k=2", 0], cells["e2e", 0]
    assert frozen["blocks"] == [[0, 2], [2, 4]] and e2e["blocks"] == [[0, 4]]
    assert frozen["drift"]["weights"]["layer 1"] == 0 < frozen["drift"]["weights"]["layer 2"]
    assert frozen["drift"]["weights"]["block 1"] == 0 < frozen["drift"]["weights"]["block 2"]
    assert frozen["drift"]["layers"][2]["relative_l2"] == 0  # after layer 1
    assert e2e["drift"]["layers"][0]["relative_l2"] > 0
    cost = {name: results["summary"]["cost"][name] for name in results["arms"]}
    assert cost["frozen k=2"]["trained_parameters"] < cost["e2e"]["trained_parameters"]
    assert cost["frozen k=2"]["flops_per_step"] < cost["e2e"]["flops_per_step"]
    assert cost["lora lr=0.01 lora_r=4"]["trained_parameters"] < cost["frozen k=2"]["trained_parameters"]
    assert cost["lopt k=2"]["head_parameters"] > 0 == cost["e2e"]["head_parameters"]
    resting = cells["lopt k=4 local_every=2", 0]["curve"]["local_loss/block_1"]
    assert [loss is None for loss in resting] == [False, True] * 3


def test_the_models_kept_are_those_that_were_measured(study: Path) -> None:
    """Losses on the text, measured again on what was saved; adapters are merged."""
    for path in study.glob("cells/lo*-seed0.json"):
        folder, found = study / "models" / path.stem, read(path)["items"]["text:other"]["values"]
        model = AutoModelForCausalLM.from_pretrained(folder)
        again = text_losses(model, AutoTokenizer.from_pretrained(folder), TEXT)
        assert [part.loss for part in again] == pytest.approx(found, abs=2e-5)


def test_the_summary_is_what_the_cells_say(study: Path) -> None:
    results = read(study / "compare.json")
    summary = results["summary"]
    losses = [c["adaptation"]["loss"] for c in results["cells"] if c["arm"] == "lopt k=2"]
    figures = summary["arms"]["lopt k=2"]["loss"]
    assert figures["seeds"] == losses
    assert [figures[k] for k in ("value", "low", "high")] == pytest.approx(list(mean_interval(losses)))
    e2e = [c["adaptation"]["loss"] for c in results["cells"] if c["arm"] == "e2e"]
    paired = summary["against"]["e2e"]["lopt k=2"]["loss"]["seeds"]
    assert paired == pytest.approx([a - b for a, b in zip(losses, e2e, strict=True)])
    assert list(results["base"]["items"]) == ["text:other", "rows:sums"]
    key = "text:other"
    base = results["base"]["items"][key]["values"]
    tuned = [c["items"][key]["values"] for c in results["cells"] if c["arm"] == "e2e"]
    expected = paired_difference(base, [mean(v) for v in zip(*tuned, strict=True)])
    assert summary["items"]["e2e"][key] == pytest.approx(expected._asdict())
    rows = [results["base"], next(c for c in results["cells"] if c["arm"] == "e2e")]
    rows = [cell["items"]["rows:sums"]["values"] for cell in rows]
    assert [len(values) for values in rows] == [6, 6] and mean(rows[1]) < mean(rows[0])  # its own task
    rise = summary["arms"]["e2e"]["forgetting"]["seeds"][0]
    assert rise == pytest.approx((mean(tuned[0]) - mean(base) + mean(rows[1]) - mean(rows[0])) / 2)


def test_the_page_is_whole(study: Path) -> None:
    page = ParsedPage((study / "report.html").read_text())
    assert not {"script", "img", "link"} & set(page.tags)
    assert page.tags.count("svg") == 7
    for word in ("lopt k=4 local_every=2", "Adaptation against retention", "held-out task loss", "Drift"):
        assert word in page.seen


def test_it_goes_on_where_it_stopped(
    compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A kill in the middle: finished cells stay, the others run, and the figures are those of one run."""
    trained: list[str] = []
    train = arm_run.LoPTSFTTrainer.train

    def counted(trainer: object, *args: object, **kwargs: object) -> object:
        if len(trained) == 1 and stop:
            raise KeyboardInterrupt
        trained.append(str(trainer.args.output_dir))  # type: ignore[attr-defined]
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(arm_run.LoPTSFTTrainer, "train", counted)
    stop = True
    flags = dict(methods=["e2e", "lopt"], seeds=("3",))
    assert compare(tmp_path / "a", **flags) == 130
    assert len(list((tmp_path / "a" / "cells").glob("*.json"))) == 1
    stop = False
    assert compare(tmp_path / "a", **flags) == 0
    assert len(trained) == 2 and "1 of 2 arm runs are finished already" in capsys.readouterr().out
    assert compare(tmp_path / "b", **flags) == 0
    whole, parts = (read(tmp_path / name / "compare.json")["cells"] for name in "ba")
    for a, b in zip(whole, parts, strict=True):
        assert a["adaptation"] == b["adaptation"] and a["curve"] == b["curve"] and a["items"] == b["items"]
    # Of its results alone the folder is made again.
    alone = tmp_path / "alone" / "compare.json"
    alone.parent.mkdir()
    alone.write_bytes((tmp_path / "a" / "compare.json").read_bytes())
    assert compare(alone.parent, **flags) == 0 and len(trained) == 4
    for name in ("setting.json", "base.json", *(f"cells/{p.name}" for p in (tmp_path / "a/cells").iterdir())):
        assert (alone.parent / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    # Another seed joins; another setting is refused and nothing is touched.
    assert compare(tmp_path / "a", methods=["e2e", "lopt"], seeds=("3", "4")) == 0
    assert len(trained) == 6
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert compare(tmp_path / "a", "--weight_decay", "0.1", **flags) == 2
    assert "other settings (training)" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == before
    # Unless it is asked to start anew: then only what is not a comparison's stays.
    (tmp_path / "a" / "notes.txt").write_text("mine")
    assert len(read(tmp_path / "a" / "run.json")["attempts"]) == 3
    anew = ("--weight_decay", "0.1", "--overwrite_output_dir")
    assert compare(tmp_path / "a", *anew, methods=["e2e"], seeds=("3",)) == 0
    assert len(list((tmp_path / "a" / "cells").iterdir())) == 1
    assert len(read(tmp_path / "a" / "run.json")["attempts"]) == 1
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_weights_in_host_memory_give_the_same_figures(compare: Compare, study: Path, tmp_path: Path) -> None:
    """What the device holds decides about cost alone, for every method; all are measured as whole models."""
    stages = ("--schedule", "block_major", "--stages", "6")
    host = ("--offload", "block", "--optimizer_device", "cpu")
    assert compare(tmp_path, *stages, *host, methods=[*ARMS[:2], *ARMS[3:]], seeds=("0",)) == 0
    eager, found = (read(folder / "compare.json") for folder in (study, tmp_path))
    cells = {cell["arm"]: cell for cell in eager["cells"] if cell["seed"] == 0} | {"base": eager["base"]}
    for other in (*found["cells"], found["base"] | {"arm": "base"}):
        one, arm = cells[other["arm"]], other["arm"]
        assert other["adaptation"] == pytest.approx(one["adaptation"], rel=1e-5), arm
        for key, item in one["items"].items():
            assert other["items"][key]["values"] == pytest.approx(item["values"], abs=2e-5), (arm, key)
        if arm != "base":
            assert other["curve"]["loss"] == pytest.approx(one["curve"]["loss"], rel=1e-5), arm
            moved = [cell["drift"]["weights"]["all"] for cell in (one, other)]
            assert moved[1] == pytest.approx(moved[0], rel=1e-3), arm
            assert other["cost"]["peak_bytes"] < one["cost"]["peak_bytes"], arm
            assert other["cost"]["flops_per_step"] > 0.9 * one["cost"]["flops_per_step"], arm


def test_processes_with_one_folder_share_the_arm_runs(tmp_path: Path) -> None:
    """What another process has taken is left to it, and made here only if it ends without a result."""
    path, made = tmp_path / "cells" / "a.json", []

    def make() -> dict[str, int]:
        made.append(path)
        return {"made": len(made)}

    path.parent.mkdir()
    other = FileLock(path.with_suffix(".lock"))
    with other:
        _once(path, make, wait=False)
        assert not made
        later = threading.Thread(target=_once, args=(path, make, True))
        later.start()
        path.write_text('{"made": 0}')
    later.join()
    assert not made and read(path) == {"made": 0}
    path.unlink()
    _once(path, make, wait=True)
    assert read(path) == {"made": 1} and list(path.parent.iterdir()) == [path]


def test_an_arm_that_breaks_down_is_a_result(compare: Compare, tmp_path: Path) -> None:
    assert compare(tmp_path, methods=["e2e", "frozen:learning_rate=1e30"], seeds=("0",)) == 0
    results = read(tmp_path / "compare.json")
    assert list(results["summary"]["failed"]) == ["frozen k=2 lr=1e+30"]
    assert "not finite: frozen k=2 lr=1e+30" in ParsedPage((tmp_path / "report.html").read_text()).seen


def test_right_answers() -> None:
    assert answer_loss({"target": 1, "filtered_resps": [(-3.0, False), (-0.5, True)]}) == 0.5
    assert answer_loss({"target": "7", "filtered_resps": ["7"]}) is None
    assert answer_loss({"target": "so", "filtered_resps": [(-3.0, False)]}) is None


def test_words_for_what_is_beyond_the_noise() -> None:
    """Against the first arm of each method; the better side is the lower one, for a loss."""
    losses = {"e2e": 0.8, "e2e slow": 0.9, "lopt k=2": 1.0, "frozen k=2": 1.0}
    base = {"adaptation": {"loss": 2.0, "token_accuracy": 0.5}, "items": {}}
    cells = []
    for arm, loss in losses.items():
        for seed, noise in enumerate((0.00, 0.01, 0.02 if arm == "lopt k=2" else 0.01)):
            own = {"loss": loss + noise, "token_accuracy": 0.5}
            rest = {"items": {}, "drift": None, "cost": dict.fromkeys(COSTS, 1)}
            cells.append({"arm": arm, "seed": seed, "adaptation": own, **rest})
    results = {"arms": list(losses), "base": base, "cells": cells}
    results["summary"] = summarise(results)
    first, more = findings(results)
    assert first.startswith("e2e had the lowest held-out task loss: 0.807")
    assert more == [
        "Beyond the seeds' noise, compared with e2e: task loss worse with e2e slow, lopt k=2, frozen k=2.",
        "Beyond the seeds' noise, compared with frozen k=2: task loss better with e2e, e2e slow.",
    ]
    assert list(results["summary"]["against"]) == ["e2e", "e2e slow", "frozen k=2"]


def test_a_summary_of_nothing_but_failures() -> None:
    base = {"adaptation": {"loss": 1.0, "token_accuracy": 0.5}, "items": {}}
    cells = [{"arm": "e2e", "seed": 0, "failed": "the loss is nan"}]
    summary = summarise({"arms": ["e2e"], "base": base, "cells": cells})
    assert summary["arms"]["e2e"]["loss"]["value"] is None and summary["cost"] == {}


def test_a_text_of_one_window_has_no_interval() -> None:
    item = {"metric": "loss", "kind": "retention", "higher_is_better": False}
    base = {"adaptation": {"loss": 1.0, "pair_accuracy": 0.5}, "items": {"text:a": item | {"values": [3.0]}}}
    rest = {"items": {"text:a": {"values": [3.5]}}, "drift": None, "cost": dict.fromkeys(COSTS, 1)}
    cells = [{"arm": "e2e", "seed": 0, "adaptation": {"loss": 0.9, "pair_accuracy": 1.0}, **rest}]
    summary = summarise({"arms": ["e2e"], "base": base, "cells": cells})
    assert summary["items"]["e2e"]["text:a"] == {"value": 0.5, "low": None, "high": None}
    assert summary["measures"]["pair_accuracy"]["label"] == "held-out pair accuracy"
    json.dumps(summary, allow_nan=False)


CASES = {
    "method flag": (("--method", "e2e"), "--methods names what is compared"),
    "seeds twice": (("--seeds", "1", "1"), "--seeds 1 1"),
    "limit": (("--limit", "0"), "--limit must be >= 2 (got 0)"),
    "pipeline": (("--schedule", "pipeline"), "use --schedule block_major"),
    "unknown task": (("--retention_tasks", "chess"), "chess"),
    "no such text": (("--retention_text", "nowhere.txt"), "--retention_text nowhere.txt"),
    "no such rows": (("--retention_rows", "nowhere.jsonl"), "--retention_rows: nowhere.jsonl does not exist"),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes(compare: Compare, tmp_path: Path, capsys: pytest.CaptureFixture, case: str) -> None:
    flags, message = CASES[case]
    assert compare(tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()[-1:]) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(
    compare: Compare, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert compare(tmp_path, "--overwrite_output_dir") == 2
    assert "holds something else" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    assert torch.is_grad_enabled()
