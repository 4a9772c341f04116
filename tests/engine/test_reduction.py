"""Several ranks are one: the same losses, weights and heads as a single process on the same batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

CASES = [f"{t}-{m}" for t in ("sft", "sft_empty", "grpo") for m in ("lopt2", "lopt4", "e2e")]
# Block-major and the next-token loss are not for FSDP2.
DDP_ONLY = [
    *(f"{t}-staged3" for t in ("sft", "sft_empty", "grpo")),
    "sft-next3",
    "sft_empty-next3",
    "lfm2-lopt2",
]
WORKER = Path(__file__).parents[1] / "ranks.py"


def launch(folder: Path, ranks: int, mode: str) -> None:
    paths = [str(WORKER.parent), str(WORKER.parents[1] / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    result = subprocess.run(
        [*torchrun, str(WORKER), str(folder), mode, *CASES, *(DDP_ONLY if mode == "ddp" else []), "resume"],
        env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-6000:]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder / "tokenizer")
    launch(folder, 1, "ddp")
    launch(folder, 2, "ddp")
    launch(folder, 2, "fsdp2")
    return folder


@pytest.mark.parametrize(
    ("case", "mode"), [*((c, m) for m in ("ddp", "fsdp2") for c in CASES), *((c, "ddp") for c in DDP_ONLY)]
)
def test_two_ranks_are_one(outcomes: Path, case: str, mode: str) -> None:
    one, two = outcomes / f"{case}.ddp.1", outcomes / f"{case}.{mode}.2"
    weights, others = load_file(f"{one}.safetensors"), load_file(f"{two}.safetensors")
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        error = (value - others[name]).norm() / value.norm().clamp(min=1e-12)
        assert error < 1e-6, (name, float(error))
    logs, other_logs = (json.loads(Path(f"{stem}.json").read_text()) for stem in (one, two))
    for row, other in zip(logs, other_logs, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=2e-5, abs=2e-6)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_resume_is_bit_for_bit(outcomes: Path, mode: str) -> None:
    """Compared by the ranks themselves, see `ranks.resume` and `ranks.checkpoints`."""
    assert (outcomes / f"resume.{mode}").is_file()


def test_the_runs_moved_the_weights(outcomes: Path) -> None:
    """Parity of two runs that did nothing would prove nothing."""
    from conftest import tiny

    before = dict(tiny("llama-tied", vocab_size=260, max_position_embeddings=256).named_parameters())
    for case in CASES:
        after = load_file(outcomes / f"{case}.ddp.1.safetensors")
        for name, value in before.items():
            assert not torch.equal(value, after[name]), (case, name)
