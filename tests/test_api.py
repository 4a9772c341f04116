"""What the README promises of `import lopt`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lopt


def test_public_names_exist() -> None:
    assert all(getattr(lopt, name) is not None for name in lopt.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = lopt.nothing


def test_the_core_needs_no_trl() -> None:
    modules = "lopt.engine.block_major, lopt.engine.clipping, lopt.engine.offload, lopt.engine.optimizer"
    names = "LoPTConfig, attach, load_model, save_model"
    code = (
        f"import sys, {modules}; from lopt import {names}; "
        "assert 'trl' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
