"""Several ranks are one: the same losses, weights and heads as a single process on the same batches."""

from __future__ import annotations

import functools
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

import forked
from conftest import batch_of, tiny
from lopt import LoPTConfig, attach
from lopt.compat import replaced
from lopt.engine.reduction import GradientReduction, load_heads_optimizer, save_heads_optimizer

CASES = ["sft-lopt2", "sft-lopt4", "sft-e2e", "sft_empty-lopt2", "sft_empty-e2e", "grpo-lopt2", "grpo-e2e"]
# Block-major and the next-token loss are not for FSDP2.
DDP_ONLY = [
    "sft_empty-staged3",
    "grpo-staged3",
    "sft-host2",
    "sft_empty-next3",
    "lfm2-lopt2",
]
# As accelerate's launcher starts FSDP2 by default, with the weights of rank 0 alone.
OWN = {"ddp": DDP_ONLY, "fsdp2": ["sft-lopt2.launcher"]}
MODES = ["ddp", "fsdp2"] if Version(accelerate.__version__) >= Version("1.15") else ["ddp"]
ALL_REDUCE = dist.all_reduce
WORKER = Path(__file__).parents[1] / "ranks.py"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder / "tokenizer")
    jobs = [
        (f"{mode}.{ranks}", [str(WORKER), str(folder), mode, *CASES, *OWN[mode], "resume"], ranks)
        for mode, ranks in (("ddp", 1), *((mode, 2) for mode in MODES))
    ]
    forked.run_all(folder, jobs)
    said = [file.read_text() for file in folder.glob("*.err")]
    assert len(said) == sum(ranks for *_, ranks in jobs)
    assert not any("find_unused_parameters" in text for text in said), "DDP searched for them in vain"
    return folder


@pytest.mark.parametrize(("case", "mode"), [(case, mode) for mode in MODES for case in (*CASES, *OWN[mode])])
def test_two_ranks_are_one(outcomes: Path, case: str, mode: str) -> None:
    one, two = outcomes / f"{case.removesuffix('.launcher')}.ddp.1", outcomes / f"{case}.{mode}.2"
    weights, others = load_file(f"{one}.safetensors"), load_file(f"{two}.safetensors")
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        error = (value - others[name]).norm() / value.norm().clamp(min=1e-12)
        assert error < 1e-6, (name, float(error))
    logs, other_logs = (json.loads(Path(f"{stem}.json").read_text()) for stem in (one, two))
    for row, other in zip(logs, other_logs, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=2e-5, abs=2e-6)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_resume_is_bit_for_bit(outcomes: Path, mode: str) -> None:
    """Compared by the ranks themselves: `resume`, `checkpoints`, `one_root_and_clipped` in `ranks.py`."""
    assert (outcomes / f"resume.{mode}").is_file()


class LateAverage:
    """An all-reduce that takes until somebody waits for it, as a slow network's does."""

    def __init__(self, tensor: torch.Tensor, group: Any, async_op: bool) -> None:
        self.wait = functools.partial(ALL_REDUCE, tensor, group=group)


def accumulated(rank: int, once: bool = False, reduced: bool = True) -> list[torch.Tensor]:
    """Return the gradients of three micro-batches of a rank, as docs/howto/plain-loop.md has it."""
    torch.manual_seed(7)
    handle = attach(tiny("llama"), LoPTConfig(num_blocks=2))
    handle.loss_scale, last = 1 / 3, False
    if reduced:
        reduction = GradientReduction(handle, (lambda: last) if once else (lambda: True))
        model = DistributedDataParallel(handle.model)
    for slot in range(3):
        last = slot == 2
        rows = batch_of([5, 7], seed=3 * rank + slot)
        with model.no_sync() if reduced and once and not last else nullcontext():
            ((model if reduced else handle.model)(**rows).loss / 3).backward()
    if reduced:
        reduction.wait()
    return [p.grad for part in (handle.model, handle.heads) for p in part.parameters()]


def accumulate_on_two_ranks(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    alone = [accumulated(other, reduced=False) for other in (0, 1)]
    with replaced(dist, all_reduce=LateAverage):
        found = [accumulated(rank), accumulated(rank, once=True)]
    for averaged in found:
        for gradient, *others in zip(averaged, *alone, strict=True):
            torch.testing.assert_close(gradient, (others[0] + others[1]) / 2, rtol=1e-5, atol=1e-6)
    dist.destroy_process_group()


def test_gradients_of_several_micro_batches_are_averaged(tmp_path: Path) -> None:
    mp.start_processes(accumulate_on_two_ranks, (str(tmp_path / "store"),), nprocs=2, start_method="fork")


def test_the_state_of_heads_is_loaded_where_the_optimizer_keeps_it(tmp_path: Path) -> None:
    """A fused or capturable AdamW reads its step counter there; the rate is that of the checkpoint."""

    def make(device: str) -> torch.optim.Optimizer:
        groups = [
            {"params": [nn.Parameter(torch.ones(3, 2, device=device))], "heads": heads}
            for heads in (False, True)
        ]
        return torch.optim.AdamW(groups, lr=0.5, capturable=device == "meta", foreach=False)

    first, second = make("cpu"), make("meta")
    for group in first.param_groups:
        group["params"][0].grad = torch.ones(3, 2)
    first.step()
    first.param_groups[1]["lr"] = 0.1 / 3
    save_heads_optimizer(first, tmp_path)
    load_heads_optimizer(second, tmp_path)
    body, heads = second.param_groups
    assert body["lr"] == 0.5 and body["params"][0] not in second.state
    assert heads["lr"] == 0.1 / 3 and heads["capturable"]
    assert {key: value.device.type for key, value in second.state[heads["params"][0]].items()} == {
        "step": "meta", "exp_avg": "meta", "exp_avg_sq": "meta",
    }  # fmt: skip
    assert first.state.keys() == {group["params"][0] for group in first.param_groups}
    load_heads_optimizer(first, tmp_path)
    assert first.state[first.param_groups[1]["params"][0]]["step"] == 1


def test_the_runs_moved_the_weights(outcomes: Path) -> None:
    """Parity of two runs that did nothing would prove nothing."""
    from conftest import tiny

    before = dict(tiny("llama-tied", vocab_size=260, max_position_embeddings=256).named_parameters())
    for case in CASES:
        after = load_file(outcomes / f"{case}.ddp.1.safetensors")
        for name, value in before.items():
            assert not torch.equal(value, after[name]), (case, name)
