"""A whole comparison by the command line: what it writes, that it goes on, that its figures are true."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopt.cli.compare import _check_tasks, _model_files
from lopt.cli.main import main
from lopt.cli.report_flags import CompareArguments
from lopt.evaluation import text_loss, text_losses
from lopt.evaluation.compare import arm_run
from lopt.evaluation.compare.study import _once
from lopt.evaluation.statistics import mean_interval, paired_difference
from lopt.reliability.guards import DivergedError
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


def test_the_summary_is_what_the_cells_say(study: Path, tiny_folder: Path) -> None:
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
    key, tokens = "text:other", [128, 128, 96]  # windows count as their tokens do
    texts = [c["items"][key] for c in (results["base"], *results["cells"]) if c.get("arm", "e2e") == "e2e"]
    assert all(item["tokens"] == tokens for item in texts)
    base, *tuned = ([v * n * 3 / 352 for v, n in zip(i["values"], tokens, strict=True)] for i in texts)
    model, tokenizer = (part.from_pretrained(tiny_folder) for part in (AutoModelForCausalLM, AutoTokenizer))
    assert summary["measures"][key]["base"] == pytest.approx(text_loss(model, tokenizer, TEXT), abs=1e-5)
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
    page = ParsedPage((tmp_path / "report.html").read_text())
    assert "not finite, or diverged: frozen k=2 lr=1e+30" in page.seen


def test_so_is_one_that_breaks_down_in_its_last_step_or_diverges(
    compare: Compare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = arm_run.LoPTSFTTrainer.train

    def diverging(trainer: Any, *args: object, **kwargs: object) -> object:
        if trainer.lopt.config.method == "lopt":
            raise DivergedError("block 1 has diverged")
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(arm_run.LoPTSFTTrainer, "train", diverging)
    methods = ["e2e:learning_rate=1e30", "lopt", "e2e"]
    assert compare(tmp_path, "--max_steps", "1", methods=methods, seeds=("0",)) == 0
    results = read(tmp_path / "compare.json")
    assert results["summary"]["failed"] == {
        "e2e lr=1e+30": "of the trained model, adaptation loss is nan",
        "lopt k=2": "block 1 has diverged",
    }
    assert results["summary"]["arms"]["e2e"]["loss"]["value"] > 0


NEWER = ("model_files", "texts", "retention_rows", "benchmark_rows", "data_seed", "eval_packing")
MIXED = {
    "texts": ("--retention_text", "other.txt"),
    "retention_rows": ("--retention_rows", "sums.jsonl"),
    "data_seed": ("--data_seed", "7"),
    "eval_packing": ("--eval_packing", "false"),
}


@pytest.mark.parametrize("key", MIXED)
def test_what_changes_a_figure_is_not_mixed(
    compare: Compare,
    study: Path,
    sums_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    key: str,
) -> None:
    """Texts and rows of the same names and sizes, but with another content, for example."""
    (tmp_path / "other.txt").write_text(TEXT.replace("sums", "seas"))
    (tmp_path / "sums.jsonl").write_text(sums_file.read_text().replace("What is 1 ", "What is 3 "))
    flag, value = MIXED[key]
    given = tmp_path / value
    assert compare(study, flag, str(given) if given.exists() else value) == 2
    assert f"other settings ({key})" in capsys.readouterr().err


def test_results_of_an_older_version_are_continued(
    compare: Compare, study: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Their setting has fewer keys, and their windows do not say how many tokens they have."""
    old = read(study / "compare.json")
    assert set(NEWER) < set(old["setting"]) == set(read(study / "setting.json"))
    old["setting"] = {key: value for key, value in old["setting"].items() if key not in NEWER}
    for run in (old["base"], *old["cells"]):
        del run["items"]["text:other"]["tokens"]
    del old["base"]["items"]["rows:sums"]
    (tmp_path / "compare.json").write_text(json.dumps(old))
    assert compare(tmp_path, "--weight_decay", "0.1") == 2
    assert "other settings (training)" in capsys.readouterr().err
    assert compare(tmp_path) == 0
    results = read(tmp_path / "compare.json")
    assert all(list(run["items"]) == ["text:other"] for run in (results["base"], *results["cells"]))
    mean_of_windows = mean(old["base"]["items"]["text:other"]["values"])
    assert results["summary"]["measures"]["text:other"]["base"] == mean_of_windows
    assert compare(tmp_path, "--data_seed", "7") == 2  # from now on it is known
    assert "other settings (data_seed)" in capsys.readouterr().err


def test_a_model_is_known_by_its_files(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder, copy_function=shutil.copyfile)  # with other times of change

    def files(name: str) -> object:
        args = SimpleNamespace(model_name_or_path=str(folder), model_revision=None)
        return _model_files(name, args, False)  # type: ignore[arg-type]

    before = files("model")
    shutil.rmtree(folder)
    shutil.copytree(tiny_folder, folder, copy_function=shutil.copyfile)
    assert files("model") == before and files("smollm2-135m") is None
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert files("model") != before


def test_benchmarks_are_known_by_their_local_rows(tmp_path: Path) -> None:
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(8)]

    def identity() -> str | None:
        for split in ("train", "test"):
            path = tmp_path / "gsm8k" / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return _check_tasks(CompareArguments(adaptation_tasks=["gsm8k"], data_dir=str(tmp_path)))

    first = identity()
    assert first is not None and identity() == first
    rows[0]["question"] = "1 + 0?"
    assert identity() != first and _check_tasks(CompareArguments()) is None


CASES = {
    "method flag": (("--method", "e2e"), "--methods names what is compared"),
    "seeds twice": (("--seeds", "1", "1"), "--seeds 1 1"),
    "limit": (("--limit", "0"), "--limit must be >= 2 (got 0)"),
    "pipeline": (("--schedule", "pipeline"), "use --schedule block_major"),
    "unknown task": (("--retention_tasks", "gsm9k"), "--retention_tasks gsm9k does not exist"),
    "unknown task to adapt to": (("--adaptation_tasks", "gsm9k"), "--adaptation_tasks gsm9k does not exist"),
    "task of both": (
        ("--adaptation_tasks", "gsm8k", "--retention_tasks", "gsm8k"),
        "--retention_tasks names gsm8k twice",
    ),
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
