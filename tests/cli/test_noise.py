"""A training command prints its own lines and progress, and nothing of the libraries below it."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lopt.cli.noise import quiet

OURS = re.compile(
    r"^$|\d+%\||examples/s\]|[a-z]/s\]"  # progress bars
    r"|^\{'\w+'|^Head warm-up, |: block 1 \(layers |^The model is in "
)


@pytest.mark.parametrize("method", ["lopt", "lora"])
def test_three_steps(method: str, tiny_folder: Path, sums_file: Path, tmp_path: Path) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    command = [sys.executable, "-m", "lopt.cli.main", "sft", "--model_name_or_path", tiny_folder,
               "--train_file", sums_file, "--output_dir", tmp_path / "out", "--max_steps", 3,
               "--logging_steps", 1, "--head_warmup_steps", 2, "--method", method]  # fmt: skip
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = [re.sub(r"\x1b\[\w", "", line).strip() for line in re.split(r"[\r\n]", run.stdout + run.stderr)]
    assert [line for line in lines if not OURS.search(line)] == []


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
