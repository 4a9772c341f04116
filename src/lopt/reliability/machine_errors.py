"""Errors of the machine in one sentence: no memory left, a data-loader worker that died."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import clear_frames, walk_tb
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedConfig, TrainingArguments

from lopt.core.config import LoPTConfig
from lopt.instruments.memory import dense_parts, format_bytes, free_host_memory
from lopt.planning.plan import BANDWIDTH, RESERVE, TFLOPS, Plan, Planner
from lopt.planning.run import Run, Setting
from lopt.planning.search import BLOCKS, search

BY_HAND = (
    "a smaller --per_device_train_batch_size with more --gradient_accumulation_steps, a smaller "
    "--max_length, --gradient_checkpointing true, more --num_blocks"
)
HOST_BY_HAND = (
    "What helps: --param_dtype bfloat16, fewer --dataloader_num_workers, fewer processes on this machine, "
    "--streaming, less of --offload"
)


class OutOfMemory(ValueError):
    """The device or the host has no memory left; the message says where, what was in use, what would fit."""


class WorkerDied(ValueError):
    """A process that loads data was killed or failed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is about memory, of a GPU or of the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("can't allocate memory", "not enough memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def where(error: BaseException, device: torch.device) -> torch.device:
    """Whose memory is full: the device's or, on a GPU as well, the host's."""
    host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    return torch.device("cpu") if host else device


@contextmanager
def told_in(phase: str, device: torch.device, attempt: Callable[[], Attempt]) -> Iterator[None]:
    """Memory that is full is a sentence in here, where there is no trainer yet.

    Raises:
        OutOfMemory: it is.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        full = where(error, device)
        used = in_use(full)
        clear_frames(error.__traceback__)
        helps = advice(attempt) if full == device else HOST_BY_HAND
        raise OutOfMemory(f"out of memory in {phase}: {used}; {helps}") from error


def worker_trouble(error: BaseException) -> str | None:
    """What happened to a data-loader worker, in words; None if the error is about something else."""
    text = str(error)
    if isinstance(error, (EOFError, ConnectionError, FileNotFoundError)) and _in_data_loader(error):
        text = "DataLoader worker (pid ?) exited"  # in the midst of handing a batch over
    if killed := re.search(r"DataLoader worker \(pid\(?s?\)? ([\d, ?]+)\) (.+)", text):
        by = re.search(r"killed by signal: ([^.]+)", killed[2])
        how = f"was killed ({by[1].strip()})" if by else "exited"
        process = "" if killed[1] == "?" else f" (process {killed[1]})"
        return (
            f"a data-loader worker{process} {how}: most likely host memory or shared memory "
            "(/dev/shm) ran out; lower --dataloader_num_workers, 0 loads in the training process"
        )
    if caught := re.search(r"Caught (\w+) in DataLoader worker process (\d+)", text):
        last = [line for line in text.splitlines() if line.strip()][-1].strip()
        return (
            f"data-loader worker {caught[2]} failed with {last}; --dataloader_num_workers 0 and "
            "LOPT_DEBUG=1 show where"
        )
    return None


def forget_children() -> None:
    """No more errors about workers: torch's handler of SIGCHLD would raise again, whatever runs by then."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _in_data_loader(error: BaseException) -> bool:
    return any(frame.f_code.co_name == "_try_get_data" for frame, _ in walk_tb(error.__traceback__))


# -- what was in use ---------------------------------------------------------------------------------


def held(tensors: Iterable[Tensor | None], device: torch.device) -> int:
    """Bytes of the storages of `tensors` on `device`, each counted once."""
    storages = {
        id(part.untyped_storage()): part.untyped_storage().nbytes()
        for tensor in tensors
        if tensor is not None
        for part in dense_parts(tensor)
        if part.device.type == device.type
    }
    return sum(storages.values())


def in_use(device: torch.device, model: Any = None, optimizer: Any = None) -> str:
    """Where the memory of `device` went, in words."""
    parts = {}
    if model is not None:
        weights = list(model.parameters())
        states = [] if optimizer is None else list(optimizer.state.values())
        found = {
            "weights": [*weights, *model.buffers()],
            "gradients": [weight.grad for weight in weights],
            "optimizer state": [t for state in states for t in state.values() if isinstance(t, Tensor)],
        }
        parts = {name: held(tensors, device) for name, tensors in found.items()}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used, where = torch.cuda.memory_allocated(device), f"the GPU has {format_bytes(total)}"
    else:
        free, used = free_host_memory(), psutil.Process().memory_info().rss
        where = f"the machine has {format_bytes(free + used)} for this process"
    if parts:
        parts["activations and libraries"] = max(0, used - sum(parts.values()))
    told = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    return f"{where}, {format_bytes(used)} were in use" + (f" ({told})" if told else "")


def room(device: torch.device) -> int:
    """Bytes of `device` that this process has or could have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return free_host_memory() + psutil.Process().memory_info().rss


# -- what would fit ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """The run that did not fit.

    Attributes:
        tokens: the longest row of its micro-batches, padding included; None if not known.
        dtype: of the weights.
    """

    config: PreTrainedConfig
    args: TrainingArguments
    lopt: LoPTConfig
    tokens: int | None
    dtype: torch.dtype
    device: torch.device


def advice(failed: Callable[[], Attempt]) -> str:
    """Flags with which the planner says that the run would fit; general advice where it cannot say."""
    try:
        found = _proposals(failed())
    # The planner runs the model's code on fake tensors, and not every model is made for that.
    except (ValueError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError):
        found = []
    if not found:
        return f"What helps: {BY_HAND}"
    return "By `lopt plan` this would fit: " + ", or ".join(found)


def _proposals(attempt: Attempt) -> list[str]:
    """The same run in smaller micro-batches, and what `lopt plan --fit` proposes."""
    sharded = bool(getattr(attempt.args, "fsdp", None))
    if attempt.tokens is None or attempt.lopt.method == "lora" or sharded:
        return []  # not planned for
    now = _setting(attempt)
    planner = Planner(_run(attempt, attempt.args.per_device_train_batch_size))
    reserve = RESERVE if attempt.device.type == "cuda" else 0
    # A plan is not exact, and this run did not fit, whatever it says.
    limit = min(room(attempt.device), int(0.9 * planner.plan(now).total) + reserve)
    found: list[str] = []
    batch = attempt.args.per_device_train_batch_size
    while batch > 1 and not found:
        batch //= 2
        plan = Planner(_run(attempt, batch), planner).plan(now)
        if plan.total <= limit - reserve:
            times = attempt.args.per_device_train_batch_size // batch
            flags = {
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": times * attempt.args.gradient_accumulation_steps,
            }
            found.append(_told(flags, plan, "the same run otherwise"))
    layers = len(planner.sizes.layers)
    least = attempt.lopt.frozen_blocks + 2
    blocks = sorted({k for k in (*BLOCKS, now.num_blocks) if least <= k <= layers})
    try:
        best = search(planner, blocks, limit, TFLOPS, BANDWIDTH)
    except ValueError:  # nothing fits
        return found
    return [*found, _told(_changed(best, now), best)]


def _told(flags: Mapping[str, object], plan: Plan, why: str = "") -> str:
    need = f"{format_bytes(plan.total)} at its peak"
    if plan.host:
        need += f", {format_bytes(plan.host)} of host memory"
    words = " ".join(f"--{name} {value}" for name, value in flags.items())
    return f"{words} ({why + ', ' if why else ''}{need})"


def _changed(plan: Plan, now: Setting) -> dict[str, object]:
    """The flags in which a plan differs from the run."""
    setting = plan.setting
    flags: dict[str, object] = {}
    for name in ("method", "num_blocks", "schedule", "offload"):
        if getattr(setting, name) != getattr(now, name):
            flags[name] = getattr(setting, name)
    if setting.checkpointing != now.checkpointing:
        flags["gradient_checkpointing"] = str(setting.checkpointing).lower()
    if setting.offload != "none":
        flags["prefetch_gib"] = f"{plan.prefetch / 2**30:g}"
    return flags


def _setting(attempt: Attempt) -> Setting:
    config = attempt.lopt
    method: Any = "e2e" if config.num_blocks == 1 else config.method
    bounds = config.block_boundaries
    blocks = 1 if method == "e2e" else config.num_blocks if bounds is None else len(bounds) + 1
    checkpointing = bool(attempt.args.gradient_checkpointing)
    return Setting(method, blocks, config.schedule, checkpointing, config.offload)


def _run(attempt: Attempt, batch: int) -> Run:
    args: Any = attempt.args
    assert attempt.tokens is not None
    return Run(
        config=attempt.config,
        batch=batch,
        tokens=attempt.tokens,
        accumulation=args.gradient_accumulation_steps * (args.per_device_train_batch_size // batch),
        dtype=attempt.dtype,
        autocast=bool(args.bf16),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        state_dtype=getattr(torch, getattr(args, "state_dtype", "float32")),
        masters=bool(getattr(args, "master_weights", False)),
        local_every=attempt.lopt.local_every,
        frozen_blocks=attempt.lopt.frozen_blocks,
        aux_loss=attempt.lopt.aux_loss,
        prefetch=int(attempt.lopt.prefetch_gib * 2**30),
        device=attempt.device.type,
    )
