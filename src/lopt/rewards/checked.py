"""Wrap a reward function so that its mistakes are reported with the function and the sample."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lopt.messages import error_text, shorten
from lopt.rewards.answers import Completion
from lopt.rewards.load import Reward

_SHOWN = 200  # characters of a prompt or completion in an error message


def checked(reward: Reward) -> Reward:
    """Return `reward` with checks of what it takes, raises and returns.

    The result keeps the name, by which TRL logs it, and is a coroutine function where `reward` is, so that
    TRL awaits it as before. It returns a list of finite floats and None. A reward model (`nn.Module`) is
    returned unchanged, because TRL calls it in a way of its own.

    Raises:
        ValueError: from the result when it is called: it names the function and, if one sample alone causes
            the error, that sample with its prompt and completion shortened. To find it, `reward` is called
            again with one sample at a time. The cause is chained.
    """
    from torch import nn

    if isinstance(reward, nn.Module):
        return reward
    inner = reward
    while isinstance(inner, functools.partial):  # the coroutine function, and the name, is what it wraps
        inner = inner.func
    name = getattr(inner, "__name__", type(inner).__name__)
    is_async = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__)  # type: ignore[operator]

    async def call(arguments: dict[str, Any]) -> Any:
        return await reward(**arguments) if is_async else reward(**arguments)

    async def check_async(
        prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
    ) -> list[float | None]:
        arguments = {"prompts": prompts, "completions": completions, **columns}
        _check_signature(reward, name, arguments)
        try:
            values = await call(arguments)
        except Exception as error:  # a user's function may raise anything
            for index, sample in enumerate(_samples(arguments)):
                try:
                    await call(sample)
                except Exception as own:
                    raise _raised(name, own, _describe(index, prompts, completions)) from own
            where = f"on {len(completions)} completions together, though on none of them alone"
            raise _raised(name, error, where) from error
        return _checked_values(name, values, prompts, completions)

    def check(
        prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any
    ) -> list[float | None]:
        # Nothing in it waits where `reward` is no coroutine function, so the first step is the last.
        try:
            check_async(prompts, completions, **columns).send(None)
        except StopIteration as done:
            return done.value
        raise AssertionError("a plain reward function was awaited")

    wrapper: Reward = check_async if is_async else check
    functools.update_wrapper(wrapper, reward)
    wrapper.__name__ = name  # a partial and an object have none
    return wrapper


def _check_signature(reward: Reward, name: str, arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError if `reward` does not take `arguments`, before an error within it looks the same."""
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # a builtin without one
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(
            f"reward function {name}: {error}: it is called with {', '.join(arguments)}: "
            "take those it needs, and **kwargs for the rest"
        ) from error


def _samples(arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the arguments of each sample alone; what is no list of one value per sample stays unchanged."""
    count = len(arguments["completions"])
    lists = {
        key for key, value in arguments.items() if isinstance(value, list | tuple) and len(value) == count
    }
    return [
        {key: value[i : i + 1] if key in lists else value for key, value in arguments.items()}
        for i in range(count)
    ]


def _raised(name: str, error: Exception, where: str) -> ValueError:
    return ValueError(f"reward function {name} raised {error_text(error, 400, with_type=True)} {where}")


def _checked_values(
    name: str, values: Any, prompts: Sequence[Any], completions: Sequence[Any]
) -> list[float | None]:
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if not isinstance(values, list | tuple):
        kind = type(values).__name__
        raise ValueError(f"reward function {name} returned {kind}, not a list: return one number each")
    if len(values) != len(completions):
        raise ValueError(
            f"reward function {name} returned {len(values)} values for {len(completions)} completions"
        )
    scores: list[float | None] = []
    for index, value in enumerate(values):
        score = None if value is None else _number(value)
        if score is not None and not math.isfinite(score):
            raise ValueError(
                f"reward function {name} returned {_short(value)}, not a finite number or None, "
                f"{_describe(index, prompts, completions)}"
            )
        scores.append(score)
    return scores


def _number(value: Any) -> float:
    """Return `value` as a float; NaN for text and whatever else is no number."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def _describe(index: int, prompts: Sequence[Any], completions: Sequence[Any]) -> str:
    where = f"on sample {index} (from 0) of {len(completions)}"
    return f"{where}: prompt {_short(prompts[index])}, completion {_short(completions[index])}"


def _short(value: Any) -> str:
    """Return one line of bounded length; of messages, the content of the last."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    return shorten(repr(value[: _SHOWN + 1] if isinstance(value, str) else value), _SHOWN)
