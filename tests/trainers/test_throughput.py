"""Time is that of steps, tokens are counted, and memory is counted where it can grow."""

from __future__ import annotations

import time

import pytest
import torch

from lopt.trainers.throughput import COUNTED_STEPS, Throughput


def test_figures_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    throughput, model = Throughput(torch.device("cpu")), torch.nn.Linear(4, 4)
    for _ in range(2):
        throughput.begin_step()
        throughput.count(30)
        with throughput.micro_batch(size=40, model=model, optimizer=None):
            clock[0] += 0.25
        throughput.end_step()
        clock[0] += 7  # between steps: evaluation, checkpoints
    figures = throughput.report()
    assert figures["seconds_per_step"] == 0.25 and figures["tokens_per_second"] == 30 / 0.25
    assert throughput.report()["tokens_per_second"] == 0  # starts anew


def test_memory_is_counted_again_when_a_batch_is_larger() -> None:
    throughput, model = Throughput(torch.device("cpu")), torch.nn.Linear(1, 1)
    sizes = [8] * (COUNTED_STEPS + 2) + [1000]
    peaks = []
    for size in sizes:
        throughput.begin_step()
        with throughput.micro_batch(size=size, model=model, optimizer=None):
            torch.ones(size)
        assert throughput.peak is not None
        peaks.append(throughput.peak.total)
    assert peaks[:-1] == [peaks[0]] * (len(sizes) - 1)
    assert peaks[-1] - peaks[0] == 4 * (1000 - 8)


@pytest.mark.parametrize("in_stages", [False, True])
def test_the_state_of_the_optimizer_and_what_micro_batches_leave(in_stages: bool) -> None:
    """However many micro-batches a step has, the second step is counted; in stages as a whole."""
    throughput, model = Throughput(torch.device("cpu"), in_stages), torch.nn.Linear(99, 1)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(COUNTED_STEPS):
        throughput.begin_step()
        left = []
        for _ in range(5):
            with throughput.micro_batch(size=8, model=model, optimizer=optimizer):
                left.append(torch.zeros(1000))
                model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert throughput.peak is not None and throughput.peak.optimizer == 2 * 4 * 99 + 4
    assert throughput.peak.activations == (5 if in_stages else 1) * 4 * 1000
