"""Which processes of a run are still there: each has a connection to the first, closed when it ends.

A process that was killed says nothing, and one that computes may be silent for long. The system closes the
connections of a process that is gone, whatever it was doing; where a machine is gone, unanswered probes do
that (torch's own connections, those of gloo and of the store, send none, and would wait for days).
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from datetime import timedelta
from typing import Any

_WORD = 16  # bytes that a connection begins with, so that strangers are told from processes of the run
_KEY = "lopt/presence"
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a lost machine is noticed after 30 s


class Presence:
    """The connections of this process: the first one's to all others, another's to the first.

    All processes make it together.

    Args:
        store: Of all processes.
        rank: Of this process.
        ranks: Number of processes.
        timeout: In which all have to be there.

    Raises:
        TimeoutError: They are not.
    """

    def __init__(self, store: Any, rank: int, ranks: int, timeout: timedelta) -> None:
        self._open: dict[int, socket.socket] = {}
        if ranks > 1:
            self._open = _accept(store, ranks, timeout) if rank == 0 else {0: _connect(store, rank)}
        for connection in self._open.values():
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _PROBES.items():
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self.close)  # a worker that survives would keep them open

    def gone(self) -> list[int]:
        """Return the ranks that have ended, as far as this process can know."""
        return [rank for rank, connection in list(self._open.items()) if _has_ended(connection)]

    def close(self) -> None:
        """End the connections."""
        for connection in self._open.values():
            connection.close()
        self._open = {}


def _has_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:  # told once: from then on it reads as ended
        return True


def _accept(store: Any, ranks: int, timeout: timedelta) -> dict[int, socket.socket]:
    word = secrets.token_hex(_WORD // 2)
    found: dict[int, socket.socket] = {}
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    deadline = time.monotonic() + timeout.total_seconds()
    with socket.create_server(("", 0), family=family, backlog=ranks, dualstack_ipv6=both) as server:
        store.set(_KEY, f"{word}{server.getsockname()[1]}")
        while missing := sorted(set(range(1, ranks)) - found.keys()):
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection = server.accept()[0]
            except TimeoutError as error:
                raise TimeoutError(f"rank {missing[0]} is missing") from error
            connection.settimeout(5.0)
            try:
                said = connection.recv(_WORD + 8, socket.MSG_WAITALL).decode("ascii", "replace")
            except OSError:
                said = ""
            if said[:_WORD] == word and said[_WORD:].isdigit():
                found[int(said[_WORD:])] = connection
            else:
                connection.close()
    return found


def _connect(store: Any, rank: int) -> socket.socket:
    told = store.get(_KEY).decode()
    address = os.environ["MASTER_ADDR"], int(told[_WORD:])
    connection = socket.create_connection(address, timeout=60.0)
    connection.sendall(f"{told[:_WORD]}{rank:08d}".encode())
    return connection
