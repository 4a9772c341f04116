"""Rewards: what scores and what does not, on made and real completions; loading and checking."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import sys
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import get_callable_name, is_async_callable

from conftest import save_tiny
from lopt.data.procedural import Problem, is_correct
from lopt.data.questions import question_rows
from lopt.rewards import REWARDS, checked, load_reward
from lopt.rewards.answers import last_boxed, text_of
from lopt.rewards.gsm8k import gsm8k_reward
from lopt.rewards.math import math_reward
from lopt.rewards.procedural import procedural_reward

needs_math = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason='needs math-verify: pip install "lopt[math]"',
)


def score(reward, completion, answer) -> float | None:
    (value,) = reward(prompts=["q"], completions=[completion], answer=[answer], extra=[1])
    return value


REAL = [
    # As models write them: (completion, answer, score).
    ("She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n9 * 2 = $<<9*2=18>>18.\n#### 18", "18", 1),
    ("Therefore, Janet makes **$18** every day at the farmers' market.", "18", 1),
    ("The total profit is $195,000 - $125,000 = $70,000.\n\n#### $70,000", "70000", 1),
    ("So the answer is $\\boxed{70{,}000}$ dollars.", "70,000", 1),
    ("**Final Answer:** 5 km\n", "5", 1),
    ("#### 3/4 of the cake", "0.75", 1),
    ("It rose by 25%.\n#### 25%", "25", 1),
    ("It rose by a quarter, 25%.", "0.25", 1),
    ("#### −12 degrees.", "-12", 1),
    ("#### 1.5 × 10^6 people", "1500000", 1),
    ("#### 18\n#### 18\n#### 18\n#### 1", "18", 0),  # runs on, and ends in something else
    ("#### 17 or 18", "18", 0),
    ("#### 5 + 13", "5", 0),
    ("#### 5 + 13", "13", 0),
    ("#### 180", "18", 0),
    ("#### 0.18", "18", 0),
    ("#### 18 thousand", "18", 0),
    ("#### -18", "18", 0),
    ("#### 1,8", "18", 0),
    ("#### 18:30", "18", 0),
    ("#### 18\\sqrt{2}", "18", 0),
    ("#### eighteen", "18", 0),
    ("####", "18", 0),
    ("", "18", 0),
    ("Let me think. " * 5000, "18", 0),
]


@pytest.mark.parametrize(("completion", "answer", "wanted"), REAL)
def test_gsm8k_on_real_completions(completion, answer, wanted):
    assert score(gsm8k_reward, completion, answer) == wanted
    assert score(gsm8k_reward, [{"role": "assistant", "content": completion}], answer) == wanted


STYLES = [
    *("{n}", "{n}.", "**{n}**", "${n}", "£{n}", "€{n}", "{n} eggs", "{n}km", "`{n}`", "*{n}*", "x = {n}"),
    *(r"\boxed{{{n}}}", "${n}$", r"\${n}", r"$\boxed{{{n}}}$", r"{n}\text{{ cm}}"),
    *("{n}\nIt is", "{n} (rounded)", "{n}</s>"),
]
PLACES = ["{x}", "We get 3 + 4 = 7.\n#### {x}", "First #### 99\nthen #### {x}", "After 3 steps: {x}"]
NUMBERS = st.decimals(-(10**9), 10**9, places=2, allow_nan=False) | st.integers(-(10**9), 10**9).map(Decimal)


def write(number: Decimal, style: str, place: str, commas: bool, minus: str) -> str:
    text = f"{number:,f}" if commas else f"{number:f}"
    return place.format(x=style.format(n=text.replace("-", minus)))


WAYS = st.tuples(st.sampled_from(STYLES), st.sampled_from(PLACES), st.booleans(), st.sampled_from("-−"))


@settings(deadline=None, max_examples=300)
@given(NUMBERS, NUMBERS, WAYS)
def test_formatting_never_changes_the_verdict(number, other, way):
    number, other = number + 0, other + 0  # no -0
    text = write(number, *way)
    for answer in (number, f"{number:,}", f"${number}"):
        assert score(gsm8k_reward, text, answer) == 1, (text, answer)
    assume(number != other)
    assert score(gsm8k_reward, text, other) == 0
    for near in (number + 1, number * 10 + 3, -number, number + Decimal("0.01")):
        assert score(gsm8k_reward, text, near) == (near == number)


@settings(deadline=None)
@given(NUMBERS, st.sampled_from(["%", r"\%", " percent"]), NUMBERS)
def test_a_percent_sign(number, sign, other):
    text = f"#### {number + 0:f}{sign}"
    assert score(gsm8k_reward, text, number) == 1
    share = number / 100
    assert score(gsm8k_reward, text, share) == (abs(share) < 1 or share == number)
    assume(other not in (number, share))
    assert score(gsm8k_reward, text, other) == 0


@settings(deadline=None)
@given(st.text() | st.text().map(lambda text: f"#### {text}"), st.integers())
def test_any_text_scores_0_or_1(text, answer):
    assert score(gsm8k_reward, text, answer) in (0, 1)
    assert score(procedural_reward, text, answer) == is_correct(text, Problem("", str(answer), ""))


@needs_math
@settings(deadline=None, max_examples=30)
@given(st.text(max_size=40) | st.text("\\{}^_$#&%abx0123456789+-*/=(),. ", max_size=20))
def test_any_mathematics_scores_0_or_1(text):
    assert score(math_reward, text, "5") in (0, 1) and score(math_reward, f"\\boxed{{{text}}}", "5") in (0, 1)


def test_an_answer_that_is_no_number_is_an_error():
    with pytest.raises(ValueError, match="needs a number in the column `answer`, not 'none'"):
        score(gsm8k_reward, "5", "none")


@needs_math
@pytest.mark.usefixtures("patient_math_check")
@pytest.mark.parametrize(
    ("completion", "answer", "wanted"),
    [
        (r"so $\boxed{\frac{3}{4}}$.", "0.75", 1),
        (r"first \boxed{1}, then \boxed{\dfrac{3}{4}}", r"\frac{3}{4}", 1),
        (r"first \boxed{\frac{3}{4}}, then \boxed{1}", r"\frac{3}{4}", 0),
        (r"\boxed{\frac{3}{4}} hence \boxed{\frac{3}", r"\frac{3}{4}", 1),
        (r"\boxed{\frac{3}", r"\frac{3}{4}", 0),
        (r"the answer is $\frac{3}{4}$", r"\frac{3}{4}", 0),
        (r"\boxed{5 \text{ or } 6}", "5", 0),
        ("", "5", 0),
    ],
)
def test_math_on_completions(completion, answer, wanted):
    assert score(math_reward, completion, answer) == wanted
    assert score(math_reward, [{"role": "assistant", "content": completion}], answer) == wanted


def read(path, step=1):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[::step]]


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_gsm8k_solution_is_right(shared_data, step):
    rows = read(shared_data / "gsm8k" / "train.jsonl", step)
    texts = [row["answer"] for row in rows]
    answers = [text.rpartition("#### ")[2] for text in texts]
    wrong = [str(int(answer.replace(",", "")) + 1) for answer in answers]
    assert gsm8k_reward(texts, texts, answers) == [1.0] * len(rows)
    assert gsm8k_reward(texts, texts, wrong) == [0.0] * len(rows)
    # Without the mark the last number is the answer in 97.3% of the solutions: a few end in a remark.
    unmarked = [text.partition("####")[0] for text in texts]
    assert sum(gsm8k_reward(texts, unmarked, answers)) >= 0.97 * len(rows)
    assert sum(gsm8k_reward(texts, unmarked, wrong)) <= 0.01 * len(rows)


@needs_math
@pytest.mark.usefixtures("patient_math_check")
def test_math_solutions_are_right(shared_data):
    texts = [row["solution"] for row in read(shared_data / "math" / "test.jsonl", step=25)]
    answers = [last_boxed(text) for text in texts]
    assert None not in answers
    assert math_reward(texts, texts, answers) == [1.0] * len(texts)
    # Written differently, so that it is math-verify that decides: right in all 2,500 rows of the file.
    boxes = [f"\\boxed{{\\displaystyle {answer} }}".replace("\\frac", "\\dfrac") for answer in answers]
    assert math_reward(texts, boxes, answers) == [1.0] * len(texts)
    others = [*answers[1:], answers[0]]
    matches = math_reward(texts, texts, others)
    assert sum(matches) == sum(a == b for a, b in zip(answers, others, strict=True))


def test_text_of():
    tool = {"role": "tool", "content": "7"}
    assert text_of("a") == "a" and text_of([]) == ""
    assert text_of([{"role": "assistant", "content": "a"}, tool]) == "a"
    assert text_of([tool, {"role": "assistant", "content": None}]) == ""
    assert (
        text_of([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]) == "a"
    )
    assert text_of([tool]) == "7"


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
