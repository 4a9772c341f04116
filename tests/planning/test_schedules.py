"""Schedules of pipelines against values computed by hand, and against the papers' formulas."""

from __future__ import annotations

import pytest

from lopt.planning.schedules import (
    BlockTime,
    Link,
    StageTime,
    end_to_end,
    held,
    one_forward_one_backward,
    pipelined,
    zero_bubble,
)

EQUAL = BlockTime(forward=1, rest=2, step=3)


@pytest.mark.parametrize(("size", "micro_batches"), [(2, 8), (8, 4), (5, 1)])
def test_a_pipeline_without_backward_traffic_has_no_bubble(size: int, micro_batches: int) -> None:
    found = pipelined([[EQUAL]] * size, micro_batches, 2, Link())
    assert found.seconds == 3 * micro_batches + 3
    assert found.input_waits == found.output_waits == [0] * size
    assert found.fill == size - 1  # a forward of each process before the last


def test_the_slowest_process_bounds_a_step_and_others_wait() -> None:
    slow = BlockTime(2, 4, 3)
    found = pipelined([[EQUAL], [slow], [EQUAL]], 4, 2, Link())
    assert found.seconds == slow.of_step(4) == 27
    assert found.output_waits == [27 - 15, 0, 0] and found.input_waits == [0, 0, 27 - 15]


def test_a_link_costs_its_first_transfer_of_a_step_or_bounds_it() -> None:
    """Receives are posted for one optimizer step: its first waits for post, transfer and arrival."""
    free, ranks = EQUAL.of_step(4), [[EQUAL]] * 3
    assert pipelined(ranks, 4, 2, Link(1)).seconds == free + 1
    assert pipelined(ranks, 4, 2, Link(1, 0.5)).seconds == free + 2
    # A link that bounds a step rests while the receiver computes its last micro-batch and steps (1 + 2 + 3).
    assert pipelined(ranks, 4, 2, Link(10)).seconds == 40 + 6
    # Of a long line at most `depth` are on their way, and a way is to and fro.
    long = [pipelined(ranks, 4, depth, Link(0, 20)).seconds for depth in (1, 2, 4)]
    assert long == sorted(long, reverse=True) and long[0] > 4 * 40 > long[1] > 2 * 40 > long[2] > 40


def test_several_blocks_of_a_process_run_one_after_the_other() -> None:
    found = pipelined([[EQUAL, EQUAL], [EQUAL, EQUAL]], 4, 2, Link())
    assert found.seconds == 2 * EQUAL.of_step(4)
    assert found.fill == EQUAL.of_step(4) + 1


@pytest.mark.parametrize(("size", "micro_batches"), [(2, 8), (4, 8), (8, 4), (8, 32)])
def test_end_to_end_has_the_bubble_of_its_schedule(size: int, micro_batches: int) -> None:
    orders = [one_forward_one_backward(n, size, micro_batches) for n in range(size)]
    seconds = end_to_end([StageTime(1, 2, 0, 0)] * size, orders, Link())
    assert 3 * micro_batches / seconds == pytest.approx(micro_batches / (micro_batches + size - 1))
    assert held(orders[0]) == min(size, micro_batches) and held(orders[-1]) == 1
    if micro_batches >= 2 * size - 1:
        orders = [zero_bubble(n, size, micro_batches) for n in range(size)]
        assert end_to_end([StageTime(1, 1, 1, 2)] * size, orders, Link()) == 3 * micro_batches + 2
        assert {held(order) for order in orders} == {2 * size - 1}


def test_end_to_end_pays_for_a_slow_link_in_every_micro_batch() -> None:
    """A gradient comes back before the next forward: there is no way to hide the link."""
    orders = [one_forward_one_backward(n, 4, 16) for n in range(4)]
    stages = [StageTime(1, 2, 0, 0)] * 4
    with_link, without = (end_to_end(stages, orders, link) for link in (Link(0, 1), Link()))
    assert with_link - without > 16
    blocks = [[BlockTime(1, 2, 0)]] * 4
    assert pipelined(blocks, 16, 4, Link(0, 1)).seconds == 48 + 2
