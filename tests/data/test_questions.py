"""Rows to GRPO examples: prompts with and without a template, final answers, what is dropped."""

from __future__ import annotations

import json
import logging

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from conftest import save_tiny
from lopt.data.procedural import TASKS, make_task, prompt
from lopt.data.question_tasks import QUESTION_TASKS
from lopt.data.questions import RESERVED_COLUMNS, procedural_rows, question_rows
from lopt.rewards import REWARDS
from lopt.rewards.gsm8k import gsm8k_reward
from lopt.rewards.math import math_reward

CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ suffix }}{% endif %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """One token per byte, no chat template."""
    return AutoTokenizer.from_pretrained(save_tiny(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_tiny(tmp_path_factory.mktemp("chatty"), chat_template=CHAT))


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def one(tokenizer, row, task, **options):
    made = question_rows(Dataset.from_list([row]), tokenizer, task, **options)
    assert len(made) == 1
    return made[0]


def test_every_task_names_a_reward():
    assert set(QUESTION_TASKS) == {"gsm8k", "numinamath", *TASKS}
    assert {task.reward for task in QUESTION_TASKS.values()} == set(REWARDS)


def test_prompts_of_a_task(plain, chatty):
    row = {"question": "How many?", "answer": "3 + 4 = 7\n#### 7", "id": 5}
    asked = "How many?\nThink step by step, and end with #### and the number."
    rest = {"answer": "7", "question": "How many?", "id": 5}
    assert one(plain, row, "gsm8k") == {"prompt": f"Question: {asked}\nAnswer:", **rest}
    assert one(chatty, row, "gsm8k") == {"prompt": user(asked), **rest}
    assert one(chatty, row, "gsm8k", instruction="Hurry.")["prompt"] == user("How many?\nHurry.")
    assert one(plain, row, "gsm8k", instruction="")["prompt"] == "Question: How many?\nAnswer:"


@pytest.mark.parametrize(
    ("task", "columns", "answer"),
    [
        ("gsm8k", {"answer": "so\n#### 1,080."}, "1080"),
        ("gsm8k", {"answer": "$1,080"}, "$1080"),
        ("gsm8k", {"answer": 72}, "72"),
        ("gsm8k", {"answer": 72.0}, "72"),
        ("gsm8k", {"answer": 0.5}, "0.5"),
        ("gsm8k", {"answer": "3/4"}, "3/4"),
        ("numinamath", {"solution": r"\boxed{1} so $\boxed{\frac{3}{4}}$."}, r"\frac{3}{4}"),
        ("numinamath", {"solution": r"\boxed{1}", "answer": "$ x^2 $"}, "x^2"),
        ("numinamath", {"solution": r"\boxed{1}", "answer": "proof"}, "1"),
        ("numinamath", {"solution": r"\boxed{1}", "answer": None}, "1"),
        ("numinamath", {"answer": r"so \boxed{2}"}, "2"),
        ("numinamath", {"answer": 7}, "7"),
        ("chain_sum", {"answer": "4 - 1 = 3\n#### 3"}, "3"),
        ("chain_sum", {"answer": 3}, "3"),
    ],
)
def test_final_answers(plain, task, columns, answer):
    row = {QUESTION_TASKS[task].question: "q", **columns}
    assert one(plain, row, task)["answer"] == answer


@pytest.mark.parametrize(
    ("task", "columns", "expected"),
    [
        ("gsm8k", {"answer": "#### seven"}, "`#### <number>`"),
        ("gsm8k", {"answer": "First 3, then 4."}, "`#### <number>`"),
        ("gsm8k", {"answer": None}, "`#### <number>`"),
        ("numinamath", {"solution": "the answer is 5"}, r"`\boxed{...}` in `solution`"),
        ("numinamath", {"solution": r"\boxed{5"}, r"`\boxed{...}` in `solution`"),
        ("numinamath", {"answer": "notfound"}, r"`\boxed{...}` in `solution`"),
        ("chain_sum", {"answer": " "}, "text in `answer`"),
    ],
)
def test_rows_without_an_answer(plain, caplog, task, columns, expected):
    bad = {QUESTION_TASKS[task].question: "q", **columns}
    with pytest.raises(ValueError, match=f"`task` {task}: none of the 2 rows has an answer") as caught:
        question_rows(Dataset.from_list([bad, bad]), plain, task)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    good = {name: r"#### 1" if task != "numinamath" else r"\boxed{1}" for name in bad}
    with caplog.at_level(logging.WARNING):
        made = question_rows(Dataset.from_list([bad, good, bad]), plain, task)
    assert made["answer"] == ["1"] and "dropped 2 of 3 rows without" in caplog.text


@pytest.mark.parametrize("name", TASKS)
def test_procedural_rows(plain, name):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install lopt[demo]")
    problems = make_task(name, 20, seed=3)
    made = question_rows(procedural_rows(name, 20, seed=3), plain, name)
    # The very text on which `lopt sft` trains on the same problems.
    assert made["prompt"] == [prompt(problem) for problem in problems]
    solutions = [problem.solution for problem in problems]
    reward = REWARDS[QUESTION_TASKS[name].reward]
    assert reward(made["prompt"], solutions, made["answer"]) == [1.0] * 20


def test_without_a_task(plain, chatty):
    turns = [{"role": "system", "content": "Be kind."}, *user("Hi")]
    for row, text, messages in [
        ({"prompt": "Once "}, "Once ", user("Once ")),
        ({"prompt": turns}, "System: Be kind.\nUser: Hi\nAssistant:", turns),
        ({"query": "q", "problem": "p"}, "Question: p\nAnswer:", user("p")),
        ({"question": "q", "answer": "a"}, "Question: q\nAnswer:", user("q")),
        ({"instruction": "Do", "input": "x"}, None, user("Do\n\nx")),
    ]:
        made = one(plain, row, None)
        kept = {name: value for name, value in row.items() if name != "prompt"}
        assert {name: made[name] for name in kept} == kept and set(made) == {"prompt", *kept}
        assert made["prompt"] == text or (text is None and made["prompt"].endswith("### Response:\n"))
        assert one(chatty, row, None)["prompt"] == messages
    assert one(chatty, {"prompt": turns}, None, instruction="Hurry.")["prompt"] == [
        turns[0],
        *user("Hi\nHurry."),
    ]
    assert one(plain, {"prompt": "Once"}, None, instruction="Hurry.")["prompt"] == "Once\nHurry."
    assert one(plain, {"prompt": "q", "answer": [1, 2]}, None)["answer"] == [1, 2]


def test_names_that_are_taken(plain, caplog):
    row = {
        "question": "q",
        "answer": "#### 1",
        "prompt": "old",
        "level": 3,
        **dict.fromkeys(RESERVED_COLUMNS, "x"),
    }
    with caplog.at_level(logging.WARNING):
        made = one(plain, row, "gsm8k", instruction="")
    assert made == {"prompt": "Question: q\nAnswer:", "answer": "1", "question": "q", "level": 3}
    assert f"left out the columns {', '.join(RESERVED_COLUMNS)}" in caplog.text
    assert "`prompt` is replaced by the prompt made of `question`" in caplog.text


def test_long_prompts_are_dropped(plain, chatty, caplog):
    rows = Dataset.from_list([{"question": "q" * size, "answer": "1"} for size in (5, 20, 21, 40)])
    for tokenizer, limit, options in [
        (plain, 20 + len("Question: \nAnswer:"), {}),
        (chatty, 20 + len("[user][assistant]"), {}),
        (chatty, 20 + len("[user][assistant]<>"), {"chat_template_kwargs": {"suffix": "<>"}}),
    ]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            made = question_rows(rows, tokenizer, "gsm8k", "", max_prompt_length=limit, **options)
        assert [len(text) for text in made["question"]] == [5, 20]
        assert f"dropped 2 of 4 rows with a prompt over {limit} tokens" in caplog.text
    with pytest.raises(ValueError, match="`max_prompt_length` 10: all 4 prompts are longer"):
        question_rows(rows, plain, "gsm8k", max_prompt_length=10)


@pytest.mark.parametrize(
    ("row", "task", "message"),
    [
        ({"question": " ", "answer": "1"}, "gsm8k", r"row 0 \(from 0\), column `question`, is empty"),
        ({"question": 3, "answer": "1"}, "gsm8k", "column `question`, must be text, not int"),
        ({"question": "q", "answer": [1]}, "gsm8k", "column `answer`, must be text or a number, not list"),
        ({"prompt": []}, None, "column `prompt`, must be a non-empty list"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, None, "ends in an assistant message"),
        (
            {"question": "q"},
            "gsm8k",
            "`task` gsm8k needs the columns `question` and `answer`, found question",
        ),
        (
            {"question": "q", "answer": "1"},
            "numinamath",
            "needs the columns `problem` and `answer` or `solution`",
        ),
        ({"text": "q"}, None, "no question, found text: rename its column to one of prompt, question"),
        ({"question": "q"}, "knitting", "`task` must be one of gsm8k, numinamath, "),
    ],
)
def test_bad_rows(plain, row, task, message):
    with pytest.raises(ValueError, match=message) as caught:
        question_rows(Dataset.from_list([row]), plain, task)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"`max_prompt_length` must be >= 1 \(got 0\)"):
        question_rows(Dataset.from_list([{"prompt": "p"}]), plain, None, max_prompt_length=0)


def read(path, step=1):
    lines = path.read_text(encoding="utf-8").splitlines()[::step]
    return Dataset.from_list([json.loads(line) for line in lines])


def test_all_of_gsm8k(plain, shared_data):
    rows = read(shared_data / "gsm8k" / "train.jsonl")
    made = question_rows(rows, plain, "gsm8k")
    assert len(made) == len(rows)
    assert gsm8k_reward(made["prompt"], rows["answer"], made["answer"]) == [1.0] * len(rows)


def test_math(plain, shared_data):
    rows = read(shared_data / "math" / "test.jsonl", step=10)
    made = question_rows(rows, plain, "numinamath")
    # Every solution of this data set has its answer in a box.
    assert len(made) == len(rows) and set(made.column_names) == {"prompt", "answer", *rows.column_names}
    pytest.importorskip("math_verify", reason='needs math-verify: pip install "lopt[math]"')
    assert math_reward(made["prompt"], made["solution"], made["answer"]) == [1.0] * len(made)
