"""Child processes: limits, replacement after a kill, nothing left behind."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lopt.subprocesses import ChildEndedError, ChildProcess

SCRIPT = """
import os, time

def answer(question):
    print("this is no reply")
    if question == "loop":
        while True:
            pass
    if question == "memory":
        return len(bytearray(2**33))
    if question == "exit":
        os._exit(3)
    if question == "raise":
        1 / 0
    if isinstance(question, float):
        time.sleep(question)
    return [question, os.getpid()]
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    (tmp_path / "json.py").write_text("raise SystemExit('imported in place of the real one')")
    return path


@pytest.fixture
def child(script: Path) -> Iterator[ChildProcess]:
    child = ChildProcess(script, memory_bytes=2**32, orphan_seconds=60)
    yield child
    child.stop()


def test_any_json_value_goes_in_and_out(child: ChildProcess) -> None:
    for question in ("text", "\ud800\n\u2028é", 7, None, {"a": [1, 2.5, True]}):
        assert child.ask(question, 60)[0] == question
    assert len({child.ask("pid", 60)[1] for _ in range(3)}) == 1


def test_a_slow_answer_is_killed_and_the_process_replaced(child: ChildProcess) -> None:
    (_, first), start = child.ask("pid", 60), time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.5 s"):
        child.ask("loop", 0.5)
    assert time.monotonic() - start < 30
    assert child._process is None
    assert child.ask("pid", 60)[1] != first


@pytest.mark.parametrize(("question", "code"), [("exit", 3), ("raise", 1), ("memory", 1)])
def test_a_process_that_ends_is_an_error_and_replaced(question: str, code: int, child: ChildProcess) -> None:
    with pytest.raises(ChildEndedError) as caught:
        child.ask(question, 60)
    assert caught.value.returncode == code
    assert child.ask(1, 60)[0] == 1


def test_processor_time_is_limited(script: Path) -> None:
    child = ChildProcess(script, memory_bytes=2**32, cpu_seconds=1, orphan_seconds=60)
    with pytest.raises(ChildEndedError) as caught:
        child.ask("loop", 60)
    assert caught.value.returncode in (-signal.SIGXCPU, -signal.SIGKILL)


def test_an_orphan_ends_by_itself(script: Path) -> None:
    child = ChildProcess(script, memory_bytes=2**32, orphan_seconds=1)
    with pytest.raises(ChildEndedError) as caught:
        child.ask("loop", 60)
    assert caught.value.returncode == -signal.SIGALRM


def test_a_late_reply_is_never_taken_for_the_next(child: ChildProcess, monkeypatch) -> None:
    child.ask(1, 60)
    process = child._process
    assert process is not None

    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(process.stdout, "readline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        child.ask(2, 60)
    assert process.poll() is not None
    assert child.ask(3, 60)[0] == 3


def test_a_killed_process_is_replaced_and_none_is_left_behind(child: ChildProcess) -> None:
    child.ask(1, 60)
    first = child._process
    assert first is not None
    first.kill()
    first.wait()
    assert child.ask(2, 60)[0] == 2
    second = child._process
    assert second is not None and second is not first
    child.stop()
    assert second.returncode is not None and child._process is None


def test_threads_take_turns(child: ChildProcess) -> None:
    replies: dict[int, int] = {}

    def ask(n: int) -> None:
        replies[n] = child.ask(n, 60)[0]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == {n: n for n in range(8)}


def test_a_script_that_cannot_be_imported_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(RuntimeError, match=r"the process for broken\.py did not start"):
        ChildProcess(tmp_path / "broken.py", memory_bytes=2**32, orphan_seconds=60).ask(1, 60)
