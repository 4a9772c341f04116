"""Whatever a file, a row or a completion holds: a result, or a ValueError of one line. Never anything else.

`LOPT_FUZZ=20000 pytest tests/data/test_fuzz.py` takes so many new examples, which is a matter of an hour.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from lopt.cli.output import check_output
from lopt.cli.parsing import parse
from lopt.data.chat import Chat
from lopt.data.columns import FORMATS, Format
from lopt.data.examples import Examples
from lopt.data.formats import format_rows
from lopt.data.json_file import json_rows
from lopt.data.load import load_rows
from lopt.data.notes import Notes
from lopt.data.question_tasks import QUESTION_TASKS
from lopt.data.questions import question_rows
from lopt.evaluation.texts import read_texts
from lopt.rewards import REWARDS
from lopt.rewards.answers import answer_is, extract_answer, final_number, last_boxed, only_number, text_of
from lopt.rewards.math import MAX_LENGTH
from small_model import byte_tokenizer

MANY = int(os.environ.get("LOPT_FUZZ", "0"))
PLAIN, CHATTY = byte_tokenizer(), byte_tokenizer()
CHATTY.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def fuzz(cost: int = 1) -> settings:
    """50 examples in `make test`, always the same; otherwise as many as asked for, by cost. Hangs fail."""
    return settings(
        max_examples=max(MANY // cost, 50),
        derandomize=not MANY,
        deadline=timedelta(seconds=60),
        suppress_health_check=list(HealthCheck),
    )


def result_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What it returns; None for a ValueError, which must say something, in one line."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        assert str(error).strip() and len(str(error).splitlines()) == 1, repr(str(error))
        return None


@pytest.fixture(autouse=True, scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder for files and for the cache of `datasets`, without progress bars."""
    folder = tmp_path_factory.mktemp("fuzz")
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        yield folder
    datasets.enable_progress_bars()


characters = st.characters(exclude_categories=[])  # lone surrogates and NUL among them
texts = st.text(characters, max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.integers(-(10**40), 10**40) | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
roles = st.sampled_from(["system", "user", "assistant", "tool", "human", "function_call", ""]) | values
turns = st.fixed_dictionaries(
    {},
    optional={
        "role": roles,
        "content": texts | values,
        "from": roles,
        "value": texts | values,
        "name": values,
        "tool_calls": values,
        "weight": values,
    },
)
cells = values | st.lists(turns, max_size=4) | st.sampled_from(["a", "", " ", "#### 4", "\\boxed{1}", 7, 2.0])
names = st.sampled_from(sorted({name for fmt in FORMATS for name in (*fmt.columns, *fmt.optional)}))


@fuzz()
@given(fmt=st.sampled_from(FORMATS), row=st.dictionaries(names, cells), chat=st.booleans())
def test_any_row_becomes_an_example_or_a_sentence(fmt: Format, row: dict, chat: bool) -> None:
    row = dict.fromkeys(fmt.columns) | row
    template = Chat(CHATTY) if chat else None
    made = result_of(Examples(fmt, template, Notes(), (), keep_messages=False, rendered=False), row)
    for side in (made or {}).values():
        written = [side] if isinstance(side, str) else [turn["content"] for turn in side]
        assert written and all(text is None or isinstance(text, str) for text in written)
        assert isinstance(side, list) == (chat and fmt.kind != "text")


def dumped(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


FORMATS_ROWS = st.sampled_from(FORMATS).flatmap(
    lambda fmt: st.lists(st.fixed_dictionaries(dict.fromkeys(fmt.columns, cells)), min_size=1, max_size=4)
)
GOOD = st.lists(st.fixed_dictionaries({"question": texts, "answer": texts | st.integers()}), min_size=1)
files = (
    st.binary(max_size=60)
    | st.builds(dumped, st.lists(values, max_size=3))
    | st.builds(dumped, FORMATS_ROWS)
    | st.builds(
        lambda rows, at, junk: dumped(rows)[:at] + junk, GOOD, st.integers(0, 99), st.binary(max_size=4)
    )
    | st.builds(
        lambda text: text.encode("utf-8", "surrogatepass"), st.text(st.sampled_from('a",\n\r;\0é{}[]:'))
    )
)


@fuzz(cost=20)
@given(content=files, suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]), stream=st.booleans())
@example(content=b'{"question": "\\ud800", "answer": "1"}', suffix=".jsonl", stream=False)
@example(content=b'{"question": "a", "question": "b"}', suffix=".jsonl", stream=False)
@example(content=b'{"a": ' + b"[" * 2000 + b"]" * 2000 + b"}", suffix=".jsonl", stream=False)
@example(content=b'a,b\n1,2,3\n"', suffix=".csv", stream=True)
def test_any_file_is_rows_or_a_sentence(content: bytes, suffix: str, stream: bool, place: Path) -> None:
    path = place / f"rows{suffix}"
    path.write_bytes(content)
    rows = result_of(load_rows, path, streaming=stream)
    if rows is None:
        return
    for tokenizer in (PLAIN, CHATTY):
        made = result_of(lambda tokenizer=tokenizer: list(format_rows(rows, tokenizer)))
        assert made is None or made
    if not stream:
        for task in ("gsm8k", "numinamath", None):
            result_of(question_rows, rows, PLAIN, task)
        result_of(question_rows, rows, CHATTY, None)


@fuzz(cost=20)
@given(rows=GOOD)
def test_neither_a_byte_order_mark_nor_line_ends_matter(rows: list[dict], place: Path) -> None:
    texts = [json.dumps(row) for row in rows]
    found = []
    for number, content in enumerate(
        ("\n".join(texts), "\ufeff" + "\n".join(texts), "\r\n".join(texts) + "\r\n")
    ):
        path = place / f"same{number}.jsonl"
        path.write_bytes(content.encode())
        found.append(result_of(lambda path=path: list(json_rows(path))))
    assert found[0] == found[1] == found[2]


@fuzz(cost=4)
@given(content=st.binary(max_size=200), tokens=st.integers(1, 5))
def test_any_text_file_is_read_or_refused(content: bytes, tokens: int, place: Path) -> None:
    path = place / "notes.txt"
    path.write_bytes(content)
    read = result_of(read_texts, [str(path)], tokens, "--text")
    assert read is None or read["notes"].strip()


flags = st.sampled_from(
    ["model", "task", "method", "steps", "learning_rate", "num_blocks", "output_dir", "x"]
)
yaml_files = (
    st.binary(max_size=60)
    | st.dictionaries(flags | texts, values, max_size=3).map(lambda found: json.dumps(found).encode())
    | st.text(st.sampled_from("steps: 1\n\t-[]{}#&*!|>'\"%@`?,~e")).map(str.encode)
)


@fuzz(cost=4)
@given(content=yaml_files)
def test_any_config_is_flags_or_a_sentence(content: bytes, place: Path) -> None:
    path = place / "run.yaml"
    path.write_bytes(content)
    parsed = result_of(parse, "demo", ["--config", str(path)])
    if parsed is not None:
        (args,) = parsed
        assert isinstance(args.steps, int) and isinstance(args.learning_rate, float)
        assert all(isinstance(name, str) for name in args.methods) and isinstance(args.task, str)
        result_of(check_output, args.output_dir, resume=None, overwrite=False)


# -- answers and rewards ---------------------------------------------------------------------------

pieces = st.sampled_from(
    ["####", "\\boxed{", "\\frac{", "}{", "}", "{", "\\sqrt", "\\pi", "^", "_", "$", "%", "**", "=", "/", ".",
     ",", "-", "−", "+", "e", "e9", "1", "0", "42", "1,234", "3/4", "½", "10^", " ", "\n", "x", "times", "\\",
     "million", "\\left(", "\\right)", "\\text{a}", "\\infty", "!", ":", "١", "²"]
)  # fmt: skip
answers = st.lists(pieces, max_size=30).map("".join) | st.text(characters, max_size=200)
long_answers = st.builds(lambda part, count: part * count, answers, st.integers(0, 3000))
parts = st.lists(st.fixed_dictionaries({"type": st.just("text")}, optional={"text": answers | st.none()}))
said = st.fixed_dictionaries(
    {"role": st.just("assistant")}, optional={"content": answers | st.none() | parts}
)
completions = answers | long_answers | st.lists(said | turns.map(lambda t: {"role": "tool"}), max_size=3)


@fuzz()
@given(text=answers | long_answers)
def test_any_text_has_an_answer_or_none(text: str) -> None:
    for number in (final_number(text), only_number(text)):
        assert number is None or (number.equals(number) and math.isfinite(number.value.numerator))
    box = last_boxed(text)
    assert box is None or box.strip() == box != ""
    answer = extract_answer(text)
    assert answer is None or answer_is(text, answer)
    for task in QUESTION_TASKS.values():
        for find in task.answers.values():
            assert find(text) is None or find(text)


@fuzz()
@given(completion=completions, answer=answers | st.integers() | st.floats() | st.none())
def test_rewards_are_0_or_1(completion: Any, answer: Any) -> None:
    assert isinstance(text_of(completion), str)
    for name in ("gsm8k", "procedural"):
        scores = result_of(REWARDS[name], prompts=["?"], completions=[completion], answer=[answer])
        assert scores is None or scores in ([0.0], [1.0])


@fuzz()
@given(answer=answers)
@example(answer="..")
@example(answer="4. .")
def test_the_right_answer_is_always_right(answer: str) -> None:
    def score(name: str, completion: str, wanted: str | None) -> list[float]:
        return REWARDS[name](prompts=["?"], completions=[completion], answer=[wanted])

    for name, text in (("gsm8k", f"#### {answer}"), ("procedural", f"#### {answer}")):
        for find in QUESTION_TASKS["gsm8k" if name == "gsm8k" else "chain_sum"].answers.values():
            wanted = find(text)
            assert wanted is None or score(name, f"So it is.\n#### {wanted}", wanted) == [1.0]
    box = last_boxed(f"\\boxed{{{answer}}}")
    if box is not None and len(box) <= MAX_LENGTH:
        assume(last_boxed(f"\\boxed{{{box}}}") == box)
        assert score("math", f"So it is \\boxed{{{box}}}", box) == [1.0]


@fuzz(cost=100)
@given(st.lists(pieces, max_size=12).map("".join), st.lists(pieces, max_size=12).map("".join))
def test_any_mathematics_is_compared_or_wrong(wanted: str, given: str) -> None:
    scores = REWARDS["math"](prompts=["?"], completions=[f"\\boxed{{{given}}}"], answer=[wanted])
    assert scores in ([0.0], [1.0])
