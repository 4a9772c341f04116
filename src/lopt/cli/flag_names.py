"""Messages of the library, which name arguments in backticks, as the user of a command reads them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any


def with_flags(message: str, flags: Collection[str], others: Collection[str] = ()) -> str:
    """Return the message as the user of a command with the flags `flags` reads it.

    A `name` in backticks is written as --name if it is one of `flags`, and without backticks if it is one of
    `others`: a flag that only other commands have.
    """

    def shown(name: re.Match[str]) -> str:
        if name[1] in flags:
            return f"--{name[1]}"
        return name[1] if name[1] in others else name[0]

    return re.sub(r"`(\w+)`", shown, message)


@contextmanager
def flags_in_logs(in_flags: Callable[[str], str]) -> Iterator[None]:
    """Within, messages that the library logs pass through `in_flags`."""
    make_record = logging.getLogRecordFactory()

    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        if record.name.startswith("lopt."):
            record.msg, record.args = in_flags(record.getMessage()), ()
        return record

    logging.setLogRecordFactory(make)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make_record)


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Rename the arguments in messages of the library to the flags that a command has for them.

    Example:
        with renamed(tasks="retention_tasks"):
            check_tasks(args.retention_tasks)  # "`tasks` must be ..." names --retention_tasks
    """
    try:
        yield
    except ValueError as error:
        message = str(error)
        for name, flag in names.items():
            message = re.sub(rf"`{name}`|--{name}\b", f"`{flag}`", message)
        raise ValueError(message) from error
