"""The blocks of a model: which layers each of them has, and which parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lopt.architectures import base_model, find_decoder
from lopt.core.config import LoPTConfig


@dataclass(frozen=True)
class Block:
    """Layers `start` (included) to `stop` (excluded) of the decoder; `index` counts from 0."""

    index: int
    start: int
    stop: int


class Blocks(Sequence[Block]):
    """The blocks of one model, in order.

    The first block owns all that feeds the first layer; the last block owns the LM head and the final norm.

    Attributes:
        decoder: The decoder's module.
        layers: All of its layers.
        front: The modules that run before the first layer: embeddings and their norms.
        others: What text does not run through, in a model of pictures as well; it is not trained.
        tail: The modules between the last layer and the LM head: the final norm, and what follows it.
        layer_output: Puts a hidden state into the form in which the layers return it: alone or in a tuple.

    Raises:
        ValueError: The model cannot be cut as `config` says, or a parameter has no block, or two.
    """

    def __init__(self, model: nn.Module, config: LoPTConfig) -> None:
        self._base = base_model(model)
        found = find_decoder(self._base, config.is_local or config.is_staged)
        self.decoder, self.layers = found.module, found.layers
        self.tail, self.front, self.others = found.tail, found.front, found.others
        self.layer_output = found.layer_output
        spans = split(len(self.layers), config)
        if config.frozen_top >= (size := spans[-1][1] - spans[-1][0]):
            raise ValueError(
                f"`frozen_top` must be < {size}, the layers of the last block, or nothing learns from the "
                f"task (got {config.frozen_top})"
            )
        self._blocks = [Block(index, start, stop) for index, (start, stop) in enumerate(spans)]
        self._check_owners(model)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: Any) -> Any:
        return self._blocks[index]

    def owner(self, parameter: nn.Parameter) -> int:
        """Return the index of the block that `parameter` belongs to."""
        return self._owners().get(id(parameter), 0)

    def parameters(self, model: nn.Module, index: int) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters of `model` that belong to block `index`, in the model's order."""
        owners = self._owners()  # anew: untying and sharding put other parameters in the modules
        for name, parameter in model.named_parameters():
            if owners.get(id(parameter), 0) == index:
                yield name, parameter

    def top(self, layers: int) -> list[nn.Module]:
        """Return the last so many layers, and the norm and LM head after them; nothing for 0 layers."""
        return [*self.layers[-layers:], *self.tail, self._base.get_output_embeddings()] if layers else []

    def _claims(self) -> Iterator[tuple[int, nn.Module]]:
        """Yield (block index, module) for every module that holds parameters."""
        yield from ((len(self) - 1, module) for module in (*self.tail, self._base.get_output_embeddings()))
        embedding = self._base.get_input_embeddings()
        # After the head, so that a matrix which they share belongs to the first block: see `_owners`.
        yield from ((0, module) for module in (*self.front, *self.others, embedding))
        yield from ((b.index, layer) for b in self for layer in self.layers[b.start : b.stop])

    def _owners(self) -> dict[int, int]:
        """Map id(parameter) to block index; the last claim counts."""
        return {id(p): index for index, module in self._claims() for p in module.parameters()}

    def _check_owners(self, model: nn.Module) -> None:
        name = type(self._base).__name__
        owners: dict[int, int] = {}
        head = {id(parameter) for parameter in self._base.get_output_embeddings().parameters()}
        for index, module in self._claims():
            for parameter in module.parameters():
                if owners.setdefault(id(parameter), index) != index and id(parameter) not in head:
                    raise ValueError(f"{name} shares weights between blocks: it cannot be cut there")
        unowned = [key for key, parameter in model.named_parameters() if id(parameter) not in owners]
        if unowned and len(self) > 1:
            raise ValueError(
                f"{name} has parameters that belong to no block, such as {unowned[0]}, and cannot be cut: "
                "use `method` e2e or lora"
            )


def split(num_layers: int, config: LoPTConfig) -> list[tuple[int, int]]:
    """Return contiguous (start, stop) spans of layers, as even as possible, the longer ones first.

    Raises:
        ValueError: The model has too few layers, or no earlier block is left to learn.
    """
    if config.stages is not None and config.stages > num_layers + 2:
        raise ValueError(
            f"`stages` must be <= {num_layers + 2}, the layers, the embedding and the LM head (got "
            f"{config.stages})"
        )
    if not config.is_cut:
        return [(0, num_layers)]
    starts = config.block_boundaries
    if starts is None:
        k = config.num_blocks
        if k > num_layers:
            raise ValueError(f"`num_blocks` must be <= {num_layers}, the model's number of layers (got {k})")
        size, rest = divmod(num_layers, k)
        starts = [b * size + min(b, rest) for b in range(1, k)]
    elif starts and starts[-1] >= num_layers:
        raise ValueError(
            f"`block_boundaries` must be < {num_layers}, the model's number of layers (got {starts})"
        )
    max_frozen = max(0, len(starts) - 1)  # of the earlier blocks at least one learns
    if config.is_local and config.frozen_blocks > max_frozen:
        given = f"{config.frozen_blocks} of {len(starts) + 1} blocks"
        raise ValueError(
            f"`frozen_blocks` must be <= {max_frozen} (got {given}), or no earlier block learns: lower it, "
            "or use `method` frozen"
        )
    return list(zip([0, *starts], [*starts, num_layers], strict=True))
