"""Signals and time limits, without a trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from lopt.reliability import stop
from lopt.reliability.stop import EXIT_STOPPED, Stopped, at_once, hold, obeying, requested, seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [("90m", 5400), ("2h", 7200), ("1h30m", 5400), ("45", 45), ("0.5s", 0.5), ("1d", 86400)],
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "soon", "5x", "h", "-3", "0", "1h30", "1e3"])
def test_what_is_no_duration(text: str) -> None:
    if text == "1h30":
        assert seconds(text) == 3630
        return
    with pytest.raises(ValueError, match=r"`max_time` .* is no duration: write 90m"):
        seconds(text)


def test_at_once_until_there_is_something_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "ONE_SIGNAL", 600.0)  # two signals are one however busy the machine is
    before = signal.getsignal(signal.SIGTERM)
    with obeying():
        with pytest.raises(Stopped, match="by SIGTERM before the first step") as error:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert error.value.code == EXIT_STOPPED
    assert signal.getsignal(signal.SIGTERM) is before and requested() is None
    with obeying():
        hold()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # the same Ctrl-C, passed on by a launcher
        assert requested() == "SIGINT"
        with pytest.raises(Stopped), at_once():
            raise AssertionError
        with pytest.raises(Stopped):
            hold()
    with pytest.raises(Stopped, match=r"by `max_time` \(0\.05 s\)"), obeying(0.05):
        while time.sleep(0.01) is None:
            pass


def test_a_second_signal_leaves_at_once() -> None:
    code = (
        "import sys, time; from lopt.reliability import stop; stop.ONE_SIGNAL = 0.1\n"
        "with stop.obeying():\n    stop.hold(); print('ready', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        while "stopping soon" not in (line := process.stderr.readline()):
            assert line, "the process ended at the first signal"
        time.sleep(0.2)  # longer than ONE_SIGNAL after the first signal was handled
        assert process.poll() is None
        process.terminate()
        assert process.wait(120) == 128 + signal.SIGTERM
    assert stop.EXIT_STOPPED == 75


def test_a_stop_that_a_library_turns_into_an_error_is_a_stop() -> None:
    def library() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except BaseException as error:
            raise RuntimeError("a callback failed") from error

    with pytest.raises(Stopped, match="by SIGTERM"), obeying():
        library()
    with obeying():
        hold()
        with pytest.raises(Stopped, match="by SIGTERM"), at_once():
            library()
        with pytest.raises(ValueError, match="its own"), obeying():
            raise ValueError("its own")
