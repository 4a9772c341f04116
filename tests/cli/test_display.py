"""What the training commands show: blocks and tables that fit, JSON lines, nothing with --quiet."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import tiny
from lopt import LoPTConfig, attach
from lopt.cli.display.closing import next_commands
from lopt.cli.display.opening import block_picture, opening, share
from lopt.cli.display.progress import _keys
from lopt.cli.display.table import COLUMNS, Table, clock, figure
from lopt.cli.main import COMMANDS as KNOWN
from lopt.cli.main import main
from lopt.cli.parsing import parse
from lopt.engine.pipeline import leave_out
from lopt.engine.stages import Stages

FACTS: dict[str, Any] = {
    "model": "/models/gemma3-270m", "architecture": "Gemma3ForCausalLM", "dtype": "bfloat16",
    "parameters": 268_098_176, "trained": 100_326_016, "method": "frozen",
    "blocks": [
        {"start": 0, "stop": 12, "learns": "nothing"},
        {"start": 12, "stop": 18, "learns": "task loss"},
    ],
    "rows": 1200, "rows_given": 1300, "dropped": 100, "cut": 7, "held_out": 64, "packed": False,
    "tokens": 123_456, "labelled_tokens": 61_728, "lengths": {"longest": 1024}, "max_length": 1024,
    "steps": 3000, "first_step": 200, "batch": [4, 2, 8], "learning_rate": 2e-5, "scheduler": "cosine",
    "warmup_steps": 30, "optimizer": "adamw_torch_fused", "output_dir": "outputs/a folder",
}  # fmt: skip


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_block_before_a_run(width: int) -> None:
    text = opening("sft", FACTS, width).plain
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for said in (
        "gemma3-270m (Gemma3ForCausalLM, bfloat16)", "268.1 M, 100.3 M trained (37.4 %)",
        "100 dropped as too long", "7 cut at 1,024 tokens", "64 held out", "123,456, 50.0 % masked",
        "3,000, each of 64 rows (4 a micro-batch × 2 micro-batches × 8 processes); resumed after step 200",
        "rate 2e-05; cosine after 30 steps of warm-up", "outputs/a folder", "· not trained: layers 0-11;",
    ):  # fmt: skip
        assert said in words, said
    picture = next(line for line in text.splitlines() if "┃" in line).split()[-1]
    early, last = picture.split("┃")
    assert set(early) == {"·"} and set(last) == {"█"} and abs(len(early) - 2 * len(last)) <= 1
    assert opening("sft", FACTS, width, ascii_only=True).plain.replace("×", "x").isascii()


def test_a_deep_model_of_many_blocks_fits() -> None:
    blocks = [{"start": 5 * i, "stop": 5 * i + 5, "learns": "recon loss"} for i in range(20)]
    picture, _ = block_picture(blocks, 60)
    assert picture.count("┃") == 19 and len(picture) <= 60
    assert (share(0, 10), share(10, 10), share(9_999_999, 10_000_000)) == ("0 %", "100 %", "99.9 %")


def test_columns_for_the_local_losses_of_all_processes() -> None:
    """The table is shown by the process with the last block, which has no local loss of its own."""
    handle = attach(tiny("llama"), LoPTConfig(num_blocks=3, schedule="block_major"))
    stages = Stages(handle)
    leave_out(handle, stages, stages.of_pipeline(2, 3))
    callbacks = SimpleNamespace(callbacks=[])
    trainer = SimpleNamespace(lopt=handle, args=None, eval_dataset=None, callback_handler=callbacks)
    local = {key for key in _keys(trainer) if "local_loss" in key}
    assert local == {"local_loss/block_1", "local_loss/block_2"}


@pytest.mark.parametrize("command", list(COLUMNS))
@pytest.mark.parametrize("width", [30, 80, 200])
def test_rows_of_the_table_are_aligned(command: str, width: int) -> None:
    keys = {column.key for column in COLUMNS[command]}
    table = Table(command, keys)
    row = dict.fromkeys(keys, 1.5) | {"step": 12_345.0, "loss": 6.02e23, "learning_rate": 2e-5}
    lines = [line.plain for step in range(3) for line in table.lines(row | {"step": step}, width)]
    assert len(lines) == 4 and {len(line) for line in lines} == {len(lines[0])} and len(lines[0]) <= width
    assert lines[0].split()[:2] == ["step", "reward" if command == "grpo" else "loss"]
    assert table.lines({"step": 3, "elapsed": 2.0, "guard/spike": 1}, width) == []  # says it in words
    assert len(table.lines({"step": 4, "eval_loss": 1.0, "eval_reward": 1.0}, width)) == 1


def test_numbers_and_times() -> None:
    assert [figure(x) for x in (0.0, 0.03853, 5.9171, 137.74, 1e5, 3e-9, float("nan"))] == [
        "0.0000", "0.0385", "5.917", "137.7", "1.00e+05", "3.00e-09", "nan",
    ]  # fmt: skip
    assert (clock(59.6), clock(3723)) == ("1:00", "1:02:03")


def test_the_next_commands_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "it's a run"
    for adapters, pushed in ((False, False), (True, False), (True, True)):
        lines = next_commands("gemma3-270m", folder, adapters=adapters, pushed=pushed)
        assert len(lines) == 3
        uploads = [line for line in lines if line.startswith("hf upload")]
        assert len(uploads) == (not adapters and not pushed)
        assert all(line.endswith(" . --exclude 'checkpoint-*'") for line in uploads)  # gigabytes of state
        for program, command, *words in map(shlex.split, lines):
            assert any(str(folder) in word for word in words)
            if (program, command) == ("lopt", "eval"):
                parse(command, words)
            else:
                assert program == "hf" or command in KNOWN


def test_json_lines_and_quiet(tiny_folder: Path, sums_file: Path, tmp_path: Path, capsys) -> None:
    words = (
        f"sft --model_name_or_path {tiny_folder} --train_file {sums_file} --output_dir {tmp_path / 'out'} "
    )
    words += "--max_steps 4 --logging_steps 2 --head_warmup_steps 2 --held_out 8 --eval_strategy steps "
    words += "--eval_steps 2 --overwrite_output_dir"
    assert main([*words.split(), "--json_logs"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [event.pop("event") for event in events]
    assert kinds == ["start", "message", *["log"] * 5, "end"]
    assert events[0]["rows"] == 40 and events[0]["tokens"] > events[0]["labelled_tokens"] > 0
    assert events[1]["text"].startswith("Head warm-up, 2 steps")
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    logs = [{k: v for k, v in event.items() if k != "elapsed"} for event in events[2:-1]]
    assert logs == history
    ends = events[-1]["first_and_last"]
    assert ends["eval_loss"] == [history[1]["eval_loss"], history[3]["eval_loss"]]
    assert main([*words.split(), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
