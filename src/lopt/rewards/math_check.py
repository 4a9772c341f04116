r"""Are two LaTeX answers equal? `math-verify` decides, in a process of its own that can be killed.

The library's own time limit is `signal.alarm`: it works in the main thread only, and its handler
waits for a running operation on big integers, which for 9^{9^{9^9}} never ends. Killing a process
works in any thread and at any moment. The process is this very file, run as a script: it imports
nothing of `lopt`, so it starts in about a second, and no script of the user is imported again.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache

TIME_LIMIT = 3.0
"""Seconds that one comparison may take."""

MAX_LENGTH = 1_000
"""Characters that an answer may have."""

_START_LIMIT = 120.0  # seconds to import sympy, which a cold disk can make long
_MEMORY_LIMIT = 4 * 2**30  # bytes of address space
_ORPHAN_LIMIT = 60  # seconds that a comparison may go on after the trainer itself was killed
_READY = "ready"


def require_math_verify() -> None:
    """Raises ImportError, with the command that installs it, where math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError('the math reward needs math-verify: pip install "lopt[math]"')


@lru_cache(maxsize=10_000)
def same_math(wanted: str, given: str) -> bool:
    """Whether the LaTeX `given` equals the LaTeX `wanted`, without delimiters around either.

    Equal text is equal. What is longer than `MAX_LENGTH`, cannot be parsed, or takes longer than
    `TIME_LIMIT` is not, and the process that was too slow is replaced (about a second). Safe in any
    thread. Verdicts are remembered: the completions of a group often agree.

    Raises:
        ImportError: math-verify is not installed.
        RuntimeError: the process does not start.
    """
    wanted, given = wanted.strip(), given.strip()
    if wanted == given:
        return bool(given)
    if not wanted or not given or max(len(wanted), len(given)) > MAX_LENGTH:
        return False
    return _CHECKER.ask(wanted, given)


class _Checker:
    """The process, started at the first question and again after each kill."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, wanted: str, given: str) -> bool:
        with self._lock:
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            reply = ""
            try:
                reply = self._exchange(json.dumps([wanted, given]), TIME_LIMIT)
            finally:  # after an interrupt too: its reply would be taken for that to the next question
                if not reply:
                    self.stop()
            return reply == "1"

    def stop(self) -> None:
        """Kill the process, if there is one and it is ours rather than our parent's."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # an unsent question
                pipe.close() if pipe else None

    def _start(self) -> None:
        require_math_verify()
        # -P: the folder of this file holds names such as `memory` that must not hide other modules.
        command = [sys.executable, "-P", __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="ascii"
        )
        self._owner = os.getpid()
        if self._exchange("", _START_LIMIT) != _READY:
            self.stop()
            raise RuntimeError(
                f"the process that checks mathematics did not start within {_START_LIMIT:.0f} s: "
                "see its error above"
            )

    def _exchange(self, question: str, limit: float) -> str:
        """Send a line and read one; "" where the process died or had to be killed after `limit` s."""
        process = self._process
        assert process and process.stdin and process.stdout
        guard = threading.Timer(limit, process.kill)
        guard.start()
        try:
            process.stdin.write(f"{question}\n")
            process.stdin.flush()
            return process.stdout.readline().strip()
        except BrokenPipeError:
            return ""
        finally:
            guard.cancel()


_CHECKER = _Checker()
atexit.register(_CHECKER.stop)


def _serve() -> None:
    """The process: answers each line `["wanted", "given"]` by 1 or 0."""
    _limit_this_process()
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)  # it warns of each answer that it cannot parse
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def read(latex: str) -> list:
        return parse(f"\\boxed{{{latex}}}", targets, parsing_timeout=None)

    for line in sys.stdin:
        if not line.strip():
            print(_READY, flush=True)
            continue
        wanted, given = json.loads(line)
        _alarm(_ORPHAN_LIMIT)
        try:
            equal = bool(verify(read(wanted), read(given), timeout_seconds=None))
        except Exception:  # whatever a model wrote is no reason to stop
            equal = False
        _alarm(0)
        print(int(equal), flush=True)


def _limit_this_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's business
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills, even amid one long operation
    with suppress(ImportError, ValueError, OSError):  # no such limit on this system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))


def _alarm(seconds: int) -> None:
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


if __name__ == "__main__":
    _serve()
