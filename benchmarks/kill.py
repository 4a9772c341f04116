"""Kill trainings by SIGKILL at random moments, resume them until they are done, compare the final weights.

    python benchmarks/kill.py --runs 50                  # of each kind, into benchmarks/results/kill.json
    python benchmarks/kill.py --runs 6 --kinds eager --output /tmp/kill.json

Each run is killed once or several times, at moments drawn uniformly over the time that a whole run takes
(which is measured anew every ten runs), and saves a checkpoint after every step, so that many kills meet it
while it writes. A run is a process forked off this one, which has imported everything already. Of a
"pipeline" one random rank is killed, and the others have to end by themselves, `LONGEST_END` seconds after it
at the latest; "pipeline_sizes" is resumed with 3, 2 or 1 ranks, and has no dropout, whose numbers depend on
that. Interrupted itself, the script goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from safetensors.torch import load_file

from lopt import LoPTConfig, LoPTGRPOTrainer, LoPTSFTTrainer
from lopt.engine import grid
from lopt.reliability.checkpoint import WRITING, checkpoints, choose, damage, recover
from lopt.trainers.config import LoPTGRPOConfig, LoPTSFTConfig
from lopt.trainers.pipeline import join_pipeline
from small_model import byte_tokenizer, flags, fork_ranks, keep, tiny_llama

KINDS = ("eager", "block_major", "stages", "grpo", "ranks", "pipeline", "pipeline_sizes")
RANKS = {"ranks": 2, "pipeline": 3, "pipeline_sizes": 3}
ON_RESUME = (3, 2, 1)
"""Ranks of `pipeline_sizes` when it is resumed; one of them is drawn."""
STEPS = 8
MEASURE_EVERY = 10
MOST_KILLS = 3
LONGEST_END = 10.0


def train(kind: str, folder: Path, steps: int, ranks: int) -> None:
    """One rank's training, from the newest whole checkpoint in `folder` if there is one, to a saved model."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = tiny_llama(len(tokenizer), dropout=0.0 if kind == "pipeline_sizes" else 0.2)
    block_major: dict[str, Any] = dict(schedule="block_major", offload="block")
    pipeline: dict[str, Any] = dict(schedule="pipeline", pipeline_size=ranks)
    staged = {
        "block_major": block_major,
        "stages": block_major | dict(method="e2e", stages=4, optimizer_device="cpu"),
        "pipeline": pipeline | dict(num_blocks=3),
        "pipeline_sizes": (pipeline if ranks > 1 else dict(schedule="block_major")) | dict(num_blocks=3),
    }.get(kind, {})
    config = LoPTConfig(**{"num_blocks": 2, "head_warmup_steps": 2} | staged)
    if config.schedule == "pipeline":
        grid.JOIN_TIMEOUT = timedelta(seconds=LONGEST_END / 2)
        join_pipeline(config)
    common: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=steps, save_steps=1, save_total_limit=2, learning_rate=1e-2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, disable_tqdm=True, report_to="none",
        use_cpu=True,
    )  # fmt: skip
    rest: dict[str, Any] = dict(lopt_config=config, processing_class=tokenizer)
    rows = [{"prompt": f"Question {i} ", "completion": "answer " * (i % 4 + 1)} for i in range(12)]
    trainer: Any
    if kind == "grpo":
        sizes = dict(num_generations=2, max_completion_length=4, steps_per_generation=2, num_iterations=2)
        trainer = LoPTGRPOTrainer(
            model, reward_funcs=_reward, args=LoPTGRPOConfig(**common, **sizes),
            train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]), **rest,
        )  # fmt: skip
    else:
        trainer = LoPTSFTTrainer(
            model, args=LoPTSFTConfig(**common), train_dataset=Dataset.from_list(rows), **rest
        )
    begun = trainer.accelerator.gather(torch.tensor([bool(checkpoints(folder))])).all()
    trainer.train(resume_from_checkpoint=bool(begun))
    trainer.save_model()
    grid.leave()


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def start(kind: str, folder: Path, steps: int, ranks: int) -> list[int]:
    """Fork a process per rank; returns their ids."""
    recover(folder)
    return fork_ranks(
        ranks, lambda rank: folder / f"log-{rank}.txt", lambda rank: train(kind, folder, steps, ranks)
    )


@dataclass
class End:
    """How the processes of a run have ended.

    Attributes:
        codes: Their exit codes, -9 of a killed one.
        seconds: From a kill to the end of the last one.
    """

    codes: list[int]
    seconds: float = 0.0


def finish(
    processes: list[int], kill_after: float | None = None, choose: Callable[[list[int]], list[int]] = list
) -> End:
    """Wait for all; kill those that `choose` names, of the ones that run after so many seconds."""
    began, codes, killed = time.monotonic(), dict.fromkeys(processes, 0), math.inf
    waiting = set(processes)
    while waiting:
        for process in list(waiting):
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(status)
                waiting.remove(process)
        if kill_after is not None and waiting and time.monotonic() - began >= kill_after:
            for process in choose(sorted(waiting)):
                os.kill(process, signal.SIGKILL)
            kill_after, killed = None, time.monotonic()
        if time.monotonic() - killed > 2 * LONGEST_END:  # they hang
            for process in waiting:
                os.kill(process, signal.SIGABRT)
            killed = math.inf
        time.sleep(0.002)
    return End(list(codes.values()), max(0.0, time.monotonic() - killed))


def weights(folder: Path) -> str:
    """SHA-256 of the final weights, in one file or in several."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= load_file(path)
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()


def logs(folder: Path) -> str:
    """Return the ends of what the processes of a run have printed."""
    return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("log-*.txt")))


def whole_run(kind: str, folder: Path, steps: int) -> tuple[str, float]:
    """An uninterrupted run: its weights and the seconds it takes."""
    folder.mkdir(parents=True)
    began = time.monotonic()
    if any(finish(start(kind, folder, steps, RANKS.get(kind, 1))).codes):
        raise RuntimeError(f"{kind}: the whole run failed\n{logs(folder)}")
    return weights(folder), time.monotonic() - began


def killed_run(kind: str, folder: Path, steps: int, duration: float, draw: random.Random) -> dict[str, Any]:
    """One run, killed once to `MOST_KILLS` times and resumed until it is done."""
    folder.mkdir(parents=True)
    kills: list[dict[str, Any]] = []
    wanted = draw.randint(1, MOST_KILLS)
    one, ranks = kind.startswith("pipeline"), RANKS.get(kind, 1)
    while True:
        after = draw.uniform(0, duration) if len(kills) < wanted else None
        if kind == "pipeline_sizes" and kills:
            ranks = draw.choice(ON_RESUME)
        began = time.monotonic()
        processes = start(kind, folder, steps, ranks)
        end = finish(processes, after, (lambda running: [draw.choice(running)]) if one else list)
        if not any(end.codes) and not kills:  # it was faster than the kill: that does not count
            duration = min(duration, time.monotonic() - began)
            shutil.rmtree(folder)
            folder.mkdir()
            continue
        if not any(end.codes):
            return {"kills": kills, "weights": weights(folder), "ranks": ranks}
        if -signal.SIGKILL not in end.codes or end.seconds > LONGEST_END or -signal.SIGABRT in end.codes:
            return {"kills": kills, "weights": None, "codes": end.codes, "error": logs(folder)}
        kills.append({"after_seconds": round(after or 0, 3), **_disk(folder)})
        if one:
            kills[-1] |= {"codes": end.codes, "ended_after_seconds": round(end.seconds, 3)}


def _disk(folder: Path) -> dict[str, Any]:
    """What a kill left."""
    found = {path.name: damage(path) for path in checkpoints(folder)}
    chosen = choose(folder).path
    return {
        "checkpoints": found,
        "writing": (folder / WRITING).exists(),
        "model": (folder / "config.json").exists(),
        "chosen": chosen.name if chosen is not None else None,
    }


def run_kind(kind: str, runs: int, steps: int, done: dict[str, Any], scratch: Path, save: Any) -> None:
    """Add runs of one kind until there are so many."""
    entry = done.setdefault(kind, {"steps": steps, "runs": []})
    if entry["steps"] != steps:
        raise ValueError(f"the results are of {entry['steps']} steps: choose another --output")
    while (number := len(entry["runs"])) < runs:
        if number % MEASURE_EVERY == 0 or "weights" not in entry:
            whole, entry["seconds"] = whole_run(kind, scratch / f"{kind}-whole-{number}", steps)
            if whole != entry.setdefault("weights", whole):
                raise RuntimeError(f"{kind}: two whole runs differ")
        folder, draw = scratch / f"{kind}-{number}", random.Random(f"{kind} {number}")
        result = killed_run(kind, folder, steps, entry["seconds"], draw)
        result["identical"] = result["weights"] == entry["weights"]
        entry["runs"].append(result)
        shutil.rmtree(folder)
        save()
        end = "identical" if result["identical"] else "DIFFERENT"
        print(kind, number, len(result["kills"]), "kills,", end, flush=True)


def summary(kinds: dict[str, Any]) -> dict[str, Any]:
    """The counts that matter."""
    runs = [run for entry in kinds.values() for run in entry["runs"]]
    kills = [kill for run in runs for kill in run["kills"]]
    ended = [kill["ended_after_seconds"] for kill in kills if "ended_after_seconds" in kill]
    longest = {"longest_end_of_the_others_seconds": max(ended)} if ended else {}
    return longest | {
        "runs": len(runs),
        "identical": sum(run["identical"] for run in runs),
        "kills": len(kills),
        "kills_before_the_first_checkpoint": sum(kill["chosen"] is None for kill in kills),
        "kills_while_writing": sum(kill["writing"] for kill in kills),
        "damaged_chosen": sum(
            kill["chosen"] is not None and kill["checkpoints"][kill["chosen"]] is not None for kill in kills
        ),
    }


def main() -> None:
    parser = flags(__doc__, "kill.json")
    parser.add_argument("--runs", type=int, default=50, help="of each kind")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps, and checkpoints, of a run")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"kinds": {}}

    def save() -> None:
        results["summary"] = summary(results["kinds"])
        keep(arguments.output, results)

    with tempfile.TemporaryDirectory() as scratch:
        for kind in arguments.kinds:
            run_kind(kind, arguments.runs, arguments.steps, results["kinds"], Path(scratch), save)
    print(json.dumps(results["summary"], indent=2))


if __name__ == "__main__":
    main()
