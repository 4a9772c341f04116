"""Finding a command; what a command does with mistakes: tests/cli/test_bad_input.py."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lopt.cli.caches import cache_problem
from lopt.cli.flag_names import renamed, with_flags
from lopt.cli.main import main


def test_no_command_and_unknown_command(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 2 and "sft" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert main(["fly"]) == 2 and "there is no command 'fly'" in capsys.readouterr().err
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("lopt ")


def test_messages_name_the_flags_of_the_command() -> None:
    message = "`num_blocks` must be >= 1 (got 0): `answer` is a column"
    assert with_flags(message, {"num_blocks"}) == message.replace("`num_blocks`", "--num_blocks")
    with pytest.raises(ValueError) as error, renamed(tasks="retention_tasks"):
        raise ValueError("`tasks` must be one of x; see --other_tasks")
    assert str(error.value) == "`retention_tasks` must be one of x; see --other_tasks"


def test_a_cache_that_cannot_be_used_is_named_with_its_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Also where a library says so in words of its own, as transformers does."""
    folders = {name: tmp_path / name for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "LOPT_CACHE")}
    for name, folder in folders.items():
        monkeypatch.setenv(name, str(folder))
    refused = PermissionError(
        errno.EACCES, "Permission denied", str(folders["HF_HUB_CACHE"] / "models--x/refs")
    )
    wrapped = OSError("PermissionError at x when downloading y. Check cache directory permissions.")
    wrapped.__cause__ = refused

    def fail(arguments: list[str]) -> None:
        raise ValueError("`model_name_or_path` x cannot be loaded") from wrapped

    monkeypatch.setattr("lopt.cli.plan.main", fail)
    assert main(["plan"]) == 2
    assert f"the cache {folders['HF_HUB_CACHE']} cannot be used (Permission denied: " in (
        shown := capsys.readouterr().err
    )
    assert shown.endswith("set HF_HUB_CACHE to a folder that you can write to\n")
    refused.filename = str(folders["LOPT_CACHE"])
    assert "set LOPT_CACHE to" in str(cache_problem(refused))
    refused.filename = str(tmp_path / "mine")  # no cache
    assert cache_problem(refused) is None
    assert cache_problem(FileNotFoundError(errno.ENOENT, "x", str(folders["LOPT_CACHE"]))) is None


def test_an_error_without_its_libraries_is_still_a_line() -> None:
    code = (
        "import sys; sys.modules['lopt.trainers.config'] = None; "  # importing it is an ImportError
        "from lopt.cli.main import main; sys.exit(main(['sft', '--output_dir', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("lopt sft: error: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full, of Linux")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_cannot_be_printed_is_a_line(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lopt.cli.main", "--help"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "lopt: error: standard output cannot be written to: No space left on device\n"


def test_places_that_no_library_can_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert main(["eval", "--text", "caf\udce9.txt"]) == 2
    assert "'caf\\udce9.txt' is not UTF-8: rename the file, or set PYTHONUTF8=1" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "two")
        assert main(["sft"]) == 2
        assert "the variable WORLD_SIZE must be a number (got two): unset it" in capsys.readouterr().err
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["sft"]) == 2
    monkeypatch.chdir(tmp_path)
    assert "the current folder is gone (No such file or directory): change into" in capsys.readouterr().err
