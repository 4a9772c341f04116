"""SIGTERM at random moments of each phase of `lopt sft`, also in stages or a pipeline, and of `lopt grpo`.

    python benchmarks/stop.py --moments 50               # of each phase, into benchmarks/results/stop.json
    python benchmarks/stop.py --moments 2 --phases data saving --output /tmp/stop.json

A moment is drawn uniformly over the time that a whole run spends in the phase; each run is resumed to its
end. What has to hold: exit code 75, or 0 of a run that had nothing left to do but to end, which then has its
weights at once; no checkpoint that is not whole, and in the end the weights of the run that nobody stopped. A
run is a process forked off this one, which has imported everything already. Of a pipeline one random rank
gets the signal, and all have to end alike. Interrupted itself, the script goes on where it was.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from kill import weights

import lopt.cli.grpo
import lopt.cli.sft
import lopt.trainers.events
from lopt.cli.main import main as lopt_main
from lopt.evaluation.retention_callback import RetentionCallback
from lopt.reliability.checkpoint import checkpoints, damage
from lopt.reliability.stop import EXIT_STOPPED
from lopt.trainers import LoPTGRPOTrainer, LoPTSFTTrainer
from small_model import byte_tokenizer, flags, fork_ranks, keep, tiny_llama

LONGEST = 60.0
LEFT = 128

COMMON = """--max_steps 4 --save_steps 1 --learning_rate 1e-2 --per_device_train_batch_size 2
    --gradient_accumulation_steps 2 --use_cpu --disable_tqdm true --logging_steps 1"""
BLOCKS = "--num_blocks 2 --head_warmup_steps 8"
SFT = """--held_out 8 --eval_strategy steps --eval_steps 1 --per_device_eval_batch_size 1 --retention_every 1
    --retention_tokens 512"""
STAGES = "--method e2e --schedule block_major --stages 4 --offload block --optimizer_device cpu"
PIPELINE = "--num_blocks 3 --head_warmup_steps 8 --schedule pipeline"
RANKS = {"pipeline": 3}
GRPO = "--task gsm8k --num_generations 2 --max_completion_length 12 --num_iterations 2"

# Phase -> job, and where it is: the owner of a function and its name.
PHASES: dict[str, tuple[str, Any, str]] = {
    "data": ("sft", lopt.cli.sft, "sft_rows"),
    "tokenizing": ("sft", LoPTSFTTrainer, "_prepare_dataset"),
    "head warm-up": ("sft", lopt.trainers.events, "warm_up_heads"),
    "training": ("sft", LoPTSFTTrainer, "training_step"),
    "evaluation": ("sft", LoPTSFTTrainer, "evaluate"),
    "retention": ("sft", RetentionCallback, "_losses"),
    "saving": ("sft", LoPTSFTTrainer, "_save_checkpoint"),
    "last model": ("sft", LoPTSFTTrainer, "save_model"),
    "training in stages": ("stages", LoPTSFTTrainer, "training_step"),
    "saving in stages": ("stages", LoPTSFTTrainer, "_save_checkpoint"),
    "training in a pipeline": ("pipeline", LoPTSFTTrainer, "training_step"),
    "saving in a pipeline": ("pipeline", LoPTSFTTrainer, "_save_checkpoint"),
    "generation": ("grpo", LoPTGRPOTrainer, "_generate_and_score_completions"),
}


@dataclass
class Job:
    """A command on little data.

    Attributes:
        name: as in `PHASES`.
        arguments: the command line but for the output folder.
        seconds: that a whole run spends in each phase.
        weights: SHA-256 of what a whole run ends with.
    """

    name: str
    arguments: list[str]
    seconds: dict[str, float]
    weights: str = ""


def jobs(folder: Path) -> dict[str, Job]:
    """A tiny model, two dozen rows, and command lines of SFT, in stages, in a pipeline, and GRPO."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"question": f"What is {i}?", "answer": f"It is {i}. " * (i % 4 + 1) + f"#### {i}"} for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    common = [f"--model_name_or_path={folder}/model", f"--train_file={folder}/rows.jsonl", *COMMON.split()]
    blocks, text = BLOCKS.split(), f"--retention_text={folder}/text.txt"
    lines = {
        "sft": ["sft", *common, *blocks, text, *SFT.split()],
        "stages": ["sft", *common, *STAGES.split()],
        "pipeline": ["sft", *common, *PIPELINE.split()],
        "grpo": ["grpo", *common, *blocks, *GRPO.split()],
    }
    return {name: Job(name, line, {}) for name, line in lines.items()}


def mark(job: str, told: int) -> None:
    """From now on, entering and leaving a phase is told on the pipe `told`: its number, or 128 more."""
    for number, (of, owner, name) in enumerate(PHASES.values()):
        if of == job:
            setattr(owner, name, _marked(getattr(owner, name), number, told))


def _marked(function: Callable[..., Any], number: int, told: int) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        os.write(told, bytes([number]))
        try:
            return function(*args, **kwargs)
        finally:
            os.write(told, bytes([number + LEFT]))

    return marked


def start(job: Job, arguments: list[str], folder: Path, told: int, telling: int) -> list[int]:
    """Fork a process per rank that runs the job, of which rank `telling` tells; returns their ids."""

    def run(rank: int) -> int:
        if rank == telling:
            mark(job.name, told)
        return lopt_main([*arguments, "--output_dir", str(folder)])

    return fork_ranks(RANKS.get(job.name, 1), lambda rank: folder.with_suffix(".log"), run)


class Clock:
    """Seconds spent in each phase."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PHASES, 0.0)
        self.entered: dict[str, float] = {}

    def note(self, marked: int) -> None:
        """A byte from the pipe."""
        phase = list(PHASES)[marked % LEFT]
        if marked < LEFT:
            self.entered[phase] = time.monotonic()
        elif phase in self.entered:
            self.spent[phase] += time.monotonic() - self.entered.pop(phase)

    def until(self, phase: str, moment: float) -> float | None:
        """Seconds until so many have been spent in the phase, if it goes on; None if it is not in it."""
        if phase not in self.entered:
            return None
        return max(moment - self.spent[phase] - (time.monotonic() - self.entered[phase]), 0)


def run(
    job: Job,
    arguments: list[str],
    folder: Path,
    stop_at: tuple[str, float] | None = None,
    telling: int = 0,
) -> tuple[int, dict[str, float], float | None]:
    """One run, to its end.

    Args:
        stop_at: send SIGTERM when it has spent so many seconds in that phase.
        telling: the rank that is meant.

    Returns:
        Exit code (-1: ranks have ended in different ways), seconds spent in each phase, seconds from the
        signal to the end (None: it was not sent).
    """
    listen, told = os.pipe()
    children = start(job, arguments, folder, told, telling)
    os.close(told)
    clock, sent = Clock(), None
    while True:
        left = clock.until(*stop_at) if stop_at is not None and sent is None else None
        if select.select([listen], [], [], LONGEST if left is None else left)[0]:
            marked = os.read(listen, 1)
            if not marked:
                break
            clock.note(marked[0])
        elif left is not None:
            os.kill(children[telling], signal.SIGTERM)
            sent = time.monotonic()
        else:
            for child in children:
                os.kill(child, signal.SIGKILL)
            raise RuntimeError(f"{job.name}: nothing happens for {LONGEST:g} s, see {folder}.log")
    os.close(listen)
    codes = {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
    return (
        codes.pop() if len(codes) == 1 else -1,
        clock.spent,
        None if sent is None else time.monotonic() - sent,
    )


def whole_run(job: Job, folder: Path) -> None:
    """What a run that nobody stops ends with, and its time in each phase."""
    code, job.seconds, _ = run(job, job.arguments, folder)
    if code != 0:
        log = folder.with_suffix(".log").read_text()
        raise RuntimeError(f"{job.name}: the whole run failed\n{log[-3000:]}")
    job.weights = weights(folder)


def stopped_run(job: Job, folder: Path, phase: str, draw: random.Random) -> dict[str, Any]:
    """One run: stopped at a moment of the phase, looked at, resumed to its end."""
    moment, telling = draw.uniform(0, job.seconds[phase]), 0
    if job.name in RANKS:
        telling = draw.randrange(RANKS[job.name])
    code, spent, took = run(job, job.arguments, folder, (phase, moment), telling)
    if took is None:  # it was faster than the whole run and is done
        job.seconds[phase] = spent[phase]
        shutil.rmtree(folder)
        return stopped_run(job, folder, phase, draw)
    there = checkpoints(folder)
    result = {
        "moment": round(moment, 3),
        "rank": telling,
        "exit_code": code,
        "seconds": round(took, 3),
        "checkpoints": {path.name: damage(path) for path in there},
    }
    result["finished"] = code == 0
    again = code and run(job, [*job.arguments, *(["--resume"] if there else [])], folder)[0]
    result["identical"] = again == 0 and weights(folder) == job.weights
    if not result["identical"] or code not in (0, EXIT_STOPPED):
        result["log"] = folder.with_suffix(".log").read_text()[-2000:]
    shutil.rmtree(folder)
    folder.with_suffix(".log").unlink()
    return result


def run_phase(
    phase: str,
    moments: int,
    made: dict[str, Job],
    done: dict[str, Any],
    scratch: Path,
    save: Callable[[], None],
) -> None:
    """Add stopped runs of one phase until there are so many."""
    runs, job = done.setdefault(phase, []), made[PHASES[phase][0]]
    if len(runs) < moments and not job.weights:
        whole_run(job, scratch / f"whole-{job.name}")
    while len(runs) < moments:
        draw = random.Random(f"{phase} {len(runs)}")
        runs.append(stopped_run(job, scratch / f"run-{len(runs)}", phase, draw))
        save()
        told = {k: runs[-1][k] for k in ("exit_code", "seconds", "identical")}
        print(f"{phase} {len(runs)}: {told}", flush=True)


def summary(phases: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The counts that matter, by phase."""
    return {
        phase: {
            "moments": len(runs),
            "exit_code_75": sum(run["exit_code"] == EXIT_STOPPED for run in runs),
            "finished": sum(run.get("finished", False) for run in runs),
            "identical": sum(run["identical"] for run in runs),
            "damaged_checkpoints": sum(
                why is not None for run in runs for why in run["checkpoints"].values()
            ),
            "longest_seconds": max(run["seconds"] for run in runs),
        }
        for phase, runs in phases.items()
        if runs
    }


def main() -> None:
    parser = flags(__doc__, "stop.json")
    parser.add_argument("--moments", type=int, default=50, help="of each phase")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"phases": {}}

    def save() -> None:
        results["summary"] = summary(results["phases"])
        keep(arguments.output, results)

    with tempfile.TemporaryDirectory() as scratch:
        made = jobs(Path(scratch))
        for phase in arguments.phases:
            run_phase(phase, arguments.moments, made, results["phases"], Path(scratch), save)
    print(json.dumps(results["summary"], indent=2))


if __name__ == "__main__":
    main()
