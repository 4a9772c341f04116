"""Every command of docs/commands.md, run as it is written.

Replaced are only the model (a small local one), the data (a local copy in the preset's own columns),
the number of processes (2) and the number of steps.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import forked
from conftest import save_tiny
from page_commands import ROOT, commands

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SUMS = [(f"What is {a} plus {b}?", a + b) for a in range(6) for b in range(6)]
ROWS = {
    "metamathqa": [{"query": q, "response": f"It is {s}.", "type": "x"} for q, s in SUMS],
    "alpaca": [{"instruction": q, "input": "", "output": str(s)} for q, s in SUMS],
    "tulu3": [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": str(s)}]}
        for q, s in SUMS
    ],
    "gsm8k": [{"question": q, "answer": f"Add them.\n#### {s}"} for q, s in SUMS],
    "numinamath": [{"problem": q, "solution": f"It is $\\boxed{{{s}}}$."} for q, s in SUMS],
}


def name_of(words: list[str]) -> str:
    return Path(words[words.index("--output_dir") + 1]).name


def test_the_page_holds_the_published_commands() -> None:
    seed = ROOT.parent / "shared/seeds/004_518a3f11fcc83294.txt"
    if not seed.is_file():
        pytest.skip(f"{seed.name}, the published page, is not here")
    published = " ".join(seed.read_text().replace("\\\n", " ").split())
    assert len(commands()) == 11
    for words in commands():
        assert " ".join(words) in published, name_of(words)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    save_tiny(folder / "model", chat_template=CHAT)
    # Many tokens end a completion, or a random model would write to the limit every time.
    GenerationConfig(eos_token_id=[2, *range(3, 67)]).save_pretrained(folder / "model")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    # What `accelerate config` leaves behind on a machine with several devices.
    (folder / "home/accelerate").mkdir(parents=True)
    (folder / "home/accelerate/default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: 'no'\n"
        "num_machines: 1\nnum_processes: 8\n"
    )
    return folder


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
    "python": [],
}


def adapted(words: list[str], place: Path) -> tuple[list[str], list[str]]:
    """The command with this machine's model, data, processes and steps: what launches it, and the rest."""
    script = next(number for number, word in enumerate(words) if word in ("train_sft.py", "train_grpo.py"))
    launcher, words = words[:script], [str(ROOT / words[script]), *words[script + 1 :]]
    if launcher[0].startswith("CUDA_VISIBLE_DEVICES"):
        launcher = launcher[1:]
    launcher = [sys.executable, *LAUNCHERS[launcher[0]], *launcher[1:]]
    for flag in ("--nproc_per_node", "--num_processes"):
        if flag in launcher:
            launcher[launcher.index(flag) + 1] = "2"
    if "--max_steps" not in words:
        words += ["--max_steps", "1"]
    words[words.index("--max_steps") + 1] = "1"
    words[words.index("--model_name_or_path") + 1] = str(place / "model")
    data = words[words.index("--dataset_preset" if "--dataset_preset" in words else "--task") + 1]
    return launcher, [*words, "--train_file", str(place / f"{data}.jsonl"), "--head_warmup_steps", "2"]


@pytest.fixture(scope="module")
def printed(place: Path) -> dict[str, str]:
    """What each command prints, of all its processes.

    The first command of each launcher is run by it, the others in forks that have its environment: importing
    the libraries takes longer than a step of this model.
    """
    own = {
        "HF_HOME": str(place / "home"),
        "LOPT_CACHE": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    launched: list[list[str]] = [[sys.executable]]  # a script alone is launched by no launcher
    jobs, out = list[forked.Job](), dict[str, str]()
    for command in commands():
        launcher, words = adapted(command, place)
        if launcher in launched:
            jobs.append((name_of(command), words, 2 * (len(launcher) > 1)))
            continue
        launched.append(launcher)
        run = subprocess.run(
            [*launcher, *words], cwd=place, env=os.environ | own | {"PYTHONPATH": source},
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-5000:]
        out[name_of(command)] = run.stdout
    assert len(launched) == 3 and len(jobs) == 9
    return out | forked.run_all(place, jobs, cwd=place, **own)


@pytest.mark.parametrize("words", commands(), ids=name_of)
def test_command(words: list[str], place: Path, printed: dict[str, str]) -> None:
    folder = place / "outputs" / name_of(words)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    method = json.loads((folder / "lopt_config.json").read_text())
    assert method["method"] == ("e2e" if "e2e" in words else "lopt")
    if "--num_blocks" in words:
        assert method["num_blocks"] == int(words[words.index("--num_blocks") + 1])
    AutoTokenizer.from_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    assert printed[name_of(words)].count("step 1 of 1 ──") == 1  # said once, not by every rank


def test_downloads_without_a_connection_say_what_to_do(place: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1",
        "LOPT_CACHE": str(place / "cache"),
    }  # fmt: skip
    page = (ROOT / "docs/commands.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("python scripts/download_datasets.py")]
    assert len(lines) == 2
    for line in lines:
        run = subprocess.run(
            [sys.executable, str(ROOT / "scripts/download_datasets.py"), *shlex.split(line)[2:]],
            cwd=place, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert (
            run.returncode == 2
            and "not downloaded: metamathqa" in run.stderr
            and "with a local copy" in run.stdout
        )
