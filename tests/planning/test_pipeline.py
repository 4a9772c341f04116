"""Plans of pipelines against live bytes of real ones, and how the model is cut."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pipeline_memory import CASES, compare
from transformers import LlamaConfig

from lopt import LoPTConfig
from lopt.core.blocks import split
from lopt.planning.balance import balance
from lopt.planning.devices import Machine
from lopt.planning.end_to_end import rivals
from lopt.planning.pipeline import PipelinePlanner
from lopt.planning.plan import Planner
from lopt.planning.run import Run, Setting

CONFIG = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=9, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=8192, tie_word_embeddings=False,
)  # fmt: skip
RUN = Run(CONFIG, 2, 128, 4, torch.float32, autocast=False, device="cpu")
PLANNER = Planner(RUN)
MACHINE = Machine(tflops=(0.1,) * 3, link_gbps=1.0, beside=False)
PIPELINE = Setting("lopt", 3, "pipeline")


@pytest.mark.parametrize(
    "case",
    [
        "lopt-2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "lopt-2"),
    ],
)
def test_plan_and_live_bytes(case: str) -> None:
    for planned, real in compare("llama", CASES[case]):
        assert planned == pytest.approx(real, rel=0.03)


def test_boundaries_let_the_slowest_process_be_as_quick_as_can_be() -> None:
    """The LM head costs as much as several layers."""
    pipelines = PipelinePlanner(PLANNER)
    chosen = pipelines.balanced(PIPELINE, MACHINE)
    plan, even = pipelines.plan(chosen), pipelines.plan(PIPELINE)
    assert plan.work(MACHINE) < 0.9 * even.work(MACHINE)
    assert [rank.layers for rank in even.ranks] == split(9, LoPTConfig(num_blocks=3))
    every = (
        pipelines.plan(replace(PIPELINE, block_boundaries=(a, b)))
        for a in range(1, 8)
        for b in range(a + 1, 9)
    )
    assert plan.work(MACHINE) == pytest.approx(min(other.work(MACHINE) for other in every))
    assert chosen.block_boundaries == tuple(rank.layers[0] for rank in plan.ranks[1:])
    # Where only the last block learns, it is not cut short.
    frozen = pipelines.balanced(replace(PIPELINE, method="frozen"), MACHINE)
    assert frozen.block_boundaries == (3, 6)


def test_equal_processes_get_equal_parts() -> None:
    assert balance(10, [1, 1, 1, 1], lambda position, count: count) == [3, 3, 2, 2]
    assert balance(10, [1, 1, 4], lambda position, count: count + 5 * (position == 2)) == [3, 3, 4]


def test_what_passes_a_link_and_from_which_rate_on_it_hides() -> None:
    plan = PipelinePlanner(PLANNER).plan(PIPELINE)
    assert plan.boundary == 2 * 128 * 128 * 4 and plan.micro_batches == 4
    rate = plan.hidden_from(MACHINE)
    assert plan.hides(replace(MACHINE, link_gbps=rate)) and plan.bound(MACHINE) == "compute"
    slow = replace(MACHINE, link_gbps=0.9 * rate)
    assert plan.bound(slow) == "link" and plan.time(slow).seconds > 1.05 * plan.work(slow)
    assert plan.hidden_from(replace(MACHINE, latency=1.0)) == math.inf
    far = replace(MACHINE, latency=plan.work(MACHINE) / 8)
    assert plan.time(far, depth=1).seconds > plan.time(far, depth=4).seconds


def test_replicas_average_their_gradients() -> None:
    one, two = (PipelinePlanner(PLANNER, replicas).plan(PIPELINE) for replicas in (1, 2))
    assert two.tokens == 2 * one.tokens
    between = replace(MACHINE, replica_gbps=0.5)
    for alone, shared in zip(one.ranks, two.ranks, strict=True):
        gradients = sum(work.averaged for work in shared.work)  # 2 (N - 1) / N of them, with N = 2
        assert gradients == shared.peak.gradients or shared.peak.gradients == 0
        more = shared.seconds(between, 4) - alone.seconds(between, 4)
        assert more == pytest.approx(gradients / 0.5e9) and shared.peak == alone.peak


def test_end_to_end_on_as_many_devices() -> None:
    plan = PipelinePlanner(PLANNER).plan(PipelinePlanner(PLANNER).balanced(PIPELINE, MACHINE))
    fsdp2, one_f_one_b, zero = rivals(PLANNER, 3, 1, MACHINE, checkpointing=False)
    assert one_f_one_b.held == 3 and zero.held == 4  # of 4 micro-batches, where 5 are asked for
    assert zero.peak.total > one_f_one_b.peak.total
    assert plan.time(MACHINE).seconds < one_f_one_b.seconds and zero.seconds < one_f_one_b.seconds
    assert one_f_one_b.sent == 2 * 4 * plan.boundary
    assert fsdp2.tokens == 3 * RUN.batch * RUN.tokens and fsdp2.sent > one_f_one_b.sent
