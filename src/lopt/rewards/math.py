r"""The `math` reward: the mathematics in the last `\boxed{}`, compared by math-verify.

math-verify runs in a process that can be killed. Its own time limit is `signal.alarm`, which works in the
main thread only, and whose handler waits for a running operation on big integers; for 9^{9^{9^9}} that
never ends.
"""

from __future__ import annotations

import atexit
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lopt.rewards.answers import Completion, last_boxed, text_of
from lopt.subprocesses import ChildEndedError, ChildProcess

TIME_LIMIT = 3.0
"""Seconds that one comparison may take."""

MAX_LENGTH = 1_000
"""Characters that an answer may have."""

_CHECKER = ChildProcess(
    Path(__file__).with_name("math_process.py"), memory_bytes=4 * 2**30, orphan_seconds=60
)
atexit.register(_CHECKER.stop)


def math_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    r"""Return 1.0 where the last complete `\boxed{}` equals the LaTeX `answer`, else 0.0.

    A completion without a box scores 0, and so does one for which math-verify needs more than `TIME_LIMIT`
    seconds. Expressions that simplify to the same are equal, so one left as it is (`3!` for 6) is right, a
    decimal to 6 digits too, and of `10/2 = 5` only the last side counts.

    Raises:
        ImportError: math-verify is not installed.
    """
    require_math_verify()
    boxes = [last_boxed(text_of(completion)) for completion in completions]
    pairs = zip(answer, boxes, strict=True)
    return [float(box is not None and same_math(str(wanted), box)) for wanted, box in pairs]


def require_math_verify() -> None:
    """Raise ImportError, with the command that installs it, if math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError('the math reward needs math-verify: pip install "lopt[math]"')


@lru_cache(maxsize=10_000)
def same_math(wanted: str, given: str) -> bool:
    """Return whether the LaTeX `given` equals the LaTeX `wanted`, without delimiters around either.

    Equal text is equal. Text longer than `MAX_LENGTH`, text that cannot be parsed, and comparisons longer
    than `TIME_LIMIT` give False; after the last the process is replaced (about a second). Safe in any
    thread. Results are remembered, because the completions of a group often agree.

    Raises:
        ImportError: math-verify is not installed.
        RuntimeError: the process does not start.
    """
    wanted, given = wanted.strip(), given.strip()
    if wanted == given:
        return bool(given)
    if not wanted or not given or max(len(wanted), len(given)) > MAX_LENGTH:
        return False
    require_math_verify()
    try:
        return _CHECKER.ask([wanted, given], TIME_LIMIT)
    except (TimeoutError, ChildEndedError):
        return False
