"""The source tree stays readable: sizes of files and functions; a room imports only rooms below it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lopt"
FILES = sorted(SOURCE.rglob("*.py"))
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_CORE, MOST_FOLDERS = 400, 60, 900, 2


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield name and number of lines, decorators and docstring included, of each function of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert node.end_lineno is not None
            yield f"{path.relative_to(SOURCE)}:{node.name}", node.end_lineno - first + 1


def test_files_are_short_and_in_rooms() -> None:
    assert {str(f): n for f in FILES if (n := lines(f)) > MOST_LINES} == {}
    assert [str(f) for f in FILES if len(f.relative_to(SOURCE).parents) - 1 > MOST_FOLDERS] == []


def test_functions_are_short() -> None:
    found = dict(pair for path in FILES for pair in functions(path))
    assert {name: n for name, n in found.items() if n > MOST_LINES_OF_A_FUNCTION} == {}


def test_core_can_be_read_in_ten_minutes() -> None:
    assert sum(lines(path) for path in (SOURCE / "core").rglob("*.py")) < MOST_LINES_OF_CORE


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    """`lint-imports`, which `make lint` runs, on a copy in which core imports the command line."""
    pytest.importorskip("importlinter")
    shutil.copytree(SOURCE, tmp_path / "lopt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    planted = tmp_path / "lopt" / "core" / "config.py"
    planted.write_text(planted.read_text() + "\n\ndef upward():\n    import lopt.cli.main\n")
    run = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0 and "lopt.core.config -> lopt.cli.main" in run.stdout, run.stdout
