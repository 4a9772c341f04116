"""`lopt eval` as a user types it: results, kept tasks, kills, other settings, other tokenizers, mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lopt.cli.eval import check, labels
from lopt.cli.main import main
from lopt.cli.report_flags import EvalArguments
from lopt.evaluation import run
from lopt.evaluation.store import read_results

pytest.importorskip("lm_eval")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def world(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models with one tokenizer, one with another, rows of two benchmarks and a text."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_folder, folder / "base")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    shutil.copytree(tiny_folder, folder / "tuned")
    model.save_pretrained(folder / "tuned")
    shutil.copytree(folder / "tuned", folder / "foreign")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}, []))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "foreign")
    names = {"option1": "Ann", "option2": "Bob"}
    winogrande = [{"sentence": f"{i} saw, as _ was tall .", "answer": "12"[i % 2], **names} for i in range(6)]
    options = [{"text": [f"{i + 1}", f"{i + 3}0"], "label": ["A", "B"]} for i in range(6)]
    arc = [{"question": f"{i} + 1?", "choices": options[i], "answerKey": "A"} for i in range(6)]
    for name, rows in (("winogrande/validation", winogrande), ("arc_challenge/test", arc)):
        (folder / f"{name}.jsonl").parent.mkdir()
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "notes.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    return folder


def flags(world: Path, out: Path, *more: str) -> list[str]:
    return [
        *("eval", "--model_name_or_path", str(world / "tuned"), "--tasks", "winogrande", "arc_challenge"),
        *("--data_dir", str(world), "--text", str(world / "notes.txt"), "--text_window", "32"),
        *("--output_dir", str(out), *more),
    ]


def examined(monkeypatch: pytest.MonkeyPatch, stop_at: str = "") -> list[str]:
    """Records the tasks that are run from now on; stops hard at one of them."""
    seen: list[str] = []
    real = run.evaluate_text

    def watch(name: str) -> None:
        if name == stop_at:
            raise KeyboardInterrupt
        seen.append(name)

    from lopt.evaluation import harness

    task = harness.run_task
    monkeypatch.setattr(harness, "run_task", lambda m, t, k, **o: watch(k.config.task) or task(m, t, k, **o))
    monkeypatch.setattr(run, "evaluate_text", lambda m, t, k, b: watch(k.name) or real(m, t, k, b))
    return seen


def test_models_against_their_base(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, base = tmp_path / "out", ("--base", str(world / "base"))
    assert main(flags(world, out, *base)) == 0
    told = capsys.readouterr().out
    assert "base: 3 tasks\n" in told
    assert "tuned against base" in told and "text:notes" in told and "report.html" in told
    for label in ("base", "tuned"):
        results = json.loads((out / label / "results.json").read_text())
        assert {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config"} <= set(
            results
        )
        rows = [
            json.loads(line) for line in (out / label / "samples_winogrande.jsonl").read_text().splitlines()
        ]
        assert [row["doc_id"] for row in rows] == list(range(6))
        assert results["results"]["winogrande"]["acc,none"] == sum(row["acc"] for row in rows) / 6
    found = json.loads((out / "retention.json").read_text())["models"]["tuned"]
    assert [c["task"] for c in found["changes"]] == ["winogrande", "arc_challenge", "text:notes"]
    assert found["changes"][0]["items"] == 6 and not found["refused"]
    again = read_results(out / "tuned").outcomes()
    assert again["text:notes"].values and not again["text:notes"].higher_is_better

    def nothing_left(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished task is run again")

    monkeypatch.setattr(run.Loading, "model", nothing_left)
    assert main(flags(world, out, *base)) == 0
    assert capsys.readouterr().out.split("\n\n", 1)[1] == told.split("\n\n", 1)[1]


def test_a_killed_run_goes_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        seen = examined(patch, stop_at="arc_challenge")
        assert main(flags(world, tmp_path / "out")) == 130
        assert seen == ["winogrande"]
    seen = examined(monkeypatch)
    assert main(flags(world, tmp_path / "out")) == 0
    assert seen == ["arc_challenge", "text:notes"]
    whole = tmp_path / "whole"
    assert main(flags(world, whole)) == 0
    assert read_results(whole / "tuned").samples == read_results(tmp_path / "out" / "tuned").samples


def test_other_settings_are_not_mixed_up(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(flags(world, out)) == 0
    seen = examined(monkeypatch)
    for more, message in (
        (("--limit", "2"), "limit was null and is 2"),
        (("--text_window", "16"), "window was 32 and is 16"),
        (("--param_dtype", "bfloat16"), 'param_dtype was "float32" and is "bfloat16"'),
    ):
        assert main([*flags(world, out), *more]) == 2
        error = capsys.readouterr().err
        assert message in error and "--overwrite_output_dir" in error and not seen
    assert main([*flags(world, out), "--text_window", "16", "--overwrite_output_dir"]) == 0
    assert seen == ["text:notes"]
    assert main([*flags(world, out), "--limit", "2", "--overwrite_output_dir"]) == 0
    assert len(seen) == 4 and len(read_results(out / "tuned").samples["winogrande"]) == 2


def test_one_task(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--model_name_or_path", world / "tuned", "--text", world / "notes.txt", "--output_dir", tmp_path)
    assert main(["eval", *map(str, words)]) == 0
    assert "tuned: 1 task\n" in capsys.readouterr().out


def test_other_tokenizers(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = flags(world, tmp_path / "out", "--base", str(world / "base"))
    command[2] = str(world / "foreign")
    assert main(command) == 0
    found = json.loads((tmp_path / "out" / "retention.json").read_text())["models"]["foreign"]
    assert [change["task"] for change in found["changes"]] == ["winogrande", "arc_challenge"]
    assert "text:notes is not compared: the models have different tokenizers" in found["refused"][0]
    assert found["refused"][0] in " ".join(capsys.readouterr().out.split())
    start = command.index("--tasks")
    del command[start : start + 5]  # and --data_dir
    command[command.index(str(tmp_path / "out"))] = str(tmp_path / "text")
    assert main(command) == 2
    assert "different tokenizers" in capsys.readouterr().err and not (tmp_path / "text").exists()


def test_the_base_comes_first() -> None:
    given = ["org/a", "org/base", "org/b"]
    models = check(EvalArguments(model_name_or_path=given, base="org/base", tasks=["gsm8k"]))
    assert list(models) == ["base", "a", "b"]


def test_labels(tmp_path: Path) -> None:
    for name in ("a/final", "b/final", "c"):
        (tmp_path / name).mkdir(parents=True)
    paths = [str(tmp_path / name) for name in ("a/final", "b/final", "c")]
    first, second, third = labels(paths)
    assert (first, second) == ("a-final", "b-final") and third.endswith("-c")
    assert list(labels([paths[0], "org/some.model-7B"])) == ["final", "some.model-7B"]
