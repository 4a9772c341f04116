"""Run a Python script in a child process that can be killed at any moment.

A thread cannot be stopped in the middle of a long operation, and `signal.alarm` works in the main thread
only. A process can be killed from any thread, whatever it is doing.

The script is a file with a function `answer(question)`, whose argument and result are JSON values. It must
not import `lopt`: the process then starts fast and also where `lopt` is not on its path. This file is the
program of the child process too, which is why it imports the standard library only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
"""How long the script may take to be imported; a slow disk can make that long."""


class ChildEndedError(Exception):
    """The child process ended without an answer.

    Attributes:
        returncode: As of `subprocess.Popen`: below 0 if a signal ended it, for example at its CPU limit.
    """

    def __init__(self, returncode: int) -> None:
        super().__init__(f"the child process ended with code {returncode}")
        self.returncode = returncode


class ChildProcess:
    """A child process that answers questions; started by the first one, and again after it was killed.

    Safe in any thread, and after a fork, where the copy starts a process of its own.

    Args:
        script: The file with the function `answer`.
        memory_bytes: Limit of its address space.
        cpu_seconds: Limit of its processor time.
        orphan_seconds: Time after which an answer in progress ends the child by itself. It matters only if
            this process has been killed and cannot end the child any more.
        quiet: Discard what the child writes to its standard error.
    """

    def __init__(
        self,
        script: Path,
        *,
        memory_bytes: int,
        cpu_seconds: int | None = None,
        orphan_seconds: int,
        quiet: bool = False,
    ) -> None:
        self.script = script
        self._quiet = quiet
        self._limits = (memory_bytes, cpu_seconds or 0, orphan_seconds)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, question: Any, seconds: float) -> Any:
        """Return what the script's `answer(question)` returns.

        Raises:
            TimeoutError: it took longer than `seconds`; the process has been killed.
            ChildEndedError: the process ended by itself.
            RuntimeError: the process does not start.
        """
        with self._lock:
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            return json.loads(self._exchange(json.dumps(question) + "\n", seconds))

    def stop(self) -> None:
        """Kill the process if there is one and this process has started it."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # a question that was never read
                pipe.close() if pipe else None

    def _start(self) -> None:
        # -P: the script's folder must not hide other modules by files of the same name.
        command = [sys.executable, "-P", __file__, str(self.script), *map(str, self._limits)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if self._quiet else None,
            text=True,
            encoding="ascii",
        )
        self._owner = os.getpid()
        try:
            self._exchange("", START_SECONDS)
        except (TimeoutError, ChildEndedError) as error:
            problem = f"the process for {self.script.name} did not start within {START_SECONDS:.0f} s"
            raise RuntimeError(problem if self._quiet else f"{problem}: see its error above") from error

    def _exchange(self, line: str, seconds: float) -> str:
        """Write `line` and return the line that comes back; kill the process if none comes."""
        process = self._process
        assert process and process.stdin and process.stdout
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(seconds, expire)
        timer.start()
        reply = ""
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
                reply = process.stdout.readline()
        finally:
            timer.cancel()
            # After an interrupt too: the reply would be taken for that to the next question.
            if not reply.endswith("\n"):
                self.stop()
        if reply.endswith("\n"):
            return reply
        if expired.is_set():
            raise TimeoutError(f"no answer within {seconds:g} s")
        raise ChildEndedError(process.returncode)


def _serve(script: str, memory_bytes: int, cpu_seconds: int, orphan_seconds: int) -> None:
    """Run in the child process: say that the script is imported, then answer each line that is read."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even amid one long operation
    _limit(memory_bytes, cpu_seconds)
    replies, sys.stdout = sys.stdout, sys.stderr  # what the script prints must not be taken for a reply
    spec = importlib.util.spec_from_file_location("script", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        _alarm(orphan_seconds)
        reply = json.dumps(module.answer(json.loads(line)))
        _alarm(0)
        print(reply, file=replies, flush=True)


def _limit(memory_bytes: int, cpu_seconds: int) -> None:
    if sys.platform == "win32":  # it has the time limit of `ask` only
        return
    import resource

    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_CPU: cpu_seconds}
    for kind, limit in limits.items():
        with suppress(ValueError, OSError):  # no such limit on this system, or a lower one is set
            if limit:
                resource.setrlimit(kind, (limit, limit))


def _alarm(seconds: int) -> None:
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


if __name__ == "__main__":
    _serve(sys.argv[1], *map(int, sys.argv[2:]))
