"""The screen of one training command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lopt.cli.display.screen import Screen
from lopt.cli.flags import ScreenArguments


@contextmanager
def screen_for(screen_args: ScreenArguments, args: Any) -> Iterator[Screen]:
    """Open the screen that the flags ask for.

    Args:
        args: the trainer's config; its `disable_tqdm` is set where there is no terminal to draw bars on.
    """
    screen = Screen(
        first=args.is_main,
        quiet=screen_args.quiet,
        json_logs=screen_args.json_logs,
        bars=not args.disable_tqdm,
    )
    args.disable_tqdm = not screen.live
    with screen.open():
        yield screen
