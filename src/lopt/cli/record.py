"""The record of a command line."""

from __future__ import annotations

from collections.abc import Sequence

from lopt.cli.parsing import settings
from lopt.reliability.record import Record


def record_of(command: str, arguments: Sequence[str]) -> Record:
    """Return the record of arguments that `lopt.cli.parsing.parse` has accepted, without secrets."""
    return Record.of(command, arguments, *settings(command, arguments))
