"""Models with random weights that are trained in a setting, and what a step of them takes; for gpu.py.

It needs torch, transformers and accelerate. Where TRL is installed the LM head is its fused one, as in the
trainers; else the logits are made for a few tokens at a time and recomputed in the backward.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from lopt import LoPTConfig, attach
from lopt.compat import checkpoint_activations
from lopt.engine.clipping import clip_gradients
from lopt.engine.optimizer import BlockOptimizer, Precision
from lopt.engine.plain_loop import block_major
from lopt.instruments.memory import MemoryTracker, free_memory

GIB = 2**30
HAS_TRL = importlib.util.find_spec("trl") is not None and importlib.util.find_spec("datasets") is not None
TOKENS_OF_LOGITS = 1024


@dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Attributes:
        method, blocks: as in `LoPTConfig`.
        stages: of the block-major schedule with weights in host memory; None trains eagerly on the device.
        optimizer: "host": AdamW with float32 masters in host memory. "device": AdamW on the device, weights
            rounded stochastically. "sgd": without state, on the device, not clipped.
    """

    method: str = "e2e"
    blocks: int = 1
    stages: int | None = None
    optimizer: str = "device"
    checkpointing: bool = False
    dtype: torch.dtype = torch.bfloat16
    prefetch_gib: float = 2.0

    @property
    def config(self) -> LoPTConfig:
        """What the model is attached with."""
        streamed: dict[str, Any] = {}
        if self.stages is not None:
            where = "cpu" if self.optimizer == "host" else "auto"
            streamed = dict(schedule="block_major", stages=self.stages, offload="block")
            streamed |= dict(optimizer_device=where, prefetch_gib=self.prefetch_gib)
        return LoPTConfig(method=self.method, num_blocks=self.blocks, **streamed)

    @property
    def masters(self) -> bool:
        """Whether bfloat16 weights have float32 masters."""
        return self.optimizer == "host" and self.dtype == torch.bfloat16


class Shape:
    """A model's sizes.

    Args:
        options: of its config; `layers` replaces their number of layers.
    """

    def __init__(self, options: dict[str, Any], layers: int | None = None) -> None:
        options = dict(options)
        self.published_layers = options["num_hidden_layers"]
        if layers is not None:
            options["num_hidden_layers"] = layers
        self.config = AutoConfig.for_model(options.pop("model_type"), **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.ends = 2 * model.get_input_embeddings().weight.numel()

    def learning(self, setting: Setting) -> float:
        """Return about how many parameters learn."""
        return self.parameters * (1 - 1 / setting.blocks if setting.method == "frozen" else 1)

    def host_bytes(self, setting: Setting, rows: int, micro_batches: int, itemsize: int = 2) -> float:
        """Return bytes of host memory: weights, gradients that wait, state, and what waits between stages.

        Args:
            rows: tokens of a micro-batch.
        """
        if setting.stages is None:
            return 0.0
        learning = self.learning(setting)
        state = {"host": 12, "device": 8, "sgd": 0}[setting.optimizer]
        waiting = 0 if setting.optimizer == "sgd" else itemsize
        one = rows * self.config.hidden_size * itemsize
        one = 2 ** math.ceil(math.log2(one))  # PyTorch's pinned memory comes in powers of two
        longest = math.ceil(setting.stages / setting.blocks)
        return itemsize * self.parameters + (waiting + state) * learning + one * micro_batches * longest

    def flops(self, setting: Setting, tokens: int) -> float:
        """Return about the FLOPs of a step: a product of a token and a parameter is two."""
        again = 8 if setting.checkpointing or (setting.stages or 0) > setting.blocks else 6
        learning = self.learning(setting)
        return tokens * (again * learning + 2 * (self.parameters - learning))


def random_model(config: Any, device: torch.device, dtype: torch.dtype, copies: bool) -> Any:
    """Return a model with random weights, made quickly.

    Args:
        copies: each matrix has memory of its own. Otherwise all are views of one block of random numbers,
            for a model whose weights are copied to host memory at once.
    """
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    largest = max(p.numel() for p in model.parameters())
    block = torch.empty(largest, dtype=dtype, device=device).normal_(0, 0.02)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                value = torch.full_like(parameter, 0.0 if name == "bias" else 1.0, device=device)
            else:
                value = block[: parameter.numel()].view(parameter.shape)
                value = value.clone() if copies else value
            setattr(module, name, nn.Parameter(value))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model.train()


class Training:
    """Optimizer steps of a model with random weights on random tokens.

    Args:
        shape: of the model.
        setting: how it is trained.
        device: where.
        size: (M, B, T), the most micro-batches of a step, and the size of one.
        threads: of a host optimizer; 0 steps in the calling thread.
    """

    def __init__(
        self, shape: Shape, setting: Setting, device: str, size: tuple[int, int, int], threads: Any = None
    ) -> None:
        torch.manual_seed(0)
        self.setting, self.device = setting, torch.device(device)
        if setting.stages is not None:
            stages = min(setting.stages, shape.config.num_hidden_layers + 2)
            setting = Setting(**vars(setting) | dict(stages=stages))
        self.model = random_model(shape.config, self.device, setting.dtype, copies=setting.stages is None)
        if HAS_TRL:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(self.model)
        if setting.checkpointing:
            checkpoint_activations(self.model)
        self.handle = attach(self.model, setting.config)
        groups, precision = self.handle.parameter_groups(1e-5), Precision(masters=setting.masters)
        self.schedule: Any = None
        if setting.stages is not None:
            clip = math.inf if setting.optimizer == "sgd" else 1.0
            make = sgd if setting.optimizer == "sgd" else adamw
            options = dict(max_norm=clip, precision=precision, threads=threads)
            self.schedule = block_major(self.handle, groups, make, device=self.device, **options)
            self.optimizer = self.schedule.optimizer
        else:
            self.optimizer = BlockOptimizer(groups, adamw, precision=precision)
        self.ids = torch.randint(0, shape.config.vocab_size, size, device=self.device)

    def loss(self, slot: int) -> Tensor:
        """Return the loss of micro-batch `slot`."""
        ids = self.ids[slot]
        if not HAS_TRL:
            return self._loss_in_parts(ids)
        from lopt.losses.lm_head import lean_fused_head

        with lean_fused_head(self.device):
            return self.model(input_ids=ids, labels=ids, fused_lm_head=True).loss

    def _loss_in_parts(self, ids: Tensor) -> Tensor:
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden, labels = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        head = self.model.get_output_embeddings()

        def part(rows: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(head(rows).float(), targets, reduction="sum")

        pairs = zip(hidden.split(TOKENS_OF_LOGITS), labels.split(TOKENS_OF_LOGITS), strict=True)
        parts = [checkpoint(part, rows, targets, use_reentrant=False) for rows, targets in pairs]
        return torch.stack(parts).sum() / labels.numel()

    def step(self, micro_batches: int) -> list[Tensor]:
        """Run an optimizer step; return its losses, each by its share."""
        self.handle.loss_scale = share = 1 / micro_batches
        if self.schedule is not None:
            return self.schedule.step(micro_batches, lambda slot: self.loss(slot) * share)
        losses = []
        for slot in range(micro_batches):
            loss = self.loss(slot) * share
            loss.backward()
            losses.append(loss.detach())
        clip_gradients(self.handle, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    def close(self) -> None:
        """Let go of pinned memory."""
        if self.schedule is not None:
            self.schedule.close()

    def measure(self, micro_batches: int, steps: int, shape: Shape) -> dict[str, Any]:
        """Time steps after an untimed one; the last one's peak, in GiB."""
        self.step(micro_batches)
        waited = 0.0 if self.schedule is None else self.schedule.waited
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        took = [seconds(lambda: self.step(micro_batches), self.device) for _ in range(steps)]
        if on_gpu:
            peak = torch.cuda.max_memory_allocated()
        else:
            with MemoryTracker(self.model, self.handle.heads, optimizer=self.optimizer) as tracker:
                self.step(micro_batches)
            peak = tracker.peak.total
        one = sum(took) / steps
        tokens = micro_batches * self.ids[0].numel()
        found = {
            "seconds": took,
            "tokens/s": tokens / one,
            "TFLOP/s": shape.flops(self.setting, tokens) / one / 1e12,
            "peak GiB": peak / GIB,
            "process GiB": psutil.Process().memory_info().rss / GIB,
        }
        if self.schedule is not None:
            found["host wait, s a step"] = (self.schedule.waited - waited) / (steps + (not on_gpu))
        return found


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True)


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=1e-5)


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    """Return the wall time of a call, the GPU's queue empty before and after."""
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def free_host_gib() -> float:
    """Return the GiB of host memory that this process can still have."""
    return free_memory(torch.device("cpu")) / GIB
