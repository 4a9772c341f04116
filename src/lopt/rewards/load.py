r"""Find reward functions by name: those of this package, or a user's own.

They follow TRL's convention, `function(prompts, completions, **columns) -> list`: keyword arguments, all
lists of one length, and one number for each completion, or None where the reward does not apply. Those of
this package compare a completion (text or messages) with the column `answer` and give 1.0 or 0.0:

| name         | the answer in a completion                                          |
| ------------ | ------------------------------------------------------------------- |
| `gsm8k`      | the number after the last `####`, else the last number in the text  |
| `math`       | the mathematics in the last `\boxed{}`, compared by math-verify     |
| `procedural` | the text after the first `####`                                     |
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from lopt.messages import error_text
from lopt.rewards.gsm8k import gsm8k_reward
from lopt.rewards.math import math_reward, require_math_verify
from lopt.rewards.procedural import procedural_reward

Reward = Callable[..., Any]
"""A reward function in TRL's convention."""

REWARDS: dict[str, Reward] = {
    "gsm8k": gsm8k_reward,
    "math": math_reward,
    "procedural": procedural_reward,
}
"""Name of a reward -> its function."""


def load_reward(spec: str) -> Reward:
    """Return the reward function that `spec` names: a key of `REWARDS`, or `module:function`.

    Modules are looked for in the current working directory first, as `python -m` does.

    Raises:
        ValueError: an unknown name, a module that is not found or fails when it is imported, or no function
            of that name in it.
        ImportError: `math` without math-verify.
    """
    if spec in REWARDS:
        if spec == "math":
            require_math_verify()
        return REWARDS[spec]
    module_name, _, name = spec.partition(":")
    if not (module_name and name):
        raise ValueError(
            f"`reward_funcs`: no reward {spec!r}: give one of {', '.join(REWARDS)}, or module:function"
        )
    module = _import(module_name)
    if not hasattr(module, name):
        raise ValueError(f"`reward_funcs`: {module_name} has no {name}: check the name")
    function = getattr(module, name)
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else f"of type {type(function).__name__}"
        raise ValueError(f"`reward_funcs`: {spec} is {kind}, not a function: name a function")
    return function


def _import(name: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()  # the file may be younger than Python's list of the folder
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        # A missing module that `name` itself imports is a failure of `name`.
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise ValueError(
                f"`reward_funcs`: no module {name} in {folder} or among the installed packages: "
                "give module:function, without .py"
            ) from error
        raise ValueError(
            f"`reward_funcs`: importing {name} failed: {error_text(error, with_type=True)}: fix it"
        ) from error
