"""The benchmarks' rows in local files: `<data_dir>/<folder>/<split>.jsonl`, columns as on the hub."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lopt.messages import error_text


class LocalFiles(NamedTuple):
    """Folder of a data set's rows in a data folder, and the columns that they must have."""

    folder: str
    columns: tuple[str, ...]


# (repository, configuration) on the hub -> local files. A configuration of "" stands for any: MMLU's are its
# subjects, which the local file has in a column.
LOCAL = {
    ("cais/mmlu", ""): LocalFiles("mmlu", ("question", "subject", "choices", "answer")),
    ("google/IFEval", None): LocalFiles("ifeval", ("key", "prompt", "instruction_id_list", "kwargs")),
    ("allenai/ai2_arc", "ARC-Challenge"): LocalFiles(
        "arc_challenge", ("question", "choices.text", "choices.label", "answerKey")
    ),
    ("openai/gsm8k", "main"): LocalFiles("gsm8k", ("question", "answer")),
    ("Rowan/hellaswag", None): LocalFiles(
        "hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    ),
    ("truthfulqa/truthful_qa", "multiple_choice"): LocalFiles(
        "truthfulqa_mc",
        (
            "question",
            "mc1_targets.choices",
            "mc1_targets.labels",
            "mc2_targets.choices",
            "mc2_targets.labels",
        ),
    ),
    ("truthfulqa/truthful_qa", "generation"): LocalFiles(
        "truthfulqa_gen", ("question", "correct_answers", "incorrect_answers")
    ),
    ("allenai/winogrande", "winogrande_xl"): LocalFiles(
        "winogrande", ("sentence", "option1", "option2", "answer")
    ),
}

# Files to read where a split's official file is absent. The harness strips HellaSwag's bracket tags itself,
# so both files give the same questions up to white space; the official one gives them exactly.
_ALTERNATIVES = {("hellaswag", "validation"): "validation_detagged"}


def find_local(dataset_path: str | None, dataset_name: str | None) -> LocalFiles | None:
    """Return the local files of a data set on the hub, None if there is no such entry."""
    return LOCAL.get((str(dataset_path), "")) or LOCAL.get((str(dataset_path), dataset_name))


def read_rows(path: Path, columns: tuple[str, ...]) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a JSON Lines file, and a hash of its bytes.

    Raises:
        ValueError: it is not JSON Lines, or a row lacks one of `columns` ("a.b" is the key b of column a).
    """
    state = path.stat()
    return _read(path, columns, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4)  # MMLU's 57 tasks share two files
def _read(path: Path, columns: tuple[str, ...], *state: int) -> tuple[list[dict[str, Any]], str]:
    content = path.read_bytes()
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"`data_dir`: {path}, line {number}, is not JSON: {error_text(error)}"
            ) from error
        missing = [name for name in columns if not _has(row, name.split("."))]
        if missing:
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"`data_dir`: {path}, line {number}, lacks the columns {', '.join(missing)} (it has {found})"
            )
        rows.append(row)
    return rows, hashlib.sha256(content).hexdigest()[:16]


def _has(row: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(row, dict) or key not in row:
            return False
        row = row[key]
    return True


def split_file(folder: Path, split: str) -> Path:
    """Return the file of a split; it may not exist."""
    path = folder / f"{split}.jsonl"
    other = folder / f"{_ALTERNATIVES.get((folder.name, split))}.jsonl"
    return other if not path.is_file() and other.is_file() else path
