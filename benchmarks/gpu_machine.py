"""What the machine itself reaches: products, copies to and from the GPU, AdamW in host memory; for gpu.py."""

from __future__ import annotations

import time
from typing import Any

import torch

from gpu_training import GIB, adamw, free_host_gib, seconds
from lopt.engine.host_optimizer import step_threads
from lopt.engine.optimizer import BlockOptimizer, Precision
from lopt.engine.scratch import Scratch


def rates(device: torch.device) -> dict[str, Any]:
    """Return measured rates; copies only where the device is a GPU."""
    on_gpu = device.type == "cuda"
    found: dict[str, Any] = {"free host GiB": free_host_gib(), "matmul, TFLOP/s": matmul(device)}
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        found |= {"name": properties.name, "GPU GiB": properties.total_memory / GIB} | copies(device)
    found |= host_adam(device, 2**28 if on_gpu else 2**20)
    return found


def matmul(device: torch.device, repeats: int = 20) -> float:
    """Return 10^12 operations a second of a square bfloat16 product of random numbers."""
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    c = a @ b
    took = seconds(lambda: [torch.mm(a, b, out=c) for _ in range(repeats)], device)
    return repeats * 2 * n**3 / took / 1e12


def copies(device: torch.device) -> dict[str, float]:
    """Return 10^9 bytes a second between pinned host memory and the GPU, and GiB a second of pinning."""
    from lopt.engine.pinned import PinnedMemory

    there = [torch.empty(GIB, dtype=torch.uint8, device=device) for _ in range(2)]
    pinned = PinnedMemory()
    started = time.perf_counter()
    host = [pinned.empty_like(tensor) for tensor in there]
    pin_rate = 2 / (time.perf_counter() - started)
    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def both() -> None:
        for stream, target, source in ((streams[0], there[0], host[0]), (streams[1], host[1], there[1])):
            with torch.cuda.stream(stream):
                for _ in range(5):
                    target.copy_(source, non_blocking=True)

    def one_way(target: torch.Tensor, source: torch.Tensor) -> float:
        target.copy_(source)
        took = seconds(lambda: [target.copy_(source, non_blocking=True) for _ in range(5)], device)
        return 5 * GIB / took / 1e9

    found = {
        "in, GB/s": one_way(there[0], host[0]),
        "out, GB/s": one_way(host[1], there[1]),
        "each way at once, GB/s": 5 * GIB / seconds(both, device) / 1e9,
        "pinning, GiB/s": pin_rate,
    }
    pinned.close()
    return found


def host_adam(device: torch.device, numbers: int) -> dict[str, float]:
    """Return how fast bfloat16 weights with float32 masters are stepped, as by a host optimizer.

    Beside it PyTorch's fused AdamW alone, on float32 numbers.
    """
    cpu, parts = torch.device("cpu"), 4
    threads = torch.get_num_threads()
    torch.set_num_threads(step_threads(device, 0))
    try:
        parameters = [torch.nn.Parameter(torch.randn(numbers // parts)) for _ in range(parts)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        plain = adamw([{"params": parameters}])
        plain.step()
        alone = min(seconds(plain.step, cpu) for _ in range(3))
        del plain
        narrow = [torch.nn.Parameter(parameter.detach().bfloat16()) for parameter in parameters]
        gradients = {p: torch.randn_like(p) for p in narrow}
        optimizer = BlockOptimizer([{"params": narrow}], adamw, precision=Precision(masters=True))
        optimizer.scratch = Scratch()
        optimizer.step_stage(0, dict(gradients))
        took = min(seconds(lambda: optimizer.step_stage(0, dict(gradients)), cpu) for _ in range(3))
    finally:
        torch.set_num_threads(threads)
    moved = 3 * 2 + 2 * 12  # bytes a number, as the plan counts: all is read, all but the gradient written
    return {
        "fused AdamW alone, 10^9 numbers/s": numbers / alone / 1e9,
        "host AdamW, 10^9 numbers/s": numbers / took / 1e9,
        "host AdamW, GB/s": moved * numbers / took / 1e9,
    }
