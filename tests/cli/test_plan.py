"""`lopt plan`: table, pictures, proposal, and what it says of mistakes."""

from __future__ import annotations

import json
import re
import shlex
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from lopt.cli.main import main
from lopt.cli.parsing import parse
from lopt.cli.plan import command, command_of, size_in_bytes
from lopt.cli.report_flags import PlanArguments
from lopt.models.shapes import model_config
from lopt.planning.plan import RESERVE, Planner
from lopt.planning.run import Run, Setting
from lopt.planning.search import search

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    LlamaConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=1024,
    ).save_pretrained(path)  # fmt: skip
    return str(path)


def plan(*flags: object) -> int:
    return main(["plan", *map(str, flags)])


def test_table_bars_and_files(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = ("--json", tmp_path / "plan.json", "--svg", tmp_path / "plan.svg")
    small = ("--per_device_train_batch_size", 2, "--max_length", 128)
    assert plan("--model_name_or_path", folder, *small, "--num_blocks", 2, 3, *files) == 0
    out = capsys.readouterr().out
    names = ["e2e", "e2e, checkpointed"]
    for k in (2, 3):
        rows = ("", ", checkpointed", ", block-major", ", offload optimizer", ", offload block")
        names += [f"k={k}{row}" for row in rows]
    plans = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert [row["name"] for row in plans] == names
    table, bars, times, hiding = out.split("\n\n")[1:5]
    assert max(map(len, out.splitlines()[1:])) <= 120  # the first line has the folder's name
    for text in (table, bars, times):
        assert [name for line in text.splitlines() if (name := line[:24].strip()) in names] == names
    totals = {row["name"]: row["total"] for row in plans}
    assert totals["k=3, block-major"] < totals["k=2, block-major"] < totals["k=2"] < totals["e2e"]
    for row in plans:
        assert sum(row["peak"].values()) == row["total"]
    longest = max(bars.splitlines()[:-1], key=len)
    assert longest.startswith("e2e ") and set(longest[24:].split()[0]) == set("WGOAH")
    assert "Copies can hide" in hiding and "--offload block" in hiding and "tokens a step on" in hiding
    row = next(line for line in table.splitlines() if line.startswith("k=3, block-major"))
    last = plans[names.index("k=3, block-major")]
    shown = [float(number) for number in row[24:].replace("-", "0").split()]
    assert shown[6] == round(last["total"] / GIB, 1)
    row = next(line for line in times.splitlines() if line.startswith("k=3, block-major"))
    predicted = last["predicted"]
    assert row.split()[-1] == predicted["bound"] == "compute"
    tokens = 2 * 128 * 8
    assert predicted["tokens_per_second"] == pytest.approx(tokens / predicted["seconds"])
    assert f"{predicted['tokens_per_second']:,.0f}" in row
    svg = ET.fromstring((tmp_path / "plan.svg").read_text())
    shown = " ".join("".join(element.itertext()) for element in svg.iter() if element.tag.endswith("text"))
    for name in [*names, "weights", "gradients", "optimizer", "activations", "head and loss"]:
        assert name in shown


def flags_of(text: str) -> dict[str, str]:
    """The flags of a printed `lopt sft` command."""
    words = shlex.split(text.replace("\\\n", " "))
    assert words[:2] == ["lopt", "sft"]
    return dict(zip(words[2::2], words[3::2], strict=True))


@pytest.mark.parametrize("method", ["lopt", "e2e", "frozen", "lora"])
def test_the_printed_command_is_accepted(folder: str, method: Any) -> None:
    """Of every method, with flags that belong to some of the methods only."""
    args = PlanArguments(
        model_name_or_path=folder, method=["lopt", "e2e", "frozen", "lora"], frozen_blocks=2, local_every=4,
        aux_loss="next_token", lora_r=8, clip="global", tied_embeddings="freeze", use_cpu=True,
    )  # fmt: skip
    k = 1 if method in ("e2e", "lora") else 4
    settings = [Setting(method, k), Setting(method, k, "block_major", True, "block", 6, None, "cpu")]
    for setting in settings:
        words = shlex.split(command_of(setting, args, 1, GIB).replace("\\\n", " "))
        assert words[:2] == ["lopt", "sft"]
        *_, config, _ = parse("sft", words[2:])
        assert (config.method, config.block_count, config.stages) == (method, k, setting.stages)
        learned = (2, 4, "next_token") if method == "lopt" else (0, 1, "recon")
        assert (config.frozen_blocks, config.local_every, config.aux_loss) == learned
        assert ("--lora_r" in words) == (method == "lora") and config.clip == "global"


def test_fit_takes_the_fastest_that_fits(folder: str) -> None:
    args = PlanArguments(model_name_or_path=folder, max_length=128, use_cpu=True)
    config = model_config(folder)
    planner = Planner(Run(config, tokens=128, dtype=torch.float32, autocast=False, device="cpu"))

    def proposed(limit: int) -> tuple[str, dict[str, str]]:
        plan = search(planner, [2, 3], limit)
        assert plan.total <= limit
        return str(plan.setting), flags_of(command(plan, args, plan.peak.transfers))

    def total(setting: Setting) -> int:
        return planner.plan(setting).total

    name, flags = proposed(total(Setting("e2e", 1)) * 2)  # room for all: the simplest
    assert name == "k=2" and "--schedule" not in flags and "--gradient_checkpointing" not in flags
    staged = Setting(num_blocks=3, schedule="block_major")
    name, flags = proposed(total(staged))
    assert name == "k=3, block-major" and flags["--schedule"] == "block_major" and "--offload" not in flags
    assert flags["--num_blocks"] == "3" and flags["--use_cpu"] == "True" and flags["--max_length"] == "128"
    with pytest.raises(ValueError, match=r"nothing fits into .* The smallest is k=.*`per_device_train"):
        proposed(1000)
    on_gpu = Planner(replace(planner.run, device="cuda"))
    limit = on_gpu.plan(Setting(num_blocks=2)).total + RESERVE
    assert str(search(on_gpu, [2], limit).setting) == "k=2"
    assert str(search(on_gpu, [2], limit - 1).setting) != "k=2"
    offloaded = on_gpu.plan(replace(staged, offload="optimizer"))
    limit = offloaded.total + RESERVE
    assert search(on_gpu, [2, 3], limit).setting.offload != "none"
    assert search(on_gpu, [2, 3], limit, host_limit=offloaded.host).host <= offloaded.host
    with pytest.raises(
        ValueError, match=r"`host_memory`: nothing .* into 1\.0 KiB of .* smallest there is k="
    ):
        search(on_gpu, [2, 3], limit, host_limit=1024)
    with pytest.raises(ValueError, match=r"1\.0 GiB is left for CUDA"):
        search(on_gpu, [2], RESERVE)


def test_fit_of_a_large_model(capsys: pytest.CaptureFixture) -> None:
    """A GPU too small for the optimizer's state: it is offloaded, and room that is left is used."""
    assert plan(
        "--model_name_or_path", "qwen2.5-7b", "--param_dtype", "bfloat16", "--fit", "24GiB",
        "--num_blocks", 4, "--max_length", 512,
    ) == 0  # fmt: skip
    head, _, line = capsys.readouterr().out.partition("The fastest that fits")[2].partition("\n\n")
    flags = flags_of(line)
    assert "into 24.0 GiB: k=4, offload" in head and flags["--offload"] in ("optimizer", "block")
    assert float(flags["--prefetch_gib"]) > 2 and flags["--param_dtype"] == "bfloat16"


def test_the_printed_command_runs(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    """In as much memory as was asked for, from the folder where the data is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text((json.dumps({"prompt": "?", "completion": "!" * 40}) + "\n") * 8)
    flags = ("--model_name_or_path", tiny_folder, "--max_length", 32, "--use_cpu", "--num_blocks", 4)
    flags += ("--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 1)
    assert plan(*flags, "--json", "plan.json") == 0
    totals = {p["name"]: p["total"] for p in json.loads(Path("plan.json").read_text())["plans"]}
    limit = totals["k=4, block-major"] / GIB  # host and device are one: nothing to offload
    capsys.readouterr()
    assert plan(*flags, "--fit", f"{1.001 * limit:.9f}") == 0
    line = capsys.readouterr().out.partition("lopt sft ")[2].replace("\\\n", " ")
    assert "--schedule block_major" in line and "--offload" not in line
    more = ["--max_steps", "2", "--report_to", "none", "--logging_steps", "1"]
    assert main(["sft", *shlex.split(line), *more]) == 0
    state = json.loads(Path("outputs/run/trainer_state.json").read_text())
    peak = max(row.get("peak_memory_gib", 0) for row in state["log_history"])
    assert 0.5 * limit < peak <= 1.02 * limit


def test_calibrate(folder: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--model_name_or_path", folder, "--num_blocks", 3, "--max_length", 64, "--use_cpu")
    flags += ("--gradient_accumulation_steps", 1, "--calibrate")
    offloaded = ("--schedule", "block_major", "--offload", "block", "--gradient_checkpointing", "true")
    monkeypatch.setattr("lopt.cli.plan.TIMED", 1)
    for more in ((), offloaded):
        assert plan(*flags, *more) == 0
        out = capsys.readouterr().out
        total = next(line for line in out.splitlines() if line.strip().startswith("total"))
        assert abs(float(total.partition("(")[2].partition("%")[0])) < 5
        assert re.search(r"a step +predicted +\S+ s, measured +\S+ s", out)
    given = re.search(r"--tflops (\S+) \S+ \S+ --bandwidth \S+ \S+ --host_gbps \S+$", out.strip())
    assert given is not None and float(given[1]) > 0
    assert plan(*flags, "--tflops", 1) == 2
    assert "--tflops must be left out with --calibrate" in capsys.readouterr().err
    monkeypatch.setattr("lopt.cli.plan.free_memory", lambda device: 10**6)
    assert plan(*flags) == 2
    assert "--calibrate would run k=3" in capsys.readouterr().err


def test_fit_of_stages(capsys: pytest.CaptureFixture) -> None:
    """End to end on an 8 GB card: a command in which the flags of the schedule are given."""
    assert plan(
        "--model_name_or_path", "qwen2.5-7b", "--param_dtype", "bfloat16", "--method", "e2e",
        "--stages", 8, 30, "--fit", "8GB",
    ) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "e2e, 30 stages, offload block, host steps" in out and "40 GB/s of host memory" in out
    flags = flags_of(out[out.index("lopt sft ") :])
    wanted = dict(method="e2e", schedule="block_major", stages="30", offload="block", optimizer_device="cpu")
    assert wanted.items() <= {name.removeprefix("--"): value for name, value in flags.items()}.items()
    assert "--num_blocks" not in flags
    assert plan("--model_name_or_path", "qwen2.5-7b", "--method", "qlora") == 2
    assert "--method must be one of lopt, e2e, frozen, lora (got qlora)" in capsys.readouterr().err
    for more in (("--fit", "8GB"), ("--stages", 4)):
        assert plan("--model_name_or_path", "qwen2.5-7b", "--stage_layers", 1, *more) == 2
        said = f"--stage_layers cannot be combined with {more[0]}: leave it out, or give numbers of --stages"
        assert said in capsys.readouterr().err


def test_sizes() -> None:
    assert size_in_bytes("24GiB") == size_in_bytes("24") == size_in_bytes("24 g") == 24 * GIB
    assert size_in_bytes("80GB") == 80 * 10**9


def test_a_pipeline(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Ranks, links, boundaries, what it is compared with, and a command that cuts the model as planned."""
    small = ("--per_device_train_batch_size", 2, "--max_length", 128, "--use_cpu")
    slow = ("--link_gbps", 0.001, 10, "--latency_ms", 5, "--num_processes", 6, "--pipeline_depth", 4)
    file = tmp_path / "plan.json"
    flags = (*small, *slow, "--schedule", "pipeline", "--pipeline_size", 3, "--svg", tmp_path / "plan.svg")
    assert plan("--model_name_or_path", folder, *flags, "--json", file) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.partition("torchrun")[0].splitlines()[1:])) <= 120
    found = json.loads(file.read_text())["pipeline"]
    assert found["boundary"] == 2 * 128 * 256 * 4 and found["link_bytes"] == 8 * found["boundary"]
    assert [rank["ranks"] for rank in found["ranks"]] == [[0, 1], [2, 3], [4, 5]]
    assert found["tokens"] == 2 * 8 * 2 * 128
    shares = [rank["predicted"]["busy_share"] for rank in found["ranks"]]
    rows = [line.split() for line in out.splitlines() if re.match(r" *\d-\d ", line)]
    assert [row[-1] for row in rows] == [f"{share:.0%}" for share in shares]
    assert found["predicted"]["bound"] == "link" and "bound by the link" in out and max(shares) < 0.95
    assert "The links cost time" in out and "2.1 GB" not in out and "0.262 MB a micro-batch" in out
    assert [other["name"] for other in found["end_to_end"]] == ["FSDP2", "1F1B", "zero bubble"]
    words = shlex.split(out[out.index("torchrun") :].replace("\\\n", " "))
    assert words[:6] == ["torchrun", "--nproc_per_node", "6", "--no-python", "lopt", "sft"]
    starts = [str(start) for start in found["setting"]["block_boundaries"]]
    at = words.index("--block_boundaries")
    assert words[at + 1 : at + 3] == starts and words[words.index("--pipeline_depth") + 1] == "4"
    assert (
        words[words.index("--num_blocks") + 1] == "3" and "--pipeline_size" not in words
    )  # as many as blocks
    assert "rank 4-5" in (tmp_path / "plan.svg").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedule", "pipeline"], "--pipeline_size must be given"),
        (["--schedule", "pipeline", "--pipeline_size", "1"], "--pipeline_size must be >= 2"),
        (
            ["--schedule", "pipeline", "--pipeline_size", "2", "--method", "e2e"],
            "--method must be one of lopt",
        ),
        (["--schedule", "pipeline", "--pipeline_size", "2", "--num_processes", "3"], "multiple of 2"),
        (["--schedule", "pipeline", "--pipeline_size", "2", "--fit", "8GiB"], "--fit must be left out"),
        (["--schedule", "pipeline", "--pipeline_size", "2", "--clip", "global"], "--clip global waits"),
        (["--schedule", "pipeline", "--pipeline_size", "7"], "--num_blocks must be <= 6"),
        (["--latency_ms", "3"], "--latency_ms must be given with --schedule pipeline"),
        (["--block_boundaries", "3"], "--block_boundaries must be given with --schedule pipeline"),
        (["--num_processes", "2", "--link_gbps", "1", "2"], "--link_gbps must be one number"),
        (["--fsdp2"], "--fsdp2 must be given with --num_processes"),
        (["--fsdp2", "--num_processes", "2", "--stages", "4"], "--stages must be left out with --fsdp2"),
    ],
)
def test_mistakes_about_several_processes(
    folder: str, flags: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert plan("--model_name_or_path", folder, *flags) != 0
    assert message in capsys.readouterr().err


def test_fsdp2(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ("--max_length", 128, "--use_cpu", "--num_processes", 4, "--fsdp2", "--num_blocks", 2)
    assert (
        plan("--model_name_or_path", folder, *flags, "--fit", "8GiB", "--json", tmp_path / "plan.json") == 0
    )
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert [row["name"] for row in rows] == ["e2e", "e2e, checkpointed", "k=2", "k=2, checkpointed"]
    assert all(row["sent"] > 0 for row in rows) and "4 processes by FSDP2" in out and "sent GB" in out
    assert "accelerate launch --config_file examples/fsdp2.yaml --num_processes 4 --no_python lopt sft" in out
