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
    code = "import sys, lopt, lopt.optim; assert 'trl' not in sys.modules and 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
