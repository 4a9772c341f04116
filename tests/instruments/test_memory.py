"""Every expected number below is a count by hand; none allows a tolerance."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from lopt.instruments.memory import (
    HOST,
    MemoryPeak,
    MemoryTracker,
    format_bytes,
    free_memory,
    peak_memory,
)

pytestmark = pytest.mark.usefixtures("no_garbage")

N = 1000
S = 4 * N  # bytes of one activation in the chains below
EXPS = 10  # exponentials per block: each saves its result


def test_chain_counts_storages_once_and_sees_frees() -> None:
    with MemoryTracker() as tracker:
        a = torch.zeros(10, 100)
        b = a @ a.view(100, 10)  # (10, 10) float32: 400 bytes
        assert tracker.current == MemoryPeak(0, 0, 0, S + 400)
        views = (a.t(), a[2:], a.view(-1), b.relu_(), a.detach(), a.add_(1))
        assert tracker.current.total == S + 400
        del a
        assert tracker.current.total == S + 400  # a view keeps the storage
        del views
        assert tracker.current.total == 400
        c = (b @ b).relu()  # b, the product and its relu live together
        assert (tracker.current.total, tracker.peak.total) == (800, S + 400)
        tracker.reset_peak()
        assert tracker.peak == tracker.current
        c = (c @ c).relu()  # b, the old c, the product, the new c
        assert tracker.peak.total == 1600
        c.untyped_storage().resize_(0)
        b.resize_(20, 20)
        assert tracker.current.total == 1600
    del b, c
    torch.zeros(N)
    assert tracker.current.total == 1600  # frozen on exit


def test_tensor_made_before_counts_from_first_use_and_device_filters() -> None:
    x = torch.zeros(N)
    with MemoryTracker() as tracker, MemoryTracker(device="cuda") as on_cuda:
        assert tracker.current.total == 0
        y = x + 1
        assert tracker.current.total == 2 * S
        del y
        assert tracker.current.total == S
    assert on_cuda.peak.total == 0
    with FakeTensorMode():
        on_gpu = peak_memory(lambda: torch.zeros(N).to("cuda:1"), device="cuda:1")
    assert on_gpu.total == S


def test_tracker_refuses_double_entry_and_hooks_are_removed() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters())
    tracker = MemoryTracker(layer, optimizer=optimizer)
    with tracker, pytest.raises(RuntimeError, match="already active"):
        tracker.__enter__()
    assert not layer.weight._post_accumulate_grad_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("prepare", [lambda o: o, lambda o: Accelerator(cpu=True).prepare_optimizer(o)])
def test_training_step_categories(prepare: Callable[..., torch.optim.Optimizer]) -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50), nn.BatchNorm1d(50))
    parameter_bytes = 4 * (30 * 40 + 40 + 40 * 50 + 50 + 50 + 50)
    buffer_bytes = 4 * (50 + 50) + 8  # running mean and variance, int64 batch counter
    optimizer = prepare(torch.optim.AdamW(model.parameters()))
    state_bytes = 2 * parameter_bytes + 6 * 4  # two moments, a float32 step per parameter

    with MemoryTracker(model, optimizer=optimizer) as tracker:
        model(torch.ones(8, 30)).sum().backward()
        assert tracker.current == MemoryPeak(parameter_bytes + buffer_bytes, parameter_bytes, 0, 0)
        tracker.reset_peak()
        optimizer.step()
        kept = MemoryPeak(parameter_bytes + buffer_bytes, parameter_bytes, state_bytes, 0)
        assert tracker.current == kept
        # The state is made inside step, yet its share of the peak goes to the optimizer.
        assert 2 * parameter_bytes - 2 * 4 * 50 < tracker.peak.optimizer <= state_bytes
        optimizer.zero_grad()
        assert tracker.current == MemoryPeak(kept.parameters, 0, state_bytes, 0)
    with MemoryTracker(model, optimizer=optimizer) as tracker:  # state that exists on entry
        assert tracker.current == MemoryPeak(kept.parameters, 0, state_bytes, 0)


def test_gradient_used_up_in_a_hook_or_assigned_by_hand() -> None:
    w = nn.ParameterList([torch.ones(N), torch.ones(N)])

    def step(parameter: torch.Tensor) -> None:
        parameter.grad = None

    w[0].register_post_accumulate_grad_hook(step)
    with MemoryTracker(w) as tracker:
        (w[0] * 2.0).sum().backward()
        assert tracker.current == MemoryPeak(2 * S, 0, 0, 0)
        assert tracker.peak.gradients == S
        w[1].grad = torch.zeros(N)
        assert tracker.current == MemoryPeak(2 * S, S, 0, 0)


def _block(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = h * weight
    for _ in range(EXPS):
        h = h.exp()
    return h


def _train(weights: nn.ParameterList, local: bool) -> None:
    h = torch.zeros(N)
    for weight in weights:
        h = _block(h, weight)
        if local and weight is not weights[-1]:
            h.sum().backward()
            h = h.detach()
    h.sum().backward()


@pytest.mark.parametrize("blocks", [2, 5])
def test_backward_inside_forward_peaks_at_one_block(blocks: int) -> None:
    weights = nn.ParameterList(torch.zeros(N) for _ in range(blocks))
    # Peak: when the second exponential from the end is differentiated, its incoming and outgoing
    # gradients live beside the input, every saved result, the scalar loss and its gradient.
    fixed = 3 * S + 2 * 4
    joint = peak_memory(lambda: _train(weights, local=False), weights)
    assert joint == MemoryPeak(blocks * S, 0, 0, blocks * EXPS * S + fixed)
    weights.zero_grad()
    local = peak_memory(lambda: _train(weights, local=True), weights)
    # In the last block the earlier blocks' gradients are there already.
    assert local == MemoryPeak(blocks * S, (blocks - 1) * S, 0, EXPS * S + fixed)
    assert joint.activations - fixed == blocks * (local.activations - fixed)


def test_checkpointing_counts_recomputed_block() -> None:
    weight = nn.ParameterList([torch.zeros(N)])
    segments = 6

    def exps(h: torch.Tensor) -> torch.Tensor:
        for _ in range(EXPS):
            h = h.exp()
        return h

    def checkpointed(h: torch.Tensor) -> torch.Tensor:
        return checkpoint(exps, h, use_reentrant=False, preserve_rng_state=False)

    def train(recompute: bool) -> None:
        h = torch.zeros(N) * weight[0]
        for _ in range(segments):
            h = checkpointed(h) if recompute else exps(h)
        h.sum().backward()

    plain = peak_memory(lambda: train(False), weight)
    assert plain.activations == (1 + segments * EXPS + 2) * S + 8
    weight.zero_grad()
    # The product's two ends, each segment's result, the last segment anew, and one gradient.
    recomputed = peak_memory(lambda: train(True), weight)
    assert recomputed.activations == (2 + segments + EXPS + 1) * S + 8


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("recompute", [False, True])
def test_fake_tensors_give_the_real_peak(
    attention: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    config._attn_implementation = attention

    def measure() -> MemoryPeak:
        model = LlamaForCausalLM(config).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.ones(2, 24, dtype=torch.long)

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            model(input_ids=ids, labels=ids).loss.backward()

        return peak_memory(step, model, optimizer=optimizer)

    real = measure()
    # On fake tensors transformers cannot read position_ids to see that nothing is packed, so it
    # would build a mask and repeat the key and value heads, which the real run does not.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    with FakeTensorMode():
        fake = measure()
    assert fake == real
    assert real.optimizer > 2 * real.gradients > 0


def test_inference_mode_sees_inside_composite_operators() -> None:
    x, weight = torch.ones(4, 10, 10), torch.ones(10, 10)

    def attend() -> None:
        torch.nn.functional.linear(torch.einsum("bij,jk->bik", x, weight), weight).softmax(-1)

    with torch.no_grad():
        expected = peak_memory(attend)
    with torch.inference_mode():
        assert peak_memory(attend) == expected


def test_sparse_and_wrapped_tensors_count_their_parts() -> None:
    table = nn.Embedding(50, 10, sparse=True)
    with MemoryTracker(table) as tracker:
        table(torch.tensor([3, 4])).sum().backward()
        assert tracker.current == MemoryPeak(2000, 2 * 8 + 2 * 10 * 4, 0, 0)
    values, offsets = torch.ones(8, 2), torch.tensor([0, 3, 8])
    ragged = torch.nested.nested_tensor_from_jagged(values, offsets)
    with MemoryTracker() as tracker:
        doubled = ragged * 2
        assert tracker.current.activations == 2 * (8 * 2 * 4)  # the values before and after
        del doubled
        assert tracker.current.activations == 8 * 2 * 4


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (12 * 2**20, "12.0 MiB"),
        (int(28.8 * 2**30), "28.8 GiB"),
        (3 * 2**40, "3.0 TiB"),
    ],
)
def test_format_bytes(n: int, text: str) -> None:
    assert format_bytes(n) == text


def test_free_memory_is_the_control_groups_if_less(monkeypatch, tmp_path: Path) -> None:
    files = {"/sys/fs/cgroup/memory.max": "5000", "/sys/fs/cgroup/memory.current": "2000"}
    real = open

    def fake(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path) in files:
            made = tmp_path / Path(path).name
            made.write_text(files[str(path)])
            return real(made)
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", fake)
    assert free_memory(HOST) == 3000
    files["/sys/fs/cgroup/memory.max"] = "max"
    assert free_memory(HOST) > 10**6
