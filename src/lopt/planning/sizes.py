"""How large the parts of a model are, read from its weights on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lopt.core.blocks import Blocks, split
from lopt.core.config import LoPTConfig
from lopt.engine.stages import split_into_stages
from lopt.losses.reconstruction import ReconstructionHead
from lopt.models.load import empty_model
from lopt.planning.adapters import adapted
from lopt.tied_embeddings import shares_embeddings

Method = Literal["lopt", "frozen", "e2e", "lora"]


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
    def trained(self) -> list[Tensor]:
        """What is trained, its head's included."""
        return [t for t in (*self.tensors, *self.head) if t.requires_grad] if self.learns else []

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, its head's included."""
        return size_of(self.tensors) + size_of(self.head)

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of its own parameters."""
        return size_of(self.trained)


@dataclass(frozen=True)
class StageSizes(BlockSizes):
    """The weights of a stage, on the meta device; what is of its block is as there.

    Attributes:
        index: of the stage in the model, from 0.
        block: index of its block.
        opens, closes: whether it is the first and the last of its block.
        reaches_back: whether an earlier stage of its block learns, which needs the gradient of its input.
        borrowed: an LM head that is the token embedding, and belongs to the first stage.
    """

    index: int = 0
    block: int = 0
    opens: bool = True
    closes: bool = True
    reaches_back: bool = False
    borrowed: list[Tensor] = field(default_factory=list)

    @property
    def runs_back(self) -> bool:
        """Whether the backward sweep of its block runs through it."""
        return self.reaches_back or bool(self.trained)

    @property
    def left(self) -> int:
        """Bytes of the gradients that it leaves for the first stage."""
        return size_of(t for t in self.borrowed if t.requires_grad)


@dataclass(frozen=True)
class Sizes:
    """The weights of a model, on the meta device; `requires_grad` says which are trained.

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
    def of(
        cls,
        config: PreTrainedConfig,
        dtype: torch.dtype = torch.float32,
        adapters: Any = None,
        freeze_tied: bool = False,
    ) -> Sizes:
        """Return the sizes of the model with this config, with weights of `dtype`.

        Args:
            adapters: the `peft.LoraConfig` of adapters, which alone are trained then.
            freeze_tied: an embedding that is the LM head as well is not trained.
        """
        with torch.device("meta"):
            base = empty_model(config, dtype=dtype)
            head = ReconstructionHead(config.get_text_config().hidden_size)
            model = base if adapters is None else adapted(base, adapters)
        tied = shares_embeddings(base)
        if tied and freeze_tied:
            base.get_input_embeddings().requires_grad_(False)
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
            tied=[base.get_output_embeddings().weight] if tied else [],
            head=list(head.parameters()),
            buffers=sum(b.nbytes for b in (*model.buffers(), *beside.values())),
        )

    def blocks(self, cut: LoPTConfig) -> list[BlockSizes]:
        """Return the blocks of a method; two blocks or more untie a trained embedding and LM head.

        Raises:
            ValueError: more blocks or stages than the model can be cut into, or no earlier block learns.
        """
        spans = split(len(self.layers), cut)
        last, blocks = len(spans) - 1, []
        untied = self.tied if last and cut.tied_embeddings == "untie" else []
        for index, (start, stop) in enumerate(spans):
            learns = index == last or (cut.is_local and index >= cut.frozen_blocks)
            between = "middle" if learns else "resting"
            place = "first" if index == 0 else "last" if index == last else between
            blocks.append(
                BlockSizes(
                    place=place if last else "whole",
                    learns=learns,
                    before=self.embedding if index == 0 else [],
                    layers=self.layers[start:stop],
                    after=[*self.tail, *untied] if index == last else [],
                    head=self.head if cut.is_local and learns and index < last else [],
                )
            )
        return blocks

    def stages(self, cut: LoPTConfig) -> list[StageSizes]:
        """Return the stages of a method's blocks, split as the engine does.

        Raises:
            ValueError: of `blocks`.
        """
        blocks = self.blocks(cut)
        tied = self.tied if len(blocks) == 1 or cut.tied_embeddings == "freeze" else []
        layers = [(layer, block.learns) for block in blocks for layer in block.layers]
        ends = [(self.embedding, blocks[0].learns), ([*blocks[-1].after, *tied], blocks[-1].learns)]
        parts = [ends[0], *layers, ends[1]]
        costs = [sum(t.nbytes * (1 + (learns and t.requires_grad)) for t in part) for part, learns in parts]
        stops = list(accumulate(len(block.layers) for block in blocks))
        found: list[StageSizes] = []
        for block, spans in enumerate(split_into_stages(costs, stops, cut.stages, cut.stage_layers)):
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
                        reaches_back=not opens and found[-1].runs_back,
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


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors)
