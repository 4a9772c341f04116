"""Packed files and addresses of fsspec: the same rows, and a broken one is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from datasets import Dataset

from lopt.data.load import load_rows

ROWS = [{"question": f"q{i}", "answer": str(i)} for i in range(300)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = ("question,answer\n" + "".join(f"q{i},{i}\n" for i in range(300))).encode()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def zstd(content: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return packed.getvalue().to_pybytes()


def put(name: str, content: bytes) -> str:
    """Put a file into the store in memory, and return its address."""
    fsspec.filesystem("memory").pipe(f"/places/{name}", content)
    return f"memory://places/{name}"


def test_packed_files_and_addresses_give_the_same_rows(tmp_path: Path) -> None:
    for name, content in {
        "a.jsonl.gz": gzip.compress(JSONL, mtime=0),
        "parts.json.gz": gzip.compress(JSONL[:100], mtime=0) + gzip.compress(JSONL[100:]),
        "a.jsonl.zst": zstd(JSONL),
        "a.csv.zst": zstd(CSV),
        "A.CSV.GZ": gzip.compress(CSV, mtime=0),
        "a.jsonl": JSONL,
    }.items():
        (tmp_path / name).write_bytes(content)
        for place in (tmp_path / name, put(name, content), f"file://{tmp_path}/{name}"):
            assert load_rows(place).to_list() == ROWS, place
    assert list(load_rows(put("a.jsonl.zst", zstd(JSONL)), streaming=True, shuffle_buffer=1)) == ROWS
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    address = put("a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert load_rows([tmp_path / "a.parquet", address]).to_list() == ROWS + ROWS
    assert list(load_rows(address, streaming=True, shuffle_buffer=1)) == ROWS


def test_a_file_that_changes_is_read_again() -> None:
    for content in (JSONL, CSV):
        place = put("changing.jsonl", JSONL if content is JSONL else JSONL.replace(b"q1", b"new"))
        assert load_rows(place)[1]["question"] == ("q1" if content is JSONL else "new")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)[:-20], "no whole .gz file"),
        ("a.jsonl.zst", zstd(JSONL)[:-20], "no whole .zst file"),
        ("a.csv.gz", CSV, "no whole .gz file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": \n', mtime=0), "line 2 is not valid JSON"),
        ("a.parquet.gz", gzip.compress(JSONL, mtime=0), "of an unknown type"),
        ("a.jsonl", b"", "is empty"),
    ],
)
def test_a_broken_file_is_named_with_its_fault(tmp_path: Path, name, content, expected) -> None:
    (tmp_path / name).write_bytes(content)
    for place in (str(tmp_path / name), put(name, content)):
        with pytest.raises(ValueError, match=f"^`train_file`: .*{name}.*{expected}"):
            load_rows(place)


def test_addresses_that_lead_nowhere() -> None:
    for address, expected in (
        ("memory://places/none.jsonl", "is not found"),
        ("memory://places", "is a folder"),
        ("nothing://a.jsonl", "cannot be reached"),
        ("https://me:secret@127.0.0.1/a.jsonl", "holds a password"),
    ):
        with pytest.raises(ValueError, match=expected) as caught:
            load_rows(address)
        assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
