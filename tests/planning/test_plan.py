"""The planner against live bytes of real optimizer steps, and against what is known of published models."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from lopt import LoPTConfig
from lopt.models.shapes import SHAPES, model_config
from lopt.planning.devices import Machine
from lopt.planning.plan import Planner
from lopt.planning.run import Run, Setting
from lopt.planning.sizes import Sizes
from plan_accuracy import live

pytestmark = pytest.mark.usefixtures("no_garbage")

WIDTH = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, head_dim=32)
CONFIGS = {
    "llama": LlamaConfig(**WIDTH, num_hidden_layers=10, num_key_value_heads=2, vocab_size=512),
    "gemma3": Gemma3TextConfig(  # tied; windows and full attention in turns
        **WIDTH, num_hidden_layers=9, num_key_value_heads=1, vocab_size=1024, sliding_window=64
    ),
    "gpt2": GPT2Config(
        n_embd=128, n_layer=8, n_head=4, vocab_size=512, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    ),
}  # fmt: skip
STAGED = Setting(num_blocks=4, schedule="block_major")
SETTINGS = {  # with the micro-batches per step
    "e2e": (Setting("e2e", 1), 1),
    "e2e, checkpointed": (Setting("e2e", 1, checkpointing=True), 2),
    "k=2": (Setting(num_blocks=2), 2),
    "k=4, checkpointed": (Setting(num_blocks=4, checkpointing=True), 1),
    "block-major k=2": (Setting(num_blocks=2, schedule="block_major"), 2),
    "block-major k=4": (STAGED, 4),
}


@cache
def planner(name: str, accumulation: int, dtype: torch.dtype, autocast: bool) -> Planner:
    run = Run(CONFIGS[name], 2, 128, accumulation, dtype, autocast, device="cpu")
    if accumulation == 1:
        return Planner(run)
    return Planner(run, planner(name, 1, dtype, autocast))


def compare(name: str, setting: Setting, accumulation: int, dtype: torch.dtype, autocast: bool) -> None:
    plan = planner(name, accumulation, dtype, autocast)
    predicted, real = plan.plan(setting).peak, live(plan.run, setting).device
    assert predicted.weights == real.parameters
    assert predicted.gradients == pytest.approx(real.gradients, rel=0.05)
    assert predicted.optimizer == pytest.approx(real.optimizer, rel=0.001)  # all but step counters
    activations = predicted.activations + predicted.head_and_loss + predicted.stash
    assert activations == pytest.approx(real.activations, rel=0.03)
    assert predicted.total == pytest.approx(real.total, rel=0.02)


def _quick(name: str, setting: str) -> bool:
    """Every setting, and every architecture, but not all of them together."""
    return name == "gemma3" or setting == next(iter(SETTINGS))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        pytest.param(name, setting, marks=[] if _quick(name, setting) else [pytest.mark.slow])
        for name in CONFIGS
        for setting in SETTINGS
    ],
)
def test_prediction_and_live_bytes(name: str, setting: str) -> None:
    compare(name, *SETTINGS[setting], torch.float32, autocast=False)


BF16 = torch.bfloat16
OFFLOADS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "optimizer": ("gpt2", "optimizer", dict()),
    "block": ("llama", "block", dict(prefetch=10**5)),
    "block, recomputed": ("gemma3", "block", dict()),
    "block, bfloat16": ("gpt2", "block", dict(dtype=BF16)),
    "block, bfloat16 state": ("gemma3", "block", dict(dtype=BF16, state_dtype=BF16, prefetch=10**6)),
    "optimizer, masters": ("llama", "optimizer", dict(dtype=BF16, masters=True)),
}


# The last three have all that these two have.
IMPLIED = ("block, recomputed", "block, bfloat16")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in IMPLIED)) for case in OFFLOADS]
)
def test_prediction_with_offload(case: str) -> None:
    """Of few tokens, so that the optimizer's turn is the peak, or next to it."""
    name, offload, options = OFFLOADS[case]
    options = {"dtype": torch.float32, "prefetch": 3 * 10**5} | options
    plan = Planner(Run(CONFIGS[name], 1, 16, 3, autocast=False, device="cpu", **options))
    setting = replace(STAGED, offload=offload, checkpointing=name == "gemma3")
    predicted, real = plan.plan(setting), live(plan.run, setting)
    assert predicted.total == pytest.approx(real.device.total, rel=0.03)
    assert predicted.host == real.host


RESTING: dict[str, tuple[str, Setting, dict[str, Any]]] = {
    "frozen": ("gemma3", Setting(num_blocks=4), dict(frozen_blocks=2)),
    "next token": ("llama", Setting(num_blocks=2), dict(aux_loss="next_token")),
    "both, checkpointed": (
        "gpt2", Setting(num_blocks=3, checkpointing=True), dict(frozen_blocks=1, aux_loss="next_token"),
    ),
    "both, block-major": ("llama", STAGED, dict(frozen_blocks=2, aux_loss="next_token")),
    "both, offload": ("gpt2", replace(STAGED, offload="block"), dict(frozen_blocks=1, aux_loss="next_token")),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (not c.startswith("both"))) for c in RESTING]
)
def test_prediction_with_frozen_blocks_and_next_token(case: str) -> None:
    name, setting, options = RESTING[case]
    rows = (1, 16, 3) if setting.offload != "none" else (2, 128, 2)
    options = options | dict(prefetch=3 * 10**5, device="cpu")
    cut = Planner(Run(CONFIGS[name], *rows, torch.float32, False, **options))
    predicted, real = cut.plan(setting), live(cut.run, setting)
    if setting.offload == "none":
        assert predicted.peak.weights == real.device.parameters
    assert predicted.total == pytest.approx(real.device.total, rel=0.02)
    assert predicted.host == real.host
    # Less of everything than without: a block that rests costs a forward.
    plain = Planner(replace(cut.run, frozen_blocks=0, aux_loss="recon"), cut).plan(setting)
    if cut.run.frozen_blocks:
        assert predicted.flops < plain.flops and predicted.checkpoint < plain.checkpoint
        assert predicted.bus < plain.bus or setting.offload == "none"


def test_every_micro_batch_stashes_a_boundary() -> None:
    predicted, real = [], []
    for accumulation in (2, 4):
        plan = planner("llama", accumulation, torch.float32, False)
        predicted.append(plan.plan(STAGED).peak.total)
        real.append(live(plan.run, STAGED).device.total)
    assert predicted[1] - predicted[0] == pytest.approx(real[1] - real[0], rel=0.02)


@pytest.mark.parametrize(
    "setting", [pytest.param("e2e, checkpointed", marks=pytest.mark.slow), "k=4, checkpointed"]
)
def test_mixed_precision(setting: str) -> None:
    compare("llama", *SETTINGS[setting], torch.float32, autocast=True)


def test_bfloat16_and_frozen_and_one_row() -> None:
    one_row = Planner(Run(CONFIGS["gemma3"], 1, 128, 1, torch.float32, False, device="cpu"))
    real = live(one_row.run, Setting("e2e", 1))  # windows need a mask, full attention does not
    assert one_row.plan(Setting("e2e", 1)).total == pytest.approx(real.device.total, rel=0.03)
    compare("llama", Setting(num_blocks=4), 2, torch.bfloat16, autocast=False)
    compare("llama", Setting("frozen", 2), 2, torch.float32, autocast=False)


@pytest.mark.parametrize(
    "name, elements",
    [
        ("qwen3-4b", 4_022_468_096),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-32b", 32_763_876_352),
        ("llama3.1-8b", 8_030_261_248),
        ("gemma3-270m", 268_098_176),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_aliases_have_the_published_size(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", None)  # no network
    assert Sizes.of(model_config(name)).model == elements
    names = "qwen3-4b qwen3-8b qwen3-14b qwen3-32b qwen2.5-7b qwen2.5-32b llama3.1-8b"
    assert set(SHAPES) == {*names.split(), "gemma3-270m", "smollm2-135m"}


def test_hub_id_of_an_alias_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", None)
    assert model_config("Qwen/Qwen2.5-7B-Instruct").hidden_size == 3584


def test_folder_and_config_file(tmp_path) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    for where in (tmp_path, tmp_path / "config.json"):
        config: PreTrainedConfig = model_config(str(where))
        assert (config.model_type, config.hidden_size) == ("llama", 128)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="has no readable config"):
        model_config(str(tmp_path))


# -- composition -----------------------------------------------------------------------------------


def llama(**changes) -> Planner:
    base = planner("llama", 4, torch.float32, False)
    return Planner(replace(base.run, **changes), base)


def test_flops_are_six_per_weight_and_token() -> None:
    run, sizes = llama().run, llama().sizes
    plan = llama().plan(Setting("e2e", 1))
    products = 6 * (sizes.model - 512 * 128) * run.step_tokens
    attention = 14 * 10 * run.step_tokens * run.tokens * 128  # two products forward, five backward
    # The fused head computes its logits twice.
    again = 2 * 512 * 128 * run.accumulation * 2 * (run.tokens - 1)
    assert plan.flops == pytest.approx(products + attention + again, rel=0.003)
    again = llama().plan(Setting("e2e", 1, checkpointing=True)).flops / plan.flops
    assert 1.2 < again < 1.34


def test_resting_early_blocks_cost_a_forward_only() -> None:
    always, seldom = (llama(local_every=n).plan(Setting(num_blocks=2)).flops for n in (1, 100))
    assert 0.6 < seldom / always < 0.75
    assert llama(local_every=8).plan(Setting("e2e", 1)).flops == llama().plan(Setting("e2e", 1)).flops


def test_offloading_moves_bytes_to_the_host() -> None:
    plans = {
        offload: llama(prefetch=10**5).plan(Setting("lopt", 4, "block_major", offload=offload))
        for offload in ("none", "optimizer", "block")
    }
    none, optimizer, block = plans.values()
    assert none.total > optimizer.total > block.total and none.host == none.bus == 0
    assert 0 < optimizer.peak.transfers <= 10**5 and 0 < block.peak.transfers <= 10**5
    sizes = llama().sizes
    head = sum(t.numel() for t in sizes.head)
    weights, heads, state = 4 * sizes.model, 12 * head, 8 * (sizes.model + 3 * head)
    assert optimizer.host == state and optimizer.bus == state
    stash = 4 * 2 * 128 * 128 * 4  # four micro-batches (B, T, H) in float32
    assert block.host == state + weights + heads + stash * 5 / 4  # an output comes before its input goes
    assert block.bus == state + weights + heads + 3 * stash and block.bus_tokens == 3 * stash
    assert none.checkpoint == weights + 3 * 4 * head + state and none.model == weights


def test_copies_hide_from_some_number_of_tokens_on() -> None:
    plan = llama().plan(Setting("lopt", 4, "block_major", offload="block"))
    even = Machine((1.0,) * 3, (1.0, 1.0))
    tokens = plan.hidden_from(even)
    run = llama(accumulation=round(tokens / 256))
    later = run.plan(plan.setting)
    assert later.flops / 1e12 == pytest.approx(later.bus / 1e9, rel=0.08)  # in whole micro-batches
    assert plan.hidden_from(replace(even, tflops=(1e6,) * 3)) == float("inf")


def test_more_prefetching_hides_more_until_all_is_hidden() -> None:
    setting = Setting("lopt", 4, "block_major", offload="block")
    machine = Machine((1e-3,) * 3, (1.0, 1.0))
    times = [llama(prefetch=p).plan(setting).time(machine) for p in (10**4, 10**6, 10**7, 10**9)]
    seconds = [time.seconds for time in times]
    none = llama().plan(STAGED).time(machine).seconds
    stash = 3 * 4 * 2 * 128 * 128 * 4 / 1e9  # in and out, of three boundaries and four micro-batches
    assert seconds[0] > seconds[1] > seconds[2] >= seconds[3] > none + 2 * stash
    assert seconds[3] == pytest.approx(none, rel=0.05)  # the first block's weights, the last one's way back


def test_buckets_of_ddp() -> None:
    """One more copy of the gradients that DDP averages, as two processes have been found to hold."""
    one, two = llama(), llama(processes=2)
    e2e, last = Setting("e2e", 1), Setting(num_blocks=2)
    assert two.plan(e2e).total - one.plan(e2e).total == 4 * one.sizes.model
    own = sum(t.nbytes for t in one.sizes.blocks(LoPTConfig())[-1].trained)  # others are averaged in place
    assert two.plan(last).total - one.plan(last).total == own
    staged = replace(STAGED, offload="block")
    assert two.plan(staged).total == one.plan(staged).total
    assert two.plan(staged).host == 2 * one.plan(staged).host


def test_an_optimizer_that_needs_room_for_its_step() -> None:
    run = Run(CONFIGS["llama"], 1, 8, 1, torch.float32, False)
    plans = [Planner(replace(run, optimizer=name)).plan(Setting("e2e", 1)) for name in ("adamw_torch", "sgd")]
    weights = 4 * llama().sizes.model
    assert plans[0].total == pytest.approx(5 * weights, rel=0.01) and plans[0].peak.optimizer == 3 * weights
    assert plans[1].peak.optimizer == 0


def test_what_cannot_be_planned() -> None:
    with pytest.raises(ValueError, match=r"`optim` must be one of .* \(got lomo\)"):
        Planner(replace(llama().run, optimizer="lomo"))
    with pytest.raises(ValueError, match=r"`offload` must be none unless `schedule`"):
        llama().plan(Setting(offload="block"))
    with pytest.raises(ValueError, match=r"`stages` must be <= 12, the layers, .* \(got 13\)"):
        llama().plan(Setting("e2e", 1, "block_major", stages=13))
    with pytest.raises(ValueError, match=r"`stages` must be >= 4, the number of blocks \(got 3\)"):
        llama().plan(replace(STAGED, stages=3))
    with pytest.raises(ValueError, match="add `offload` block"):
        llama().plan(replace(STAGED, optimizer_device="cpu"))
    with pytest.raises(ValueError, match=r"<= 262,144 tokens, .* \(got 1,024,000,000\): plan a smaller"):
        llama(batch=10**6, tokens=1024).plan(STAGED)
    with pytest.raises(ValueError, match=r"`num_blocks` must be <= 10, .* \(got 11\)"):
        llama().plan(Setting(num_blocks=11))


@pytest.mark.parametrize("masters", [False, True])
def test_the_step_of_a_wide_lm_head_is_the_peak(masters: bool) -> None:
    """Its gradient goes when it has become float32, before the weights do: 18 bytes a number, or 20."""
    config = CONFIGS["llama"].__class__(**CONFIGS["llama"].to_dict() | dict(vocab_size=20000))
    run = Run(config, 1, 8, 1, BF16, False, device="cpu", masters=masters, prefetch=10**5)
    setting = Setting("e2e", 1, "block_major", offload="block", stages=config.num_hidden_layers + 2)
    predicted, real = Planner(run).plan(setting), live(run, setting)
    numbers = config.vocab_size * config.hidden_size
    # A frozen embedding lets the norm come into one part with the head, behind it.
    frozen = replace(setting, method="frozen", num_blocks=2)
    together = replace(run, prefetch=2**31)
    assert Planner(together).plan(frozen).total == pytest.approx(
        live(together, frozen).device.total, rel=0.005
    )
    assert predicted.total == pytest.approx(real.device.total, rel=0.005)
    assert real.device.total / numbers == pytest.approx(20 if masters else 18, rel=0.02)
