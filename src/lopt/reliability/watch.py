"""The processes of a pipeline end together: by a stop at one point of the run, or after one has failed.

No process waits for a later one, so they do not agree by collectives. The first process is ahead of all
others: it decides whether the run stops at a point, and the others read that in the store when they get
there. A thread in each process carries a stop that was asked for there to the first one, and ends the process
where another has failed while it computes or waits.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from lopt.engine.grid import HOST_GONE, Grid, RankError
from lopt.reliability.stop import Stopped, requested

KEPT = 10_000
"""Points that stay in the store."""
STOP = "lopt/stop"
"""Key of the reason for which a process asks to stop."""
LOOK_EVERY = 0.5
"""Seconds between two looks of the thread."""
GRACE = 4.0
"""Seconds in which a process may end by itself after another has failed."""


class Agreement:
    """Whether the run stops at a point that all processes of a pipeline come to.

    Args:
        place: Of this process.
    """

    def __init__(self, place: Grid) -> None:
        self._place = place
        self._points: deque[str] = deque()

    def decide(self, reason: str | None) -> str | None:
        """Return why all stop here, None if they go on; all processes call this at the same points.

        Args:
            reason: Why this process was asked to stop.

        Raises:
            RankError: Another process has failed.
        """
        store, key = self._place.store, f"lopt/point/{next(self._place.calls)}"
        if self._place.rank == 0:
            self._points.append(key)
            if len(self._points) > KEPT:  # a pipeline is not that long: all have passed it
                store.delete_key(self._points.popleft())
            if reason is None and store.check([STOP]):
                reason = store.get(STOP).decode()
            store.set(key, reason or "")
        elif reason is not None:
            store.set(STOP, reason)
        return self._place.wait_for(key) or None


@contextmanager
def watching(place: Grid | None) -> Iterator[None]:
    """Watch the other processes of a pipeline inside, and let them know if this one fails.

    Raises:
        RankError: Another process has failed, with its reason where it could give one.
    """
    if place is None or _watched.is_set():
        yield
        return
    _watched.set()
    over = threading.Event()
    watchers = _watch, _watch_first
    threads = [threading.Thread(target=watch, args=(place, over), daemon=True) for watch in watchers]
    for thread in threads:
        thread.start()
    try:
        yield
    except Stopped:
        raise
    except RankError as error:
        message = place.failure() or place.fail(str(error))
        over.set()  # until here the threads watch: what a lost machine is asked is not answered
        place.part(GRACE)
        raise RankError(message) from error
    except BaseException as error:
        place.fail(f"rank {place.rank}: {error or repr(error)}")
        over.set()
        place.part(GRACE)
        raise
    finally:
        over.set()
        for thread in threads:
            thread.join(GRACE)
        _watched.clear()


_watched = threading.Event()


def _watch(place: Grid, over: threading.Event) -> None:
    """Carry a stop to the first process, and end this one if another has failed, until the run is over."""
    asked = False
    while not over.wait(LOOK_EVERY):
        try:
            if not asked and (reason := requested()) is not None:
                asked = True
                place.asking.set(STOP, reason)
        except RuntimeError:
            pass  # the store was in another process
        message = place.failure(place.asking)
        if message is not None and not over.wait(GRACE):
            _end(message)


def _watch_first(place: Grid, over: threading.Event) -> None:
    """End this process where the machine of the first is lost: a question to its store is never answered."""
    while not over.wait(LOOK_EVERY):
        if place.rank != 0 and place.presence.gone() and not over.wait(2 * GRACE):
            _end(HOST_GONE)


def _end(message: str) -> None:
    os.write(2, f"lopt: error: {message}\n".encode())
    os._exit(1)
