"""Plans of stages against live bytes of real optimizer steps, and against what is known of their traffic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig

from lopt import LoPTConfig
from lopt.planning.devices import Machine
from lopt.planning.plan import Planner
from lopt.planning.run import Run, Setting
from lopt.planning.sizes import elements
from lopt.trainers.lora import lora_config
from plan_accuracy import live

WIDTH = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, head_dim=32)
CONFIGS = {
    "llama": LlamaConfig(**WIDTH, num_hidden_layers=6, num_key_value_heads=2, vocab_size=512),
    "gemma3": Gemma3TextConfig(  # tied
        **WIDTH, num_hidden_layers=6, num_key_value_heads=1, vocab_size=1024, sliding_window=64
    ),
    "gpt2": GPT2Config(  # tied
        n_embd=128, n_layer=6, n_head=4, vocab_size=512, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=1,
    ),
}  # fmt: skip
BF16 = torch.bfloat16
E2E, LOPT, FROZEN = (Setting(m, k, "block_major") for m, k in (("e2e", 1), ("lopt", 2), ("frozen", 2)))
LORA = Setting("lora", 1, "block_major")
HOST: dict[str, Any] = dict(offload="block", optimizer_device="cpu")


def case(name: str, setting: Setting, stages: int | None, rows: tuple[int, int, int], **options: Any) -> Any:
    """Options of `Setting` and of `Run`; quick if asked for."""
    quick = options.pop("quick", False)
    changes = {key: options.pop(key) for key in list(options) if key in vars(setting)}
    marks = [] if quick else [pytest.mark.slow]
    return pytest.param(name, replace(setting, stages=stages, **changes), rows, options, marks=marks)


MANY, FEW = (2, 128, 3), (1, 16, 3)  # with few tokens the optimizer's turn is the peak, or next to it
CASES = [
    case("llama", E2E, 4, MANY, checkpointing=True),
    case("gemma3", E2E, 3, MANY, offload="optimizer"),
    case("llama", E2E, 5, FEW, offload="block", quick=True),
    case("llama", E2E, 5, FEW, offload="block", clips=False),
    case("gemma3", E2E, 5, FEW, offload="block", clip="global"),
    case("gemma3", E2E, 8, MANY, **HOST, dtype=BF16, masters=True),
    case("gpt2", E2E, 8, FEW, **HOST, dtype=BF16, quick=True),
    case("gpt2", LOPT, 6, MANY),
    case("llama", LOPT, None, FEW, clip="global"),
    case("llama", LOPT, 5, MANY, offload="block", checkpointing=True),
    case("gemma3", replace(LOPT, num_blocks=3), 6, FEW, offload="block", clip="global", quick=True),
    case("gemma3", LOPT, 5, MANY, **HOST, dtype=BF16),
    case("llama", FROZEN, 4, MANY, quick=True),
    case("gpt2", FROZEN, 6, FEW, offload="block"),
    case("gemma3", FROZEN, 8, MANY, **HOST, dtype=BF16),
    case("llama", replace(E2E, stage_layers=2), None, MANY, offload="block"),
    case("gemma3", E2E, 4, FEW, offload="optimizer", quick=True),  # the embedding's gradient meets the head's
    case("gemma3", LORA, 8, FEW, **HOST, dtype=BF16, quick=True),
    case("llama", LORA, 4, MANY, **HOST, dtype=BF16),
    case("llama", LORA, 4, MANY, checkpointing=True),
    case("gemma3", LOPT, 5, FEW, offload="block", tied_embeddings="freeze", quick=True),
    case("gemma3", E2E, 4, FEW, tied_embeddings="freeze"),
]


@pytest.mark.parametrize(("name", "setting", "rows", "options"), CASES)
def test_prediction_and_live_bytes(
    name: str, setting: Setting, rows: tuple[int, int, int], options: dict[str, Any]
) -> None:
    options = dict(dtype=torch.float32, prefetch=3 * 10**5, adapters=lora_config(8, 16)) | options
    planner = Planner(Run(CONFIGS[name], *rows, autocast=False, device="cpu", **options))
    predicted = planner.plan(setting)
    found = live(planner.run, setting)
    peak, real = predicted.peak, found.device
    assert predicted.total == pytest.approx(real.total, rel=0.03)
    assert peak.gradients == pytest.approx(real.gradients, rel=0.03, abs=2000)
    if setting.offload == "none":
        assert peak.weights == real.parameters and peak.optimizer == pytest.approx(real.optimizer, rel=0.001)
    # In the thread a step may meet more of what waits between stages than when it is as late as can be.
    late = setting.optimizer_device == "cpu" and setting.num_blocks > 1
    assert 0.999 * found.host <= predicted.host <= (1.03 if late else 1.001) * found.host
    if rows == MANY or setting.optimizer_device == "cpu":  # else it may be that of a step on the device
        assert found.logged == pytest.approx(real.total, rel=0.001)


def test_operations_and_traffic() -> None:
    """All but a block's last stage run forward once more, and their weights come in for both sweeps."""
    planner = Planner(Run(CONFIGS["llama"], 2, 64, 4, BF16, False, prefetch=10**5))
    whole = planner.plan(E2E)
    stages = planner.sizes.stages(LoPTConfig(method="e2e", schedule="block_major", stages=4))
    host = planner.plan(replace(E2E, stages=4, **HOST))
    layers = len(stages[-1].layers)
    forward = planner.plan(FROZEN).flops - planner.plan(replace(FROZEN, stages=4)).flops
    assert forward < 0  # a frozen model's last block is recomputed too, but for its last stage
    of_layer = (planner.plan(replace(E2E, stages=8)).flops - whole.flops) / 6
    assert host.flops - whole.flops == pytest.approx((6 - layers) * of_layer)
    assert 8 / 6 - 0.03 < 1 + 6 * of_layer / whole.flops < 8 / 6
    weights = [2 * elements(stage.tensors) for stage in stages]
    boundary = 4 * 2 * 64 * 128 * 2  # of four micro-batches, in bfloat16
    assert host.bus - host.bus_tokens == 2 * sum(weights) - weights[-1]
    assert host.bus_tokens == boundary * (
        2 + 1 + 2 + 2 + 1
    )  # inputs forward, the last's, inputs and gradients
    state = 2 * 4 * sum(weights) // 2
    device = planner.plan(replace(E2E, stages=4, offload="block"))
    # Clipped: once the norm is known all but the first come in again, and their gradients.
    clipped = 2 * sum(weights) - weights[-1] + state + 2 * (sum(weights) - weights[0])
    assert device.bus - device.bus_tokens == clipped
    free = Planner(replace(planner.run, clips=False), planner).plan(device.setting)
    assert free.bus - free.bus_tokens == 2 * sum(weights) - weights[-1] + state


def test_steps_in_host_memory_hide_where_blocks_are_needed_later() -> None:
    """End to end waits for what it steps last; blocks that are stepped in order do not."""
    planner = Planner(Run(CONFIGS["llama"], 2, 64, 4, BF16, False, masters=True))
    e2e, lopt = (planner.plan(replace(s, stages=8, **HOST)) for s in (E2E, LOPT))
    machine = Machine((1e-3,) * 3, (float("inf"),) * 2)
    busy = lopt.time(machine)
    host = replace(
        machine, host_gbps=40 * busy.stepping / (0.9 * busy.seconds)
    )  # it is at work 0.9 of the time
    assert lopt.time(host).host == 0 < busy.stepping and lopt.time(host).bound == "compute"
    steps = [sum(update.traffic for update in stage) / host.host_gbps / 1e9 for stage in e2e.work.updates]
    sweep = [turn for turn in e2e.work.turns if not turn.with_graph]
    wait = now = ready = 0.0  # from the end of one step on
    for stage, step in enumerate(steps):
        ready += step
        wait, now = wait + max(0.0, ready - now), max(now, ready)
        now += sweep[stage].flops / 1e9 if stage < len(sweep) else 0.0
    found = e2e.time(host)
    assert found.host == pytest.approx(wait) and wait > 0 and found.bound == "wait"
