"""The block-major schedule: the eager weights for any method and stages, and no trace left behind."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import BATCHES, tiny
from lopt import LoPTConfig, attach
from lopt.core.attach import LoPT
from lopt.engine.clipping import clip_gradients
from lopt.engine.host_transfer import HostTransfer, TensorGroup
from lopt.engine.offload import WeightsOffload
from lopt.engine.optimizer import BlockOptimizer, Precision
from lopt.engine.plain_loop import block_major
from lopt.engine.random_state import micro_batch_seed, random_numbers
from lopt.engine.stages import Stage
from lopt.models.part import replace_parameters
from tiny_models import small_model_of

ADAMW = functools.partial(torch.optim.AdamW, fused=True)
# Adam makes a step of a gradient that is 0 but for rounding, as that of a key's bias.
SGD = functools.partial(torch.optim.SGD, momentum=0.9)
CLIP = 0.5
STEPS = 3
LONG = 10


def attached(model: nn.Module, **config: Any) -> LoPT:
    torch.manual_seed(7)  # the same heads
    return attach(model, LoPTConfig(**config))


def run_eagerly(
    handle: LoPT, slots: int, max_norm: float = CLIP, make: Any = ADAMW, steps: int = STEPS, **options: Any
) -> list[float]:
    model: Any = handle.model
    stepped = BlockOptimizer(handle.parameter_groups(1e-2, 1e-3, 0.1), make, **options)
    handle.loss_scale = 1 / slots
    losses = []
    for step in range(steps):
        for slot in range(slots):
            with random_numbers(torch.device("cpu"), micro_batch_seed(0, step, slot)):
                loss = model(**BATCHES[slot % 4]).loss / slots
                loss.backward()
            losses.append(loss.item())
        if max_norm < math.inf:
            clip_gradients(handle, max_norm)
        stepped.step()
        stepped.zero_grad()
    return losses


def run_in_stages(
    handle: LoPT, slots: int, max_norm: float = CLIP, make: Any = ADAMW, steps: int = STEPS, **options: Any
) -> list[float]:
    """Like `run_eagerly`, by the schedule of the handle's config."""
    model: Any = handle.model
    groups = handle.parameter_groups(1e-2, 1e-3, 0.1)
    schedule = block_major(handle, groups, make, max_norm=max_norm, **options)
    handle.loss_scale = 1 / slots
    losses = []
    for _ in range(steps):
        losses += schedule.step(slots, lambda slot: model(**BATCHES[slot % 4]).loss / slots)
        assert not schedule.stashed_bytes
    schedule.synchronize()
    return [loss.item() for loss in losses]


def compare(
    model: nn.Module,
    slots: int = 4,
    tolerance: float = 0.0,
    max_norm: float = CLIP,
    make: Any = ADAMW,
    steps: int = STEPS,
    **config: Any,
) -> None:
    """Train two copies, eagerly and in stages, and assert that losses and weights are the same."""
    residency = ("stages", "stage_layers", "offload", "optimizer_device", "prefetch_gib")
    eager = attached(copy.deepcopy(model), **{k: v for k, v in config.items() if k not in residency})
    staged = attached(copy.deepcopy(model), schedule="block_major", **config)
    start = {n: p.clone() for n, p in staged.model.named_parameters()}
    expected = run_eagerly(eager, slots, max_norm, make, steps)
    losses = run_in_stages(staged, slots, max_norm, make, steps)
    assert losses == (pytest.approx(expected, rel=tolerance) if tolerance else expected)
    heads = dict(staged.heads.named_parameters())
    for handle in (eager, staged):
        assert all(p.grad is None for p in [*handle.model.parameters(), *handle.heads.parameters()])
    for name, value in [*eager.model.named_parameters(), *eager.heads.named_parameters()]:
        other = heads[name] if name in heads else staged.model.get_parameter(name)
        error = (value - other).float().norm() / value.float().norm().clamp(min=1e-12)
        assert error <= tolerance, (name, float(error))
        if name in start and other.requires_grad:
            assert not torch.equal(other, start[name]), f"{name} was not trained"


METHODS: dict[str, dict[str, Any]] = {
    "e2e": dict(method="e2e", stages=1),
    "e2e x 3": dict(method="e2e", stages=3),
    "e2e x all": dict(method="e2e", stages=6),
    "e2e by layers": dict(method="e2e", stage_layers=1),
    "lopt": dict(num_blocks=2),
    "lopt x 2": dict(num_blocks=2, stages=4),
    "lopt x all": dict(num_blocks=2, stages=6),
    "lopt, 4 blocks": dict(num_blocks=4),
    "next token": dict(num_blocks=2, aux_loss="next_token", stages=5),
    "frozen": dict(method="frozen", num_blocks=2, stages=4),
    "frozen block": dict(num_blocks=3, frozen_blocks=1, stages=5),
    "frozen top": dict(method="frozen", num_blocks=2, stages=4, frozen_top=1),
    "global": dict(num_blocks=2, stages=4, clip="global"),
}
PLACES: dict[str, dict[str, Any]] = {
    "on the device": {},
    "optimizer": dict(offload="optimizer", prefetch_gib=1e-5),
    "block": dict(offload="block", prefetch_gib=1e-5),
    "host optimizer": dict(offload="block", optimizer_device="cpu", prefetch_gib=1e-5),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_weights_are_the_eager_ones_bit_for_bit(method: str, place: str) -> None:
    for slots in (1, 4) if place == "on the device" else (4,):
        compare(tiny("llama"), slots, **METHODS[method], **PLACES[place])


@pytest.mark.parametrize("method", ["e2e x 3", "lopt x 2"])
def test_weights_are_the_eager_ones_after_ten_steps(method: str) -> None:
    compare(tiny("llama"), 7, steps=LONG, **METHODS[method], **PLACES["host optimizer"])


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 4, 7])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_and_place_for_ten_steps(method: str, place: str, slots: int) -> None:
    """With dropout; then checkpointed as well, of which the same weights are expected."""
    model = tiny("gpt2", tie_word_embeddings=False, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    settings = dict(steps=LONG, **METHODS[method], **PLACES[place])
    compare(tiny("llama"), slots, **settings)
    compare(copy.deepcopy(model), slots, **settings)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    compare(model, slots, **settings)


@pytest.mark.parametrize("place", ["block", "host optimizer"])
@pytest.mark.parametrize("method", ["e2e x all", "lopt x 2", "frozen"])
def test_without_clipping_every_stage_is_stepped_at_once(method: str, place: str) -> None:
    compare(tiny("llama"), max_norm=math.inf, **METHODS[method], **PLACES[place])


@pytest.mark.parametrize("place", PLACES)
def test_a_tied_matrix_stays_one(place: str) -> None:
    """The LM head's gradient waits for the embedding's; the sum has another order than in one backward."""
    compare(tiny("llama-tied"), tolerance=1e-6, **METHODS["e2e x all"], **PLACES[place])
    compare(tiny("llama-tied"), tied_embeddings="freeze", **METHODS["lopt x all"], **PLACES[place])


@pytest.mark.parametrize("method", ["e2e x all", "lopt x 2"])
def test_dropout_and_checkpointing(method: str) -> None:
    model = tiny("gpt2", tie_word_embeddings=False, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    compare(model, **METHODS[method])
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    compare(model, **METHODS[method], **PLACES["block"])


@pytest.mark.parametrize("method", ["e2e x 3", "lopt x 2"])
def test_every_architecture(architecture: str, method: str) -> None:
    changes = {"output_router_logits": False} if architecture in ("mixtral", "qwen3_moe") else {}
    compare(
        tiny(architecture, **changes), slots=2, tolerance=1e-6, make=SGD, **METHODS[method], **PLACES["block"]
    )


@pytest.mark.parametrize("stages", [1, 6])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_routers_are_not_balanced_stage_by_stage(architecture: str, stages: int) -> None:
    handle = attached(tiny(architecture), schedule="block_major", method="e2e", stages=stages)
    model: Any = handle.model
    groups = handle.parameter_groups(1e-2)
    with pytest.raises(ValueError, match="all layers at once: use `schedule` eager, or set `output_router"):
        block_major(handle, groups, ADAMW)
    model.config.output_router_logits = False
    schedule = block_major(handle, groups, ADAMW)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="use `schedule` eager, or leave `output_router_logits` False"):
        schedule.step(1, lambda slot: model(**BATCHES[0], output_router_logits=True).loss)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert model(**BATCHES[0], output_router_logits=True).aux_loss > 0
    schedule.step(1, lambda slot: model(**BATCHES[0]).loss)


@pytest.mark.parametrize("config", [{}, dict(stages=5)], ids=["2 stages", "5 stages"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "gpt_neo", "gpt_bigcode", "biogpt", "gemma3_text"])
def test_no_later_stage_reads_the_weights_in_front_of_the_layers(name: str, config: dict[str, Any]) -> None:
    """They may be elsewhere: position embeddings and norms as well as the token embedding."""
    model = small_model_of(name)
    eager, staged = attached(copy.deepcopy(model)), attached(model, schedule="block_major", **config)
    expected = run_eagerly(eager, 2, math.inf, SGD, steps=1)
    weights = dict(staged.model.named_parameters())
    front = {p for module in staged.blocks.front for p in module.parameters()}
    assert name == "gemma3_text" or len(front) > 1
    empty = {p: nn.Parameter(p.detach().to("meta")) for p in front}
    staged.loss_scale = 0.5
    schedule = block_major(staged, staged.parameter_groups(1e-2, 1e-3, 0.1), SGD)

    def enter(*_: Any) -> None:
        is_first = schedule.passes.now.stage.index == 0
        replace_parameters(staged.model, {e: p for p, e in empty.items()} if is_first else empty)

    staged.blocks.decoder.register_forward_pre_hook(enter)
    losses = schedule.step(2, lambda slot: staged.model(**BATCHES[slot]).loss / 2)
    assert [loss.item() for loss in losses] == expected
    for key, value in eager.model.named_parameters():
        assert torch.equal(weights[key], value), key


@pytest.mark.parametrize("place", ["on the device", "host optimizer"])
def test_adapters(place: str) -> None:
    torch.manual_seed(0)
    targets = LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)
    model = get_peft_model(tiny("llama"), targets)
    compare(model, method="lora", stages=6, **PLACES[place])


def test_base_weights_of_adapters_only_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a stage without adapters is not fetched to be stepped."""
    out: list[TensorGroup] = []
    visits: list[int] = []
    copy_out, enter = HostTransfer._copy_out, WeightsOffload.enter

    def copied(self: HostTransfer, group: TensorGroup, tensors: Any) -> None:
        out.append(group)
        copy_out(self, group, tensors)

    def entered(self: WeightsOffload, stage: Stage) -> None:
        visits.append(stage.index)
        enter(self, stage)

    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"], r=4))
    handle = attached(model, method="lora", stages=6, schedule="block_major", offload="block")
    schedule = block_major(handle, handle.parameter_groups(1e-2), ADAMW, max_norm=CLIP)
    monkeypatch.setattr(HostTransfer, "_copy_out", copied)
    monkeypatch.setattr(WeightsOffload, "enter", entered)
    schedule.step(2, lambda slot: model(**BATCHES[slot]).loss / 2)
    sent = {p for group in out for p in group.get() if isinstance(p, nn.Parameter)}
    assert sent == set(handle.block_parameters(0))
    # Forward; back to the first stage with adapters; steps, of which stage 1 is there already.
    assert visits == [0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "precision", [Precision(), Precision(masters=True), Precision(state_dtype=torch.bfloat16)]
)
@pytest.mark.parametrize("place", ["on the device", "block", "host optimizer"])
def test_rounding_does_not_depend_on_stages(place: str, precision: Precision) -> None:
    ends = []
    for config in (dict(schedule="eager"), dict(schedule="block_major", stages=5, **PLACES[place])):
        handle = attached(tiny("llama", torch.bfloat16), num_blocks=2, **config)
        if config["schedule"] == "eager":
            run_eagerly(handle, 4, precision=precision)
        else:
            run_in_stages(handle, 4, precision=precision)
        ends.append(dict(handle.model.named_parameters()))
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_a_forward_without_gradients_is_left_alone() -> None:
    """As that of a reference model which shares the weights, in the midst of a loss."""
    model: Any = tiny("llama")
    batch = BATCHES[0]
    with torch.no_grad():
        expected = model(**batch).logits
    handle = attached(model, schedule="block_major", method="e2e", stages=4, offload="block")
    schedule = block_major(handle, handle.parameter_groups(1e-2), ADAMW, max_norm=1.0)

    def forward(slot: int) -> torch.Tensor:
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, expected)
        return model(**batch).loss

    schedule.step(1, forward)


def test_an_error_in_a_stage_leaves_the_model_whole() -> None:
    model: Any = tiny("llama")
    batch = BATCHES[0]
    plain = model(**batch).logits.detach()
    handle = attached(model, schedule="block_major", num_blocks=2, stages=4)
    schedule = block_major(handle, handle.parameter_groups(1e-2), ADAMW)
    calls: list[int] = []

    def forward(slot: int) -> torch.Tensor:
        calls.append(slot)
        if len(calls) > fails_after:
            raise RuntimeError("no data")
        return model(**batch).loss

    for fails_after in range(8):
        calls.clear()
        with pytest.raises(RuntimeError, match="no data"):
            schedule.step(2, forward)
        model.zero_grad()
        handle.heads.zero_grad()
        assert torch.equal(model(**batch).logits, plain) or fails_after > 3  # block 1 has been stepped
        model.zero_grad()
        handle.heads.zero_grad()
    handle.detach()
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("place", ["on the device", "block", "host optimizer"])
def test_a_step_after_an_error_is_the_step_without_it(place: str) -> None:
    """Nothing of the lost step is left: gradients, also those that waited, kept inputs, fetched weights."""
    ends = []
    for fails_at in (0, 3, 8, 13):  # in the forward sweep, in the last stage, in the backward sweep
        model: Any = tiny("llama-tied")
        handle = attached(model, schedule="block_major", method="e2e", stages=6, **PLACES[place])
        schedule = block_major(handle, handle.parameter_groups(1e-2), ADAMW, max_norm=CLIP)
        calls: list[int] = []

        def forward(slot: int, model: Any = model, fails_at: int = fails_at, calls: Any = calls) -> Any:
            calls.append(slot)
            if len(calls) == fails_at:
                raise RuntimeError("no data")
            return model(**BATCHES[slot]).loss

        if fails_at:
            with pytest.raises(RuntimeError, match="no data"):
                schedule.step(2, forward)
        schedule.step(2, forward)
        schedule.synchronize()
        ends.append(dict(model.named_parameters()))
    for other in ends[1:]:
        for name, value in ends[0].items():
            assert torch.equal(value, other[name]), name
