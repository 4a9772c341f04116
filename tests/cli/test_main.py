"""Finding a command; what a command does with mistakes: tests/cli/test_bad_input.py."""

from __future__ import annotations

import pytest

from lopt.cli.main import main


def test_no_command_and_unknown_command(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 2 and "sft" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert main(["fly"]) == 2 and "there is no command 'fly'" in capsys.readouterr().err
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("lopt ")
