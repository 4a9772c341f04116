"""docs/models.md says what scripts/model_table.py finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model_table import examine_all, render

TABLE = Path(__file__).parents[1] / "docs" / "models.md"


def test_rows_of_the_table_are_what_is_found() -> None:
    found = render(*examine_all(["lfm2", "opt", "zaya"]))
    lines = [line for line in found.splitlines() if line.startswith("| `")]
    assert len(lines) == 2 and set(lines) <= set(TABLE.read_text().splitlines())


@pytest.mark.slow
def test_the_whole_table() -> None:
    torch.set_num_threads(1)
    assert render(*examine_all([])) == TABLE.read_text()
