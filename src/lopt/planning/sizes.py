"""How large the parts of a model are, read from its weights on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lopt.core.blocks import Blocks, split
from lopt.core.config import LoPTConfig
from lopt.core.objective import ReconstructionHead
from lopt.engine.stages import split_into_stages
from lopt.models.load import empty_model
from lopt.tied_embeddings import shares_embeddings
from lopt.validation import check

Method = Literal["lopt", "frozen", "e2e"]


@dataclass(frozen=True)
class BlockSizes:
    """The weights of a block, on the meta device.

    Attributes:
        place: "first", "middle", "last", "resting" for a middle one that does not learn or, if there is
            one block only, "whole".
        learns: whether its weights are trained.
        before, layers, after: what feeds its layers (block 1: the embedding), the layers, and what follows
            them (block k: final norm and LM head).
        head: its reconstruction head's.
    """

    place: str
    learns: bool
    before: list[Tensor]
    layers: list[list[Tensor]]
    after: list[Tensor]
    head: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All weights but the head's, in the model's order."""
        return [*self.before, *chain(*self.layers), *self.after]

    @property
    def weights(self) -> int:
        """Elements of the block's part of the model."""
        return elements(self.tensors)

    @property
    def head_weights(self) -> int:
        """Elements of its reconstruction head."""
        return elements(self.head)


@dataclass(frozen=True)
class StageSizes(BlockSizes):
    """The weights of a stage, on the meta device; what is of its block is as there.

    Attributes:
        index: of the stage in the model, from 0.
        block: index of its block.
        opens, closes: whether it is the first and the last of its block.
        borrowed: an LM head that is the token embedding, and belongs to the first stage.
        reaches_back: whether an earlier stage of its block learns.
    """

    index: int = 0
    block: int = 0
    opens: bool = True
    closes: bool = True
    borrowed: list[Tensor] = field(default_factory=list)

    @property
    def reaches_back(self) -> bool:
        """Whether an earlier stage of its block learns, which needs the gradient of its input."""
        return self.learns and not self.opens

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of its own parameters."""
        return sum(t.nbytes for t in (*self.tensors, *self.head)) if self.learns else 0


@dataclass(frozen=True)
class Sizes:
    """The weights of a model, on the meta device.

    Attributes:
        embedding: all that feeds the first layer.
        layers: of every layer.
        tail: final norm, and the LM head if it has a matrix of its own.
        tied: that matrix if it is the embedding's.
        head: one reconstruction head's.
        buffers: in bytes, with what text does not run through (`Blocks.others`).
    """

    embedding: list[Tensor]
    layers: list[list[Tensor]]
    tail: list[Tensor]
    tied: list[Tensor]
    head: list[Tensor]
    buffers: int

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Sizes:
        """Return the sizes of the model with this config, with weights of `dtype`."""
        with torch.device("meta"):
            model = empty_model(config, dtype=dtype)
            head = ReconstructionHead(config.get_text_config().hidden_size)
        count = len(Blocks(model, LoPTConfig(method="e2e")).layers)
        blocks = Blocks(model, LoPTConfig(method="frozen", num_blocks=count))
        layers: list[list[Tensor]] = [list(layer.parameters()) for layer in blocks.layers]
        inside = {id(p) for layer in layers for p in layer}
        others = [[p for _, p in blocks.parameters(model, b.index) if id(p) not in inside] for b in blocks]
        beside = {id(p): p for module in blocks.others for p in module.parameters()}  # not trained
        return cls(
            embedding=[p for p in others[0] if id(p) not in beside],
            layers=layers,
            tail=list(others[-1]) if count > 1 else [],
            tied=[model.get_output_embeddings().weight] if shares_embeddings(model) else [],
            head=list(head.parameters()),
            buffers=sum(b.nbytes for b in (*model.buffers(), *beside.values())),
        )

    def blocks(self, method: Method, num_blocks: int, frozen_blocks: int = 0) -> list[BlockSizes]:
        """Return the blocks of a method; two blocks or more untie embedding and LM head.

        Raises:
            ValueError: more blocks than layers, or all earlier blocks of lopt frozen.
        """
        cut = LoPTConfig(method=method, num_blocks=num_blocks, frozen_blocks=frozen_blocks)
        spans = split(len(self.layers), cut)
        last, blocks = len(spans) - 1, []
        for index, (start, stop) in enumerate(spans):
            learns = index == last or (method != "frozen" and index >= frozen_blocks)
            between = "middle" if learns else "resting"
            place = "first" if index == 0 else "last" if index == last else between
            blocks.append(
                BlockSizes(
                    place=place if last else "whole",
                    learns=learns,
                    before=self.embedding if index == 0 else [],
                    layers=self.layers[start:stop],
                    after=self.tail + (self.tied if last else []) if index == last else [],
                    head=self.head if method == "lopt" and learns and index < last else [],
                )
            )
        return blocks

    def stages(
        self, blocks: list[BlockSizes], stages: int | None, stage_layers: int | None
    ) -> list[StageSizes]:
        """Return the stages of `blocks`, split as the engine does.

        Raises:
            ValueError: the model cannot be split into so many.
        """
        most = len(self.layers) + 2
        rule = f"<= {most}, the layers, the embedding and the LM head"
        check(stages is None or stages <= most, "stages", stages, rule)
        tied = self.tied if len(blocks) == 1 else []
        check(stages is None or stages >= len(blocks), "stages", stages, f">= {len(blocks)}, the blocks")
        layers = [(layer, block.learns) for block in blocks for layer in block.layers]
        ends = [(self.embedding, blocks[0].learns), ([*blocks[-1].after, *tied], blocks[-1].learns)]
        parts = [ends[0], *layers, ends[1]]
        costs = [sum(t.nbytes for t in tensors) * (1 + learns) for tensors, learns in parts]
        stops = list(accumulate(len(block.layers) for block in blocks))
        found: list[StageSizes] = []
        for block, spans in enumerate(split_into_stages(costs, stops, stages, stage_layers)):
            for number, (first, end) in enumerate(spans):
                opens, closes, whole = number == 0, number == len(spans) - 1, blocks[block]
                top = end == len(parts)
                found.append(
                    StageSizes(
                        place=whole.place,
                        learns=whole.learns,
                        before=whole.before if first == 0 else [],
                        layers=self.layers[max(first - 1, 0) : min(end - 1, len(self.layers))],
                        after=whole.after if top else [],
                        head=whole.head if closes else [],
                        index=len(found),
                        block=block,
                        opens=opens,
                        closes=closes,
                        borrowed=tied if top and first > 0 else [],
                    )
                )
        return found

    @property
    def model(self) -> int:
        """Elements of all weights as they are published."""
        return elements([*self.embedding, *chain(*self.layers), *self.tail])


def elements(tensors: Iterable[Tensor]) -> int:
    """Return the number of elements of all tensors together."""
    return sum(tensor.numel() for tensor in tensors)
