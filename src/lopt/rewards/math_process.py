"""The script of the child process in `lopt.rewards.math`: compare two answers by math-verify."""

from __future__ import annotations

import logging

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

logging.disable(logging.CRITICAL)  # it warns of each answer that it cannot parse
_TARGETS = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def answer(question: list[str]) -> bool:
    """Return whether the two LaTeX texts are equal; False where either cannot be parsed."""
    try:
        wanted, given = (parse(f"\\boxed{{{latex}}}", _TARGETS, parsing_timeout=None) for latex in question)
        return bool(verify(wanted, given, timeout_seconds=None))
    except Exception:  # a completion may hold anything, and none of it ends the process
        return False
