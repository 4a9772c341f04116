"""Lines of other libraries that say nothing to the user of a command."""

from __future__ import annotations

import logging
from collections.abc import Sequence

# Logger -> beginnings of its messages, and why they are dropped.
DROPPED: dict[str, Sequence[str]] = {
    # transformers imports torchao wherever it is installed; its kernels for other GPUs or Python versions
    # do not load, and nothing here calls them.
    "torchao": ("Failed to load ",),
    # torchao registers its enums in a way that torch has deprecated.
    "torch.utils._pytree": ("<enum ",),
}


class _Dropped(logging.Filter):
    """Drops the messages of one logger that begin in a given way."""

    def __init__(self, beginnings: Sequence[str]) -> None:
        super().__init__()
        self.beginnings = tuple(beginnings)

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)


def quiet() -> None:
    """Drop the messages of `DROPPED`, and no others."""
    for name, beginnings in DROPPED.items():
        logging.getLogger(name).addFilter(_Dropped(beginnings))
