"""How fast a machine is: what is known of some GPUs, and what is assumed of the rest.

Published peaks are dense, in bfloat16 with float32 accumulation: GeForce cards do half of what they do with
float16 accumulation, and figures "with sparsity" are twice as high.
"""

from __future__ import annotations

from dataclasses import dataclass

REACHED = 0.6
"""Assumed: the share of its peak that a GPU reaches in training. Data-centre GPUs often reach less."""
PCIE = {3: 12.5, 4: 25.0, 5: 50.0}
"""Assumed: GB/s each way of 16 lanes, pinned memory, by generation: 0.8 of the raw 15.75, 31.5 and 63."""
NVLINK_REACHED = 0.8
"""Assumed: the share of NVLink's rate that averaging reaches."""
HOST_GBPS = 40.0
"""Assumed: GB/s at which a step in host memory reads and writes; half the peak of two channels of DDR5."""
ROUNDED = 1e8
"""Numbers a second that PyTorch rounds stochastically in host memory; one core draws the random bits."""
TFLOPS, BANDWIDTH, MEMORY_GBPS = 100.0, PCIE[4], 1000.0
"""Of a GPU that is not named: about an RTX 4090."""
CPU_TFLOPS = 0.2
"""Of a CPU whose rate is not given: a few cores in float32."""


@dataclass(frozen=True)
class Device:
    """A GPU as its vendor describes it.

    Attributes:
        memory_gib: What PyTorch reports of the card's memory, in GiB.
        peak: TFLOP/s, dense, bfloat16 with float32 accumulation.
        memory_gbps: GB/s of its memory.
        pcie: Generation; 16 lanes.
        nvlink: GB/s each way to other GPUs, half of what is published for both ways; None without NVLink.
        source: Where these numbers are from.
    """

    memory_gib: float
    peak: float
    memory_gbps: float
    pcie: int
    source: str
    nvlink: float | None = None


_HOPPER = "NVIDIA H100 data sheet (SXM; 1,979 TFLOP/s with sparsity)"
DEVICES = {
    "rtx3090": Device(23.6, 71.2, 936, 4, "NVIDIA Ampere GA102 GPU Architecture whitepaper"),
    "rtx4090": Device(23.6, 165.2, 1008, 4, "NVIDIA Ada GPU Architecture whitepaper"),
    "rtx5090": Device(31.3, 209.5, 1792, 5, "NVIDIA RTX Blackwell GPU Architecture whitepaper"),
    "l40s": Device(44.4, 362.05, 864, 4, "NVIDIA L40S data sheet"),
    "a100-40": Device(39.3, 312, 1555, 4, "NVIDIA A100 data sheet (SXM)", 300),
    "a100-80": Device(79.2, 312, 2039, 4, "NVIDIA A100 data sheet (SXM)", 300),
    "h100": Device(78.0, 989.5, 3350, 5, _HOPPER, 450),
    "h200": Device(139.0, 989.5, 4800, 5, "NVIDIA H200 data sheet (SXM; 1,979 TFLOP/s with sparsity)", 450),
}


@dataclass(frozen=True)
class Machine:
    """What decides about time.

    Attributes:
        tflops: TFLOP/s in layers with a graph, in layers without one, and in the LM head and losses.
        bandwidth: GB/s to the device, and back.
        memory_gbps: GB/s of the device's memory.
        host_gbps: GB/s at which a step in host memory reads and writes.
        link_gbps: GB/s each way between processes.
        replica_gbps: GB/s each way between the replicas of a block; None: as between others.
        latency: Seconds from one process to another.
        rounded: Numbers a second that are rounded stochastically in host memory, beside that; None: in that.
        beside: Whether copies and steps in host memory run beside the device's work, as those of a GPU do.
    """

    tflops: tuple[float, float, float] = (TFLOPS,) * 3
    bandwidth: tuple[float, float] = (BANDWIDTH,) * 2
    memory_gbps: float = MEMORY_GBPS
    host_gbps: float = HOST_GBPS
    rounded: float | None = ROUNDED
    link_gbps: float = BANDWIDTH
    replica_gbps: float | None = None
    latency: float = 0.0
    beside: bool = True

    @property
    def between_replicas(self) -> float:
        """GB/s each way between the replicas of a block."""
        return self.link_gbps if self.replica_gbps is None else self.replica_gbps

    @property
    def bytes_in(self) -> float:
        """Bytes a second to the device."""
        return self.bandwidth[0] * 1e9

    @property
    def bytes_out(self) -> float:
        """Bytes a second from the device."""
        return self.bandwidth[1] * 1e9

    def seconds_of(self, layers: float, head: float, with_graph: bool) -> float:
        """Return the time of FLOPs in layers and of those in the LM head and losses."""
        return layers / (self.tflops[0 if with_graph else 1] * 1e12) + head / (self.tflops[2] * 1e12)

    def seconds_of_update(self, traffic: int, rounded: int) -> float:
        """Return the time of a step on the device that reads and writes `traffic` bytes."""
        if not self.beside:  # a CPU
            return self.seconds_of_host_update(traffic, rounded)
        return traffic / (self.memory_gbps * 1e9)

    def seconds_of_host_update(self, traffic: int, rounded: int) -> float:
        """Return the time of a step in host memory; `rounded` numbers are rounded stochastically."""
        rounding = 0.0 if self.rounded is None else rounded / self.rounded
        return traffic / (self.host_gbps * 1e9) + rounding


def machine_of(
    name: str | None = None,
    tflops: list[float] | None = None,
    bandwidth: list[float] | None = None,
    host_gbps: float | None = None,
    link_gbps: list[float] | None = None,
    latency_ms: float = 0.0,
    on_gpu: bool = True,
) -> Machine:
    """Return a machine with a GPU of `DEVICES`, or with one like an RTX 4090; what is given wins.

    Args:
        tflops: One for all, or three as in `Machine`.
        bandwidth: One for both ways, or two.
        host_gbps: With all that a step in host memory does, as it is measured.
        link_gbps: One for all, or two: between processes, and between the replicas of a block. Default: what
            is reached of NVLink, or the way back over PCIe.
        latency_ms: Milliseconds from one process to another.
        on_gpu: Whether the device is a GPU; else it is the CPU.
    """
    device = DEVICES[name] if name is not None else None
    known = CPU_TFLOPS if not on_gpu else TFLOPS if device is None else round(REACHED * device.peak, 1)
    rates = tflops or [known]
    ways = bandwidth or [BANDWIDTH if device is None else PCIE[device.pcie]]
    nvlink = None if device is None else device.nvlink
    links = link_gbps or [ways[-1] if nvlink is None else NVLINK_REACHED * nvlink]
    return Machine(
        tflops=(rates[0], rates[1 % len(rates)], rates[2 % len(rates)]),
        bandwidth=(ways[0], ways[-1]),
        memory_gbps=MEMORY_GBPS if device is None else device.memory_gbps,
        host_gbps=HOST_GBPS if host_gbps is None else host_gbps,
        rounded=ROUNDED if host_gbps is None else None,
        link_gbps=links[0],
        replica_gbps=links[1] if len(links) > 1 else None,
        latency=latency_ms / 1e3,
        beside=on_gpu,
    )
