"""The Hub, stood in for by a function: what it is asked, and one line of help for every refusal."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError

from lopt.data import hub
from lopt.data.load import load_rows

ROWS = Dataset.from_list([{"question": f"q{i}", "answer": str(i), "id": i} for i in range(20)])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """What the Hub is asked; it answers with `ROWS`."""
    calls: list = []

    def load(*args: object, **kwargs: object):
        calls.append((args, kwargs))
        return ROWS.to_iterable_dataset() if kwargs.get("streaming") else ROWS

    monkeypatch.setattr(hub, "load_dataset", load)
    monkeypatch.setattr(hub, "load_dataset_builder", card("hf://datasets/org/data@abc/rows.jsonl"))
    return calls


def card(file: str) -> Callable[..., SimpleNamespace]:
    """A data set whose card names this file."""
    return lambda *_args, **_kwargs: SimpleNamespace(config=SimpleNamespace(data_files={"train": [file]}))


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "file:///etc/passwd", "https://elsewhere/x.csv", "zip://a::/b.zip"]
)
def test_a_card_that_names_files_elsewhere_is_refused(file: str, asked: list, monkeypatch) -> None:
    monkeypatch.setattr(hub, "load_dataset_builder", card(file))
    with pytest.raises(ValueError, match=r"`dataset_name`: .* is no file of the data set"):
        load_rows(dataset_name="org/data")
    assert not asked


def test_the_hub_is_asked_for_what_the_flags_say(asked: list, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOPT_CACHE", str(tmp_path))
    load_rows(dataset_name="org/data", dataset_config="main", dataset_split="test", dataset_revision="abc")
    assert asked.pop() == (("org/data", "main"), {"split": "test", "revision": "abc"})
    rows = load_rows(dataset_preset="gsm8k", dataset_revision="abc")
    assert asked.pop() == (("openai/gsm8k", "main"), {"split": "train", "revision": "abc"})
    assert rows.column_names == ["question", "answer"] and len(rows) == 20
    stream = load_rows(dataset_preset="gsm8k", streaming=True, max_samples=3)
    assert asked.pop() == (
        ("openai/gsm8k", "main"),
        {"split": "train", "revision": None, "streaming": True},
    )
    assert [set(row) for row in stream] == [{"question", "answer"}] * 3


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach 'org/data'\non the Hub"), ["use `train_file` with a local copy"]),
        (FileNotFoundError("Dataset 'org/data' doesn't exist"), ["doesn't exist"]),
        (ValueError("Config name is missing.\nPlease pick one"), ["missing. Please pick one"]),
        (
            RuntimeError("Dataset scripts are no longer supported"),
            ["is not run", "`train_file`"],
        ),
        (
            DatasetNotFoundError("Dataset 'org/data' is a gated dataset on the Hub."),
            ["accept its terms at https://huggingface.co/datasets/org/data", "`hf auth login`"],
        ),
    ],
)
def test_a_refusal_is_one_line_with_the_fix(error: Exception, words: list[str], monkeypatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise error

    monkeypatch.setattr(hub, "load_dataset_builder", fail)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ValueError) as caught:
        load_rows(dataset_name="org/data")
    message = str(caught.value)
    assert message.startswith("`dataset_name`") and "\n" not in message
    assert all(word in message for word in words), message


def test_without_a_connection_a_preset_says_how_to_fetch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(hub, "load_dataset_builder", fail)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ValueError, match=r"`dataset_preset` tulu3: .*`lopt data download --dataset tulu3"):
        load_rows(dataset_preset="tulu3")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"`dataset_preset` tulu3: HF_HUB_OFFLINE is set"):
        load_rows(dataset_preset="tulu3")
