"""What a file says is what a model and a reward see: dates, numbers, classes, nested values, late keys."""

from __future__ import annotations

import datetime
import json
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lopt.data.columns import needed_columns
from lopt.data.files import LOOK_AHEAD, READERS
from lopt.data.formats import format_rows
from lopt.data.json_file import CHUNK, json_rows
from lopt.data.load import load_rows, split_held_out
from lopt.data.questions import question_rows
from small_model import byte_tokenizer

PLAIN = byte_tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def answers(path: Path, **options: Any) -> list[str]:
    """What `lopt sft` trains on."""
    made = format_rows(load_rows(path, choose=needed_columns, **options), PLAIN)
    return [row["completion"][1:] for row in made]


def rewarded(path: Path) -> list[Any]:
    """What a reward function of the user's gets."""
    made = question_rows(load_rows(path), PLAIN, None)
    return [made[place]["answer"] for place in range(len(made))]


# Text of the file -> what the model reads, what a reward function gets.
VALUES = [
    ('"2024-05-01"', "2024-05-01", "2024-05-01"),
    ('"2024-05-01T10:00:00"', "2024-05-01T10:00:00", "2024-05-01T10:00:00"),
    ('"007"', "007", "007"),
    ('"{\\"a\\": 1}"', '{"a": 1}', '{"a": 1}'),
    ("12345678901234567890123", "12345678901234567890123", 12345678901234567890123),
    ("1.50", "1.50", 1.5),
    ("2.0", "2.0", 2.0),
    ("0.1234567890123456789", "0.1234567890123456789", 0.1234567890123456789),
    ("6.02e23", "6.02e23", 6.02e23),
    ("7", "7", 7),
    ("false", "false", False),
]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_value_of_json_in_one_file(tmp_path: Path, streaming: bool) -> None:
    """All kinds in one column, and keys that come late."""
    lines = [f'{{"question": "q", "answer": {text}}}' for text, _, _ in VALUES]
    late = '{"question": "q", "nobody": [{"a": 1}, "b"], "answer": "end"}'
    path = write(tmp_path / "a.jsonl", *lines, late)
    seen = [seen for _, seen, _ in VALUES]
    assert sorted(answers(path, streaming=streaming)) == sorted([*seen, "end"])
    if streaming:
        return
    got = rewarded(path)
    assert got == [*(value for _, _, value in VALUES), "end"]
    assert all(isinstance(a, type(b)) for a, (_, _, b) in zip(got, VALUES, strict=False))
    assert load_rows(path)[-1]["nobody"] == [{"a": 1}, "b"]
    path = write(tmp_path / "a.json", f"[{', '.join([*lines, late])}]")
    assert answers(path) == [*seen, "end"]


def test_nested_values_are_not_merged(tmp_path: Path) -> None:
    calls: list[Any] = [{"time": "2025-08-01"}, {"time": 1690876800, "no": None}, "{}", [], 1.5]
    path = write(tmp_path / "a.jsonl", *(json.dumps({"prompt": "p", "calls": call}) for call in calls))
    rows = load_rows(path)
    assert [row["calls"] for row in rows] == calls
    made = question_rows(rows, PLAIN, None)
    assert [row["calls"] for row in made] == calls
    assert [row["calls"] for row in split_held_out(made, 4)[1] or []] != []


def test_digits_of_nested_numbers(tmp_path: Path) -> None:
    """They are the file's wherever a template writes the value; `tojson` has its own form, as in serving."""
    nested = '{"price": 1.50, "list": [1e3, {"é": 0.10000000000000000001}], "whole": 2}'
    path = write(tmp_path / "a.jsonl", f'{{"prompt": "p", "call": {nested}}}')
    for rows in (load_rows(path), load_rows(path, streaming=True)):
        call = next(iter(rows))["call"]
        assert call == {"price": 1.5, "list": [1000.0, {"é": 0.1}], "whole": 2}
        assert f"{call['price']} {call}" == "1.50 " + nested.replace('"', "'")
        assert pickle.loads(pickle.dumps(call["list"]))[0].text == "1e3"


def test_csv_with_the_line_ends_of_old_spreadsheets(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'question,answer\rq,1\r"two\rlines\n",2\r')
    assert answers(path) == ["1", "2"]
    assert load_rows(path)[1]["question"] == "two\rlines\n"
    path.write_bytes(b"question,answer\rq,1\rq,2,3\r")
    with pytest.raises(ValueError, match="is broken: line 3 has 3 cells, the header 2"):
        load_rows(path)


def test_files_need_not_be_alike(tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", '{"question": "q", "answer": 1}')
    two = write(tmp_path / "2.jsonl", '{"id": {"x": 1}, "question": "q", "answer": "two"}')
    assert answers([one, two]) == ["1", "two"]  # type: ignore[arg-type]
    assert sorted(answers([one, two], streaming=True)) == ["1", "two"]  # type: ignore[arg-type]
    for number, column in enumerate(([1], ["two"])):
        table = pa.table({"question": ["q"], "answer": column, f"only_{number}": [0]})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    with pytest.raises(ValueError, match=r"`answer` is int64 in 0.parquet and string in 1.parquet"):
        load_rows([tmp_path / "0.parquet", tmp_path / "1.parquet"])
    pq.write_table(pa.table({"answer": [2], "question": ["q"]}), tmp_path / "2.parquet")
    assert answers([tmp_path / "0.parquet", tmp_path / "2.parquet"]) == ["1", "2"]  # type: ignore[arg-type]


def test_a_file_that_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "q", "answer": "old"}')
    assert answers(path) == ["old"]
    with monkeypatch.context() as patch:
        patch.setitem(READERS, "json", lambda path: pytest.fail("a file that has not changed is read again"))
        assert answers(path) == ["old"]
    assert answers(write(path, '{"question": "q", "answer": "newer"}')) == ["newer"]


def test_types_of_parquet_become_text(tmp_path: Path) -> None:
    day = datetime.date(2024, 5, 1)
    at = datetime.datetime(2024, 5, 1, 10, 0)
    for number, (value, text) in enumerate(
        [(day, "2024-05-01"), (at, "2024-05-01 10:00:00"), (at.time(), "10:00:00"), (Decimal("1.50"), "1.50"),
         (True, "true"), (2.0, "2"), (2.5, "2.5")]
    ):  # fmt: skip
        path = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"question": ["q"], "answer": [value]}), path)
        assert answers(path) == answers(path, streaming=True) == [text]
        assert rewarded(path) == [text if number < 3 else value]
    features = Features({"question": Value("string"), "answer": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"question": ["q", "q"], "answer": [1, 0]}, features=features).to_parquet(
        tmp_path / "c.parquet"
    )
    assert answers(tmp_path / "c.parquet") == ["yes", "no"]
    assert sorted(answers(tmp_path / "c.parquet", streaming=True)) == ["no", "yes"]


def test_parquet_without_rows_and_with_a_chain_in_its_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "a.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"a.parquet has no rows: give at least one row"):
            load_rows(tmp_path / "a.parquet", streaming=streaming)
    (tmp_path / "a.parquet").rename(tmp_path / "a::b.parquet")
    with pytest.raises(ValueError, match=r"a::b.parquet has :: in its path.*rename it"):
        load_rows(tmp_path / "a::b.parquet")
    assert answers(write(tmp_path / "a::b.jsonl", '{"question": "q", "answer": 1}')) == ["1"]


def test_an_index_without_a_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ",question,answer", "0,q,2024-05-01", '1,q,"two\nlines"', "2,q")
    assert load_rows(path).column_names == ["Unnamed: 0", "question", "answer"]
    assert load_rows(path)["answer"][:] == ["2024-05-01", "two\nlines", None]
    assert answers(path) == ["2024-05-01", "two\nlines"]


def test_a_large_list_is_read_in_parts(tmp_path: Path) -> None:
    """Characters of several bytes and rows lie across the ends of what is read at a time."""
    rows = [{"question": "ü" * (997 * place % 5000), "answer": place} for place in range(1000)]
    text = json.dumps(rows, ensure_ascii=False)
    assert len(text.encode()) > 3 * CHUNK
    path = write(tmp_path / "a.json", text)
    assert list(json_rows(path)) == rows
    path = write(tmp_path / "b.jsonl", *(json.dumps(row, ensure_ascii=False) for row in rows))
    assert list(json_rows(path)) == rows
    write(path, *(json.dumps(row, ensure_ascii=False) for row in rows), '{"question": "q", "answer": }')
    with pytest.raises(ValueError, match=r"b.jsonl is broken: line 1001 is not valid JSON"):
        load_rows(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "line 1 has the key 'a' twice"),
        ('{"a": "\\ud800"}', r"line 1 has half a character ('\ud800')"),
        ('[{"a": 1}, {"a": 2}', "is not valid JSON (a comma or ] is missing): add it"),
        ('[{"a": 1}] []', "line 1 goes on after the list"),
        ('{"a": 1}\n{"a": tru}', "line 2 is not valid JSON (Expecting value, column 7)"),
        ('[{"a": 1}, ]', "line 1 is not valid JSON (Expecting value, column 12)"),
        ('[{"a": 1},\n{"a": 2}, {"a" 3}]', "line 2 is not valid JSON (Expecting ':' delimiter, column 16)"),
        ('{"a": 1}\n{"a": "b\n"}', "line 2 is not valid JSON (Invalid control character at, column 9)"),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_rows(write(tmp_path / "a.jsonl", text))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_that_comes_late_in_a_stream_is_used(tmp_path: Path) -> None:
    lines = ['{"instruction": "i", "output": "o"}'] * LOOK_AHEAD
    late = '{"instruction": "i", "input": "late", "output": "o"}'
    path = write(tmp_path / "a.jsonl", *lines, late)
    made = format_rows(load_rows(path, streaming=True, choose=needed_columns), PLAIN)
    assert sum("late" in row["prompt"] for row in made) == 1
