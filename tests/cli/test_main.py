"""Finding a command; what a command does with mistakes: tests/cli/test_bad_input.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


def test_an_error_without_its_libraries_is_still_a_line() -> None:
    code = (
        "import sys; sys.modules['lopt.trainers.config'] = None; "  # importing it is an ImportError
        "from lopt.cli.main import main; sys.exit(main(['sft', '--output_dir', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("lopt sft: error: ")
