"""Everything a user chooses about the method, in one validated, frozen dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

METHODS = ("lopt", "e2e", "frozen", "lora")
METHOD_ALIASES = {"ll": "lopt"}
# An early block without a task gradient moves as fast as its learning rate lets it, because Adam
# is blind to the size of the gradient. A tenth is what keeps a pretrained block intact
# (docs/method.md, "The learning rate of earlier blocks").
LR_K1_RATIO = {"recon": 0.1, "next_token": 1.0}


@dataclass(frozen=True)
class LoPTConfig:
    """How the model is cut and what each block learns from (arXiv 2605.04913).

    Raises:
        ValueError: a value is out of range; the message names the flag and the fix.
    """

    method: Literal["lopt", "ll", "e2e", "frozen", "lora"] = field(
        default="lopt",
        metadata={
            "help": "What the earlier blocks learn from: 'lopt' (or 'll') their own "
            "reconstruction loss, 'e2e' the task loss through the whole depth, 'frozen' nothing, "
            "'lora' adapters trained end to end."
        },
    )
    num_blocks: int = field(
        default=2,
        metadata={"help": "k, the number of blocks the layers are split into; 1 is end to end."},
    )
    block_boundaries: list[int] | None = field(
        default=None,
        metadata={
            "help": "Layers (from 0) at which blocks 2..k start, for example '6 12'; overrides "
            "--num_blocks. By default the layers are split evenly."
        },
    )
    aux_loss: Literal["recon", "next_token"] = field(
        default="recon",
        metadata={
            "help": "What every earlier block learns: 'recon' to reconstruct its own input, as published; "
            "'next_token' to predict the next token, its head being a lens on the LM head; for blocks near "
            "the top, as with --num_blocks 4 --frozen_blocks 2."
        },
    )
    frozen_blocks: int = field(
        default=0,
        metadata={
            "help": "How many blocks, from the first on, do not learn at all: they need no activations, "
            "gradients or optimizer state. For --aux_loss next_token, of which low blocks learn little."
        },
    )
    lambda_aux: float = field(
        default=10.0,
        metadata={"help": "λ, the weight of the mean local loss beside the task loss."},
    )
    lr_k1: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of every block but the last, the embedding and the heads. "
            "Default: a tenth of --learning_rate, and the same with --aux_loss next_token (the published "
            "recipe uses the same)."
        },
    )
    schedule: Literal["eager", "block_major"] = field(
        default="eager",
        metadata={
            "help": "'eager': each micro-batch runs through all blocks. 'block_major': all micro-batches of "
            "an optimizer step run through one block, which is stepped before the next one begins."
        },
    )
    offload: Literal["none", "optimizer", "block"] = field(
        default="none",
        metadata={
            "help": "What --schedule block_major keeps in host memory while the device does not need it: "
            "'optimizer' state, or 'block': weights and optimizer state of all blocks but the one at work."
        },
    )
    prefetch_gib: float = field(
        default=2.0,
        metadata={
            "help": "With --offload: GiB of device memory for what is on its way in or out, beside the block "
            "at work. More of it hides more of the copying."
        },
    )
    local_every: int = field(
        default=1,
        metadata={
            "help": "Earlier blocks learn on every N-th optimizer step and run without gradients on the "
            "others, which makes those faster. 1 is the published recipe."
        },
    )
    head_warmup_steps: int = field(
        default=60,
        metadata={
            "help": "Steps in which the reconstruction heads alone learn, before the first "
            "optimizer step. 0 is the published start."
        },
    )
    head_warmup_lr: float = field(default=1e-2, metadata={"help": "Learning rate of the head warm-up."})
    tied_embeddings: Literal["untie", "freeze"] = field(
        default="untie",
        metadata={
            "help": "What becomes of an embedding shared with the LM head: 'untie' trains two "
            "copies, 'freeze' keeps the one matrix and does not train it."
        },
    )
    clip: Literal["global", "block"] = field(
        default="block",
        metadata={
            "help": "Clip --max_grad_norm per block, or over all gradients together ('global', as "
            "published: a large gradient in one block shrinks every other block's step)."
        },
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", METHOD_ALIASES.get(self.method, self.method))
        _check(self.method in METHODS, "--method", self.method, "use one of lopt, ll, e2e, frozen, lora")
        _check(self.num_blocks >= 1, "--num_blocks", self.num_blocks, "use 1 or more")
        _check(
            self.aux_loss in LR_K1_RATIO, "--aux_loss", self.aux_loss, "use one of " + ", ".join(LR_K1_RATIO)
        )
        _check(self.frozen_blocks >= 0, "--frozen_blocks", self.frozen_blocks, "use 0 or more")
        if self.frozen_blocks:
            _check(self.method == "lopt", "--frozen_blocks with --method", self.method,
                   "the earlier blocks that learn are those of lopt; leave --frozen_blocks out")  # fmt: skip
        _check(_finite(self.lambda_aux), "--lambda_aux", self.lambda_aux, "use a finite number >= 0")
        if self.lr_k1 is not None:
            _check(_finite(self.lr_k1), "--lr_k1", self.lr_k1, "use a finite number >= 0")
        _check(
            self.schedule in ("eager", "block_major"),
            "--schedule", self.schedule, "use eager or block_major",
        )  # fmt: skip
        if self.schedule == "block_major":
            _check(self.method == "lopt", "--schedule block_major with --method", self.method,
                   "only lopt has blocks that learn on their own; leave --schedule out")  # fmt: skip
            _check(self.clip == "block", "--schedule block_major with --clip", self.clip,
                   "a block is stepped before the others' gradients exist; use --clip block")  # fmt: skip
        _check(
            self.offload in ("none", "optimizer", "block"),
            "--offload", self.offload, "use none, optimizer or block",
        )  # fmt: skip
        _check(self.offload == "none" or self.schedule == "block_major", "--offload", self.offload,
               "only one block at a time can be on the device; add --schedule block_major")  # fmt: skip
        _check(_finite(self.prefetch_gib), "--prefetch_gib", self.prefetch_gib, "use a finite number >= 0")
        _check(self.local_every >= 1, "--local_every", self.local_every, "use 1 or more")
        _check(self.head_warmup_steps >= 0, "--head_warmup_steps", self.head_warmup_steps, "use 0 or more")
        _check(
            _finite(self.head_warmup_lr), "--head_warmup_lr", self.head_warmup_lr, "use a finite number >= 0"
        )
        _check(
            self.tied_embeddings in ("untie", "freeze"),
            "--tied_embeddings", self.tied_embeddings, "use untie or freeze",
        )  # fmt: skip
        _check(self.clip in ("global", "block"), "--clip", self.clip, "use global or block")
        bounds = self.block_boundaries
        if bounds is not None:
            object.__setattr__(self, "block_boundaries", list(bounds))
            rising = all(a < b for a, b in zip([0, *bounds], bounds, strict=False))
            _check(
                rising,
                "--block_boundaries",
                bounds,
                "use increasing layer numbers from 1 on, for example 6 12",
            )

    @property
    def is_local(self) -> bool:
        """Whether earlier blocks learn from a local loss of their own."""
        return self.method == "lopt"

    @property
    def is_cut(self) -> bool:
        """Whether the task gradient stops at a boundary."""
        return self.method in ("lopt", "frozen")

    def early_learning_rate(self, learning_rate: float) -> float:
        """The learning rate of earlier blocks, the embedding and the heads."""
        return LR_K1_RATIO[self.aux_loss] * learning_rate if self.lr_k1 is None else self.lr_k1

    def replace(self, **changes: Any) -> LoPTConfig:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)


def _finite(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _check(condition: bool, flag: str, value: object, fix: str) -> None:
    if not condition:
        raise ValueError(f"{flag} {value} is not possible: {fix}")
