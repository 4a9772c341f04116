"""Plans of FSDP2: what is sharded, what is gathered, and (slow) live bytes of two processes."""

from __future__ import annotations

from dataclasses import replace

import fsdp2
import pytest
import torch

from lopt.planning.devices import Machine
from lopt.planning.plan import Planner
from lopt.planning.run import Run, Setting
from plan_accuracy import CONFIGS

WHOLE = Run(CONFIGS["llama"], 2, 128, 1, torch.float32, autocast=False, processes=4)
SHARDED = replace(WHOLE, fsdp2=True)
PLANNER = Planner(SHARDED)
E2E = Setting("e2e", 1)


def test_each_process_has_its_share_and_gathers_the_rest() -> None:
    plan, weights = PLANNER.plan(E2E), 4 * PLANNER.sizes.model
    assert plan.peak.weights == weights // 4 and plan.peak.optimizer == 2 * weights // 4
    assert plan.total < Planner(WHOLE, PLANNER).plan(E2E).total
    # Weights are gathered twice (those of norm and LM head once) and gradients scattered once: 3 of 4 parts
    # come from others, or go to them.
    tail = 4 * (512 * 128 + 128)
    assert plan.sent == pytest.approx(3 / 4 * (3 * weights - tail), rel=0.001)
    several = Planner(replace(SHARDED, accumulation=3), PLANNER).plan(E2E)
    assert several.sent == pytest.approx(3 / 4 * ((3 * 2 + 1) * weights - 3 * tail), rel=0.001)
    assert several.peak.gradients > 0.9 * weights  # whole until the last micro-batch
    frozen = PLANNER.plan(Setting("frozen", 2))
    assert frozen.sent < plan.sent and frozen.peak.optimizer < plan.peak.optimizer


def test_gathering_runs_beside_the_computation() -> None:
    plan, fast = PLANNER.plan(E2E), Machine(link_gbps=1e6)
    assert plan.time(fast).ranks == pytest.approx(0, abs=1e-6)
    slow = replace(fast, link_gbps=1e-3)
    time = plan.time(slow)
    assert time.seconds == pytest.approx(plan.sent / 1e6, rel=0.01) and time.bound == "ranks"


@pytest.mark.slow
@pytest.mark.parametrize("name", fsdp2.SETTINGS)
def test_plan_and_live_bytes(name: str) -> None:
    row = fsdp2.compare("llama", fsdp2.SETTINGS[name], 3)
    assert abs(row["bytes"]["off"]) < 0.03 and abs(row["sent"]["off"]) < 0.1
