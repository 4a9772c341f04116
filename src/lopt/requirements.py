"""The oldest releases of the libraries underneath that lopt works with, and a check of what is installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

OLDEST: dict[str, str] = {
    "accelerate": "1.12",
    "datasets": "5.0",  # before, a stream's held-out rows are also trained on
    "torch": "2.11",
    "transformers": "5.16.1",
    "trl": "1.16",
}
"""Package -> its lower bound in pyproject.toml."""
OLDEST_FOR_FSDP2 = {"accelerate": "1.15"}


def check_installed(oldest: Mapping[str, str] = OLDEST, purpose: str = "lopt") -> None:
    """Refuse installed releases that are too old, which pip lets in when another package asks for them.

    Args:
        oldest: package -> the oldest release that works.
        purpose: what needs it, for the message.

    Raises:
        ImportError: a release is older.
    """
    from packaging.version import Version

    for package, lowest in oldest.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # its import says so
        if Version(found) < Version(lowest):
            raise ImportError(
                f"{purpose} needs {package} >= {lowest} ({found} is installed): "
                f'pip install "{package}>={lowest}"'
            )
