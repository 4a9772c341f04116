"""Stops: SIGTERM, SIGINT (Ctrl-C) and a time limit, obeyed at the next moment at which nothing is lost.

    with obeying(max_time=7200):      # `lopt sft` and `lopt grpo` do this
        trainer.train()               # a trainer with `LoPTMixin`

The first signal is noted, and the trainer obeys it: it writes a checkpoint and raises `Stopped`, with which
a Python program ends with exit code 75. While there is nothing to save (data are prepared, heads warm up), it
is raised at once. A second signal ends the process at once, as the signal would have done.
"""

from __future__ import annotations

import _thread
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_STOPPED = 75
"""Exit code of a run that was stopped and can go on: EX_TEMPFAIL of sysexits.h, "try again later"."""
ONE_SIGNAL = 1.0
"""Seconds within which signals count as one: a terminal and a launcher both send the same Ctrl-C."""
INSIST_AFTER = 2.0
"""Seconds after which a stop that did not end the program is raised again."""
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """The run was asked to stop and did; the message has the reason and what is on the disk."""

    def __init__(self, reason: str, state: str = "before the first step: nothing had to be saved") -> None:
        super().__init__(EXIT_STOPPED)
        self.reason, self.state = reason, state

    def __str__(self) -> str:
        return f"stopped by {self.reason} {self.state}"


class _Request:
    """A stop that may be requested, and whether it is obeyed at once."""

    def __init__(self, max_time: float | None) -> None:
        self.reason: str | None = None
        self.at_once = True
        self.raised = False
        self._owner = os.getpid()
        self._first = 0.0
        self._time_is_over = False
        self._insisting = False
        self._insist_later: threading.Timer | None = None
        self._limit = max_time
        self.timer = threading.Timer(max_time, self._time_over) if max_time is not None else None
        if self.timer is not None:
            self.timer.daemon = True
            self.timer.start()

    def _time_over(self) -> None:
        self._time_is_over = True
        _thread.interrupt_main(signal.SIGTERM)  # runs the handler below in the main thread

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a worker that was forked off: its parent decides
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self._insisting:
            self._insisting = False
            if self.at_once:
                self._raise()
            return
        if self._time_is_over:
            self._time_is_over = False
            why = f"`max_time` ({self._limit:g} s)"
        elif self._first and time.monotonic() - self._first > ONE_SIGNAL:
            os.write(2, f"\nlopt: a second {signal.Signals(number).name}: leaving at once\n".encode())
            os._exit(128 + number)
        else:
            self._first = self._first or time.monotonic()
            why = signal.Signals(number).name
        if self.reason is None:
            self.reason = why
            if not self.at_once:
                os.write(2, f"\nlopt: {why}: stopping soon; again to leave at once\n".encode())
        if self.at_once:
            self._raise()

    def _raise(self) -> None:
        self.raised = True
        # Python ignores what is raised in the midst of a destructor: then once more.
        self._insist_later = threading.Timer(INSIST_AFTER, self._insist)
        self._insist_later.daemon = True
        self._insist_later.start()
        assert self.reason is not None
        raise Stopped(self.reason)

    def _insist(self) -> None:
        if self.at_once:
            self._insisting = True
            _thread.interrupt_main(signal.SIGTERM)

    def close(self) -> None:
        """Cancel the timers."""
        for timer in (self.timer, self._insist_later):
            if timer is not None:
                timer.cancel()


_request: _Request | None = None


@contextmanager
def obeying(max_time: float | None = None) -> Iterator[None]:
    """Obey SIGTERM, SIGINT and the end of `max_time` seconds inside; in the main thread only.

    At first a stop is raised wherever the program is; a trainer with something to save changes that (`hold`).
    """
    global _request
    before, _request = _request, _Request(max_time)
    main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    handlers = {number: signal.signal(number, _request.on_signal) for number in _SIGNALS if main}
    try:
        with _unwrapped(_request):
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _request.close()
        _request = before


@contextmanager
def _unwrapped(request: _Request) -> Iterator[None]:
    """Raise a stop as it was even if a library turned it into an error of its own."""
    try:
        yield
    except Exception as error:
        if not request.raised or request.reason is None:
            raise
        raise Stopped(request.reason) from error


def requested() -> str | None:
    """Return why the run is to stop, in a few words; None if it is not."""
    return _request.reason if _request is not None else None


def is_active() -> bool:
    """Return whether stops are obeyed."""
    return _request is not None


def hold() -> None:
    """Let stops wait until `requested` is called: from now on there is something to save.

    Raises:
        Stopped: a stop has been asked for already.
    """
    if _request is not None:
        _request.at_once = False
        if _request.reason is not None:
            raise Stopped(_request.reason)


@contextmanager
def at_once() -> Iterator[None]:
    """Raise a stop wherever the program is inside, where it may wait long and loses nothing.

    Raises:
        Stopped: at once or at any moment inside.
    """
    request = _request
    if request is None or request.at_once:
        yield
        return
    request.at_once = True
    try:
        if request.reason is not None:
            raise Stopped(request.reason)
        with _unwrapped(request):
            yield
    finally:
        request.at_once = False


def seconds(text: str) -> float:
    """Return the seconds of a duration such as 90m, 2h, 1h30m, 45s or 5400.

    Raises:
        ValueError: `text` is not a duration.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text.replace(" ", "") or not total:
        raise ValueError(f"`max_time` {text} is no duration: write 90m, 2h, 1h30m or a number of seconds")
    return total
