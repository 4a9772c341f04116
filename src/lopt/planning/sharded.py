"""What FSDP2 needs on each device: shards of everything, and units of the model that are gathered in turn.

As accelerate wraps a model: every layer, the embedding, and final norm with LM head are units. A unit's
weights are gathered for its forward and freed after it, and gathered again for its backward, whose gradients
are then scattered (Zhao et al., "PyTorch FSDP", 2023, arXiv 2304.11277, section 3). The last unit keeps its
weights between the two. In all micro-batches of an optimizer step but the last, the trainer puts scattering
off (`no_sync`), so that each device holds whole gradients meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lopt.planning.measure import Parts, Segment
from lopt.planning.optimizer_step import parts_of, state_of, temporary_bytes
from lopt.planning.run import Bytes, Run
from lopt.planning.sizes import BlockSizes, size_of
from lopt.planning.staged import updates_of
from lopt.planning.timeline import Turn, Work
from lopt.planning.trace import Trace


def computes_in(run: Run) -> torch.dtype:
    """Return the dtype in which weights are gathered and gradients scattered."""
    return torch.bfloat16 if run.autocast else run.dtype


def shards(tensors: Iterable[Tensor], processes: int) -> list[Tensor]:
    """Return what the first process has of each tensor: rows, of which some may have one less."""
    return [t.new_empty((-(-t.shape[0] // processes), *t.shape[1:])) for t in tensors]


def sharded_peak(
    run: Run, blocks: Sequence[BlockSizes], computed: Sequence[BlockSizes], parts: Parts
) -> Bytes:
    """Return the device of one process at the moment of its largest total.

    Args:
        run: What is planned.
        blocks: With the weights that are trained; computed: the same blocks in the dtype of `computes_in`.
        parts: Of a micro-batch, of the latter.
    """
    n = run.processes
    weights = size_of(shards([t for block in blocks for t in block.tensors], n))
    weights += sum(size_of(block.head) for block in blocks)  # heads are whole
    own = [_own(block.trained, block, n) for block in blocks]
    trained = [t for tensors in own for t in tensors]
    trace = ShardedTrace(run, computed, Bytes(weights=weights, optimizer=state_of(run, trained)))
    for number, segments in enumerate((parts.fresh, parts.again)[: run.accumulation]):
        trace.averages = number + 1 == run.accumulation
        trace.activations = (run.accumulation - 1) * run.ids_bytes
        trace.run(segments[blocks[0].place, "start"], "start")
        for block in computed:
            trace.run_block(segments, block, 0)
    steps = [_own(part, block, n) for block in blocks for part in parts_of(block)]
    trace.end(size_of(trained), max((temporary_bytes(run, part) for part in steps), default=0))
    return trace.peak


def sharded_work(
    run: Run, blocks: Sequence[BlockSizes], computed: Sequence[BlockSizes], parts: Parts, every: int
) -> Work:
    """Return the blocks' work one by one: forwards, and backwards, beside which units are gathered.

    Args:
        run, blocks, computed, parts: As of `sharded_peak`.
        every: Earlier blocks of lopt learn in every N-th step.
    """
    turns, updates, count = list[Turn](), [], run.accumulation
    for index, (stored, block) in enumerate(zip(blocks, computed, strict=True)):
        trace = Trace(Bytes())
        trace.run_forward(parts.fresh, block)
        forward = trace.flops
        trace.run_loss(parts.fresh, block, 0)
        share = 1 / every if block.head else 1.0
        rest, head = share * (trace.flops - forward - trace.head_flops), share * trace.head_flops
        gathers = count * _others(run, size_of(block.tensors))
        again = gathers - count * _others(run, size_of(block.after))  # the last unit is still there
        turns.append(_turn(run, index, block.learns, count * forward, 0.0, gathers))
        if block.learns:
            trained = [t for t in block.tensors if t.requires_grad]
            scatters = _others(run, size_of(trained) + 2 * size_of(block.head))  # heads by an all-reduce
            turns.append(_turn(run, index, True, count * rest, count * head, again + scatters))
        updates.append(updates_of(run, [_own(part, stored, run.processes) for part in parts_of(stored)]))
    turns += [Turn(index, steps=True) for index, own in enumerate(updates) if own]
    return Work(turns, [[] for _ in blocks], updates)


def _turn(run: Run, index: int, learns: bool, flops: float, head: float, sent: int) -> Turn:
    beside = flops + head if run.device == "cuda" else 0.0
    return Turn(
        index, with_graph=learns, flops=flops, head_flops=head, averaged=((sent, beside),) if sent else ()
    )


def _own(tensors: Iterable[Tensor], block: BlockSizes, processes: int) -> list[Tensor]:
    """Return what the first process has of tensors of a block; its head's are whole."""
    heads = {id(t) for t in block.head}
    return [t if id(t) in heads else shards([t], processes)[0] for t in tensors]


def _others(run: Run, nbytes: int) -> int:
    """Return what each process sends to gather, or to scatter, so many bytes: a ring passes on N - 1 of N."""
    return nbytes * (run.processes - 1) // run.processes


class ShardedTrace(Trace):
    """Follows live bytes under FSDP2; units that are gathered are on their way (`Bytes.transfers`).

    Args:
        run: What is planned.
        blocks: Of weights in the dtype of `computes_in`.
        resident: What each process holds all the time.

    Attributes:
        averages: Whether gradients are scattered in the backward that is run now.
    """

    def __init__(self, run: Run, blocks: Sequence[BlockSizes], resident: Bytes) -> None:
        super().__init__(resident)
        self.averages = True
        self._resident, self._processes = resident, run.processes
        self._embedding, self._tail = size_of(blocks[0].before), size_of(blocks[-1].after)
        self._layer = max(size_of(layer) for block in blocks for layer in block.layers)
        self._on_gpu = run.device == "cuda"

    def run(self, segment: Segment, what: str, freed: int = 0) -> None:
        """Run a segment with the unit that it needs; see `Trace.run`."""
        back = what not in ("start", "forward0", "forward")
        ahead = self._layer * (back or self._on_gpu)  # the next one is gathered meanwhile
        ahead += self._layer * (back and self._on_gpu)  # and gradients of the one before are on their way
        unit = self._unit(what)
        self._hold(
            2 * unit + ahead * (what not in ("head", "loss"))
        )  # gathered into one, and copied out of it
        self._see(gradients=self.gradients, activations=self.activations)
        self._hold(unit + ahead * self._on_gpu)
        before = self.gradients
        super().run(segment, what, freed)
        if self.averages and back:
            whole = self.gradients - before
            self._hold(ahead)
            self._see(gradients=before + 2 * whole, activations=self.activations)  # copied to be scattered
            self.gradients = before + whole // self._processes

    def end(self, gradients: int, temporaries: int) -> None:
        """Run the optimizer's step, with so many bytes of shards of gradients and of its own."""
        self._hold(0)
        self.gradients = gradients
        self.step(temporaries)

    def _unit(self, what: str) -> int:
        if what in ("start", "embedding"):
            return self._embedding
        return self._tail if what in ("head", "loss") else self._layer * (what != "end")

    def _hold(self, nbytes: int) -> None:
        self.base = replace(self._resident, transfers=nbytes)
