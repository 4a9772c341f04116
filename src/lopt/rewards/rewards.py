r"""Verifiable rewards, in the convention of TRL: `fn(prompts, completions, **columns) -> list`.

| name         | right is                                                                 |
| ------------ | ------------------------------------------------------------------------ |
| `gsm8k`      | the number after the last `####`, else the last number in the text       |
| `math`       | the mathematics in the last `\boxed{}`, compared by math-verify          |
| `procedural` | what stands after the first `####`, by the checker of `lopt.data.tasks`  |

Each gives 1.0 or 0.0 per completion, a string or a list of messages, against the column `answer`.
`load_reward` finds these and a user's own; `checked` makes the mistakes of any of them speak.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lopt.data.tasks import answer_is
from lopt.rewards.answers import final_number, last_boxed, only_number
from lopt.rewards.math_check import require_math_verify, same_math

Reward = Callable[..., Any]
"""A reward function: keyword arguments `prompts`, `completions` and one per column, all lists of
one length; one number per completion, or None where it does not apply."""

Completion = str | Sequence[Mapping[str, Any]]

_SHOWN = 200  # characters of a prompt or completion in an error message


def gsm8k_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    """1.0 where a completion ends in the number `answer`, by `lopt.rewards.answers.final_number`.

    Commas, currency, units, percent signs, LaTeX and bold do not matter; the value does, exactly.

    Raises:
        ValueError: An answer is not one number.
    """
    wanted = [only_number(str(value)) for value in answer]
    scores: list[float | None] = []
    for text, number, value in zip(map(text_of, completions), wanted, answer, strict=True):
        if number is None:
            raise ValueError(f"the gsm8k reward needs a number in the column `answer`, not {value!r}")
        given = final_number(text)
        scores.append(float(given is not None and number.equals(given)))
    return scores


def math_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    r"""1.0 where the last complete `\boxed{}` equals the LaTeX `answer`, by math-verify.

    No box scores 0, and so does what takes math-verify more than `lopt.rewards.math_check.TIME_LIMIT`
    seconds. Equal is what simplifies to the same, so an expression left as it is (`3!` for 6) is
    right, a decimal to 6 digits too, and of `10/2 = 5` only the last side counts.

    Raises:
        ImportError: math-verify is not installed.
    """
    require_math_verify()
    scores: list[float | None] = []
    for text, wanted in zip(map(text_of, completions), answer, strict=True):
        given = last_boxed(text)
        scores.append(float(given is not None and same_math(str(wanted), given)))
    return scores


def procedural_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    """1.0 where what follows the first `####` is `answer`: the rule of `lopt.data.is_correct`."""
    texts = map(text_of, completions)
    return [float(answer_is(text, str(wanted))) for text, wanted in zip(texts, answer, strict=True)]


REWARDS: dict[str, Reward] = {
    "gsm8k": gsm8k_reward,
    "math": math_reward,
    "procedural": procedural_reward,
}
"""Name for `--reward_funcs` -> reward function."""


def text_of(completion: Completion) -> str:
    """The text of a completion: itself, or the content of its last assistant message.

    Of messages without an assistant's the last counts; of content in parts, the text of the parts.
    """
    if isinstance(completion, str):
        return completion
    turns = [turn for turn in completion if turn.get("role") == "assistant"] or list(completion)
    content = turns[-1].get("content") if turns else None
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def load_reward(spec: str) -> Reward:
    """The reward function that `spec` names: a key of `REWARDS`, or `module:function`.

    Modules are looked for in the current working directory first, as `python -m` does.

    Raises:
        ValueError: One line that begins with `--reward_funcs`: an unknown name, a module that is
            not found or fails when imported, or no function of that name in it.
        ImportError: `math` without math-verify.
    """
    if spec in REWARDS:
        if spec == "math":
            require_math_verify()
        return REWARDS[spec]
    module_name, colon, name = spec.partition(":")
    if not (colon and module_name and name):
        raise ValueError(
            f"--reward_funcs: no reward {spec!r}: give one of {', '.join(REWARDS)}, or module:function"
        )
    module = _import(module_name)
    if not hasattr(module, name):
        raise ValueError(f"--reward_funcs: {module_name} has no {name}: check the name")
    function = getattr(module, name)
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else f"of type {type(function).__name__}"
        raise ValueError(f"--reward_funcs: {spec} is {kind}, not a function: name a function")
    return function


def _import(name: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()  # the file may be younger than Python's list of the folder
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        # An absent import inside the module is the module's own fault.
        if absent and (name == absent or name.startswith(f"{absent}.")):
            raise ValueError(
                f"--reward_funcs: no module {name} in {folder} or among the installed packages: "
                "give module:function, without .py"
            ) from error
        raise ValueError(f"--reward_funcs: importing {name} failed: {_brief(error)}: fix it") from error


def checked(reward: Reward) -> Reward:
    """`reward` with its mistakes told: what it raises, and what it returns that is no reward.

    The result keeps the name, by which TRL logs it, and is a coroutine function where `reward` is,
    so TRL awaits it as before. It returns a list of finite floats and None. A reward model
    (`nn.Module`) comes back as it is, because TRL itself calls it.

    Raises:
        ValueError: From the result when called: it names the function and, where one sample alone
            brings the fault about, that sample with its prompt and completion shortened. For that,
            `reward` is called again with one sample at a time. The cause is chained.
    """
    if isinstance(reward, nn.Module):
        return reward
    name, is_async = _name(reward), _is_async(reward)

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
                    raise _raised(name, own, index, prompts, completions) from own
            raise _raised(name, error, None, prompts, completions) from error
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


def _is_async(reward: Reward) -> bool:
    # As TRL tells: an object has the `async` on its `__call__`, a partial on what it wraps.
    while isinstance(reward, functools.partial):
        reward = reward.func
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(reward.__call__)  # type: ignore[operator]


def _name(reward: Reward) -> str:
    while isinstance(reward, functools.partial):
        reward = reward.func
    return getattr(reward, "__name__", type(reward).__name__)


def _check_signature(reward: Reward, name: str, arguments: Mapping[str, Any]) -> None:
    """Told apart from a fault within: a function that does not take what it is given."""
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
    """The arguments of each sample alone. What is no list of one per sample stays as it is."""
    count = len(arguments["completions"])
    lists = {
        key for key, value in arguments.items() if isinstance(value, list | tuple) and len(value) == count
    }
    return [
        {key: value[at : at + 1] if key in lists else value for key, value in arguments.items()}
        for at in range(count)
    ]


def _raised(
    name: str, error: Exception, index: int | None, prompts: Sequence[Any], completions: Sequence[Any]
) -> ValueError:
    if index is None:
        where = f"on {len(completions)} completions together, though on none of them alone"
    else:
        where = _sample(index, prompts, completions)
    return ValueError(f"reward function {name} raised {_brief(error)} {where}")


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
        try:
            score = None if value is None else _finite(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"reward function {name} returned {_short(value)}, not a finite number or None, "
                f"{_sample(index, prompts, completions)}"
            ) from error
        scores.append(score)
    return scores


def _finite(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError("text is no number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _sample(index: int, prompts: Sequence[Any], completions: Sequence[Any]) -> str:
    where = f"on sample {index} (from 0) of {len(completions)}"
    return f"{where}: prompt {_short(prompts[index])}, completion {_short(completions[index])}"


def _short(value: Any) -> str:
    """One line of bounded length; of messages, the content of the last."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    text = " ".join(repr(value[: _SHOWN + 1] if isinstance(value, str) else value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= 2 * _SHOWN else f"{text[: 2 * _SHOWN]}..."
