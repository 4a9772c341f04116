"""A pipeline of processes ends with the weights of one process, and each has only its own blocks."""

from __future__ import annotations

import functools
import itertools
import os
import runpy
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoModelForCausalLM

from conftest import BATCHES, save_tiny, tiny
from lopt import LoPTConfig, attach
from lopt.engine.block_major import BlockMajor
from lopt.engine.pipeline import check_pipeline, own_blocks, pipeline, save_model
from lopt.engine.plain_loop import block_major
from lopt.models.part import load_part
from page_commands import ROOT
from tiny_models import small_model_of

CPU = torch.device("cpu")
ADAMW = functools.partial(torch.optim.AdamW, fused=True)
SGD = functools.partial(torch.optim.SGD, momentum=0.9)
STEPS = 3


def run_ranks(ranks: int, folder: Path, work: Callable[..., None], *args: Any) -> None:
    """Run `work(*args)` in so many processes, forked off this one, that form a group."""
    mp.start_processes(_rank, (ranks, str(folder), work, args), nprocs=ranks, start_method="fork")


def _rank(rank: int, ranks: int, folder: str, work: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    work(*args)
    dist.destroy_process_group()


def train(schedule: BlockMajor, handle: Any, batches: list[Any], steps: int = STEPS) -> list[float]:
    handle.loss_scale, losses = 1 / len(batches), []
    for _ in range(steps):
        if schedule.link is not None:
            schedule.link.expect([tuple(batch["input_ids"].shape) for batch in batches])
        losses += schedule.step(len(batches), lambda slot: handle.model(**batches[slot]).loss / len(batches))
    return [loss.item() for loss in losses]


def one_process(folder: Path, config: LoPTConfig, batches: list[Any], make: Any) -> tuple[Any, list[float]]:
    torch.manual_seed(7)
    handle = attach(load_part(str(folder), config, range(9)), config)
    schedule = block_major(handle, handle.parameter_groups(1e-2, 1e-3, 0.1), make, max_norm=0.5)
    return handle, train(schedule, handle, batches)


def in_pipeline(
    folder: Path, config: LoPTConfig, batches: list[Any], make: Any, mesh: DeviceMesh
) -> tuple[Any, list[float], BlockMajor]:
    torch.manual_seed(7)  # the same heads
    handle = attach(load_part(str(folder), config, own_blocks(config, mesh)), config)
    groups = handle.parameter_groups(1e-2, 1e-3, 0.1)
    schedule = pipeline(handle, groups, make, mesh, device=CPU, max_norm=0.5, threads=0)
    losses = train(schedule, handle, batches)
    assert schedule.link is not None
    schedule.link.flush()
    return handle, losses, schedule


def compare(folder: Path, config: LoPTConfig, batches: list[Any], mesh: DeviceMesh) -> None:
    """Assert the weights of one process bit for bit, and the bytes that were sent."""
    whole, expected = one_process(
        folder, replace(config, offload="none", optimizer_device="auto"), batches, ADAMW
    )
    handle, losses, schedule = in_pipeline(folder, config, batches, ADAMW, mesh)
    parts = config.num_blocks, config.stages, config.method, config.tied_embeddings, config.offload
    saved = folder / "-".join(map(str, ("saved", *parts, len(batches))))
    save_model(handle, schedule, saved)
    plain = AutoModelForCausalLM.from_pretrained(saved)
    for name, value in plain.named_parameters():
        assert torch.equal(value, whole.model.get_parameter(name)), name
    assert losses == (expected if schedule.has_task else [])
    own = {stage.block for stage in schedule.own}
    for name, value in handle.heads.named_parameters():
        assert value.is_meta or torch.equal(value, whole.heads.get_parameter(name)), name
    for block in handle.blocks:
        parameters = [p for _, p in handle.blocks.parameters(handle.model, block.index)]
        shared = handle.model.get_output_embeddings().weight
        assert all(p.is_meta == (block.index not in own) for p in parameters if p is not shared)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    hidden = handle.model.config.hidden_size
    assert schedule.link is not None
    assert schedule.link.sent == (0 if schedule.has_task else STEPS * tokens * hidden * 4)


def bit_for_bit(folder: Path, size: int) -> None:
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("pipeline",))
    configs = [
        LoPTConfig(num_blocks=size, schedule="block_major"),
        LoPTConfig(num_blocks=4, schedule="block_major", stages=6),
        LoPTConfig(num_blocks=size, method="frozen", schedule="block_major"),
        LoPTConfig(num_blocks=size, schedule="block_major", offload="block", optimizer_device="cpu"),
        LoPTConfig(num_blocks=size, tied_embeddings="freeze", schedule="block_major"),
    ]
    for config, slots in itertools.product(configs, {2: (1, 7), 3: (4,), 4: (1, 4, 7)}[size]):
        compare(folder, config, [BATCHES[slot % 4] for slot in range(slots)], mesh)


def of_one_kind(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pipeline",))
    compare(folder, LoPTConfig(num_blocks=2, schedule="block_major"), BATCHES[:2], mesh)


def with_replicas(folder: Path) -> None:
    """Two pipelines of two that average their gradients learn what one process learns from all rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    config = LoPTConfig(num_blocks=2, schedule="block_major")
    whole, _ = one_process(folder, config, BATCHES, SGD)
    replica = mesh["data"].get_local_rank()
    handle, _, _ = in_pipeline(folder, config, BATCHES[2 * replica : 2 * replica + 2], SGD, mesh)
    for name, value in handle.model.named_parameters():
        if not value.is_meta:
            torch.testing.assert_close(value, whole.model.get_parameter(name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_weights_of_one_process_bit_for_bit(tmp_path: Path, size: int) -> None:
    tiny("llama-tied").save_pretrained(tmp_path, max_shard_size="20KB")
    run_ranks(size, tmp_path, bit_for_bit, tmp_path, size)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {}),  # has position embeddings
        ("bloom", dict(num_hidden_layers=8)),  # a norm of the token embedding, and layers that return tuples
        ("gptj", dict(num_hidden_layers=8)),  # such layers, and eager attention alone
    ],
)
def test_other_parts_in_front_and_other_layers(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    small_model_of(name, **changes).save_pretrained(tmp_path)
    run_ranks(2, tmp_path, of_one_kind, tmp_path)


def test_replicas_average_their_gradients(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    run_ranks(4, tmp_path, with_replicas, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoPTConfig(method="e2e"), "`method` e2e has none: use lopt or frozen"),
        (LoPTConfig(num_blocks=2), "`num_blocks` must be >= 3, the processes of the pipeline"),
        (LoPTConfig(num_blocks=3, clip="global"), "`clip` global waits"),
        (LoPTConfig(num_blocks=3, aux_loss="next_token"), "use recon"),
        (LoPTConfig(num_blocks=3, aux_loss="predicted_gradient"), "use recon"),
    ],
)
def test_what_cannot_be_a_pipeline_is_refused(config: LoPTConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pipeline(config, 3)


def run_example(rank: int, arguments: list[str], port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    runpy.run_path(str(ROOT / "examples/pipeline.py"))["main"](*arguments)


def test_the_example_runs(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    save_tiny(tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text('{"text": "It rains."}\n{"text": "It is dry."}\n')
    arguments = [str(tmp_path / name) for name in ("model", "texts.jsonl", "out")]
    mp.start_processes(run_example, (arguments, port), nprocs=2, start_method="fork")
    trained, start = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "model"))
    for name, value in trained.named_parameters():
        assert not torch.equal(value, start.get_parameter(name)), f"{name} was not trained"
