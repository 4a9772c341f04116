"""What flows between the ranks of a pipeline: hidden states, from each rank to the next.

A boundary lets no gradient pass, so nothing flows back. Every rank reads the same rows and knows the shapes
of what it will receive; a receive is posted before its tensor is needed. At most `depth` micro-batches are on
their way between two ranks, which keeps a fast rank from running away from a slow one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from lopt.engine.grid import RankError
from lopt.engine.stash import Stash
from lopt.validation import check_number


class Link:
    """Receives the inputs of this rank's blocks from the rank before, and sends their outputs to the next.

    Args:
        group: The ranks of the pipeline, in the order of their blocks.
        device: Where hidden states come from and go to.
        hidden_size: H.
        dtype: Of hidden states between blocks.
        depth: Micro-batches that may be on their way at a time, in each direction of this rank.

    Attributes:
        group: As given.
        position: Of this rank in the pipeline, from 0.
        size: Number of ranks in the pipeline.
        sent: Bytes that this rank has sent.
        waited: Seconds that it has waited for its inputs.
        blocked: Seconds that it has waited for the next rank to take its outputs.

    Raises:
        ValueError: `depth` is less than 1.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        hidden_size: int,
        dtype: torch.dtype,
        depth: int = 2,
    ) -> None:
        check_number("pipeline_depth", depth, minimum=1)
        self.position, self.size = group.rank(), group.size()
        self.sent, self.waited, self.blocked = 0, 0.0, 0.0
        self.group = group
        self._device, self._hidden_size, self._dtype = device, hidden_size, dtype
        self._largest = torch.zeros(2, device=device)
        self._depth = depth
        self._expected: deque[tuple[int, int]] = deque()
        self._receiving: deque[tuple[dist.Work, Tensor]] = deque()
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()  # a tensor lives until it is sent

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first block."""
        return self.position == 0

    def expect(self, shapes: Iterable[tuple[int, int]]) -> None:
        """Post receives for micro-batches to come, after those that are expected already.

        Args:
            shapes: (B, T) of each, in the order in which they will be received.
        """
        if not self.is_first:
            self._expected.extend(shapes)
            self._post()

    def receive(self) -> Tensor:
        """Return the next hidden state (B, T, H).

        Raises:
            RankError: The rank before is gone.
        """
        work, hidden = self._receiving.popleft()
        began = time.perf_counter()
        self._finish(work, self.position - 1)
        self.waited += time.perf_counter() - began
        self._post()
        self._note(0, hidden)
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Send a hidden state (B, T, H) to the next rank, which goes on while this one does.

        Raises:
            ValueError: It is not of the dtype or size that the next rank expects.
            RankError: The next rank is gone.
        """
        if hidden.dtype != self._dtype or hidden.shape[-1] != self._hidden_size:
            raise ValueError(
                f"a block's output has dtype {hidden.dtype} and size {hidden.shape[-1]}, and the link to the "
                f"next rank was made for {self._dtype} and {self._hidden_size}"
            )
        began = time.perf_counter()
        self.flush(self._depth - 1)
        self.blocked += time.perf_counter() - began
        hidden = hidden.detach().contiguous()
        with told_if_gone(self.position + 1):
            work = self.group.send([hidden], self.position + 1, 0)
        self._sending.append((work, hidden))
        self.sent += hidden.nbytes
        self._note(1, hidden)

    def largest(self) -> Tensor:
        """Return the largest absolute values (2,) received and sent since the last call, NaN if one was."""
        largest, self._largest = self._largest, torch.zeros_like(self._largest)
        return largest

    def _note(self, which: int, hidden: Tensor) -> None:
        low, high = torch.aminmax(hidden)  # in one pass, without memory; NaN goes through
        largest = torch.maximum(high, -low).float()
        self._largest[which] = torch.maximum(self._largest[which], largest)

    def flush(self, most: int = 0) -> None:
        """Wait until at most `most` of what was sent has not been taken; 0 as at the end of a run."""
        while len(self._sending) > most:
            self._finish(self._sending.popleft()[0], self.position + 1)

    def _finish(self, work: dist.Work, other: int) -> None:
        """Wait for what is exchanged with the process at position `other`."""
        with told_if_gone(other):
            work.wait()

    def _post(self) -> None:
        while self._expected and len(self._receiving) < self._depth:
            shape = (*self._expected.popleft(), self._hidden_size)
            hidden = torch.empty(shape, dtype=self._dtype, device=self._device)
            with told_if_gone(self.position - 1):
                work = self.group.recv([hidden], self.position - 1, 0)
            self._receiving.append((work, hidden))


@contextmanager
def told_if_gone(position: int) -> Iterator[None]:
    """Say which process is gone: gloo's own words name its source files."""
    try:
        yield
    except RuntimeError as error:
        gone = f"process {position} of the pipeline (from 0) has ended, and has not said why"
        raise RankError(gone) from error


class LinkedStash(Stash):
    """A stash whose first input comes from the rank before, and whose last output goes to the next.

    Args:
        device, on_host: As of `Stash`.
        link: To these ranks.
        first: The first stage of this rank.
        end: The stage after its last one.
    """

    def __init__(self, device: torch.device, on_host: bool, link: Link, first: int, end: int) -> None:
        super().__init__(device, on_host)
        self._link, self._first, self._end = link, first, end
        self._sent: set[int] = set()

    def put(self, stage: int, slot: int, value: Tensor) -> None:
        """Keep `value` (B, T, H), or send it if it is this rank's output and has not been sent yet."""
        if stage != self._end:
            super().put(stage, slot, value)
        elif slot not in self._sent:
            self._sent.add(slot)
            self._link.send(value)

    def get(self, stage: int, slot: int) -> Tensor:
        """Return what is kept, on the device; this rank's input is received when it is asked for first."""
        if stage == self._first and not self._link.is_first and (stage, slot) not in self._kept:
            super().put(stage, slot, self._link.receive())
        return super().get(stage, slot)

    def clear(self) -> None:
        """Keep nothing, and begin an optimizer step."""
        super().clear()
        self._sent.clear()
