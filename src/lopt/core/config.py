"""Everything a user chooses about the method, in one validated, frozen dataclass."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Literal

from lopt.options import documented
from lopt.residency import Residency
from lopt.validation import check, check_choice, check_number

METHODS = ("lopt", "e2e", "frozen", "lora")
METHOD_ALIASES = {"ll": "lopt"}
# Adam ignores the size of a gradient, so even a weak local loss moves a block at its full learning rate. A
# tenth keeps a pretrained block intact (docs/method.md).
LR_K1_RATIO = {"recon": 0.1, "next_token": 1.0, "predicted_gradient": 0.3}
_CHOICES: dict[str, Any] = {
    "method": [*METHODS, *METHOD_ALIASES],
    "aux_loss": tuple(LR_K1_RATIO),
    "tied_embeddings": ("untie", "freeze"),
    "clip": ("global", "block"),
}
_AT_LEAST_0 = ("frozen_blocks", "frozen_top", "lambda_aux", "lr_k1", "head_warmup_steps", "head_warmup_lr")


@documented
@dataclass(frozen=True)
class LoPTConfig(Residency):
    """How the model is cut and what each block learns from (arXiv 2605.04913).

    Attributes:
        method: What the earlier blocks learn from: 'lopt' (or 'll') a local loss of their own, 'e2e' the task
            loss through the whole depth, 'frozen' nothing; 'lora' trains adapters end to end.
        num_blocks: k, the number of blocks the layers are split into; 1 is end to end.
        block_boundaries: Layers (from 0) at which blocks 2..k start, for example '6 12'; overrides
            `num_blocks`. By default the layers are split evenly.
        aux_loss: The local loss of every earlier block: 'recon' reconstructs its input, as published;
            'next_token' predicts the next token, its head being a lens on the LM head, which suits blocks
            near the top, as with `num_blocks` 4 and `frozen_blocks` 2; 'predicted_gradient' follows a linear
            prediction of the task's gradient, fitted to exact ones every `refit_every` steps.
        frozen_blocks: How many blocks, from the first on, do not learn at all: they need no activations,
            gradients or optimizer state. Useful with `aux_loss` next_token, which teaches low blocks little.
        frozen_top: How many of the last layers do not learn, nor do the norm and LM head after them, or an
            embedding that the LM head shares. The task gradient passes through them, so that with `method`
            frozen only layers in the middle learn.
        refit_every: Optimizer steps between two fits of `aux_loss` predicted_gradient.
        lambda_aux: λ, the weight of the mean local loss beside the task loss; a predicted gradient has none.
        lr_k1: Learning rate of blocks 1 to k−1, the embedding and the heads. Default: of `learning_rate` a
            tenth, 0.3 with `aux_loss` predicted_gradient, all with next_token (in the paper with recon).
        local_every: Earlier blocks learn on every N-th optimizer step and run without gradients on the
            others, which makes those faster. 1 is the published recipe.
        head_warmup_steps: Steps in which the heads alone learn, before the first optimizer
            step. 0 is the published start.
        head_warmup_lr: Learning rate of the head warm-up.
        tied_embeddings: How an embedding shared with the LM head is treated: 'untie' trains two copies,
            'freeze' keeps the one matrix and does not train it.
        clip: Clip to `max_grad_norm` per 'block', or over all gradients together ('global', as published: a
            large gradient in one block shrinks every other block's step).

    Raises:
        ValueError: A value is out of range; the message names the field and the rule.
    """

    method: Literal["lopt", "ll", "e2e", "frozen", "lora"] = "lopt"
    num_blocks: int = 2
    block_boundaries: list[int] | None = None
    aux_loss: Literal["recon", "next_token", "predicted_gradient"] = "recon"
    frozen_blocks: int = 0
    frozen_top: int = 0
    refit_every: int = 10
    lambda_aux: float = 10.0
    lr_k1: float | None = None
    local_every: int = 1
    head_warmup_steps: int = 60
    head_warmup_lr: float = 1e-2
    tied_embeddings: Literal["untie", "freeze"] = "untie"
    clip: Literal["global", "block"] = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "method", METHOD_ALIASES.get(self.method, self.method))
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in ("num_blocks", "local_every", "refit_every"):
            check_number(name, getattr(self, name), minimum=1)
        for name in _AT_LEAST_0:
            check_number(name, getattr(self, name), minimum=0)
        if self.block_boundaries is not None:
            starts = list(self.block_boundaries)
            object.__setattr__(self, "block_boundaries", starts)
            rising = all(a < b for a, b in itertools.pairwise([0, *starts]))
            check(rising, "block_boundaries", starts, "increasing layer numbers from 1 on, for example 6 12")
        if self.aux_loss == "predicted_gradient":
            self._check_predicted_gradient()
        elif self.refit_every != 10:
            raise ValueError("`refit_every` needs `aux_loss` predicted_gradient: leave it out")
        if self.frozen_blocks and not self.is_local:
            raise ValueError(f"`frozen_blocks` needs `method` lopt (got {self.method}): leave it out")
        if self.frozen_top and self.method == "lora":
            raise ValueError("`frozen_top` has no effect with `method` lora: leave it out")
        rule = f">= {self.block_count}, the number of blocks"
        check(self.stages is None or self.stages >= self.block_count, "stages", self.stages, rule)

    def _check_predicted_gradient(self) -> None:
        for name, default in (("lambda_aux", 10.0), ("head_warmup_steps", 60), ("head_warmup_lr", 1e-2)):
            if getattr(self, name) != default:
                raise ValueError(f"`{name}` has no effect with `aux_loss` predicted_gradient: leave it out")

    @property
    def is_local(self) -> bool:
        """True if earlier blocks learn from a local loss of their own."""
        return self.method == "lopt"

    @property
    def is_cut(self) -> bool:
        """True if the task gradient stops at a boundary."""
        return self.method in ("lopt", "frozen")

    @property
    def block_count(self) -> int:
        """The number of blocks that the fields ask for."""
        if not self.is_cut:
            return 1
        return self.num_blocks if self.block_boundaries is None else len(self.block_boundaries) + 1

    def early_learning_rate(self, learning_rate: float) -> float:
        """Return the learning rate of earlier blocks, the embedding and the heads."""
        return LR_K1_RATIO[self.aux_loss] * learning_rate if self.lr_k1 is None else self.lr_k1

    def local_weight(self, learners: int) -> float:
        """Return the factor on each of the local losses of so many blocks, beside the task loss."""
        return 1.0 if self.aux_loss == "predicted_gradient" else self.lambda_aux / learners

    def changed(self) -> dict[str, Any]:
        """Return the fields that are not at their defaults."""
        default = LoPTConfig()
        return {k: v for k, v in dataclasses.asdict(self).items() if v != getattr(default, k)}

    def replace(self, **changes: Any) -> LoPTConfig:
        """Return a copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)
