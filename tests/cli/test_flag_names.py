"""The library names arguments, the user of a command reads flags."""

from __future__ import annotations

import logging

import pytest

from lopt.cli.flag_names import flags_in_logs, renamed, with_flags


def test_only_flags_that_the_command_has_are_written_as_such() -> None:
    message = "`num_blocks` must be >= 1 (got 0); column `answer` of `num_blocks`"
    expected = "--num_blocks must be >= 1 (got 0); column `answer` of --num_blocks"
    assert with_flags(message, {"num_blocks", "seed"}) == expected
    assert with_flags("give `revision`", {"seed"}, others={"revision"}) == "give revision"


def test_an_argument_with_another_flag() -> None:
    with pytest.raises(ValueError, match="retention_tasks") as error, renamed(tasks="retention_tasks"):
        raise ValueError("`tasks` must be one of a, b; see `tasks_file`")
    assert str(error.value) == "`retention_tasks` must be one of a, b; see `tasks_file`"
    with pytest.raises(TypeError, match="`tasks`"), renamed(tasks="retention_tasks"):
        raise TypeError("`tasks`")
    with renamed(tasks="retention_tasks"):
        pass


def test_log_messages_of_the_library_name_flags(caplog: pytest.LogCaptureFixture) -> None:
    with flags_in_logs(lambda message: with_flags(message, {"lr_k1"})):
        logging.getLogger("lopt.reliability.guards").warning("try a lower `%s` for `%s`", "lr_k1", "other")
        logging.getLogger("elsewhere").warning("`lr_k1`")
    logging.getLogger("lopt.reliability.guards").warning("`lr_k1`")
    assert caplog.messages == ["try a lower --lr_k1 for `other`", "`lr_k1`", "`lr_k1`"]
