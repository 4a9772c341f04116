"""Several sources by weight: exact shares, no row twice, the same rows for a seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from lopt.cli.main import main
from lopt.data.mix import Part, load_mix, parse_mix, shares


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """40 rows as questions, 100 as Alpaca's, in files of two types."""
    questions = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    alpaca = [{"instruction": f"i{i}", "output": f"o{i}", "history": [["h", "r"]]} for i in range(100)]
    Dataset.from_list(alpaca).to_parquet(tmp_path / "b.parquet")
    return {"a": str(tmp_path / "a.jsonl"), "b": str(tmp_path / "b.parquet")}


def test_shares_are_exact_and_no_row_comes_twice() -> None:
    parts = [Part("a", 0.7), Part("b", 0.3)]
    assert shares(parts, [700, 10_000], None) == [700, 300]
    assert shares(parts, [10_000, 300], None) == [700, 300]
    assert shares(parts, [10_000, 10_000], 11) == [8, 3]
    assert shares([Part("a", 2), Part("b", 1), Part("c", 1)], [9, 9, 9], None) == [9, 5, 4]
    assert shares([Part("a", None), Part("b", None)], [5, 7], None) == [5, 7]
    with pytest.raises(ValueError, match="the weight of b leaves none of its rows, of 10 in all"):
        shares([Part("a", 1), Part("b", 0.001)], [10, 10], None)


def test_rows_are_drawn_by_the_seed(files: dict[str, str]) -> None:
    words = [f"{files['a']}:3", f"{files['b']}:1"]
    one, again, other = (load_mix(words, seed=seed) for seed in (1, 1, 2))
    assert [len(part.rows) for part in one] == [40, 13]
    assert [part.rows.to_list() for part in one] == [part.rows.to_list() for part in again]
    assert one[1].rows.to_list() != other[1].rows.to_list()
    assert len({row["instruction"] for row in one[1].rows}) == 13


@pytest.mark.parametrize(
    ("model", "more"),
    [("tiny", ""), ("chatty", ""), ("tiny", "--max_samples 20"), ("chatty", "--streaming --max_steps 2")],
)
def test_a_mix_of_formats_is_trained_on(
    files: dict[str, str], model: str, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from conftest import save_tiny
    from lopt.cli import rows as module

    chat = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>{% endfor %}"
    folder = save_tiny(tmp_path / "model", chat_template=chat if model == "chatty" else None)
    made: list[Any] = []
    join = module.examples_of
    monkeypatch.setattr(module, "examples_of", lambda *args: made.append(join(*args)) or made[-1])
    turns = " --assistant_only_loss" if model == "chatty" else ""
    words = (
        f"data preview --model_name_or_path {folder} --rows 40 --data_mix {files['a']}:0.5 {files['b']}:0.5"
    )
    assert main(f"{words} {more}{turns}".split()) == 0
    out = capsys.readouterr().out
    kinds = Counter("i" in str(row["messages"] if turns else row["prompt"])[:90] for row in _first(made[0]))
    if "streaming" in more:
        assert "a.jsonl: 50.0% of the rows, drawn from a stream" in out and min(kinds.values()) > 8
    else:
        count = 10 if more else 40
        assert f"a.jsonl: {count} of 40 rows, 50.0% of the mix" in out
        assert f"b.parquet: {count} of 100 rows, 50.0% of the mix" in out
        assert f"{2 * count} rows; 0 dropped" in out and len(made[0]) == 2 * count
    if turns and not more:  # of Alpaca's history, every answer is trained on
        assert sorted({len(row["trained"]) for row in made[0]}) == [1, 2]


def _first(rows: Any) -> list[dict[str, Any]]:
    return list(rows.take(40)) if hasattr(rows, "take") else list(rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.jsonl:0.7", "b.csv"], "no weight for b.csv"),
        (["a.jsonl:0", "b.csv:1"], "`data_mix` a.jsonl:0: the weight .* above 0"),
        (["a.jsonl:nan", "b.csv:1"], "above 0"),
        (["a.jsonl:1", "a.jsonl:2"], "names a.jsonl twice"),
    ],
)
def test_weights_that_are_none(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_mix(words)


def test_sources_are_told_apart() -> None:
    found = parse_mix(["s3://bucket/a.jsonl:0.5", "tulu3:1", "some/set:2", "none.jsonl.gz:1"])
    assert [(part.source, part.weight) for part in found] == [
        ({"train_file": "s3://bucket/a.jsonl"}, 0.5),
        ({"dataset_preset": "tulu3"}, 1.0),
        ({"dataset_name": "some/set"}, 2.0),
        ({"train_file": "none.jsonl.gz"}, 1.0),
    ]
    assert parse_mix(["s3://bucket/a.jsonl"])[0].weight is None


def test_what_does_not_go_together_is_refused(
    files: dict[str, str], tiny_folder: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "all"}\n')
    command = f"sft --model_name_or_path {tiny_folder} --output_dir {tmp_path / 'out'}"
    for words, message in (
        (
            f"--data_mix {files['a']} {tmp_path / 't.jsonl'}",
            "examples of two kinds, text and prompt+completion",
        ),
        (
            f"--data_mix {files['a']}:1 {tmp_path / 'none.jsonl'}:1",
            "--data_mix {0}: --train_file: {0} does not exist",
        ),
        (f"--data_mix {files['a']} --train_file {files['a']}", "--train_file is for one source"),
        (f"--data_mix {files['a']} --streaming --max_steps 1", "--data_mix needs weights with --streaming"),
        (f"--data_mix {files['a']}:1 ultrafeedback:1", "has pairs for lopt dpo"),
    ):
        assert main(f"{command} {words}".split()) == 2
        assert message.format(tmp_path / "none.jsonl") in capsys.readouterr().err
