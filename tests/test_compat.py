"""Private names of other libraries: each exists in what is installed, none is used outside `lopt.compat`."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lopt
from lopt.compat import labelled_positions_only, replaced
from lopt.private_names import NAMES, OVERRIDES

SOURCE = Path(lopt.__file__).parent
FILES = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
ALLOWED: dict[str, str] = {
    "_exit": "os._exit is documented: a second signal ends the process at once",
    "_asdict": "a documented method of named tuples",
    "_replace": "a documented method of named tuples",
    "_get_layout": "models/pickles.py: a name that pickles of checkpoints may hold, never called",
}
"""Private names that may be used anywhere, each with a reason."""


@pytest.mark.parametrize("place", [*NAMES, *OVERRIDES])
def test_every_name_exists(place: str) -> None:
    module, path = place.split(":")
    found: Any = pytest.importorskip(module.split(".")[0]) and importlib.import_module(module)
    *owners, last = path.split(".")
    for owner in owners:
        found = getattr(found, owner)
    if not hasattr(found, last):  # an attribute of instances
        assert any(f"self.{last} " in inspect.getsource(kind) for kind in found.__mro__[:-1]), place


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def own_names() -> set[str]:
    """Every private name that lopt itself defines."""
    found: set[str] = set()
    for tree in FILES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
                found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return found


def foreign_names(tree: ast.AST, own: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of every private import and attribute that is not lopt's own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None)
            parts = [part for alias in node.names for part in alias.name.split(".")]
            parts += (module or "").split(".")
            if (module or parts[0]).split(".")[0] not in (*sys.stdlib_module_names, "lopt"):
                yield from ((node.lineno, part) for part in parts if private(part))
            if "mock" in parts:
                yield node.lineno, "unittest.mock"
        elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in KNOWN - own:
            yield node.lineno, node.value


KNOWN = {
    part for place in (*NAMES, *OVERRIDES) for part in place.replace(":", ".").split(".") if private(part)
}
PRIVATE_TO_TRAINERS = {place.split(".")[-1] for place in OVERRIDES}


def test_no_private_name_outside_compat() -> None:
    own, found = own_names(), []
    for name, tree in FILES.items():
        allowed = set(ALLOWED) | (PRIVATE_TO_TRAINERS if name.startswith("trainers/") else set())
        if name != "compat.py":
            found += [
                f"{name}:{line} {used}" for line, used in foreign_names(tree, own) if used not in allowed
            ]
    assert not found, "\n".join(found)


def test_trainers_override_no_other_private_name() -> None:
    """Nor one by accident: a helper of ours that has the name of one of theirs."""
    from lopt import LoPTDPOTrainer, LoPTGRPOTrainer, LoPTSFTTrainer

    listed = {place.split(".")[-1] for place in OVERRIDES}
    for trainer in (LoPTSFTTrainer, LoPTGRPOTrainer, LoPTDPOTrainer):
        ours = [kind for kind in trainer.__mro__ if kind.__module__.startswith("lopt.")]
        theirs = [kind for kind in trainer.__mro__ if kind not in ours]
        names = {name for kind in ours for name in vars(kind) if private(name)}
        both = {name for name in names if any(name in vars(kind) for kind in theirs)}
        assert both <= listed, (trainer, both - listed)


def test_compat_imports_no_library() -> None:
    script = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "print([m for m in ('torch', 'transformers', 'trl', 'datasets', 'lm_eval') if m in sys.modules])"
    )
    command = [sys.executable, "-c", script, str(SOURCE / "compat.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_replaced_puts_back_after_an_error() -> None:
    class Owner:
        value = 1

    with pytest.raises(KeyError), replaced(Owner, value=2):
        assert Owner.value == 2
        raise KeyError
    assert Owner.value == 1


def test_labelled_positions_are_asked_for_inside_only() -> None:
    from trl.trainer import utils

    cpu = torch.device("cpu")
    with labelled_positions_only():
        assert utils._use_triton(cpu)
        with labelled_positions_only():
            pass
        assert utils._use_triton(cpu)
    assert not utils._use_triton(cpu)
