"""When each process of a pipeline works and when it waits: a block on each, and end to end for comparison.

Every process is followed through its own order of work. It goes on until it needs a time that another one has
not come to yet; then the other ones are followed. All times are in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lopt.planning.devices import Machine

STEADY = 4
"""Optimizer steps over which the time of one is taken, when the pipeline is full."""


@dataclass(frozen=True)
class Link:
    """What one process sends to the next.

    Attributes:
        seconds: In which the bytes of a micro-batch pass.
        latency: Seconds from one end to the other.
    """

    seconds: float = 0.0
    latency: float = 0.0

    @classmethod
    def of(cls, machine: Machine, nbytes: int) -> Link:
        """Return the link of `machine` for `nbytes` a micro-batch."""
        return cls(nbytes / (machine.link_gbps * 1e9), machine.latency)


@dataclass(frozen=True)
class BlockTime:
    """What a process does for one of its blocks.

    Attributes:
        forward: Of a micro-batch, up to the block's output.
        rest: Of a micro-batch after it: loss and backward.
        step: After the last micro-batch: gradients are averaged, and weights stepped.
    """

    forward: float
    rest: float
    step: float

    def of_step(self, micro_batches: int) -> float:
        """Return the time of an optimizer step of this block, if nobody waits."""
        return micro_batches * (self.forward + self.rest) + self.step


@dataclass(frozen=True)
class Steady:
    """An optimizer step of a full pipeline.

    Attributes:
        seconds: From one step to the next.
        input_waits, output_waits: Of each process: for hidden states, and for the next one to take its own.
        fill: When the last process begins, counted from the start of the run.
    """

    seconds: float
    input_waits: list[float]
    output_waits: list[float]
    fill: float


def pipelined(ranks: Sequence[Sequence[BlockTime]], micro_batches: int, depth: int, link: Link) -> Steady:
    """Return an optimizer step of a pipeline without backward traffic, in the order of `lopt.engine.links`.

    A receive is posted as soon as fewer than `depth` of an optimizer step are, the sender is told so, and no
    transfer begins before that. A process sends on when at most `depth` - 1 of what it has sent before are
    still on their way.

    Args:
        ranks: The blocks of each process.
        micro_batches: Of an optimizer step.
        depth: `pipeline_depth`.
        link: Between two processes.
    """
    steps = STEADY + 1 + -(-len(ranks) * (depth + 1) // micro_batches)
    places = [_Place(len(ranks)) for _ in ranks]
    _follow([_run(places, r, blocks, micro_batches, depth, link, steps) for r, blocks in enumerate(ranks)])

    def mean(of: Callable[[_Place], list[float]]) -> list[float]:
        return [(of(place)[-1] - of(place)[-1 - STEADY]) / STEADY for place in places]

    return Steady(
        mean(lambda place: place.ends)[-1],
        mean(lambda place: place.inputs),
        mean(lambda place: place.outputs),
        places[-1].began,
    )


class _Place:
    """A process of a pipeline: when it has done what.

    Attributes:
        posted: When its receives were posted, by number since the start of the run.
        sent: When its outputs were there to be sent; taken: when the next process had received them.
        ends, inputs, outputs: At the end of each optimizer step: the time, and all seconds waited so far.
        began: When it began its first micro-batch.
    """

    def __init__(self, size: int) -> None:
        self.posted: dict[int, float] = {}
        self.sent: list[float] = []
        self.taken: list[float] = []
        self.ends: list[float] = []
        self.inputs: list[float] = []
        self.outputs: list[float] = []
        self.began = 0.0


def _run(
    places: list[_Place], r: int, blocks: Sequence[BlockTime], count: int, depth: int, link: Link, steps: int
) -> Iterator[None]:
    own, now, waited, blocked = places[r], 0.0, 0.0, 0.0
    for step in range(steps):
        first = step * count
        own.posted |= {first + slot: now for slot in range(min(depth, count))}
        for number, block in enumerate(blocks):
            for slot in range(first, first + count):
                if number == 0 and r > 0:
                    sender = places[r - 1]
                    while len(sender.sent) <= slot:
                        yield
                    begins = max([sender.sent[slot], own.posted[slot] + link.latency, *sender.taken[-1:]])
                    sender.taken.append(begins + link.seconds)
                    ready = max(now, sender.taken[-1] + link.latency)
                    waited, now = waited + ready - now, ready
                    if slot + depth < first + count:
                        own.posted[slot + depth] = now
                if step == slot == number == 0:
                    own.began = now
                now += block.forward
                if number == len(blocks) - 1 and r < len(places) - 1:
                    while len(own.taken) <= slot - depth:
                        yield
                    ready = max(now, own.taken[slot - depth]) if slot >= depth else now
                    blocked, now = blocked + ready - now, ready
                    own.sent.append(now)
                now += block.rest
            now += block.step
        own.ends.append(now)
        own.inputs.append(waited)
        own.outputs.append(blocked)


# -- end to end ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageTime:
    """What a process does for its stage of an end-to-end pipeline.

    Attributes:
        forward: Of a micro-batch.
        backward: Of a micro-batch, the gradient of the stage's input; weights: that of its weights.
        step: After the last micro-batch.
    """

    forward: float
    backward: float
    weights: float
    step: float


def one_forward_one_backward(position: int, size: int, micro_batches: int) -> str:
    """Return the order of work of a stage in the 1F1B schedule: F a forward, B a backward, W one of weights.

    Stage i of p (from 0) runs p - i forwards before its first backward, so it holds the activations of as
    many micro-batches. With equal stages the bubble is (p - 1) / (m + p - 1) of a step of m micro-batches
    (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    arXiv 2104.04473, section 2.2.1: (p - 1) / m of the time without it).
    """
    ahead = min(size - position, micro_batches)
    return "F" * ahead + "BWF" * (micro_batches - ahead) + "BW" * ahead


def zero_bubble(position: int, size: int, micro_batches: int) -> str:
    """Return the order of work of a stage in the ZB-H2 schedule, as `one_forward_one_backward` does.

    Stage i of p (from 0) runs 2 (p - i) - 1 forwards before its first backward, and puts 2 i of the gradients
    of weights off to the end, so that each stage holds 2 p - 1 micro-batches. Where a forward and both halves
    of a backward take as long, no bubble is left (Qi et al., "Zero Bubble Pipeline Parallelism", arXiv
    2401.10241, section 2.2), as the optimizer's step waits for no other stage.
    """
    ahead = min(2 * (size - position) - 1, micro_batches)
    later = min(2 * position, micro_batches - ahead)
    whole = micro_batches - ahead - later
    return "F" * ahead + "BF" * later + "BWF" * whole + "BW" * ahead + "W" * later


def held(order: str) -> int:
    """Return of how many micro-batches a stage holds activations at most."""
    held = most = 0
    for what in order:
        held += (what == "F") - (what == "W")
        most = max(most, held)
    return most


def end_to_end(stages: Sequence[StageTime], orders: Sequence[str], link: Link) -> float:
    """Return the time of an optimizer step of an end-to-end pipeline, once the steps before have been alike.

    Hidden states go to the next stage, and gradients of them come back; sending takes no time of the device.

    Args:
        stages: Of each process.
        orders: The order of work of each of them.
        link: Between two processes, each way.
    """
    steps = STEADY + 2
    moves = [_Moves() for _ in stages]
    _follow([_run_stage(moves, r, stages[r], orders[r] * steps, link) for r in range(len(stages))])
    ends = moves[0].ends
    return (ends[-1] - ends[-1 - STEADY]) / STEADY


class _Moves:
    """A stage's outputs and gradients, when they are there for the stage after and before it."""

    def __init__(self) -> None:
        self.outputs: list[float] = []
        self.gradients: list[float] = []
        self.ends: list[float] = []


def _run_stage(moves: list[_Moves], r: int, stage: StageTime, order: str, link: Link) -> Iterator[None]:
    own, now, forwards, backwards, weights = moves[r], 0.0, 0, 0, 0
    count = order.count("F") // (STEADY + 2)
    busy = {"outputs": 0.0, "gradients": 0.0}

    def send(name: str) -> None:
        busy[name] = max(now, busy[name]) + link.seconds
        getattr(own, name).append(busy[name] + link.latency)

    for what in order:
        if what == "F":
            while r > 0 and len(moves[r - 1].outputs) <= forwards:
                yield
            now = max(now, moves[r - 1].outputs[forwards] if r > 0 else 0.0) + stage.forward
            forwards += 1
            send("outputs")
        elif what == "B":
            while r + 1 < len(moves) and len(moves[r + 1].gradients) <= backwards:
                yield
            now = max(now, moves[r + 1].gradients[backwards] if r + 1 < len(moves) else 0.0) + stage.backward
            backwards += 1
            send("gradients")
        else:
            now += stage.weights
            weights += 1
            if weights % count == 0:
                now += stage.step
                own.ends.append(now)


def _follow(processes: Sequence[Iterator[None]]) -> None:
    """Follow all processes to their ends, each as far as it can go."""
    going = list(processes)
    while going:
        going = [one for one in going if next(one, one) is None]
