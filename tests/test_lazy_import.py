"""`import lopt` is quick: each public name imports its module when it is first asked for."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import lopt
assert set(lopt.__all__) <= set(dir(lopt))
from lopt import LoPTConfig
assert LoPTConfig(num_blocks=4).num_blocks == 4
assert not {"torch", "transformers", "trl", "numpy"} & set(sys.modules)
import lopt.core.attach
from lopt import attach
assert callable(attach) and attach is lopt.core.attach.attach and "attach" in vars(lopt)
assert "trl" not in sys.modules
"""


def test_public_names_are_imported_on_demand() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
