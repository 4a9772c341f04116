"""One block on the device: what is where, when, and that host memory holds the only other copy."""

from __future__ import annotations

import copy
import gc
import math
import os
import re
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import batch_of, tiny
from lopt import LoPTConfig, attach
from lopt.compat import replaced
from lopt.engine import host_optimizer
from lopt.engine.block_major import BlockMajor
from lopt.engine.host_optimizer import HostOptimizer
from lopt.engine.offload import Offload
from lopt.engine.optimizer import BlockOptimizer
from lopt.engine.plain_loop import block_major
from lopt.engine.stages import Stages
from lopt.engine.updates import Updates
from lopt.instruments.memory import MemoryTracker, in_host_memory
from plan_accuracy import LateSteps

BATCHES = [batch_of([9, 5, 2]), batch_of([4], seed=1), batch_of([3, 11], side="left", seed=2)]
CPU = torch.device("cpu")


class Loop:
    """The block-major schedule in a plain loop."""

    def __init__(
        self, model: nn.Module, offload: str, budget: int = 4096, k: int = 3, **options: object
    ) -> None:
        self.model = model
        self.handle = attach(model, LoPTConfig(num_blocks=k, schedule="block_major", offload=offload))
        self.stages = Stages(self.handle)
        self.offload = (
            Offload(self.handle, self.stages, CPU, budget, offload == "block") if offload != "none" else None
        )
        self.optimizer = BlockOptimizer(
            self.handle.parameter_groups(1e-2, 1e-3),
            lambda groups: torch.optim.AdamW(groups, fused=True),
            part_bytes=max(budget // 8, 1),
            transfer=self.offload and self.offload.transfer,
            stage_of=self.stages.owner,
        )
        if self.offload is not None:
            self.offload.optimizer = self.optimizer
        updates = Updates(self.handle, self.stages, self.optimizer, self.offload, max_norm=1.0)
        self.schedule = BlockMajor(self.handle, updates, self.offload)

    def step(self) -> float:
        """One optimizer step over all micro-batches; the task loss."""
        losses = self.schedule.step(len(BATCHES), lambda slot: self.model(**BATCHES[slot]).loss)
        return sum(loss.item() for loss in losses)

    def on_device(self) -> set[str]:
        return {name for name, p in self.model.named_parameters() if not in_host_memory(p)}


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("budget", [0, 20_000, 2**30])
def test_values_do_not_depend_on_where_things_are(name: str, budget: int) -> None:
    loops = [Loop(tiny(name), offload, budget) for offload in ("none", "optimizer", "block")]
    for loop in loops[1:]:
        loop.handle.heads.load_state_dict(loops[0].handle.heads.state_dict())
    for step in range(3):
        losses = [loop.step() for loop in loops]
        assert losses[0] == losses[1] == losses[2], step
    for loop in loops[1:]:
        for (parameter, a), b in zip(loops[0].model.named_parameters(), loop.model.parameters(), strict=True):
            assert torch.equal(a, b), parameter
    assert in_host_memory(loops[2].model.get_input_embeddings().weight)


def test_only_the_block_at_work_is_on_the_device() -> None:
    loop = Loop(tiny("llama"), "block", budget=0)
    assert not loop.on_device()
    for stage in loop.stages:
        loop.offload.enter(stage, will_step=True, following=None)
        own = {name for name, _ in loop.handle.blocks.parameters(loop.model, stage.block)}
        assert loop.on_device() == own, stage
    loop.offload.leave()
    assert not loop.on_device()
    loop.step()
    assert not loop.on_device()
    assert all(map(in_host_memory, loop.handle.heads.parameters())) and loop.handle.device == CPU
    state = [t for s in loop.optimizer.state.values() for t in s.values() if t.ndim]
    assert state and all(map(in_host_memory, state))


@pytest.mark.parametrize("which", ["weight", "state"])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_change_in_host_memory_is_seen(which: str, block: int) -> None:
    """No other copy is left that could hide it: not of a block just trained, and not of the next one."""
    loop, other = Loop(tiny("llama"), "block", 2**30), Loop(tiny("llama"), "block", 2**30)
    other.handle.heads.load_state_dict(loop.handle.heads.state_dict())
    for both in (loop, other):
        both.step()
    parameter = loop.handle.blocks.layers[loop.handle.blocks[block].start].mlp.up_proj.weight
    if which == "weight":
        parameter.data.mul_(1.5)
    else:
        proxy = loop.optimizer._proxies[parameter]
        loop.optimizer.state[proxy]["exp_avg"].mul_(-3)
    before = parameter.detach().clone()
    losses = loop.step(), other.step()
    moved = parameter.detach() - before
    twin = other.handle.blocks.layers[other.handle.blocks[block].start].mlp.up_proj.weight
    if which == "weight":
        assert losses[0] != losses[1]
        assert (parameter - 1.5 * twin).norm() < 0.2 * twin.norm()
    else:
        assert moved.norm() > 0 and not torch.equal(parameter, twin)


def test_evaluation_brings_weights_in_and_the_next_step_takes_them_out() -> None:
    loop = Loop(tiny("gemma3"), "block")
    loop.step()
    plain = copy.deepcopy(loop.model.state_dict())
    with torch.no_grad():
        logits = loop.model(**BATCHES[0]).logits
    assert len(loop.on_device()) == len(list(loop.model.parameters()))
    reference = tiny("gemma3", tie_word_embeddings=False)
    reference.load_state_dict(plain)
    assert torch.equal(logits, reference(**BATCHES[0]).logits)
    with torch.no_grad():
        loop.model.get_output_embeddings().weight.mul_(2)  # changed while it is there
    loop.step()
    assert not loop.on_device()
    changed = loop.model.get_output_embeddings().weight
    assert (changed - 2 * plain["lm_head.weight"]).norm() < 0.1 * changed.norm()


def test_a_model_that_does_not_fit_is_evaluated_layer_by_layer(monkeypatch) -> None:
    loop = Loop(tiny("llama"), "block", budget=0)
    with torch.no_grad():
        expected = loop.model(**BATCHES[0]).logits
    loop.offload.synchronize()
    monkeypatch.setattr("lopt.engine.offload.free_memory", lambda device: 0)
    most = []
    for layer in loop.handle.blocks.layers:
        layer.register_forward_hook(lambda *_: most.append(len(loop.on_device())))
    with torch.no_grad():
        assert torch.equal(loop.model(**BATCHES[0]).logits, expected)
    assert max(most) < 12  # a layer, the embedding, the head
    before = loop.handle.heads[0].up.weight.detach().clone()
    loop.handle.warm_up_heads(BATCHES, steps=2)
    assert not torch.equal(loop.handle.heads[0].up.weight, before)
    first = loop.step()
    assert loop.step() != first
    with pytest.raises(RuntimeError, match="without gradients"):
        loop.model(**BATCHES[0])


def test_resting_blocks_keep_their_weights_and_state() -> None:
    loop = Loop(tiny("llama"), "block")
    loop.step()
    before = copy.deepcopy(loop.model.state_dict())
    loop.handle.learns_locally = False
    loop.step()
    last = {name for name, _ in loop.handle.blocks.parameters(loop.model, 2)}
    for name, value in loop.model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in last), name


def test_the_loop_of_the_docs_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "block_major(" in block]
    model = tiny("llama")
    names = dict(torch=torch, model=model, steps=[BATCHES])
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    exec(code.replace('"cuda"', '"cpu"'), names)
    assert all(loss.isfinite() for loss in names["losses"])
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, start[name]), name


def test_a_matrix_waits_for_the_step_of_its_own_stage_alone() -> None:
    """The LM head's stage is stepped last, and the token embedding is needed first."""
    model = tiny("llama-tied")
    config = LoPTConfig(
        method="e2e", schedule="block_major", stages=6, offload="block", optimizer_device="cpu"
    )
    handle = attach(model, config)
    with replaced(host_optimizer, ThreadPoolExecutor=LateSteps):
        groups, make = handle.parameter_groups(1e-2), partial(torch.optim.AdamW, fused=True)
        schedule = block_major(handle, groups, make, device=CPU, max_norm=1.0, threads=1)
    schedule.step(len(BATCHES), lambda slot: model(**BATCHES[slot]).loss)
    before = model.get_input_embeddings().weight.clone()
    (embedding,) = schedule.updates._offload.weights.groups(schedule.stages[0])
    schedule.updates._offload.transfer.wait_until_final(embedding)
    assert not torch.equal(model.get_input_embeddings().weight, before)
    assert len(schedule.updates._offload.host._running[0]._pool.waiting) == len(schedule.stages) - 1


def test_memory_is_counted_beside_a_step_in_host_memory() -> None:
    """A tracker looks at the optimizer's state before or after a step in another thread, never within."""
    started = threading.Event()

    class Slow(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            for number, parameter in enumerate(self.param_groups[0]["params"]):
                self.state[parameter] = {"kept": torch.zeros(100 + number)}
                started.set()
                time.sleep(0.1)

    parameters = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = BlockOptimizer([{"params": parameters}], Slow)
    host = HostOptimizer(optimizer, threads=1)
    gc.collect()
    with MemoryTracker() as before:  # what other tests have left in host memory
        pass
    with MemoryTracker(optimizer=optimizer) as tracker:
        host.submit(0, {p: torch.ones(3) for p in parameters}, None, [], math.inf, None)
        started.wait()
    host.wait()
    assert tracker.current.optimizer == tracker.peak.optimizer == 0
    assert tracker.current.host - before.current.host == 4 * (100 + 101 + 102)


@pytest.mark.skipif(sys.platform != "linux", reason="cores of a process are counted on Linux")
@pytest.mark.parametrize(
    ("processes", "workers", "threads"), [(None, 0, 15), ("4", 0, 3), ("4", 2, 1), ("8", 2, 1)]
)
def test_processes_of_a_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, processes: str | None, workers: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert host_optimizer.step_threads(torch.device("cuda"), workers) == threads
    assert host_optimizer.step_threads(torch.device("cpu"), workers) == torch.get_num_threads()
