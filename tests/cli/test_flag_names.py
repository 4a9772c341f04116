"""The library names arguments, the user of a command reads flags."""

from __future__ import annotations

import pytest

from lopt.cli.flag_names import renamed, with_flags


def test_only_flags_that_the_command_has_are_written_as_such() -> None:
    message = "`num_blocks` must be >= 1 (got 0); column `answer` of `num_blocks`"
    expected = "--num_blocks must be >= 1 (got 0); column `answer` of --num_blocks"
    assert with_flags(message, {"num_blocks", "seed"}) == expected


def test_an_argument_with_another_flag() -> None:
    with pytest.raises(ValueError, match="retention_tasks") as error, renamed(tasks="retention_tasks"):
        raise ValueError("`tasks` must be one of a, b; see `tasks_file`")
    assert str(error.value) == "`retention_tasks` must be one of a, b; see `tasks_file`"
    with pytest.raises(TypeError, match="`tasks`"), renamed(tasks="retention_tasks"):
        raise TypeError("`tasks`")
    with renamed(tasks="retention_tasks"):
        pass
