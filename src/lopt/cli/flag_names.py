"""Messages of the library, which name arguments in backticks, as the user of a command reads them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any


def with_flags(message: str, flags: Collection[str]) -> str:
    """Return the message with `name` written as --name wherever `flags` has that name."""
    return re.sub(r"`(\w+)`", lambda name: f"--{name[1]}" if name[1] in flags else name[0], message)


@contextmanager
def flags_in_logs(flags: Callable[[], Collection[str]]) -> Iterator[None]:
    """Within, what the library logs names flags as well; `flags` is called when a message needs it."""
    make_record = logging.getLogRecordFactory()

    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        if record.name.startswith("lopt.") and "`" in (message := record.getMessage()):
            record.msg, record.args = with_flags(message, flags()), ()
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
