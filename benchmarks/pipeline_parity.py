"""A run of `lopt sft` by one process and by a pipeline of several: the same losses, and the same weights?

Both train on the same rows by the command line, one in the block-major schedule, the other under torchrun
with `--schedule pipeline`: on CPUs over gloo, with `--device cuda` on one GPU each over NCCL. The losses of
every step and the largest relative difference of a weight tensor are kept.

    python benchmarks/pipeline_parity.py --model gemma3-270m --train_file gsm8k/train.jsonl
    python benchmarks/pipeline_parity.py --device cuda --processes 2 --model MODEL --train_file ROWS

It ends with exit code 1 if a difference is larger than 1e-6 on a CPU (none is expected) or 1e-5 on GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lopt.reliability.provenance import device
from small_model import flags, keep

TOLERANCE = {"cpu": 1e-6, "cuda": 1e-5}


def main() -> None:
    parser = flags(__doc__, "pipeline_parity.json")
    parser.add_argument("--device", choices=list(TOLERANCE), default="cpu")
    parser.add_argument("--processes", type=int, default=2, help="of the pipeline")
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--micro_batches", type=int, default=4, help="of an optimizer step")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.output.parent) as scratch:
        runs = {n: _run(args, n, Path(scratch) / f"of-{n}") for n in (1, args.processes)}
    one, several = runs.values()
    result = {
        "model": args.model,
        "processes": args.processes,
        "losses": {"one process": one["losses"], "pipeline": several["losses"]},
        "busy_share": several["busy"],
        "tensors": len(one["weights"]),
        "equal": all(torch.equal(one["weights"][name], w) for name, w in several["weights"].items()),
        "largest_relative_difference": max(
            ((one["weights"][name] - w).norm() / one["weights"][name].norm().clamp(min=1e-12)).item()
            for name, w in several["weights"].items()
        ),
    }
    print(json.dumps(result, indent=1))
    before = json.loads(args.output.read_text()) if args.output.exists() else {}
    keep(args.output, {**before, args.device: result | {"device": device()}})
    sys.exit(int(result["largest_relative_difference"] > TOLERANCE[args.device]))


def _run(args: Any, processes: int, folder: Path) -> dict[str, Any]:
    """Train with so many processes; return the losses of all steps, the shares and the weights."""
    settings = {
        "--model_name_or_path": args.model, "--train_file": args.train_file, "--output_dir": folder,
        "--num_blocks": max(2, args.processes), "--tied_embeddings": "freeze", "--max_length": 128,
        "--drop_long_rows": "true", "--max_samples": 1000, "--per_device_train_batch_size": 2,
        "--gradient_accumulation_steps": args.micro_batches, "--max_steps": args.steps, "--logging_steps": 1,
        "--head_warmup_steps": 4, "--save_strategy": "no", "--report_to": "none", "--bf16": "false",
        "--schedule": "block_major" if processes == 1 else "pipeline",
    }  # fmt: skip
    words = ["-m", "lopt.cli.main", "sft", *(str(word) for pair in settings.items() for word in pair)]
    words += ["--use_cpu", "true"] if args.device == "cpu" else []
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if args.device == "cpu" else None
    subprocess.run([sys.executable, *launcher, *words], check=True, env=environment)
    rows = [
        row for row in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in row
    ]
    weights: dict[str, Any] = {}
    for path in folder.glob("model*.safetensors"):
        weights |= load_file(path)
    shares = {k: v for k, v in rows[-1].items() if k.startswith("busy_share")}
    return {"losses": [row["loss"] for row in rows], "busy": shares, "weights": weights}


if __name__ == "__main__":
    main()
