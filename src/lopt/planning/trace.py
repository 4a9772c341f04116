"""Live bytes on the device, followed through the segments of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lopt.planning.measure import Parts, Segment
from lopt.planning.run import Bytes, Setting
from lopt.planning.sizes import BlockSizes, StageSizes


@dataclass
class Trace:
    """Follows live bytes through segments; `peak` is their largest sum, by part.

    `reference` is the rise of a second model's forward between the LM head and the loss's backward.
    `head_flops` is the part of `flops` that the LM head and losses take.
    """

    base: Bytes
    reference: int = 0
    stash: int = 0
    gradients: int = 0
    activations: int = 0
    flops: float = 0.0
    head_flops: float = 0.0
    peak: Bytes = field(init=False)

    def __post_init__(self) -> None:
        self.peak = self.base

    def run(self, segment: Segment, what: str, freed: int = 0) -> None:
        """Run a segment, at whose end `freed` bytes go beside what was measured."""
        top = what in ("head", "loss")
        if what == "loss" and self.reference:
            self._see(gradients=self.gradients, activations=self.activations, head_and_loss=self.reference)
        self._see(
            gradients=self.gradients + segment.rise_gradients,
            activations=self.activations + (0 if top else segment.rise),
            head_and_loss=segment.rise if top else 0,
        )
        self.activations += segment.activations - freed
        self.gradients += segment.gradients
        self.flops += segment.flops
        self.head_flops += segment.flops if top else 0.0

    def run_block(self, segments: dict[tuple[str, str], Segment], block: BlockSizes, casts: int) -> None:
        """Run one micro-batch through one block, forward and backward.

        Args:
            casts: bytes of autocast's copies of weights that go when the block is done, beside those that
                were measured.
        """
        self.run_forward(segments, block)
        self.run_loss(segments, block, casts)

    def run_forward(self, segments: dict[tuple[str, str], Segment], block: BlockSizes) -> None:
        """Run one micro-batch forward through the layers of a block."""
        for what in ("forward0", *["forward"] * (len(block.layers) - 1)):
            self.run(segments[block.place, what], what)

    def run_loss(self, segments: dict[tuple[str, str], Segment], block: BlockSizes, casts: int) -> None:
        """Run the loss of a block and its backward, after `run_forward`; `casts` as of `run_block`."""
        order = ["head", "loss", *["backward"] * (len(block.layers) - 1), "backward0", "embedding", "end"]
        end = "end" if block.place in ("first", "middle") else "head"
        for what in order:
            segment = segments.get((block.place, what))
            if segment is not None:
                self.run(segment, what, freed=casts if what == end else 0)

    def run_without_graph(self, forward: Segment, layers: int, casts: int) -> None:
        """Run one micro-batch through layers without a graph.

        Args:
            forward: of one layer.
            casts: bytes of autocast's copies of a layer's weights.
        """
        for number in range(layers):
            before = self.activations
            self.run(forward, "forward")
            if number:  # the input of a layer goes, autocast's copies stay
                self.activations = before + casts

    def run_stage(self, segments: dict[tuple[str, str], Segment], stage: StageSizes, freed: int) -> None:
        """Run one micro-batch through one stage of several of its block, forward and backward.

        Args:
            freed: bytes that go when the forward ends, beside those that were measured; with a local loss
                when the local backward ends.
        """
        rest = stage.place if stage.closes or stage.place == "whole" else "last"
        count, first = len(stage.layers), bool(stage.layers) and not stage.reaches_back
        forward = [(stage.place, "forward0")] * first + [(rest, "forward")] * (count - first)
        backward = [(rest, "backward")] * (count - first) + [(stage.place, "backward0")] * first
        top = [(stage.place, "head"), (stage.place, "loss")] * stage.closes
        below = [(stage.place, "embedding")] * bool(stage.before) + [(stage.place, "end")] * stage.closes
        end = "end" if stage.place in ("first", "middle") else "head"
        for key in forward:
            self.run(segments[key], key[1])
        if not stage.closes:
            self.activations -= freed
        for key in [*top, *backward, *below]:
            if (segment := segments.get(key)) is not None:
                self.run(segment, key[1], freed=freed if key[1] == end and stage.closes else 0)

    def step(self, temporaries: int) -> None:
        """Run the optimizer's step, when all gradients are there, with so many bytes of its own."""
        self._see(gradients=self.gradients, optimizer=self.base.optimizer + temporaries)

    def _see(self, **parts: int) -> None:
        self.peak = max(self.peak, replace(self.base, stash=self.stash, **parts), key=total)


def casts(setting: Setting, parts: Parts, block: BlockSizes) -> int:
    """Return the bytes of autocast's copies of weights, beside those measured, that go when a block is done.

    They live until a local backward or the whole forward ends. A last block's are also held by its graph,
    unless it is recomputed.
    """
    local = block.place in ("first", "middle")
    if not block.learns or not (local or setting.checkpointing):
        return 0
    return (len(block.layers) - parts.layers.get(block.place, 1)) * parts.casts


def total(parts: Bytes) -> int:
    """Return the sum of the parts."""
    return parts.total
