"""A training command prints its own lines and progress, and nothing of the libraries below it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from lopt.cli.noise import quiet

OURS = re.compile(
    r"^$|^Loading \S+ and preparing its rows$|^── lopt sft"
    r"|^  (model|parameters|method|layers|rows|tokens|steps|learning|output) "
    r"|^  (learned|cost|files) |^ {14}\S|^  next$"
    r"|^Head warm-up, \d steps, local loss of block 1: [^\r]*$|^   step      loss"
    r"|^ {6}[123] +\d|^    (lopt \w+|hf upload) "
)


@pytest.mark.parametrize("method", ["lopt", "lora"])
def test_three_steps(method: str, tiny_folder: Path, sums_file: Path, tmp_path: Path) -> None:
    """One of them on a terminal of 60 columns, on which no line is torn or too long."""
    if method == "lora":
        pytest.importorskip("peft")
    command = [sys.executable, "-m", "lopt.cli.main", "sft", "--model_name_or_path", tiny_folder,
               "--train_file", sums_file, "--output_dir", tmp_path / "out", "--max_steps", 3,
               "--logging_steps", 1, "--head_warmup_steps", 2, "--method", method]  # fmt: skip
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    environment.pop("COLUMNS", None)
    if method == "lopt" and sys.platform != "win32":
        printed = on_a_terminal(list(map(str, command)), 60, environment)
        assert printed.count("3/3") and "\x1b[?25l" in printed  # the line of progress
    else:
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        printed = run.stdout + run.stderr
        assert "\r" not in printed and "\x1b" not in printed
    # What is drawn over begins with a carriage return or clears its line; the last line is taken away.
    printed = re.sub(r"[^\n]*\n(?:\x1b\[\?25h)?\r?\x1b\[1A\x1b\[2K", "", printed)
    lines = [re.sub(r"\x1b\[[?\w;]*?[A-Za-z]", "", re.split(r"\r|\x1b\[2K", line)[-1]) for line in
             printed.replace("\r\n", "\n").split("\n")]  # fmt: skip
    assert [line.rstrip() for line in lines if not OURS.search(line.rstrip())] == []
    if method == "lopt":
        # A path or a command is not broken, so that it can be copied.
        assert [line for line in lines if len(line) > 60 and not re.search("^Head|/", line)] == []


def on_a_terminal(command: list[str], columns: int, environment: dict[str, str]) -> str:
    """Run a command on a pseudo-terminal; returns all that it sent there."""
    import fcntl
    import pty
    import termios

    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    run = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=environment)
    os.close(inner)
    sent = b""
    with contextlib.suppress(OSError):  # how Linux ends a terminal
        while part := os.read(outer, 65536):
            sent += part
    os.close(outer)
    assert run.wait() == 0, sent.decode()
    return sent.decode()


def test_the_hub_s_retries_are_one_line(caplog: pytest.LogCaptureFixture) -> None:
    quiet()
    quiet()
    logger = logging.getLogger("huggingface_hub.utils._http")
    for _ in range(3):
        logger.warning("'no route' thrown while requesting HEAD https://huggingface.co/x")
        logger.warning("Retrying in 1s [Retry 1/5].")
    logger.warning("Rate limited. Waiting 5s before retry [Retry 1/5].")
    assert len(caplog.messages) == 2 and caplog.messages[1].startswith("Rate limited")
    logging.getLogger("torchao").warning("Failed to load x.so: y")
    logging.getLogger("torchao").warning("something new")
    assert caplog.messages[2:] == ["something new"]
