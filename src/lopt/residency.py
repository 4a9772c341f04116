"""How much of a model the device holds at a time, which does not change what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lopt.options import documented
from lopt.validation import check_choice, check_number

_CHOICES: dict[str, Any] = {
    "schedule": ("eager", "block_major", "pipeline"),
    "offload": ("none", "optimizer", "block"),
    "optimizer_device": ("auto", "cpu"),
}


@documented
@dataclass(frozen=True)
class Residency:
    """How an optimizer step is run, and what the device holds meanwhile.

    Attributes:
        schedule: 'eager': each micro-batch runs through the whole model. 'block_major': all micro-batches of
            an optimizer step run through one stage of the model before the next one begins. 'pipeline': the
            same, with the blocks dealt out to the processes that a launcher has started.
        pipeline_size: With `schedule` pipeline: processes of a pipeline. Default: as many as blocks. Where
            there are more processes, they are replicas that average the gradients of their blocks.
        pipeline_depth: Micro-batches that may be on their way between two processes of a pipeline.
        stages: With `schedule` block_major or pipeline: the number of stages of the whole model, at least one
            per block. The device works on one at a time. Boundaries are chosen by size; the token embedding
            and the LM head may become stages of their own. Default: as many as blocks.
        stage_layers: Instead of `stages`: the largest number of layers of a stage.
        offload: What stays in host memory while the device does not need it, with `schedule` block_major or
            pipeline: 'optimizer' state, or 'block': weights and optimizer state of every stage but the
            current one.
        optimizer_device: Where the optimizer steps. 'auto': where the model is trained. 'cpu', with `offload`
            block: in host memory, in a thread beside the device's work; gradients are copied out, and
            optimizer state never moves.
        prefetch_gib: With `offload`: GiB of device memory for tensors on their way in or out, beside the
            current stage. A larger value hides more of the copying.

    Raises:
        ValueError: A value is out of range, or needs another one; the message names the field and the rule.
    """

    schedule: Literal["eager", "block_major", "pipeline"] = "eager"
    pipeline_size: int | None = None
    pipeline_depth: int = 2
    stages: int | None = None
    stage_layers: int | None = None
    offload: Literal["none", "optimizer", "block"] = "none"
    optimizer_device: Literal["auto", "cpu"] = "auto"
    prefetch_gib: float = 2.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in ("stages", "stage_layers", "pipeline_size", "pipeline_depth"):
            check_number(name, getattr(self, name), minimum=1)
        check_number("prefetch_gib", self.prefetch_gib, minimum=0)
        if self.stages is not None and self.stage_layers is not None:
            raise ValueError("`stages` and `stage_layers` say the same thing: give one of them")
        for name, none in (("offload", "none"), ("stages", None), ("stage_layers", None)):
            given = getattr(self, name)
            if given != none and not self.is_staged:
                raise ValueError(f"`{name}` {given} needs `schedule` block_major: add it")
        for name, usual in (("pipeline_size", None), ("pipeline_depth", 2)):
            given = getattr(self, name)
            if given != usual and self.schedule != "pipeline":
                raise ValueError(f"`{name}` {given} needs `schedule` pipeline: add it")
        if self.optimizer_device == "cpu" and self.offload != "block":
            raise ValueError(
                "`optimizer_device` cpu steps weights that are in host memory: add `offload` block"
            )

    @property
    def is_staged(self) -> bool:
        """True if micro-batches run stage by stage, in one process or in several."""
        return self.schedule != "eager"

    def keeps_masters(self, asked: bool | None) -> bool:
        """Return whether weights in bfloat16 have float32 masters.

        Args:
            asked: What the user says; None: where the host steps, which rounds stochastically more slowly
                than it steps, and has the memory.
        """
        return self.optimizer_device == "cpu" if asked is None else asked
