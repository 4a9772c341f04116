"""`lopt sft` through its command line: equivalence classes, golden losses, resume, what is saved."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import assert_moved_alike, save_tiny
from lopt.cli.main import main
from lopt.evaluation import completion_loss

GOLDEN = Path(__file__).parents[1] / "golden"
Run = Callable[..., tuple[Path, list[float]]]


@pytest.fixture
def sft(tiny_folder: Path, sums_file: Path, tmp_path: Path) -> Run:
    """Run `lopt sft` on little sums; returns the output folder and the losses of all steps."""

    def run(
        name: str = "out", *flags: str, model: Path = tiny_folder, steps: int = 5
    ) -> tuple[Path, list[float]]:
        folder = tmp_path / name
        arguments = {
            "--model_name_or_path": model,
            "--train_file": sums_file,
            "--output_dir": folder,
            "--max_steps": steps,
            "--logging_steps": 1,
            "--learning_rate": 1e-3,
            "--head_warmup_steps": 5,
            "--per_device_train_batch_size": 4,
        }
        for flag, value in zip(flags[::2], flags[1::2], strict=True):
            arguments[flag] = value
        assert main(["sft", *(str(x) for pair in arguments.items() for x in pair)]) == 0
        folder = Path(arguments["--output_dir"])
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return folder, [row["loss"] for row in history if "loss" in row]

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_batches_accumulation_and_checkpointing_are_the_same_run(sft: Run, tiny_folder: Path) -> None:
    folder, losses = sft("batch", "--num_blocks", "4")
    variants = {
        "accumulation": ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"],
        "uneven": ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"],
        "checkpointing": ["--gradient_checkpointing", "true"],
    }
    for name, flags in variants.items():
        other, other_losses = sft(name, "--num_blocks", "4", *flags)
        assert other_losses == pytest.approx(losses, rel=1e-5), name
        assert_moved_alike(weights(tiny_folder), weights(folder), weights(other))


ACCUMULATED = ["--num_blocks", "4", "--gradient_accumulation_steps", "2"]
BLOCK_MAJOR = [*ACCUMULATED, "--schedule", "block_major", "--offload", "block"]
GOLDEN_CASES: dict[str, list[str]] = {
    "e2e": ["--method", "e2e"],
    "lopt-k2": ["--num_blocks", "2"],
    "lopt-k4": ["--num_blocks", "4"],
    "block-major": BLOCK_MAJOR,
}


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden_losses(sft: Run, case: str) -> None:
    """20 steps in float32; after a wanted change of numbers delete the file, run once and look at the diff.

    Kernels for other instruction sets and numbers of threads sum in another order, which moves these losses
    by under 1e-6 (float32 resolves 1.2e-7). The tolerance of 1e-5 leaves room for that and little else: a
    weight decay of 0.01 moves them by 2e-5, a learning rate 0.1 % higher by 1e-4.
    """
    _, losses = sft("golden", *GOLDEN_CASES[case], steps=20)
    path = GOLDEN / f"{case}.json"
    if not path.exists():
        path.write_text(json.dumps(losses) + "\n")
        pytest.fail(f"wrote {path}: look at it and run again")
    assert losses == pytest.approx(json.loads(path.read_text()), rel=1e-5)
    assert losses[-1] < losses[0]


def test_bfloat16_follows_float32_and_no_schedule_changes_it(sft: Run) -> None:
    """Properties, not golden numbers: bfloat16 kernels differ between CPUs by more than 1e-4 in the loss.

    The unit roundoff of bfloat16 is u = 2^-8: rounding a weight, an activation or a gradient moves it by up
    to u. The mean loss over a batch stays within 2u of float32's; the two schedules, which round the same
    values in the same places, within u/4 of each other in the losses and within u in the weights.
    """
    unit = 2.0**-8
    eager, losses = sft("eager", *ACCUMULATED, "--param_dtype", "bfloat16", steps=20)
    staged, staged_losses = sft("staged", *BLOCK_MAJOR, "--param_dtype", "bfloat16", steps=20)
    assert losses == pytest.approx(json.loads((GOLDEN / "block-major.json").read_text()), rel=2 * unit)
    assert losses[-1] < (1 - 8 * unit) * losses[0]  # the band is narrower than what is learned
    assert staged_losses == pytest.approx(losses, rel=unit / 4)
    for name, value in weights(eager).items():
        assert value.dtype == torch.bfloat16
        difference = weights(staged)[name].float() - value.float()
        assert difference.norm() <= unit * value.float().norm(), name


@pytest.mark.parametrize("method", ["lopt", "e2e", "frozen"])
def test_what_moves(sft: Run, tiny_folder: Path, method: str) -> None:
    folder, _ = sft("moved", "--method", method, "--num_blocks", "2")
    before, after = weights(tiny_folder), weights(folder)
    assert before.keys() == after.keys()
    for name, value in before.items():
        early = any(part in name for part in ("embed_tokens", "layers.0.", "layers.1."))
        assert torch.equal(value, after[name]) == (method == "frozen" and early), name


def test_block_major_is_eager(sft: Run) -> None:
    """The other places of weights and state: tests/trainers/test_block_major.py."""
    flags = ["--num_blocks", "3", "--gradient_accumulation_steps", "2"]
    folder, losses = sft("eager", *flags)
    other, other_losses = sft("block", *flags, "--schedule", "block_major", "--offload", "block")
    assert other_losses == pytest.approx(losses, rel=1e-6)
    for key, value in weights(folder).items():
        torch.testing.assert_close(weights(other)[key], value, rtol=1e-5, atol=1e-7, msg=key)


def test_local_every(sft: Run, tiny_folder: Path) -> None:
    """Early blocks move in steps 1 and 4 of 5, and their optimizer has counted those only."""
    flags = ["--num_blocks", "2", "--local_every", "3", "--save_steps", "1", "--save_total_limit", "9"]
    folder, _losses = sft("lazy", *flags, "--lr_k1", "1e-3")
    whole, _ = sft("eager", "--num_blocks", "2", "--lr_k1", "1e-3")
    saved = [weights(tiny_folder), *(weights(folder / f"checkpoint-{step}") for step in range(1, 6))]
    early = "model.layers.0.mlp.up_proj.weight"
    moved = [not torch.equal(a[early], b[early]) for a, b in itertools.pairwise(saved)]
    assert moved == [True, False, False, True, False]
    late = "model.layers.3.mlp.up_proj.weight"
    assert all(not torch.equal(a[late], b[late]) for a, b in itertools.pairwise(saved))
    state = torch.load(folder / "checkpoint-5/optimizer.pt", weights_only=True)
    assert {int(s["step"]) for s in state["state"].values()} == {2, 5}
    assert not torch.equal(weights(whole)[early], weights(folder)[early])
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert ["local_loss/block_1" in row for row in logs if "loss" in row] == moved


def test_lora_saves_an_adapter(sft: Run) -> None:
    pytest.importorskip("peft")
    folder, losses = sft("lora", "--method", "lora", "--lora_r", "4")
    assert (folder / "adapter_model.safetensors").is_file() and losses[-1] < losses[0]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "flags"), [(0o022, []), (0o077, ["--method", "lora", "--lora_r", "4"])])
def test_every_file_follows_the_umask_in_any_place(
    sft: Run, tmp_path: Path, monkeypatch, umask: int, flags: list[str]
) -> None:
    """A folder with a space, through a link, from two working folders; the resumed run finds its best."""
    if flags:
        pytest.importorskip("peft")
    (tmp_path / "disk two").mkdir()
    (tmp_path / "läufe").symlink_to(tmp_path / "disk two")
    flags = [*flags, "--save_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1", "--held_out", "4"]
    flags += ["--load_best_model_at_end", "true", "--greater_is_better", "true"]  # the first is the best
    flags += ["--metric_for_best_model", "loss", "--head_warmup_steps", "1"]
    before = os.umask(umask)
    try:
        monkeypatch.chdir(tmp_path)
        sft("out", *flags, "--output_dir", "läufe/my run/", steps=1)
        monkeypatch.chdir(tmp_path / "disk two")
        sft("out", *flags, "--output_dir", "../läufe/my run/", "--resume", "true", steps=2)
    finally:
        os.umask(before)
    run = tmp_path / "disk two" / "my run"
    for path in [run, *run.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
    state = json.loads((run / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).resolve() == run / "checkpoint-1"
    saved = "adapter_model.safetensors" if "lora" in flags else "model.safetensors"
    assert (run / saved).read_bytes() == (run / "checkpoint-1" / saved).read_bytes()


def test_the_saved_model_is_plain_and_says_the_same(sft: Run, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "tied", "llama-tied")
    folder, _ = sft("plain", "--num_blocks", "4", "--held_out", "8", model=model)
    assert set(weights(folder)) == set(weights(model)) | {"lm_head.weight"}
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer as T\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(folder)!r}); t = T.from_pretrained({str(folder)!r})\n"
        "assert not torch.equal(m.lm_head.weight, m.model.embed_tokens.weight)\n"
        "m.generate(**t('What is', return_tensors='pt'), max_new_tokens=3)\n"
        "assert not any(name.split('.')[0] == 'lopt' for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    evaluated = json.loads((folder / "eval_results.json").read_text())["eval_loss"]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    from lopt.data.formats import format_rows
    from lopt.data.load import load_rows, split_held_out

    rows = format_rows(load_rows(train_file=sums_rows(folder)), tokenizer)
    _, held_out = split_held_out(rows, 8, 42)
    pairs = [(row["prompt"], row["completion"] + tokenizer.eos_token) for row in held_out]
    assert completion_loss(loaded, tokenizer, pairs) == pytest.approx(evaluated, rel=1e-5)


def sums_rows(folder: Path) -> str:
    """The training file that a run of this module's fixture used."""
    return (folder.parent / "sums").read_text()


@pytest.fixture(autouse=True)
def _note_file(tmp_path: Path, sums_file: Path) -> None:
    (tmp_path / "sums").write_text(str(sums_file))


@pytest.mark.parametrize(("k", "every"), [("2", "1"), ("3", "3")])
def test_resume_is_bit_for_bit(sft: Run, tmp_path: Path, k: str, every: str) -> None:
    """Stopped at step 4 of 8 and resumed: optimizer, schedule, heads, dropout, order of rows, phase."""
    model = save_tiny(tmp_path / "dropout", "llama-tied", attention_dropout=0.2)
    flags = ["--num_blocks", k, "--save_steps", "4", "--gradient_accumulation_steps", "2"]
    flags += ["--local_every", every]
    whole, _ = sft("whole", *flags, model=model, steps=8)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(whole / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    resumed, _ = sft("resumed", *flags, "--resume", "true", model=model, steps=8)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_logs_tell_what_the_blocks_do(sft: Run) -> None:
    folder, _ = sft("logs", "--num_blocks", "3", "--report_to", "tensorboard", "--clip", "global")
    row = json.loads((folder / "trainer_state.json").read_text())["log_history"][0]
    shares = [row[f"grad_share/block_{b}"] for b in (1, 2, 3)]
    assert sum(shares) == pytest.approx(1, rel=1e-5) and row["local_loss/block_2"] > 0
    assert row["learning_rate_k1"] == pytest.approx(0.1 * row["learning_rate"])
    assert row["tokens_per_second"] > 0 and row["peak_memory_gib"] > 0 and row["seconds_per_step"] > 0
    assert list(folder.rglob("events.out.tfevents*"))


def test_yaml_and_flags_and_a_chat_template(sft: Run, tmp_path: Path, sums_file: Path) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model = save_tiny(tmp_path / "chat", chat_template=template)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"num_blocks: 4\nlearning_rate: 1.0e-3\nblock_boundaries: [1, 2]\ntrain_file: ['{sums_file}']\n"
    )
    folder, losses = sft(
        "yaml", "--config", str(config), "--packing", "true", "--max_seq_length", "64", model=model
    )
    assert json.loads((folder / "lopt_config.json").read_text())["block_boundaries"] == [1, 2]
    assert len(losses) == 5


def test_a_preset_with_a_local_copy_is_the_same_run(sft: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path / "cache"))
    _, losses = sft("file")
    assert sft("preset", "--dataset_preset", "gsm8k")[1] == losses


def test_rows_that_are_too_long_are_counted(sft: Run, sums_file: Path, tmp_path: Path, caplog) -> None:
    mixed = tmp_path / "mixed.jsonl"
    long = json.dumps({"question": "why " * 200, "answer": "so"})
    mixed.write_text(sums_file.read_text() + f"{long}\n{long}\n")
    for name, packing in (("long", "false"), ("packed", "true")):
        caplog.clear()
        sft(name, "--train_file", str(mixed), "--max_seq_length", "100", "--packing", packing)
        assert "2 of 50 train rows are left out: their prompt alone reaches --max_length 100" in caplog.text


def test_a_run_that_explodes_stops_and_names_the_step(
    tiny_folder: Path, sums_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = ("--model_name_or_path", tiny_folder, "--train_file", sums_file, "--output_dir", tmp_path / "out")
    assert main(["sft", *map(str, files), *["--learning_rate", "1e30", "--head_warmup_steps", "0"]]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 2, batch 1 of 1" in error and "stopped before the optimizer step" in error
    assert not (tmp_path / "out" / "config.json").exists()
    one = ("--max_steps", "1", "--method", "e2e", "--overwrite_output_dir")
    assert main(["sft", *map(str, files), *one, "--learning_rate", "1e39"]) == 2
    assert "after step 1 weights are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()
    assert main(["sft", *map(str, files), *one, "--learning_rate", "1e30", "--held_out", "4"]) == 2
    assert "the held-out loss of the trained model is nan" in capsys.readouterr().err
