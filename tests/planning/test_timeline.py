"""The time of a step against values computed by hand: a byte and an operation take a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from conftest import batch_of, tiny
from lopt import LoPTConfig, attach
from lopt.engine.host_transfer import HostTransfer
from lopt.engine.plain_loop import block_major
from lopt.planning.devices import DEVICES, HOST_GBPS, PCIE, REACHED, ROUNDED, Machine, machine_of
from lopt.planning.plan import Planner
from lopt.planning.run import Run, Setting
from lopt.planning.timeline import StepTime, Turn, Update, Work, _Clocks, _run, step_time, stored

SLOW = Machine((1e-12,) * 3, (1e-9, 1e-9), memory_gbps=1e-9, host_gbps=1e-9)
NO_BUS = replace(SLOW, bandwidth=(float("inf"),) * 2)


def work(turns: list[Turn], weights: tuple[int, ...] = (), host: tuple[int, ...] = ()) -> Work:
    """Stages of so many bytes of weights, whose steps in host memory take so many seconds."""
    count = 1 + max(turn.stage for turn in turns)
    groups = [[stored(size)] for size in weights or (0,) * count]
    updates = [[Update(seconds)] for seconds in host or (0,) * count]
    return Work(turns, groups, updates, {group: stage for stage, (group,) in enumerate(groups)})


def near(time: StepTime, **values: float) -> None:
    for name, value in values.items():
        assert getattr(time, name) == pytest.approx(value), name


def test_the_device_alone() -> None:
    """Operations by where they are done, the device's own step, and hidden states on the way."""
    machine = replace(SLOW, tflops=(1e-12, 0.5e-12, 0.25e-12))
    turns = [
        Turn(0, with_graph=False, flops=3),
        Turn(1, flops=2, head_flops=1, stash_in=4, stash_out=5, steps=True),
    ]
    plan = work(turns, host=(100, 7))
    near(step_time(plan, machine, 0), seconds=6 + 9 + 2 + 4 + 7, copies=9, host=0, bound="bus")
    cpu = replace(machine, beside=False, host_gbps=0.5e-9)  # it steps by the rate of its memory
    near(step_time(plan, cpu, 0), seconds=6 + 9 + 2 + 4 + 14)


def test_weights_come_in_beside_the_stage_before() -> None:
    turns = [Turn(0, following=1, flops=5), Turn(1, flops=5)]
    near(step_time(work(turns, (3, 4)), SLOW, 10), seconds=13, copies=3, bound="bus")
    near(step_time(work(turns, (3, 4)), SLOW, 0), seconds=17, copies=7)  # no room: only when it is needed
    short = [replace(turns[0], flops=2), turns[1]]
    near(step_time(work(short, (3, 4)), SLOW, 10), seconds=3 + 4 + 5, copies=5)


def test_what_the_device_steps_goes_back_and_is_waited_for() -> None:
    """Weights 3 in, work 5; of two parts of state (2, 4 in) the first comes meanwhile, budget 2."""
    updates = [[Update(1, state=stored(2)), Update(1, state=stored(4))]]
    weights, adapted = stored(3), stored(0)  # what does not learn stays as it is in host memory
    plan = Work([Turn(0, flops=5, steps=True, announced=True)], [[weights, adapted]], updates, {weights: 0})
    # 3 in, 8 worked, 9 stepped; 2 out until 11, 4 in until 15, 16 stepped; 4 out until 20, weights until 23.
    near(step_time(plan, SLOW, 2), seconds=23, copies=3 + 6 + 7)
    # All state is there in time: 10 stepped; 2 out from 9 until 11, 4 until 15, weights until 18.
    near(step_time(plan, SLOW, 10), seconds=18, copies=3 + 8)


def test_end_to_end_waits_for_what_is_stepped_last() -> None:
    """Clipped: both stages are handed over at the end, the first one first."""
    turns = [Turn(0, 1, False, flops=2), Turn(1, 0, flops=6), Turn(0, flops=4, handed_over=(0, 1))]
    near(
        step_time(work(turns, host=(3, 5)), NO_BUS, 10), seconds=12 + 3 + 3, host=6, stepping=8, bound="wait"
    )
    near(step_time(work(turns, host=(3, 1)), NO_BUS, 10), seconds=12 + 3, host=3)
    near(step_time(work(turns, host=(10, 20)), NO_BUS, 10), seconds=10 + 20 + 10, bound="host")
    free = [turns[0], replace(turns[1], handed_over=(1,)), replace(turns[2], handed_over=(0,))]
    near(step_time(work(free, host=(3, 4)), NO_BUS, 10), seconds=12 + 3, host=3)  # not clipped
    near(step_time(work(free, host=(3, 8)), NO_BUS, 10), seconds=12 + 3 + 4, host=7)


@pytest.mark.parametrize(("forward", "host"), [(2, 5), (5, 2)])
def test_end_to_end_by_formula(forward: int, host: int) -> None:
    stages = 4
    turns = [Turn(index, index + 1, False, flops=forward) for index in range(stages - 1)]
    turns += [Turn(stages - 1, stages - 2, flops=3 * forward)]
    turns += [
        Turn(index, index - 1 if index else None, flops=2 * forward) for index in range(stages - 2, -1, -1)
    ]
    turns[-1] = replace(turns[-1], handed_over=tuple(range(stages)))
    waits = host + (stages - 1) * max(0, host - forward)
    near(step_time(work(turns, host=(host,) * stages), NO_BUS, 100), host=waits)


def test_blocks_in_the_order_in_which_they_are_needed_wait_for_nothing() -> None:
    turns = [Turn(0, 1, flops=5, handed_over=(0,)), Turn(1, flops=5, handed_over=(1,))]
    near(step_time(work(turns, host=(5, 5)), NO_BUS, 10), seconds=10, host=0, bound="compute")
    near(step_time(work(turns, host=(7, 7)), NO_BUS, 10), seconds=14, host=4, bound="host")


def test_a_gradient_arrives_before_it_is_stepped() -> None:
    """Work 5, gradient 4 out, step 3; then weights 2 in."""
    turns = [Turn(0, flops=5, gradients_out=4, handed_over=(0,))]
    near(step_time(work(turns, (2,), host=(3,)), SLOW, 10), seconds=14, copies=6, host=3)


def test_gradients_are_averaged_over_processes() -> None:
    """Beside what the device has left to do, one after the other; in stages with nothing beside it."""
    one = replace(SLOW, link_gbps=1e-9)
    near(step_time(work([Turn(0, flops=6, averaged=((4, 3.0),))]), one, 0), seconds=7, ranks=1)
    both = Turn(1, flops=6, averaged=((1, 6.0), (4, 3.0), (3, 1.0)))
    near(step_time(work([both]), one, 0), seconds=10, ranks=4, bound="ranks")
    staged = [Turn(0, flops=6, averaged=((4, 0.0),), gradients_out=2, handed_over=(0,))]
    near(step_time(work(staged, host=(5,)), one, 0), seconds=6 + 4 + 2 + 5, ranks=4, host=5, copies=2)


def test_what_is_averaged() -> None:
    """A ring of four sends 1.5 times the gradients; an earlier block's begin when that block is done."""
    other = planner("llama")
    four = Planner(replace(other.run, processes=4), other)
    lopt = four.plan(Setting("lopt", 2))
    sizes = [block.gradients for block in four.sizes.blocks(LoPTConfig())]
    (averaged,) = [turn.averaged for turn in lopt.work.turns if turn.averaged]
    last = lopt.work.turns[1]
    whole = (last.flops + last.head_flops) / four.run.accumulation
    assert averaged == tuple((round(1.5 * n), w) for n, w in zip(sizes, (whole, whole * 2 / 3), strict=True))
    staged = four.plan(Setting("e2e", 1, "block_major", stages=6))
    assert sum(n for turn in staged.work.turns for n, _ in turn.averaged) == 1.5 * size_of(four)
    alone = other.plan(staged.setting)
    assert staged.time(Machine()).seconds > alone.time(Machine()).seconds and not alone.time(Machine()).ranks


def size_of(planner: Planner) -> int:
    return planner.sizes.model * planner.run.dtype.itemsize


def test_devices() -> None:
    for name, device in DEVICES.items():
        machine = machine_of(name)
        assert machine.tflops[0] == pytest.approx(REACHED * device.peak, abs=0.05)
        assert machine.bandwidth == (PCIE[device.pcie],) * 2 and device.source
        # Of cards that fit one machine: operations for each byte of their memory.
        assert 70 < 1000 * device.peak / device.memory_gbps < 450
    given = machine_of("h100", [1, 2, 3], [4], 5)
    assert given == Machine((1, 2, 3), (4, 4), 3350, 5, rounded=None, link_gbps=0.8 * 450)
    assert machine_of(on_gpu=False).beside is False and machine_of().host_gbps == HOST_GBPS
    assert machine_of().seconds_of_host_update(0, round(ROUNDED)) == 1


# -- the order of the engine -----------------------------------------------------------------------

HOST: dict[str, Any] = dict(offload="block", optimizer_device="cpu")


@contextmanager
def moves() -> Iterator[list[tuple[str, int]]]:
    """Bytes that are fetched, announced and released, in order, what follows of one kind together."""
    seen: list[tuple[str, int]] = []

    def note(kind: str, size: int) -> None:
        if size and seen and seen[-1][0] == kind:
            size += seen.pop()[1]
        seen.extend([(kind, size)] * (size > 0))

    real = {name: getattr(HostTransfer, name) for name in ("fetch", "prefetch", "release")}

    def fetch(transfer: Any, group: Any) -> None:
        needed = group.host is not None and group not in transfer._in_use
        real["fetch"](transfer, group)
        note("in", group.nbytes * needed)

    def prefetch(transfer: Any, groups: Any) -> None:
        groups = list(groups)
        real["prefetch"](transfer, groups)
        note("ahead", sum(group.nbytes for group in groups))

    def release(transfer: Any, group: Any, changed: bool = True) -> None:
        held = group.host is None or group in transfer._in_use
        real["release"](transfer, group, changed)
        note("out" if changed else "dropped", group.nbytes * held)

    with pytest.MonkeyPatch.context() as patch:
        for made in (fetch, prefetch, release):
            patch.setattr(HostTransfer, made.__name__, made)
        yield seen


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        (Setting("e2e", 1, stages=4, **HOST), dict(name="llama-tied")),
        (Setting("e2e", 1, stages=4, offload="block"), dict(name="llama-tied")),
        (Setting("e2e", 1, stages=4, **HOST), {}),
        (Setting("e2e", 1, stages=4, **HOST), dict(clips=False)),
        (Setting("e2e", 1, stages=4, offload="block"), {}),
        (Setting("e2e", 1, stages=3, offload="block"), dict(clips=False)),
        (Setting("lopt", 2, stages=4, **HOST), {}),
        (Setting("lopt", 2, offload="optimizer"), {}),
        (Setting("lopt", 2, stages=4, offload="block"), dict(clip="global")),
        (Setting("frozen", 2, stages=4, **HOST), {}),
    ],
    ids=lambda value: str(value) if isinstance(value, Setting) else str(value or ""),
)
def test_the_order_is_that_of_the_engine(setting: Setting, options: dict[str, Any]) -> None:
    size: dict[str, Any] = dict(name="llama", clips=True, clip="block") | options
    setting, name = replace(setting, schedule="block_major"), size.pop("name")
    model = tiny(name, num_hidden_layers=6)
    handle = attach(
        model,
        LoPTConfig(
            method=setting.method, num_blocks=setting.num_blocks, schedule="block_major",
            stages=setting.stages, offload=setting.offload, optimizer_device=setting.optimizer_device,
            clip=size["clip"], prefetch_gib=1,
        ),
    )  # fmt: skip
    norm = 1.0 if size["clips"] else float("inf")
    schedule = block_major(handle, handle.parameter_groups(1e-3), torch.optim.AdamW, max_norm=norm, threads=0)
    for _ in range(2):  # in the second one the optimizer's state is there
        with moves() as real:
            schedule.step(2, lambda slot: model(**batch_of([8, 8], seed=slot)).loss / 2)
    other = planner(name)
    plan = Planner(replace(other.run, config=model.config, **size), other).plan(setting)
    with moves() as planned:
        _run(plan.work, _Clocks(Machine(), 2**30))
    assert planned == real and {kind for kind, _ in real} >= {"in", "out"}


@cache
def planner(name: str) -> Planner:
    """One whose measurements all cases share."""
    config = tiny(name, num_hidden_layers=6).config
    return Planner(Run(config, 2, 8, 2, torch.float32, False, prefetch=2**30, device="cpu"))
