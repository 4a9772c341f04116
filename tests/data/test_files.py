"""Rows from files and the Hub: what is read, and one line of help for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

from lopt.data import places
from lopt.data.load import load_rows, split_held_out

ROWS = [{"question": f"q{i}", "answer": str(i)} for i in range(20)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def error_of(**arguments: object) -> str:
    with pytest.raises(ValueError) as caught:
        load_rows(**arguments)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_file_type_gives_the_same_rows(tmp_path):
    write(tmp_path / "a.jsonl", "\n" + jsonl(ROWS))
    write(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    write(tmp_path / "a.csv", "question,answer\n" + "".join(f"q{i},{i}\n" for i in range(20)))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    for suffix in places.KINDS:
        assert load_rows(tmp_path / f"a{suffix}").to_list() == ROWS, suffix
    assert load_rows(write(tmp_path / "b [1]*.JSONL", jsonl(ROWS))).to_list() == ROWS
    twice = load_rows([tmp_path / "a.jsonl", tmp_path / "a.json"])
    assert twice.to_list() == ROWS + ROWS
    assert load_rows(str(tmp_path / "a.csv"), dataset_split="train[:10%]").to_list() == ROWS[:2]


def test_csv_cells_stay_as_written(tmp_path):
    path = write(tmp_path / "a.csv", b'\xef\xbb\xbfquestion,answer\nx,007\n"y, z",NA\nw,\n')
    rows = load_rows(path)
    assert rows["question"][:] == ["x", "y, z", "w"]
    assert rows["answer"][:] == ["007", "NA", ""]


def test_max_samples_is_a_seeded_random_subset(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    first = load_rows(path, max_samples=8, seed=1).to_list()
    assert first == load_rows(path, max_samples=8, seed=1).to_list()
    assert first != load_rows(path, max_samples=8, seed=2).to_list()
    assert len({row["question"] for row in first}) == 8 and first != ROWS[:8]
    assert load_rows(path, max_samples=99).to_list() == ROWS
    assert "`max_samples` must be >= 1 (got 0)" in error_of(train_file=path, max_samples=0)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b" \n\n", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.csv", b"question,answer\n", "no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is not valid JSON"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', "line 2 is not valid JSON"),
        ("a.jsonl", b"3\n4\n", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"a": "x"}\n{"a": "\xe9"}\n', "not UTF-8 (line 2)"),
        ("a.csv", b"a,b\n\xff,1\n", "not UTF-8 (line 2)"),
        ("a.csv", b'a,b\n1,2\n3,"x\n', "line 3 is no CSV"),
        ("a.csv", b"a,b\n1,2,3\n", "line 2 has 3 cells, the header 2"),
        ("a.parquet", b"junk", "cannot load"),
        ("a.txt", b"hello", ".json, .jsonl, .parquet, .csv"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path, name, content, expected):
    message = error_of(train_file=write(tmp_path / name, content))
    assert message.startswith("`train_file`") and name in message and expected in message


def test_an_integer_too_long_for_python_is_valid_json(tmp_path):
    long = '{"question": "' + "[" * 600 + '", "n": ' + "9" * 5000 + "}"
    assert load_rows(write(tmp_path / "a.jsonl", long + "\n"))["question"][:] == ["[" * 600]
    message = error_of(train_file=write(tmp_path / "b.jsonl", f'{long}\n{{"a": \n'))
    assert "b.jsonl is broken: line 2 is not valid JSON" in message
    message = error_of(train_file=write(tmp_path / "c.json", f'[{long},\n{{"a" 4}}]'))
    assert "c.json is broken: line 2 is not valid JSON" in message


def test_bad_paths(tmp_path, monkeypatch):
    assert "does not exist" in error_of(train_file=tmp_path / "none.jsonl")
    assert "is a folder" in error_of(train_file=tmp_path)
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    assert "a.jsonl" in error_of(train_file=tmp_path)
    other = write(tmp_path / "a.csv", "a\n1\n")
    assert "mixes" in error_of(train_file=[path, other])
    assert "`dataset_split`" in error_of(train_file=path, dataset_split="test")

    # Stands in for chmod, which does not stop root.
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in error_of(train_file=path)


def test_exactly_one_source():
    assert "neither" in error_of()
    assert "both" in error_of(train_file="a.jsonl", dataset_name="b")


def test_held_out_rows_are_no_training_rows():
    rows = Dataset.from_list(ROWS)
    assert split_held_out(rows, 0) == (rows, None)
    for held_out, count in [(0.25, 5), (0.001, 1), (1, 1), (7.0, 7)]:
        train, test = split_held_out(rows, held_out, seed=3)
        assert test is not None and len(test) == count
        assert sorted(train["answer"][:] + test["answer"][:]) == sorted(r["answer"] for r in ROWS)
        again = split_held_out(rows, held_out, seed=3)[1]
        assert again is not None and test.to_list() == again.to_list()
    for wrong in (20, 0.99, -1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="`held_out`"):
            split_held_out(rows, wrong)
    with pytest.raises(ValueError, match=r"^`held_out` 1234567 takes 1234567 of 20 rows"):
        split_held_out(rows, 1_234_567.0)


def test_a_stream_has_the_order_of_its_seed(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", "it waited")  # seconds, at each end
    write(tmp_path / "a.jsonl", jsonl(ROWS))
    write(tmp_path / "a.csv", "question,answer\n" + "".join(f"q{i},{i}\n" for i in range(20)))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    for suffix in (".jsonl", ".csv", ".parquet"):
        path = tmp_path / f"a{suffix}"
        order = list(load_rows(path, streaming=True, seed=1))
        assert order != ROWS and sorted(order, key=lambda row: int(row["answer"])) == ROWS, suffix
        stream = load_rows(path, streaming=True, seed=1)
        assert [list(stream), list(stream)] == [order, order], suffix
        assert list(load_rows(path, streaming=True, seed=2)) != order
        assert list(load_rows(path, streaming=True, seed=1, max_samples=6)) == order[:6]
    near = [int(row["answer"]) for row in load_rows(tmp_path / "a.csv", streaming=True, shuffle_buffer=4)]
    assert all(answer <= place + 4 for place, answer in enumerate(near))
    path = tmp_path / "a.jsonl"
    train, held_out = split_held_out(load_rows(path, streaming=True, seed=1), 7)
    assert [*held_out, *train] == order


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b" \n\n", "no rows"),
        ("a.csv", b"question,answer\n", "no rows"),
        ("a.jsonl", b'{"a": \n', "line 1 is not valid JSON (Expecting value, column 6)"),
        ("a.parquet", b"junk", "cannot load"),
    ],
)
def test_a_bad_file_is_refused_before_its_stream_is_used(tmp_path, name, content, expected):
    message = error_of(train_file=write(tmp_path / name, content), streaming=True)
    assert message.startswith("`train_file`") and name in message and expected in message


def test_real_data(shared_data):
    rows = load_rows(shared_data / "gsm8k" / "train.jsonl", max_samples=100)
    assert rows.column_names == ["question", "answer"] and len(rows) == 100
