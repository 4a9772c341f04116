"""A pipeline of two processes through a slow link: measured, and as the model of `lopt plan` says.

Each process is in a network namespace of its own, with one interface (a TUN device), and this script
carries the packets between them at a limited rate and with a delay, as a line would. Schedule, link and gloo
are real; layers take their time by a sleep, so that the cores of this machine matter less. The prediction
takes the time in which each process has not waited, from the same run, and the rate and the delay of the
line. Linux, as root.

    python benchmarks/slow_link.py [--only "1 Gbit/s, 20 ms"]
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import heapq
import json
import multiprocessing
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pipeline import Sleep
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from lopt import LoPTConfig, attach
from lopt.engine.pipeline import pipeline
from lopt.planning.schedules import BlockTime, Link, pipelined
from small_model import flags, keep

ADAMW = functools.partial(torch.optim.AdamW, fused=True)
CPU = torch.device("cpu")
# Narrow and of many rows, so that much is sent for what is computed.
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1,
    vocab_size=32, tie_word_embeddings=False,
)  # fmt: skip
ROWS, TOKENS, MICRO_BATCHES = 512, 64, 6
FORWARD, BACKWARD = 0.05, 0.1
"""Seconds of sleep in a process's forward and backward of a micro-batch."""
WARM_UP = 4  # optimizer steps that are not timed
MTU, ADDRESSES, PORT = 65000, ("10.77.0.1", "10.77.0.2"), 29577
CLONE_NEWNET, TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x40000000, 0x400454CA, 1, 0x1000


@dataclass(frozen=True)
class Case:
    """A line, and how many micro-batches may be on their way."""

    gbit: float
    latency_ms: float
    depth: int = 2

    def __str__(self) -> str:
        rate = f"{self.gbit:g} Gbit/s" if self.gbit >= 1 else f"{1000 * self.gbit:g} Mbit/s"
        return f"{rate}, {self.latency_ms:g} ms, depth {self.depth}"


CASES = [Case(100, 0), Case(1, 20), Case(1, 20, 8), Case(0.1, 50), Case(0.1, 50, 8)]


def main() -> None:
    parser = flags(__doc__, "slow_link.json")
    parser.add_argument("--only", nargs="*", help="beginnings of names of cases")
    parser.add_argument("--steps", type=int, default=6, help=f"that are timed, after {WARM_UP} others")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for case in CASES:
        if args.only and not any(str(case).startswith(name) for name in args.only):
            continue
        results[str(case)] = found = compared(case, args.steps)
        print(f"{case!s:30}", *(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
        results["micro-batches"] = f"{MICRO_BATCHES} of {ROWS} x {TOKENS} tokens, H = {CONFIG.hidden_size}"
        keep(args.output, results)


def compared(case: Case, steps: int) -> dict[str, Any]:
    """Return tokens per second, predicted and measured."""
    found = through_a_line(case, measured_rank, case, steps)
    blocks = []
    for own, _, _ in found:  # a forward's share of what is neither sleep nor step is that of its sleep
        share = FORWARD / (FORWARD + BACKWARD)
        blocks.append([BlockTime(own / MICRO_BATCHES * share, own / MICRO_BATCHES * (1 - share), 0.0)])
    sent = 4 * ROWS * TOKENS * CONFIG.hidden_size
    line = Link(sent / (case.gbit * 1e9 / 8), case.latency_ms / 1e3)
    steady = pipelined(blocks, MICRO_BATCHES, case.depth, line)
    seconds, tokens = found[-1][1], MICRO_BATCHES * ROWS * TOKENS
    assert found[0][2] == sent * MICRO_BATCHES * (WARM_UP + steps), "what was sent is not what was planned"
    return {
        "predicted tokens/s": round(tokens / steady.seconds),
        "measured tokens/s": round(tokens / seconds),
        "off": round(seconds / steady.seconds - 1, 4),
        "without a link tokens/s": round(tokens / max(own for own, _, _ in found)),
        "MB a micro-batch": sent / 1e6,
    }


def measured_rank(case: Case, steps: int) -> tuple[float, float, int]:
    """Train; return seconds of a step in which this process has not waited, all its seconds, bytes sent."""
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("pipeline",))
    model: Any = LlamaForCausalLM(CONFIG)
    for layer in model.model.layers:  # what a layer would compute takes its time by a sleep
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
        layer.mlp.forward = lambda hidden: Sleep.apply(hidden, FORWARD, BACKWARD)
    handle = attach(model, LoPTConfig(num_blocks=2, schedule="block_major"))
    schedule = pipeline(handle, handle.parameter_groups(1e-4), ADAMW, mesh, device=CPU, depth=case.depth)
    link = schedule.link
    assert link is not None
    ids = torch.randint(0, CONFIG.vocab_size, (MICRO_BATCHES, ROWS, TOKENS))
    began = waited = 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            began, waited = time.perf_counter(), link.waited + link.blocked
        link.expect([(ROWS, TOKENS)] * MICRO_BATCHES)
        schedule.step(MICRO_BATCHES, lambda slot: model(input_ids=ids[slot], labels=ids[slot]).loss)
    seconds, waited = time.perf_counter() - began, link.waited + link.blocked - waited
    link.flush()
    dist.barrier()
    return (seconds - waited) / steps, seconds / steps, link.sent


# -- the line --------------------------------------------------------------------------------------


def through_a_line(case: Case, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `work(*args)` in two processes, each in a network of its own; return what they returned."""
    context = multiprocessing.get_context("fork")
    ends = [socket.socketpair() for _ in ADDRESSES]
    queue = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, ends[rank][1], queue, work, args), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    tuns = [socket.recv_fds(end, 1, 1)[1][0] for end, _ in ends]
    carrier = context.Process(target=_carry_both_ways, args=(tuns, case), daemon=True)
    carrier.start()
    try:
        found = dict(queue.get(timeout=500) for _ in processes)
        for process in processes:
            process.join()
    finally:
        carrier.terminate()
        for tun in tuns:
            os.close(tun)
    return [found[rank] for rank in range(2)]


def _rank(rank: int, end: socket.socket, queue: Any, work: Any, args: tuple) -> None:
    tun = _network_of_its_own(ADDRESSES[rank])
    socket.send_fds(end, [b"x"], [tun])
    os.environ |= {"GLOO_SOCKET_IFNAME": "tun0"}
    store = dist.TCPStore(ADDRESSES[0], PORT, 2, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    queue.put((rank, work(*args)))
    dist.barrier()
    dist.destroy_process_group()


def _network_of_its_own(address: str) -> int:
    """Go into a new network namespace, and return the file of its one interface, packet by packet."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare: run this as root")
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH", b"tun0", IFF_TUN | IFF_NO_PI))
    for command in (f"addr add {address}/24 dev tun0", f"link set tun0 mtu {MTU} up", "link set lo up"):
        subprocess.run(["ip", *command.split()], check=True)
    # As on a machine that is set up for a long line: windows that hold what is on its way.
    for name in ("tcp_rmem", "tcp_wmem"):
        Path("/proc/sys/net/ipv4", name).write_text("4096 4194304 67108864")
    Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").write_text("0")
    return tun


def _carry_both_ways(tuns: list[int], case: Case) -> None:
    """Carry packets between two interfaces, each way at the rate and with the delay of `case`."""
    os.nice(-15)  # a line does not wait for the processes at its ends
    threading.Thread(target=_carry, args=(*tuns, case), daemon=True).start()
    _carry(*reversed(tuns), case)


def _carry(source: int, target: int, case: Case) -> None:
    waiting: list[tuple[float, int, bytes]] = []
    free, number = 0.0, 0
    while True:
        wait = min(0.1, max(0.0, waiting[0][0] - time.monotonic())) if waiting else 0.1
        if select.select([source], [], [], wait)[0]:
            packet = os.read(source, MTU + 100)
            free = max(free, time.monotonic()) + 8 * len(packet) / (case.gbit * 1e9)
            heapq.heappush(waiting, (free + case.latency_ms / 1e3, number, packet))
            number += 1
        while waiting and waiting[0][0] <= time.monotonic():
            os.write(target, heapq.heappop(waiting)[2])


if __name__ == "__main__":
    main()
