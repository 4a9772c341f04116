"""Reward functions with their mistakes reported, and as TRL calls them."""

from __future__ import annotations

import asyncio
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_callable_name, is_async_callable

from conftest import save_tiny
from lopt.data.questions import question_rows
from lopt.rewards import REWARDS, checked, gsm8k_reward

PROMPTS = ["p0", [{"role": "user", "content": "p1 " * 200}]]
COMPLETIONS = ["c0", [{"role": "assistant", "content": "c1"}]]


def returns(value):
    def mine(completions, **kwargs):
        return value

    return mine


def call(reward, **columns):
    return checked(reward)(prompts=PROMPTS, completions=COMPLETIONS, **columns)


@pytest.mark.parametrize(
    ("value", "scores"),
    [
        ([1, None], [1.0, None]),
        ((True, 0.5), [1.0, 0.5]),
        (torch.tensor([1.0, 0.5]), [1.0, 0.5]),
        ([torch.tensor(1.0), np.float32(0.5)], [1.0, 0.5]),
        (np.array([1, 0]), [1.0, 0.0]),
    ],
)
def test_checked_values_pass(value, scores):
    assert call(returns(value)) == scores


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0] * 3, "reward function mine returned 3 values for 2 completions"),
        (None, "returned NoneType, not a list"),
        (0.5, "returned float, not a list"),
        (torch.tensor(0.5), "returned float, not a list"),
        ({"a": 1, "b": 2}, "returned dict, not a list"),
        ([1.0, "1"], "returned '1', not a finite number or None, on sample 1 .* of 2: prompt 'p1 .*'c1'"),
        ([float("nan"), 1.0], "returned nan, .* on sample 0 .* of 2: prompt 'p0', completion 'c0'"),
        ([1.0, float("inf")], "returned inf, .* on sample 1"),
        (torch.zeros(2, 2), r"returned \[0.0, 0.0\], not a finite number"),
    ],
)
def test_checked_values_fail(value, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(returns(value))
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_checked_names_the_guilty_sample():
    seen = []

    def fussy(prompts, completions, answer, trainer_state, **kwargs):
        seen.append((len(prompts), len(completions), len(answer), trainer_state.step))
        return [1 / value for value in answer]

    state = SimpleNamespace(step=7)
    assert call(fussy, answer=[1, 2], trainer_state=state) == [1.0, 0.5]
    with pytest.raises(
        ValueError, match=r"fussy raised ZeroDivisionError: division by zero on sample 1"
    ) as caught:
        call(fussy, answer=[1, 0], trainer_state=state)
    assert isinstance(caught.value.__cause__, ZeroDivisionError) and "'c1'" in str(caught.value)
    assert seen == [(2, 2, 2, 7), (2, 2, 2, 7), (1, 1, 1, 7), (1, 1, 1, 7)]

    def together(completions, **kwargs):
        if len(completions) > 1:
            raise KeyError("pair")
        return [1.0]

    with pytest.raises(ValueError, match="together raised KeyError: 'pair' on 2 completions together"):
        call(together)


def test_checked_tells_a_wrong_signature():
    def narrow(completions, solution):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"narrow: missing .*'solution'.*prompts, completions, answer"):
        call(narrow, answer=[1, 2])
    with pytest.raises(ValueError, match=r"unexpected keyword argument 'prompts'.*\*\*kwargs"):
        call(narrow, solution=[1, 2])


async def waiting(completions, answer, **kwargs):
    return [1 / value for value in answer]


class Scorer:
    async def __call__(self, completions, answer, **kwargs):
        return [1 / value for value in answer]


@pytest.mark.parametrize("reward", [waiting, Scorer(), functools.partial(waiting, extra=1)])
def test_checked_keeps_coroutine_functions(reward):
    wrapped = checked(reward)
    assert is_async_callable(wrapped) and get_callable_name(wrapped) == get_callable_name(reward)
    arguments = {"prompts": PROMPTS, "completions": COMPLETIONS}
    assert asyncio.run(wrapped(**arguments, answer=[1, 2])) == [1.0, 0.5]
    with pytest.raises(ValueError, match="raised ZeroDivisionError: division by zero on sample 0"):
        asyncio.run(wrapped(**arguments, answer=[0, 1]))


def test_checked_keeps_names_and_reward_models():
    for reward in REWARDS.values():
        wrapped = checked(reward)
        assert get_callable_name(wrapped) == reward.__name__ and not is_async_callable(wrapped)
    assert checked(functools.partial(returns([1.0, 1.0]), extra=1)).__name__ == "mine"
    model = torch.nn.Linear(1, 1)
    assert checked(model) is model


def test_trl_calls_them_as_expected(tmp_path):
    """Two steps of GRPO on questions: TRL hands over columns, awaits what is to be awaited, logs by name."""
    folder = save_tiny(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = [{"question": f"{n} + {n}?", "answer": f"#### {2 * n}", "level": n} for n in range(4)]
    rows = question_rows(Dataset.from_list(given), tokenizer, "gsm8k")
    seen = []

    async def level(prompts, completions, level, answer, **kwargs):
        seen.extend(zip(prompts, level, answer, strict=True))
        return [len(text) / 100 + value for text, value in zip(completions, level, strict=True)]

    options = dict(max_completion_length=4, num_generations=2, per_device_train_batch_size=2, max_steps=2)
    args = GRPOConfig(str(tmp_path / "out"), report_to="none", use_cpu=True, logging_steps=1, **options)
    rewards = [checked(gsm8k_reward), checked(level)]
    trainer = GRPOTrainer(str(folder), rewards, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert len(seen) == 4
    for text, n, answer in seen:
        assert text == rows[n]["prompt"] and answer == str(2 * n)
    logged = trainer.state.log_history[0]
    assert logged["rewards/gsm8k_reward/mean"] in (0, 0.5, 1) and logged["rewards/level/mean"] >= 0
