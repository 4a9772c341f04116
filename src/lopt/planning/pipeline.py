"""What a pipeline needs: memory and time of each process, bytes on its links, and where to cut the model.

Each process runs the block-major schedule with its own blocks (`lopt.engine.pipeline`). The live bytes of a
micro-batch are those that `lopt.planning.measure` has found; what the link holds beside them is counted here.
Blocks of one stage are planned, with all weights and optimizer state on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lopt.core.blocks import split
from lopt.engine.stages import dealt
from lopt.planning.balance import balance, evenly
from lopt.planning.devices import Machine
from lopt.planning.kept import Linked
from lopt.planning.measure import Parts, Segment
from lopt.planning.optimizer_step import parts_of, state_of, temporary_bytes, traffic_of
from lopt.planning.plan import Planner
from lopt.planning.run import Bytes, Setting
from lopt.planning.schedules import BlockTime, Link, Steady, pipelined
from lopt.planning.sizes import BlockSizes, size_of
from lopt.planning.trace import Trace, casts, total

HIDDEN = 1.05
"""A link hides if a step takes at most so many times as long as it would without any."""
SLOWEST, FASTEST = 1e-4, 1e4
"""GB/s between which the rate is searched from which on a link hides."""


@dataclass(frozen=True)
class Rank:
    """A process of a pipeline.

    Attributes:
        blocks: Numbers (from 0) of its blocks.
        layers: First (included) and last (excluded) layer.
        peak: The device at the moment of its largest total; `stash` are hidden states: the link's, and those
            that wait between its blocks.
        queue: Bytes that the link holds in the midst of a step: posted receives, and outputs on their way.
        head: Bytes of the local heads' weights.
        work: FLOPs of its blocks.
    """

    blocks: range
    layers: tuple[int, int]
    peak: Bytes
    queue: int
    head: int
    work: tuple[BlockWork, ...]

    def times(self, machine: Machine, micro_batches: int) -> list[BlockTime]:
        """Return the time of each of its blocks."""
        return [work.time(machine, micro_batches) for work in self.work]

    def seconds(self, machine: Machine, micro_batches: int) -> float:
        """Return the time of an optimizer step, if nobody waits."""
        return sum(time.of_step(micro_batches) for time in self.times(machine, micro_batches))


@dataclass(frozen=True)
class BlockWork:
    """What an optimizer step of one block takes.

    Attributes:
        learns: Whether its layers run with a graph.
        forward: FLOPs of a micro-batch up to the block's output; rest: those of its layers after that; loss:
            those of the LM head and losses.
        updates: Bytes that its optimizer step reads and writes, and numbers that it rounds, part by part.
        averaged: Bytes that each replica of the block sends to average gradients.
    """

    learns: bool
    forward: float
    rest: float
    loss: float
    updates: tuple[tuple[int, int], ...]
    averaged: float

    def time(self, machine: Machine, micro_batches: int) -> BlockTime:
        """Return how long it takes."""
        step = self.averaged / (machine.between_replicas * 1e9) + sum(
            machine.seconds_of_update(*u) for u in self.updates
        )
        forward = machine.seconds_of(self.forward, 0.0, self.learns)
        return BlockTime(forward, machine.seconds_of(self.rest, self.loss, self.learns), step)


@dataclass(frozen=True)
class PipelinePlan:
    """A pipeline of processes.

    Attributes:
        setting: With the block boundaries.
        ranks: Its processes, in order.
        boundary: Bytes of a hidden state (B, T, H), which is what a micro-batch sends on.
        micro_batches: Of an optimizer step, in each replica.
        replicas: Number of pipelines.
        tokens: Of an optimizer step, of all replicas.
    """

    setting: Setting
    ranks: tuple[Rank, ...]
    boundary: int
    micro_batches: int
    replicas: int
    tokens: int

    def time(self, machine: Machine, depth: int | None = None) -> Steady:
        """Return the time of an optimizer step; `depth` in place of the plan's."""
        times = [rank.times(machine, self.micro_batches) for rank in self.ranks]
        link = Link.of(machine, self.boundary)
        return pipelined(
            times, self.micro_batches, self.setting.pipeline_depth if depth is None else depth, link
        )

    def work(self, machine: Machine) -> float:
        """Return the time of the process that has most to do: of a step in which no link is waited for."""
        return max(rank.seconds(machine, self.micro_batches) for rank in self.ranks)

    def bound(self, machine: Machine) -> str:
        """Return what bounds a step: "compute", "link", or "replicas", which average gradients."""
        if not self.hides(machine):
            return "link"
        alone = self.work(replace(machine, replica_gbps=math.inf))
        return "compute" if self.work(machine) <= HIDDEN * alone else "replicas"

    @property
    def sent(self) -> int:
        """Bytes that the process with the most to send sends in a step, to the next one and to replicas."""
        passed, last = self.micro_batches * self.boundary, len(self.ranks) - 1
        averaged = [round(sum(work.averaged for work in rank.work)) for rank in self.ranks]
        return max(passed * (n < last) + own for n, own in enumerate(averaged))

    def hides(self, machine: Machine, depth: int | None = None) -> bool:
        """Return whether what passes the links costs next to no time."""
        return self.time(machine, depth).seconds <= HIDDEN * self.work(machine)

    def hidden_from(self, machine: Machine, depth: int | None = None) -> float:
        """Return the GB/s of the links from which on they hide; infinity if latency alone is too long."""
        low, high = math.log(SLOWEST), math.log(FASTEST)
        if not self.hides(replace(machine, link_gbps=FASTEST, replica_gbps=machine.between_replicas), depth):
            return math.inf
        while high - low > 0.01:
            middle = (low + high) / 2
            rate = replace(machine, link_gbps=math.exp(middle), replica_gbps=machine.between_replicas)
            low, high = (low, middle) if self.hides(rate, depth) else (middle, high)
        return math.exp(high)


class PipelinePlanner:
    """Plans pipelines of one run.

    Args:
        planner: Of the run, whose measurements are used.
        replicas: Number of pipelines.
    """

    def __init__(self, planner: Planner, replicas: int = 1) -> None:
        self._planner, self._replicas = planner, replicas

    def plan(self, setting: Setting) -> PipelinePlan:
        """Return what the run needs in `setting`, whose boundaries may be given.

        Raises:
            ValueError: A combination that does not exist.
        """
        run, size, depth = self._planner.run, _size(setting), setting.pipeline_depth
        cut = self._planner.cut(setting)
        blocks = self._planner.sizes.blocks(cut)
        spans = split(len(self._planner.sizes.layers), cut)
        parts = self._planner.measured(setting)
        waits = Linked(size, depth, run.accumulation, parts.boundary)
        ranks = []
        for position in range(size):
            numbers = dealt(len(blocks), position, size)
            own = [blocks[number] for number in numbers]
            peak = self._peak(setting, parts, own, position, blocks[0].place, waits)
            ranks.append(
                Rank(
                    blocks=numbers,
                    layers=(spans[numbers[0]][0], spans[numbers[-1]][1]),
                    peak=peak,
                    queue=waits.of_link(position),
                    head=sum(size_of(block.head) for block in own),
                    work=tuple(self._work(setting, parts, block) for block in own),
                )
            )
        return PipelinePlan(
            setting, tuple(ranks), parts.boundary, run.accumulation, self._replicas,
            run.step_tokens * self._replicas,
        )  # fmt: skip

    def balanced(self, setting: Setting, machine: Machine) -> Setting:
        """Return `setting` with boundaries by which the process that has most to do has as little as can be.

        Blocks of one process are as even as `split` makes them. Of frozen blocks the last one keeps its even
        share of the layers, since no other learns.
        """
        layers, run, size = len(self._planner.sizes.layers), self._planner.run, _size(setting)
        owned = [len(dealt(setting.num_blocks, position, size)) for position in range(size)]
        least = list(owned)
        if setting.method == "frozen":
            least[-1] *= max(1, layers // setting.num_blocks)
        costs = self._costs(setting, machine)

        def seconds(position: int, count: int) -> float:
            start = sum(owned[:position])
            counts = evenly(count, owned[position])
            return sum(costs[start + n](c).of_step(run.accumulation) for n, c in enumerate(counts))

        counts = balance(layers, least, seconds)
        of_blocks = [c for count, own in zip(counts, owned, strict=True) for c in evenly(count, own)]
        starts = [sum(of_blocks[:n]) for n in range(1, len(of_blocks))]
        return replace(setting, block_boundaries=tuple(starts))

    def _costs(self, setting: Setting, machine: Machine) -> list[Callable[[int], BlockTime]]:
        """Return for each block its time by its number of layers, of which the model has all alike."""
        sizes, parts = self._planner.sizes, self._planner.measured(setting)
        blocks = sizes.blocks(self._planner.cut(replace(setting, block_boundaries=None)))
        alike = sizes.layers[len(sizes.layers) // 2]

        def of(block: BlockSizes) -> Callable[[int], BlockTime]:
            def time(count: int) -> BlockTime:
                other = replace(block, layers=[alike] * count)
                return self._work(setting, parts, other).time(machine, self._planner.run.accumulation)

            return time

        return [of(block) for block in blocks]

    # -- a block ---------------------------------------------------------------------------------

    def _forward(self, setting: Setting) -> Segment:
        """Return the forward of a layer without a graph."""
        return self._planner.measured(setting, without_graph=True).fresh["resting", "forward"]

    def _work(self, setting: Setting, parts: Parts, block: BlockSizes) -> BlockWork:
        run, trace = self._planner.run, Trace(Bytes())
        if block.learns:
            trace.run_forward(parts.fresh, block)
            forward = trace.flops
            trace.run_loss(parts.fresh, block, 0)
        else:
            trace.run_without_graph(self._forward(setting), len(block.layers), 0)
            forward = trace.flops
        rest, loss = trace.flops - forward - trace.head_flops, trace.head_flops
        if block.head and run.local_every > 1:  # at other times it only runs forward
            rest, loss = rest / run.local_every, loss / run.local_every
        updates = tuple(traffic_of(run, part) for part in parts_of(block))
        averaged = 2 * (self._replicas - 1) / self._replicas * block.gradients  # a ring
        return BlockWork(block.learns, forward, rest, loss, updates, averaged)

    def _peak(
        self,
        setting: Setting,
        parts: Parts,
        own: Sequence[BlockSizes],
        position: int,
        place: str,
        waits: Linked,
    ) -> Bytes:
        """Follow an optimizer step of a process's blocks, and return the largest moment."""
        run, sizes = self._planner.run, self._planner.sizes
        state = state_of(run, [t for block in own for t in block.trained])
        borrowed = sizes.tied if own[-1].place == "last" and run.tied_embeddings == "freeze" else []
        weights = sum(block.nbytes for block in own) + size_of(borrowed) + sizes.buffers
        base, peak = Bytes(weights=weights, optimizer=state), Bytes()
        for number, block in enumerate(own):
            trace = Trace(base)
            for slot, segments in enumerate((parts.fresh, parts.again)[: run.accumulation]):
                before, after = waits.during(position, number, len(own), slot)
                trace.activations, trace.stash = (run.accumulation - 1) * run.ids_bytes, before
                trace.run(segments[place, "start"], "start")
                if not block.learns:
                    trace.run_without_graph(self._forward(setting), len(block.layers), parts.casts)
                    continue
                trace.run_forward(segments, block)
                trace.stash = after
                trace.run_loss(segments, block, casts(setting, parts, block))
            peak = max(
                peak,
                trace.peak,
                self._step(base, block, waits.at_step(position, number, len(own))),
                key=total,
            )
        return peak

    def _step(self, base: Bytes, block: BlockSizes, stash: int) -> Bytes:
        added = max((temporary_bytes(self._planner.run, part) for part in parts_of(block)), default=0)
        return replace(base, gradients=block.gradients, optimizer=base.optimizer + added, stash=stash)


def _size(setting: Setting) -> int:
    return setting.num_blocks if setting.pipeline_size is None else setting.pipeline_size
