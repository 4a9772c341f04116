"""The training commands of docs/commands.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands() -> list[list[str]]:
    """Words of every training command of the page."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/commands.md").read_text(), re.DOTALL)
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks if "--output_dir outputs" in block]
