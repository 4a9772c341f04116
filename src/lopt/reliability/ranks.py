"""The processes of a run, its ranks."""

from __future__ import annotations

from accelerate.utils import get_cpu_distributed_information


def processes_here() -> int:
    """Return how many processes of this run share the machine's memory, by what their launcher says."""
    return max(1, get_cpu_distributed_information().local_world_size)
