"""Clipping by block, and the block optimizer: parts, bfloat16, state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import batch_of, tiny
from lopt import LoPTConfig, attach
from lopt.engine.clipping import clip_gradients
from lopt.engine.host_transfer import HostTransfer
from lopt.engine.optimizer import BlockOptimizer, Precision, split_into_parts, state_bytes
from lopt.engine.rounding import round_stochastically
from lopt.engine.scratch import Scratch
from lopt.instruments.memory import in_host_memory, peak_memory


@pytest.mark.parametrize("clip", ["global", "block"])
def test_clip(clip: str) -> None:
    model = tiny("llama")
    handle = attach(model, LoPTConfig(num_blocks=3, clip=clip, lambda_aux=1000.0))
    model(**batch_of([9, 4])).loss.backward()
    parameters = [handle.block_parameters(b.index) for b in handle.blocks]
    before = [[copy.deepcopy(p.grad) for p in block] for block in parameters]
    expected = torch.stack([torch.cat([g.flatten() for g in grads]).norm() for grads in before])
    norms = clip_gradients(handle, max_norm=0.5)
    torch.testing.assert_close(norms, expected)
    total = norms.norm()
    for block, grads, norm in zip(parameters, before, norms, strict=True):
        factor = min(1.0, 0.5 / (norm if clip == "block" else total).item())
        for parameter, gradient in zip(block, grads, strict=True):
            torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-4, atol=1e-8)
    assert torch.equal(clip_gradients(handle), clip_gradients(handle))  # no limit, no change


def make(name: str, **options):
    return lambda groups: getattr(torch.optim, name)(groups, **options)


def gradients_for(model: torch.nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = noise.to(parameter.dtype)


OPTIMIZERS = {
    "AdamW": dict(lr=1e-2, fused=True), "NAdam": dict(lr=1e-2), "RMSprop": dict(lr=1e-2, momentum=0.9),
    "Adagrad": dict(lr=1e-2), "SGD": dict(lr=1e-2, momentum=0.9), "Adafactor": dict(lr=1e-2),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("part_bytes", [0, 10_000, 2**30])
def test_step_by_parts_is_the_optimizers_own(name: str, part_bytes: int) -> None:
    model, other = tiny("llama"), tiny("llama")
    handle = attach(model, LoPTConfig(num_blocks=2))
    groups = attach(other, LoPTConfig(num_blocks=2)).parameter_groups(1e-2, 1e-3, weight_decay=0.1)
    face = BlockOptimizer(
        handle.parameter_groups(1e-2, 1e-3, weight_decay=0.1),
        make(name, **OPTIMIZERS[name]),
        part_bytes=part_bytes,
    )
    plain = make(name, **OPTIMIZERS[name])(groups)
    for step in range(4):
        for one, optimizer in ((model, face), (other, plain)):
            gradients_for(one, step)
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
            optimizer.zero_grad()
    for (parameter_name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), parameter_name


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "SGD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_may_appear_in_any_step(name: str, dtype: torch.dtype) -> None:
    """A parameter's first gradient may come late: an expert nobody asked, an embedding that was frozen."""
    ends, options = [], OPTIMIZERS[name]
    for transfer in (None, HostTransfer(torch.device("cpu"), 2**20)):
        parameters = [nn.Parameter(torch.linspace(-1, 1, 6).add(n).to(dtype)) for n in range(3)]
        face = BlockOptimizer(
            [{"params": parameters}],
            make(name, **options),
            precision=Precision(masters=True, state_dtype=torch.bfloat16),
            transfer=transfer,
        )
        assert len(face.parts) == 1
        for step, learning in enumerate([[1], [1, 2], [0, 2], [2], [0, 1, 2]]):
            for number in learning:
                parameters[number].grad = torch.full_like(parameters[number], step + number - 1.5)
            face.step()
            face.zero_grad()
        tensors = [v for s in face.state.values() for v in s.values() if v.ndim]
        assert transfer is None or all(map(in_host_memory, tensors))
        ends.append([*parameters, *tensors])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


def test_parts_are_bounded_and_within_a_block() -> None:
    handle = attach(tiny("llama"), LoPTConfig(num_blocks=2))
    groups = handle.parameter_groups(1.0)
    whole = {id(p) for g in groups for p in g["params"]}
    owner = {id(p): g["block"] for g in groups for p in g["params"]}
    made = split_into_parts(groups, 10_000, lambda p: owner[id(p)])
    assert sorted(id(p) for part in made for p in part) == sorted(whole)
    for part in made:
        assert len({owner[id(p)] for p in part}) == 1
        assert len(part) == 1 or sum(p.nbytes for p in part) <= 10_000
    assert len(split_into_parts(groups, 2**30, lambda p: owner[id(p)])) == 2


def test_rounding_keeps_the_average_and_the_representable(monkeypatch) -> None:
    wide = torch.full((200_000,), 1.0 + 2**-10)  # an eighth of the way from 1 to the next bfloat16
    narrow = torch.empty_like(wide, dtype=torch.bfloat16)
    round_stochastically(wide, narrow, torch.Generator().manual_seed(0))
    assert set(narrow.tolist()) == {1.0, 1.0 + 2**-7}
    assert narrow.float().mean().item() == pytest.approx(1.0 + 2**-10, abs=3 * 2**-7 * 0.33 / 200_000**0.5)
    monkeypatch.setattr("lopt.engine.rounding.ROUNDED_AT_ONCE", 300)
    exact = torch.randn(125, 8).bfloat16().float()
    exact[0, :4] = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    narrow = torch.empty(8, 125, dtype=torch.bfloat16).T
    round_stochastically(exact, narrow, None)
    assert torch.equal(narrow.float(), exact)
    # NaN as CUDA makes it, its negative, and one whose bits are all in the lower half
    exact.view(torch.int32)[2, :3] = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)
    round_stochastically(exact, narrow, None)
    assert narrow[2, :3].isnan().all() and narrow.isnan().sum() == 3
    assert torch.equal(narrow[3:].float(), exact[3:])


def drift(precision: Precision | None) -> tuple[torch.Tensor, BlockOptimizer]:
    """Where 100 steps of 1e-4 from 1 end; every one of them is lost in bfloat16 to nearest."""
    parameter = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = BlockOptimizer([{"params": [parameter]}], make("SGD", lr=1e-4), precision=precision)
    for _ in range(100):
        parameter.grad = torch.full_like(parameter, -1.0)
        optimizer.step()
    return parameter.detach(), optimizer


def test_small_steps_move_bfloat16_weights() -> None:
    end, optimizer = drift(None)
    assert end.float().mean().item() == pytest.approx(1.01, abs=2e-4)
    assert len(end.unique()) > 1
    assert torch.equal(end, drift(None)[0])  # the same run, the same rounding
    assert not torch.equal(end, drift(Precision(seed=1))[0])
    masters, optimizer = drift(Precision(masters=True))
    assert masters.unique().tolist() == [torch.tensor(1.01).bfloat16().item()]
    (state,) = optimizer.state.values()
    torch.testing.assert_close(state["master"], torch.full((20_000,), 1.01), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"masters": True}, {"state_dtype": torch.bfloat16}], ids=str)
def test_state_goes_on_where_it_was(options: dict) -> None:
    precision = Precision(**options)

    def start() -> tuple[torch.nn.Module, BlockOptimizer]:
        model = tiny("llama", torch.bfloat16)
        handle = attach(model, LoPTConfig(num_blocks=2))
        groups = handle.parameter_groups(1e-2)
        return model, BlockOptimizer(groups, make("AdamW", fused=True), precision=precision, part_bytes=9000)

    def go_on(model: torch.nn.Module, optimizer: BlockOptimizer, steps: range) -> None:
        for step in steps:
            gradients_for(model, step)
            optimizer.step()

    model, optimizer = start()
    go_on(model, optimizer, range(2))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    go_on(model, optimizer, range(2, 4))
    other, resumed = start()
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    dtypes = {t.dtype for s in resumed.state.values() for k, t in s.items() if t.ndim and k != "master"}
    assert dtypes == {precision.state_dtype}
    go_on(other, resumed, range(2, 4))
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16])
def test_state_goes_on_in_another_dtype(after: torch.dtype, offloaded: bool) -> None:
    """A master stays what it is."""
    before = torch.bfloat16 if after == torch.float32 else torch.float32
    parameter = nn.Parameter(torch.linspace(-1, 1, 7).bfloat16())

    def start(state_dtype: torch.dtype) -> BlockOptimizer:
        transfer = HostTransfer(torch.device("cpu"), 2**20) if offloaded else None
        precision = Precision(masters=True, state_dtype=state_dtype)
        return BlockOptimizer(
            [{"params": [parameter]}],
            make("AdamW", lr=1e-2, fused=True),
            precision=precision,
            transfer=transfer,
        )

    first, second = start(before), start(after)
    parameter.grad = torch.full_like(parameter, 1 / 3)
    first.step()
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(saved)
    (loaded,), old = second.state.values(), saved["state"][0]
    for key in ("exp_avg", "exp_avg_sq"):
        assert old[key].dtype == before and torch.equal(loaded[key], old[key].to(after))
    assert torch.equal(loaded["master"], old["master"])
    parameter.grad = torch.full_like(parameter, 1 / 3)
    second.step()
    (state,) = second.state.values()
    assert {key: value.dtype for key, value in state.items() if value.ndim} == {
        "exp_avg": after, "exp_avg_sq": after, "master": torch.float32,
    }  # fmt: skip
    assert state["step"] == 2


def test_state_in_bfloat16_follows_float32() -> None:
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama")
        groups = attach(model, LoPTConfig(num_blocks=2)).parameter_groups(1e-2)
        optimizer = BlockOptimizer(groups, make("AdamW"), precision=Precision(state_dtype=dtype))
        start = [p.detach().clone() for p in model.parameters()]
        for step in range(20):
            gradients_for(model, step)
            optimizer.step()
        ends[dtype] = torch.cat(
            [(p - s).detach().flatten() for p, s in zip(model.parameters(), start, strict=True)]
        )
    a, b = ends.values()
    assert not torch.equal(a, b)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.999


def test_what_a_step_adds_is_as_large_as_a_part() -> None:
    """Any optimizer's temporaries, and the float32 copies of bfloat16 weights."""
    peaks = {}
    for part_bytes in (2**14, 2**30):
        model = tiny("llama", torch.bfloat16, vocab_size=97)
        groups = attach(model, LoPTConfig(num_blocks=1)).parameter_groups(1e-2)
        optimizer = BlockOptimizer(groups, make("NAdam", foreach=True), part_bytes=part_bytes)
        gradients_for(model, 0)
        optimizer.step()
        peaks[part_bytes] = peak_memory(optimizer.step, model, optimizer=optimizer).activations
    largest = max(p.numel() for p in model.parameters())
    assert peaks[2**14] < 6 * 4 * max(2**13, largest)
    assert peaks[2**30] > 4 * peaks[2**14]


@pytest.mark.parametrize(
    ("name", "size"), [("AdamW8bit", 2 * (1 + 4 / 256)), ("AdamW4bit", 2 * (0.5 + 4 / 128))]
)
def test_torchaos_low_bit_state(name: str, size: float) -> None:
    torchao = pytest.importorskip("torchao.optim")
    factory = lambda groups: getattr(torchao, name)(groups, lr=1e-3)  # noqa: E731
    assert state_bytes(factory, Precision(), torch.bfloat16) == pytest.approx(size, rel=0.02)
    assert state_bytes(make("AdamW"), Precision(), torch.bfloat16) == 8
    assert state_bytes(make("AdamW"), Precision(state_dtype=torch.bfloat16), torch.float32) == 4
    assert state_bytes(make("AdamW"), Precision(masters=True), torch.bfloat16) == 12
    assert state_bytes(make("SGD"), Precision(), torch.float32) == 0


@pytest.mark.parametrize("masters", [False, True])
def test_a_step_in_host_memory_uses_its_memory_again(masters: bool) -> None:
    """And gives what a step with new memory gives, for parts of any size."""
    start = [torch.randn(shape).bfloat16() for shape in ((8, 16), (4, 16), (3,))]
    found = []
    for scratch in (None, Scratch()):
        parameters = [nn.Parameter(value.clone()) for value in start]
        groups = [{"params": parameters}]
        optimizer = BlockOptimizer(groups, torch.optim.AdamW, precision=Precision(masters), part_bytes=200)
        optimizer.scratch = scratch
        places = set()
        for _ in range(3):
            gradients = {p: p.detach() ** 2 for p in parameters}
            optimizer.step_stage(0, gradients)
            places.add(None if scratch is None else scratch._memory.data_ptr())
        assert len(places) == 1
        found.append([p.detach() for p in parameters])
    assert len(optimizer.parts) > 1
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)
