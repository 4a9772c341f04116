"""What is planned: the run that is fixed, the settings that are compared, and bytes by what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from lopt.planning.sizes import Method

PREFETCH = 2 * 2**30
"""Default of the bytes of weights and optimizer state that are on their way to or from the device."""


@dataclass(frozen=True)
class Setting:
    """One row of a plan: how the method runs.

    Attributes:
        stages, stage_layers: as in `lopt.residency.Residency`; of the block-major schedule.
        optimizer_device: "cpu" steps in host memory.
        block_boundaries: layers (from 0) at which blocks 2..k start; None splits them evenly.
        pipeline_size, pipeline_depth: as in `lopt.residency.Residency`.
    """

    method: Method = "lopt"
    num_blocks: int = 2
    schedule: Literal["eager", "block_major", "pipeline"] = "eager"
    checkpointing: bool = False
    offload: Literal["none", "optimizer", "block"] = "none"
    stages: int | None = None
    stage_layers: int | None = None
    optimizer_device: Literal["auto", "cpu"] = "auto"
    block_boundaries: tuple[int, ...] | None = None
    pipeline_size: int | None = None
    pipeline_depth: int = 2

    def __str__(self) -> str:
        words = [f"k={self.num_blocks}" if self.method in ("lopt", "frozen") else self.method]
        if self.method == "frozen":
            words.append("frozen")
        words += ["pipeline"] * (self.schedule == "pipeline")
        if self.schedule == "block_major":
            words += [f"{self.stages} stages"] if self.stages is not None else []
            words += [f"{self.stage_layers} layers a stage"] if self.stage_layers is not None else []
            words.append("block-major" if self.offload == "none" else f"offload {self.offload}")
            words += ["host steps"] * (self.optimizer_device == "cpu")
        return ", ".join(words + ["checkpointed"] * self.checkpointing)


@dataclass(frozen=True)
class Run:
    """What all rows of a plan share: model, batch and number formats.

    Attributes:
        batch, tokens: B rows of T tokens in a micro-batch; of several rows, one is padded.
        accumulation: micro-batches per optimizer step.
        dtype: of the weights. autocast: whether forwards run under bfloat16 autocast.
        optimizer: a name of `lopt.planning.optimizer_step.OPTIMIZERS`.
        state_dtype: of the optimizer's state. masters: whether bfloat16 weights have float32 masters;
            None: as `Residency.keeps_masters` says.
        local_every: earlier blocks learn in every N-th step.
        frozen_blocks: how many blocks of lopt, from the first on, do not learn.
        aux_loss: what the other earlier blocks of lopt learn.
        tied_embeddings: as in `LoPTConfig`.
        adapters: the `peft.LoraConfig` of method lora.
        clips, clip: whether gradients are clipped, and by the norm of a block or of all ("global").
        prefetch: bytes of device memory for what offloading has on its way.
        device: "cuda" or "cpu".
        reference: whether a second model that does not learn is on the device and run forward,
            as that of DPO unless its log-probabilities are known before.
        processes: of DDP on one machine, each with a device and micro-batches of its own.
        fsdp2: whether they have shards of the model in place of all of it, as FSDP2 deals them out.
    """

    config: PreTrainedConfig
    batch: int = 4
    tokens: int = 1024
    accumulation: int = 8
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = True
    optimizer: str = "adamw_torch_fused"
    state_dtype: torch.dtype = torch.float32
    masters: bool | None = None
    local_every: int = 1
    frozen_blocks: int = 0
    aux_loss: Literal["recon", "next_token", "predicted_gradient"] = "recon"
    tied_embeddings: Literal["untie", "freeze"] = "untie"
    adapters: Any = None
    clips: bool = True
    clip: Literal["block", "global"] = "block"
    prefetch: int = PREFETCH
    device: str = "cuda"
    reference: bool = False
    processes: int = 1
    fsdp2: bool = False

    @property
    def ids_bytes(self) -> int:
        """Bytes of a micro-batch as it waits: tokens, mask and labels."""
        return 3 * 8 * self.batch * self.tokens

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step, padding included."""
        return self.batch * self.tokens * self.accumulation


@dataclass(frozen=True)
class Bytes:
    """Bytes on the device at one moment, by what they hold."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0  # of the layers of the block at work
    head_and_loss: int = 0
    stash: int = 0  # boundaries of all micro-batches (block-major)
    transfers: int = 0  # on their way to or from the device (offload)

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(vars(self).values())
