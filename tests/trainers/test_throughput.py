"""Time is that of steps, tokens are counted, and memory is counted where it can grow."""

from __future__ import annotations

import time

import pytest
import torch

from lopt.trainers.throughput import COUNTED_ALWAYS, Throughput


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
    sizes = [8] * (COUNTED_ALWAYS + 2) + [1000]
    peaks = []
    for size in sizes:
        with throughput.micro_batch(size=size, model=model, optimizer=None):
            torch.ones(size)
        assert throughput.peak is not None
        peaks.append(throughput.peak.total)
    assert peaks[:-1] == [peaks[0]] * (len(sizes) - 1)
    assert peaks[-1] - peaks[0] == 4 * (1000 - 8)
