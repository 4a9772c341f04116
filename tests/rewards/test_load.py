"""Reward functions by name: those of the package and a user's own."""

from __future__ import annotations

import sys

import pytest

from lopt.rewards import REWARDS, load_reward


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A working directory with modules of a user, forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in {
        "my_rewards": "def score(completions, **kwargs):\n    return [1.0] * len(completions)\n\nNUMBER = 3\n"
        "class Scorer:\n    pass\n",
        "my_broken": "1 / 0\n",
        "my_exit": "raise SystemExit(0)\n",
        "my_import": "import my_absent\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    yield
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def test_load_reward(modules):
    assert [load_reward(name) for name in REWARDS] == list(REWARDS.values())
    assert load_reward("my_rewards:score")(completions=["a", "b"]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("knitting", "no reward 'knitting': give one of gsm8k, math, procedural, or module:function"),
        (":score", "no reward ':score'"),
        ("my_rewards:", "no reward 'my_rewards:'"),
        ("my_nothing:score", "no module my_nothing in"),
        ("my_rewards.py:score", "no module my_rewards.py in .* without .py"),
        ("folder/my_rewards.py:score", "no module folder/my_rewards.py in"),
        ("my_rewards:nothing", "my_rewards has no nothing"),
        ("my_rewards:NUMBER", "my_rewards:NUMBER is of type int"),
        ("my_rewards:Scorer", "my_rewards:Scorer is a class"),
        ("my_broken:score", "importing my_broken failed: ZeroDivisionError: division by zero"),
        ("my_exit:score", "importing my_exit failed: SystemExit"),
        ("my_import:score", "importing my_import failed: ModuleNotFoundError: No module named 'my_absent'"),
    ],
)
def test_load_reward_faults(modules, spec, message):
    with pytest.raises(ValueError, match=f"^`reward_funcs`: .*{message}") as caught:
        load_reward(spec)
    assert "\n" not in str(caught.value)
    if "import" in message:
        assert caught.value.__cause__ is not None
