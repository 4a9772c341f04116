"""Where a training command prints to: a terminal, plain lines, JSON lines, or nowhere.

`rich` draws. It is installed wherever transformers is, whose own command line needs it, knows what a terminal
can show (`NO_COLOR`, `TERM`, width, encoding), and moves what others print above the line of progress.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from typing import Any, TextIO

import datasets
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text
from transformers.utils import logging as transformers_logging

from lopt.cli.noise import counted_warnings
from lopt.files import finite
from lopt.reports.page import clean

PLAIN_WIDTH = 110
"""Columns of a line where there is no terminal."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # called while it is handled: `lopt.cli.main` answers for it, not rich


class Screen:
    """What a training command prints to.

    Attributes:
        speaks: whether this process prints for people: the first one, without `quiet` and `json_logs`.
        live: whether there is a terminal on which a line can be drawn again and again.
        warnings: what has been logged while it was open, with how often.
    """

    def __init__(
        self, *, first: bool = True, quiet: bool = False, json_logs: bool = False, bars: bool = True
    ) -> None:
        self._out: TextIO = sys.stdout or io.StringIO()  # closed from the start
        self._first, self._quiet, self._json = first, quiet, json_logs
        self.speaks = first and not quiet and not json_logs
        # The same lines in a notebook as elsewhere.
        self._console = _Console(
            file=self._out, highlight=False, markup=False, emoji=False, force_jupyter=False
        )
        self.live = self.speaks and bars and self._out.isatty() and not self._console.is_dumb_terminal
        self._line: Live | None = None
        self._undo = ExitStack()
        self.warnings: Counter[str] = Counter()

    @property
    def width(self) -> int:
        """Columns that a line may take."""
        return self._console.width if self._out.isatty() else PLAIN_WIDTH

    @property
    def ascii_only(self) -> bool:
        """Whether only ASCII can be printed."""
        return not (self._out.encoding or "utf-8").lower().replace("-", "").startswith("utf")

    @contextmanager
    def open(self) -> Iterator[Screen]:
        """Within, standard output is what this screen says, also for what libraries print."""
        if self.ascii_only and isinstance(self._out, io.TextIOWrapper):
            self._out.reconfigure(errors="replace")
        with ExitStack() as stack:
            if self._json:
                stack.enter_context(_lines_of(redirect_stdout, self._message, self._out))
            elif self._quiet:
                stack.enter_context(_lines_of(redirect_stdout, lambda line: None, self._out))
            if not self.live:
                stack.enter_context(without_bars())
            self.warnings = stack.enter_context(counted_warnings())
            stack.callback(self.stop_line)
            yield self

    def print(self, *parts: RenderableType) -> None:
        """Print text or what rich draws, for people."""
        if self.speaks:
            self._console.print(*parts, soft_wrap=True)

    def event(self, kind: str, **values: Any) -> None:
        """Print a JSON object in a line of its own, for programs."""
        if self._json and self._first:
            line = json.dumps({"event": kind, **finite(values)}, ensure_ascii=False, default=str)
            print(line, file=self._out, flush=True)

    def _message(self, line: str) -> None:
        if line.strip():
            self.event("message", text=clean(line))

    # -- the line of progress ------------------------------------------------------------------------

    def start_line(self, draw: Callable[[], RenderableType]) -> None:
        """Draw a line below all that is printed meanwhile; only `draw_line` draws it again, no thread."""
        if not self.live or self._line is not None:
            return
        self._line = Live(
            get_renderable=draw,
            console=self._console,
            auto_refresh=False,
            transient=True,
            # rich's own redirection lets another console of rich write through it, as TRL's is.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._undo.enter_context(without_bars())
        self._undo.enter_context(_lines_of(redirect_stdout, self._above, self._out))
        if sys.stderr is not None and sys.stderr.isatty():
            before = sys.stderr
            self._undo.enter_context(_lines_of(redirect_stderr, self._above, before))
            self._undo.enter_context(_logging_to(before, sys.stderr))
        self._line.start()

    def _above(self, line: str) -> None:
        """Print what a library has printed, or drawn over and over, above the line."""
        self._console.print(Text.from_ansi(" ".join(line.rsplit("\r", 1)[-1].splitlines())), soft_wrap=True)

    def draw_line(self) -> None:
        """Draw the line again."""
        if self._line is not None:
            self._line.refresh()

    def stop_line(self) -> None:
        """Take the line away; a second call does nothing."""
        line, self._line = self._line, None
        if line is not None:
            line.stop()
            self._undo.close()


class _Lines(io.TextIOBase):
    """A stream that hands on whole lines; its descriptor is that of `out`, for programs that are started."""

    encoding = "utf-8"

    def __init__(self, take: Callable[[str], None], out: TextIO) -> None:
        self._take, self._out, self._rest = take, out, ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._out.fileno()

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._take(line)
        return len(text)

    def finish(self) -> None:
        """Hand on what has no end of a line."""
        rest, self._rest = self._rest, ""
        if rest.strip():
            self._take(rest)


@contextmanager
def _lines_of(redirect: Callable[[Any], Any], take: Callable[[str], None], out: TextIO) -> Iterator[None]:
    """Within, hand on each line that is printed; `redirect` is one of contextlib's."""
    lines = _Lines(take, out)
    with redirect(lines):
        try:
            yield
        finally:
            lines.finish()


@contextmanager
def without_bars() -> Iterator[None]:
    """Within, transformers and datasets draw no progress bars of their own."""
    drawn = transformers_logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if drawn[0]:
            transformers_logging.enable_progress_bar()
        if not drawn[1]:
            datasets.enable_progress_bars()


def bars_on_a_terminal() -> AbstractContextManager[None]:
    """Return `without_bars()` where standard error is no terminal: a file would hold every state of a bar."""
    return nullcontext() if sys.stderr.isatty() else without_bars()


@contextmanager
def _logging_to(old: Any, new: Any) -> Iterator[None]:
    """Within, handlers that hold on to the stream `old` write to `new`."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    every = {h for logger in loggers if isinstance(logger, logging.Logger) for h in logger.handlers}
    moved = [h for h in every if isinstance(h, logging.StreamHandler) and h.stream is old]
    for handler in moved:
        handler.setStream(new)
    try:
        yield
    finally:
        for handler in moved:
            handler.setStream(old)
