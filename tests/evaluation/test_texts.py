"""Text files are read as far as needed and named so that they can be told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from lopt.evaluation.names import text_names
from lopt.evaluation.texts import read_texts


def test_names() -> None:
    assert text_names(["a/wiki.txt", "b/code.py"]) == ["wiki", "code.py"]
    assert text_names(["a/x.txt", "b/x.txt"]) == ["a/x", "b/x"]
    assert text_names(["a/x.txt", "a/x.md"]) == ["a/x.txt", "a/x.md"]
    assert text_names(["org/model-2.5-7B"]) == ["model-2.5-7B"]


def test_only_the_beginning_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffä" + "b" * 1000, encoding="utf-8")
    assert read_texts([str(tmp_path / "a.txt")], 2, "text") == {"a": "ä" + "b" * 127}
    with pytest.raises(ValueError, match="is given twice"):
        read_texts([str(tmp_path / "a.txt")] * 2, 2, "text")
