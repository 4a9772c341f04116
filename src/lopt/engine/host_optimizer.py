"""Step stages in host memory, in a thread beside the device's work.

A stage's final gradient is copied out in its own dtype; weights, their float32 masters and the optimizer's
state never leave host memory. A stage that is needed while its step is under way or waits for its turn waits
for it (`TensorGroup.pending`), so nothing is ever stale.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lopt.engine.clipping import scale
from lopt.engine.host_transfer import TensorGroup
from lopt.engine.optimizer import BlockOptimizer
from lopt.engine.scratch import Scratch
from lopt.instruments.memory import count_as_host, host_step


class HostOptimizer:
    """Steps stages one after the other, in the order in which they are submitted.

    Args:
        optimizer: Made without a `transfer`, for weights that are in host memory.
        threads: Threads that a step computes with; 0 steps at once, in the thread that submits.
    """

    def __init__(self, optimizer: BlockOptimizer, threads: int) -> None:
        self.optimizer = optimizer
        optimizer.scratch = Scratch()
        self._running: list[Future] = []
        self._pool = None
        if threads:
            # Threads of PyTorch are counted per thread that asks for work.
            self._pool = ThreadPoolExecutor(1, "host-optimizer", torch.set_num_threads, (threads,))

    def submit(
        self,
        stage: int,
        gradients: dict[nn.Parameter, Tensor],
        arrived: torch.cuda.Event | None,
        weights: list[TensorGroup],
        max_norm: float,
        norm: Tensor | None,
    ) -> None:
        """Step stage `stage` soon.

        Args:
            gradients: In host memory, of parameters that are there.
            arrived: What has passed when they are; None if they are.
            weights: The groups of these parameters, which wait for this step before they are fetched.
            max_norm: What to clip to.
            norm: The gradient's norm () as it counts for clipping; None clips nothing.
        """
        settings = [dict(group, params=None) for group in self.optimizer.param_groups]
        on_host = None if norm is None else norm.to("cpu")

        def step() -> None:
            if arrived is not None:
                arrived.synchronize()
            with host_step():
                if on_host is not None:
                    scale(gradients.values(), max_norm, on_host)
                # Not as their `grad`, which belongs to the thread of the training.
                self.optimizer.step_stage(stage, gradients, settings)
                for group in self.optimizer.state_groups(stage):
                    count_as_host(group.get().values())

        if self._pool is None:
            step()
            return
        future = self._pool.submit(step)
        self._running = [f for f in self._running if not f.done() or f.exception() is not None] + [future]
        for group in weights:
            group.pending = future

    def wait(self) -> None:
        """Wait until every stage that was submitted has been stepped.

        Raises:
            Exception: What a step has raised.
        """
        running, self._running = self._running, []
        for future in running:
            future.result()


def step_threads(device: torch.device, workers: int) -> int:
    """Return how many threads step.

    The processes that torchrun has started on this machine share its cores. Of its share each leaves one for
    every data-loader worker and one for a GPU's launches.
    """
    if device.type == "cpu":
        return torch.get_num_threads()
    cores = os.cpu_count() or 1
    if sys.platform == "linux":
        cores = len(os.sched_getaffinity(0))  # those that this process may use
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1 - workers)
