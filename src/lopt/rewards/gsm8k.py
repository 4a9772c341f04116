"""The `gsm8k` reward: the number that a completion ends in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lopt.rewards.answers import Completion, final_number, only_number, text_of


def gsm8k_reward(
    prompts: Sequence[Any], completions: Sequence[Completion], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    """Return 1.0 where `lopt.rewards.answers.final_number` of a completion is the number `answer`, else 0.0.

    Commas, currency, units, percent signs, LaTeX and bold do not matter; the value does, exactly.

    Raises:
        ValueError: an answer is not one number.
    """
    scores: list[float | None] = []
    for completion, value in zip(completions, answer, strict=True):
        wanted = only_number(str(value))
        if wanted is None:
            raise ValueError(f"the gsm8k reward needs a number in the column `answer`, not {value!r}")
        given = final_number(text_of(completion))
        scores.append(float(given is not None and wanted.equals(given)))
    return scores
