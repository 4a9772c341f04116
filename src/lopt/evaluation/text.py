"""Plain text as a benchmark: losses window by window, in the form of the harness's results."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lopt.evaluation.loss import text_losses
from lopt.evaluation.outcomes import Evaluation
from lopt.evaluation.texts import read_text

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class TextTask:
    """The first `tokens` tokens of a file, in windows of `window` tokens."""

    path: Path
    tokens: int
    window: int

    @property
    def name(self) -> str:
        return f"text:{self.path.stem}"

    def identity(self) -> dict[str, Any]:
        """Return what identifies its results."""
        digest = hashlib.sha256(self.read().encode()).hexdigest()[:16]
        return {"name": self.name, "rows": digest, "tokens": self.tokens, "window": self.window}

    def read(self) -> str:
        """Return the text; errors as of `read_text`."""
        return read_text(self.path, self.tokens, "text")


def evaluate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: TextTask, batch_size: int | None = None
) -> Evaluation:
    """Return losses in nats per token as results and samples in the harness's form; the items are windows.

    Raises:
        ValueError: see `TextTask.read`.
    """
    batch = batch_size or max(1, BATCH_TOKENS // task.window)
    windows = text_losses(model, tokenizer, task.read(), task.tokens, task.window, batch)
    mean = sum(w.tokens for w in windows) / len(windows)
    samples = [
        {
            "doc_id": i,
            "doc": {"text": tokenizer.decode(w.ids)},
            "filter": "none",
            "metrics": ["loss"],
            "loss": w.loss,
            "tokens": w.tokens,
            "weight": w.tokens / mean,  # so that the mean over windows is the mean over tokens
            "doc_hash": hashlib.sha256(repr(w.ids).encode()).hexdigest(),
        }
        for i, w in enumerate(windows)
    ]
    loss = sum(w.loss * w.tokens for w in windows) / sum(w.tokens for w in windows)
    result: dict[str, Any] = {"name": task.name, "alias": task.name, "sample_len": len(windows)}
    result |= {"loss,none": loss, "perplexity,none": math.exp(min(loss, 700))}
    name, count = task.name, {"original": len(windows), "effective": len(windows)}
    config = {"task": name, "file": task.path.name, "tokens": task.tokens, "window": task.window}
    results = {
        "results": {name: result},
        "configs": {name: config},
        "versions": {name: 1},
        "n-shot": {name: 0},
        "higher_is_better": {name: {"loss": False, "perplexity": False}},
        "n-samples": {name: count},
    }
    return Evaluation(results, {name: samples})
