"""What was left out or changed while rows became examples: counted, and said in every run."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger(__name__)


class Notes:
    """Counts of what happened to rows, one for each row at most.

    Args:
        streamed: Say each thing when it happens first, since the rows of a stream are never all counted.
    """

    def __init__(self, streamed: bool = False) -> None:
        self.streamed = streamed
        self.counts: Counter[str] = Counter()

    def add(self, *found: str) -> None:
        """Count what happened to one row."""
        for what in dict.fromkeys(found):
            if self.streamed and what not in self.counts:
                logger.warning("rows of the stream: %s", what)
            self.counts[what] += 1

    def show(self, rows: int) -> None:
        """Say what happened to how many of all rows."""
        if not self.streamed:
            for what, count in self.counts.items():
                logger.warning("%d of %d rows: %s", count, rows, what)
