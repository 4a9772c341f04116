"""The `procedural` reward: the answer after `####`, for the problems of `lopt.data.procedural`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lopt.rewards.answers import Completion, answer_is, text_of


def procedural_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    """Return 1.0 where a completion has `answer` after its first `####`, else 0.0: see `answer_is`."""
    pairs = zip(completions, answer, strict=True)
    return [float(answer_is(text_of(completion), str(wanted))) for completion, wanted in pairs]
