"""Predicted gradients in a trainer's run: their first fit, and later ones as the model moves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from lopt.engine.exact_gradients import boundary_gradients
from lopt.losses.predicted_gradient import labelled

FIRST_ROWS = 48
"""Training rows of the first fit."""


class PredictedGradients:
    """Fits the maps of a trainer's earlier blocks that learn.

    Args:
        trainer: A trainer with `LoPTMixin`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def start(self) -> None:
        """Fit to the gradients of the unchanged model, on training rows in an order of their own."""
        seen = 0
        with torch.random.fork_rng():
            for batch in itertools.cycle(self._trainer.head_warm_up_batches()):
                self._add(batch)
                seen += len(batch["input_ids"])
                if seen >= FIRST_ROWS:
                    break
        self._fit()

    def begin_step(self, batches: list[Any]) -> None:
        """Fit again if that is due, to the gradients of the optimizer step that begins."""
        trainer, step = self._trainer, self._trainer.state.global_step
        if not step or step % trainer.lopt.config.refit_every:
            return
        with torch.random.fork_rng():
            for batch in batches:
                for block, cosine in zip(trainer.lopt.learning, self._add(batch), strict=True):
                    trainer.average(f"predicted_gradient/block_{block + 1}", cosine)
        self._fit()

    def _fit(self) -> None:
        for block in self._trainer.lopt.learning:
            self._trainer.lopt.heads[block].fit()

    def _add(self, batch: Mapping[str, Any]) -> list[float]:
        """Add a batch to the statistics; return for each block the cosine of prediction and truth before."""
        lopt, cosines = self._trainer.lopt, []
        pairs, rows = boundary_gradients(lopt, batch)
        places, _ = labelled(rows)
        for block, (hidden, gradient) in zip(lopt.learning, pairs, strict=True):
            head = lopt.heads[block]
            both = head(hidden, rows), gradient
            guess, truth = (values.flatten(0, 1)[places].flatten().float() for values in both)
            cosines.append(cosine_similarity(guess, truth, dim=0).item())
            head.add(hidden, gradient, rows)
        return cosines
