"""Measure how fast this machine is at what an optimizer step consists of.

Layers are alike, so a model of two layers of the real width runs a micro-batch; it is timed at its first and
last layer, forward and backward. A machine that others use as well is measured again and again, between the
steps that are to be predicted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lopt.core.blocks import Blocks
from lopt.core.config import LoPTConfig
from lopt.engine.clipping import scale, total_norm
from lopt.engine.host_optimizer import step_threads
from lopt.engine.optimizer import BlockOptimizer, Precision
from lopt.engine.scratch import Scratch
from lopt.instruments.flops import FlopCounter
from lopt.losses.lm_head import lean_fused_head
from lopt.planning.devices import Machine
from lopt.planning.measure import short_model
from lopt.planning.optimizer_step import state_of, traffic_of
from lopt.planning.run import Run
from lopt.planning.sizes import Sizes, size_of

LAYERS = 2
COPIED = 64 * 2**20
"""Bytes of a copy that is timed."""
PASSES = 3
"""Micro-batches of a sample."""
KINDS = ("with a graph", "without a graph", "head")


def rates_bytes(run: Run, sizes: Sizes) -> int:
    """Return the bytes on the device that `Rates` takes beside activations."""
    model = size_of([*sizes.embedding, *chain(*sizes.layers[:LAYERS]), *sizes.tail])
    return 2 * model + state_of(run, sizes.layers[0])


class Rates:
    """The rates of this machine for a run's model and micro-batch.

    Args:
        run: What is planned.
        checkpointing: Whether layers are recomputed.
        make: Makes the optimizer out of parameter groups.
        device: Where the model is trained.
        on_host: Whether it is stepped in host memory.
    """

    def __init__(
        self,
        run: Run,
        checkpointing: bool,
        make: Callable[[Any], Any],
        device: torch.device,
        on_host: bool = False,
    ) -> None:
        self.run, self._device = run, device
        self._model = short_model(run, LAYERS, checkpointing).to(device)
        self._blocks = Blocks(self._model, LoPTConfig(method="e2e"))
        precision = Precision(bool(run.masters), run.state_dtype)
        layer = list(self._blocks.layers[0].parameters())
        self._on_host = self._on_device = _Stepper(run, layer, make, precision)
        if device.type == "cuda":
            copies = [nn.Parameter(p.detach().cpu()) for p in layer]
            self._on_host = _Stepper(run, copies, make, precision)
        if on_host:
            self._on_host.keep_scratch()
        self._kind, self._now, self._in_layers = "", 0.0, ""
        self._spent: dict[str, float] = {}
        self._counter: FlopCounter | None = None
        self._hook()
        with FlopCounter() as self._counter:
            self._pass()
            self._flops = self._spent
        self._counter = None
        if self._on_host is not self._on_device:
            self._on_host.fill()
        self.sample()  # the first of everything is slow

    def sample(self) -> Machine:
        """Return this machine as it is now."""
        rates = {kind: list[float]() for kind in KINDS}
        for _ in range(PASSES):
            self._pass()
            for kind, seconds in self._spent.items():
                rates[kind].append(self._flops[kind] / seconds / 1e12)
        graph, none, head = (median(rates[kind]) for kind in KINDS)
        step = host = self._on_device.gbps(self._sync)
        if self._on_host is not self._on_device:
            threads = torch.get_num_threads()
            torch.set_num_threads(step_threads(self._device, 0))
            host = self._on_host.gbps(self._sync)
            torch.set_num_threads(threads)
        return Machine(
            tflops=(graph, none, head),
            bandwidth=self._copy(),
            memory_gbps=step,
            host_gbps=host,
            rounded=None,
            beside=self._device.type == "cuda",
        )

    def product(self) -> float:
        """Return the TFLOP/s of a plain matrix product, for comparison."""
        size = 4096 if self._device.type == "cuda" else 1024
        dtype = torch.bfloat16 if self.run.autocast else self.run.dtype
        matrix = torch.ones(size, size, dtype=dtype, device=self._device)
        return 2 * size**3 / median(self._time(lambda: matrix @ matrix) for _ in range(PASSES)) / 1e12

    # -- a micro-batch ---------------------------------------------------------------------------

    def _hook(self) -> None:
        """Let what is spent in layers be told from the rest."""
        layers = self._blocks.layers

        def enter(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._mark(self._in_layers)
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self._mark("head"))

        def leave(layer: nn.Module, args: tuple, output: Any) -> None:
            self._mark("head")
            hidden = output[0] if isinstance(output, tuple | list) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self._mark("with a graph"))

        layers[0].register_forward_pre_hook(enter, with_kwargs=True)
        layers[-1].register_forward_hook(leave)

    def _pass(self) -> None:
        """Run a micro-batch with a graph, and its layers without one."""
        run, device = self.run, self._device
        ids = torch.randint(2, self._model.config.vocab_size, (run.batch, run.tokens), device=device)
        mask = torch.ones_like(ids)
        mask[-1, -1] = run.batch == 1  # of several rows, one is padded
        self._spent = dict.fromkeys(KINDS, 0.0)
        amp = torch.autocast(device.type, torch.bfloat16, enabled=run.autocast)
        with lean_fused_head(device):
            self._mark("head")
            self._in_layers = "with a graph"
            with amp:
                out = self._model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
            out.loss.backward()
            self._mark("")
        self._in_layers = "without a graph"
        with torch.no_grad(), amp:
            self._blocks.decoder(input_ids=ids, attention_mask=mask)
        self._mark("")

    def _mark(self, kind: str) -> None:
        """End what runs now, and begin `kind`."""
        self._sync()
        now = time.perf_counter() if self._counter is None else float(self._counter.total)
        if self._kind and not (self._kind == "head" and self._in_layers == "without a graph"):
            self._spent[self._kind] += now - self._now
        self._kind, self._now = kind, now

    def _sync(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    # -- copies ----------------------------------------------------------------------------------

    def _copy(self) -> tuple[float, float]:
        """Return the GB/s of copies to the device and back."""
        host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        there = torch.empty(COPIED, dtype=torch.uint8, device=self._device)
        there.copy_(host)
        to = self._time(lambda: there.copy_(host, non_blocking=True))
        back = self._time(lambda: host.copy_(there, non_blocking=True))
        return COPIED / to / 1e9, COPIED / back / 1e9

    def _time(self, work: Callable[[], Tensor]) -> float:
        self._sync()
        began = time.perf_counter()
        work()
        self._sync()
        return time.perf_counter() - began


class _Stepper:
    """Clips and steps some parameters as an optimizer step does."""

    def __init__(
        self, run: Run, parameters: list[nn.Parameter], make: Callable[[Any], Any], precision: Precision
    ) -> None:
        self._run, self._parameters = run, parameters
        self._optimizer = BlockOptimizer([{"params": parameters}], make, precision=precision)
        self._traffic = traffic_of(run, parameters)[0]

    def keep_scratch(self) -> None:
        """Step as a host optimizer does."""
        self._optimizer.scratch = Scratch()

    def fill(self) -> None:
        """Give all parameters a gradient."""
        for p in self._parameters:
            p.grad = torch.ones_like(p)

    def gbps(self, sync: Callable[[], None]) -> float:
        """Step once; return the GB/s of what that reads and writes."""
        gradients = {p: p.grad for p in self._parameters if p.grad is not None}
        sync()
        began = time.perf_counter()
        norms = [torch.linalg.vector_norm(g) for g in gradients.values()]
        if self._run.clips:
            scale(gradients.values(), 1.0, total_norm(norms, norms[0].device))
        self._optimizer.step_stage(0, gradients)
        sync()
        seconds = time.perf_counter() - began
        return self._traffic / seconds / 1e9


def typical(machines: Sequence[Machine]) -> Machine:
    """Return the machine whose every rate is the median of those of `machines`."""

    def of(name: str) -> Any:
        values = [getattr(machine, name) for machine in machines]
        if isinstance(values[0], tuple):
            return tuple(median(column) for column in zip(*values, strict=True))
        return median(values)

    names = ("tflops", "bandwidth", "memory_gbps", "host_gbps")
    return replace(machines[0], **{name: of(name) for name in names})
