"""TRL's SFTConfig with the defaults of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import SFTConfig


@dataclass
class LoPTSFTConfig(SFTConfig):
    """`trl.SFTConfig` where a LoPT run wants other defaults.

    No gradient checkpointing (one block's activations are what it would save), bfloat16 autocast
    only where the hardware has it, two checkpoints kept.
    """

    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations in the backward: less memory, about a third slower."},
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Mixed precision in bfloat16. Default: where the GPU supports it."},
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "How many checkpoints to keep; the oldest go first."}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        # Pinned pages serve copies to a GPU; without one torch only warns about them.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if self.activation_checkpointing is None:  # the new name of the same flag
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
