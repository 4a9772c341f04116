"""Predicted gradients in a trainer's run: their first fit, and later ones as the model moves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from tqdm.auto import tqdm

from lopt.engine.exact_gradients import StagedGradients, exact_gradients
from lopt.losses.predicted_gradient import labelled
from lopt.losses.rows import Rows
from lopt.reliability.finite import NonFiniteError

FIRST_ROWS = 48
"""Training rows of the first fit."""


class PredictedGradients:
    """Fits the maps of a trainer's earlier blocks that learn.

    Args:
        trainer: A trainer with `LoPTMixin`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._labels = 0
        if getattr(trainer, "compute_loss_func", None) is not None:
            raise ValueError(
                "`aux_loss` predicted_gradient is fitted to plain cross-entropy: leave `compute_loss_func` "
                "out, or use `aux_loss` recon"
            )

    def start(self) -> None:
        """Fit to the gradients of the unchanged model, on training rows in an order of their own."""
        if self._trainer.is_world_process_zero():
            tqdm.write(f"Predicted gradients: fitting to {FIRST_ROWS} rows")
        for block in self._trainer.lopt.learning:
            self._trainer.lopt.heads[block].reset()
        batches: list[Any] = []
        for batch in itertools.cycle(self._trainer.head_warm_up_batches()):
            batches.append(batch)
            if sum(len(batch["input_ids"]) for batch in batches) >= FIRST_ROWS:
                break
        self._fit(batches)

    def begin_step(self, batches: Sequence[Any]) -> None:
        """Count the labels of an optimizer step that begins; fit again to its gradients if that is due."""
        self._labels = sum(_count(batch) for batch in batches)
        trainer, step = self._trainer, self._trainer.state.global_step
        if step and step % trainer.lopt.config.refit_every == 0:
            for block, cosine in self._fit(batches):
                trainer.average(f"predicted_gradient/block_{block + 1}", cosine)

    def share(self, inputs: Mapping[str, Any]) -> float:
        """Return the share of a micro-batch in the labels of its optimizer step, as in the task loss."""
        return _count(inputs) / max(1, self._labels)

    def _fit(self, batches: Sequence[Any]) -> list[tuple[int, float]]:
        """Fit to the exact gradients of batches; return blocks and cosines of old prediction and truth."""
        lopt, found = self._trainer.lopt, []
        inputs = [
            {name: value.to(lopt.device) for name, value in batch.items() if isinstance(value, Tensor)}
            for batch in batches
        ]
        rows = [_rows(batch) for batch in inputs]

        def forward(slot: int) -> Tensor:
            return _task_loss(lopt.model, inputs[slot], rows[slot])

        def take(block: int, slot: int, hidden: Tensor, gradient: Tensor) -> None:
            predicted = lopt.heads[block].predict(hidden, rows[slot])
            places, _ = labelled(rows[slot])
            guess, truth = (x.flatten(0, 1)[places].flatten().float() for x in (predicted, gradient))
            found.append((block, cosine_similarity(guess, truth, dim=0).item()))
            lopt.heads[block].add(hidden, gradient, rows[slot])

        guard = self._trainer.guard
        with torch.random.fork_rng(), guard.during("fit of predicted gradients"):
            if self._trainer.block_major is None:
                exact_gradients(lopt, len(inputs), forward, take)
            else:
                StagedGradients(lopt, self._trainer.block_major.schedule).run(len(inputs), forward, take)
        for block in lopt.learning:
            if not lopt.heads[block].statistics.isfinite().all():
                raise NonFiniteError(
                    f"the task's gradient at the end of block {block + 1}, to which predicted gradients are "
                    "fitted, is not finite; no weight has been changed by it. Lower `learning_rate`, or use "
                    "`aux_loss` recon"
                )
            lopt.heads[block].fit()
        return found


def _rows(inputs: Mapping[str, Tensor]) -> Rows:
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    return Rows(mask, inputs["input_ids"], positions, inputs["labels"])


def _count(inputs: Mapping[str, Tensor]) -> int:
    """Return the number of labels that a micro-batch has a prediction for."""
    return len(labelled(_rows(inputs))[0])


def _task_loss(model: Any, inputs: Mapping[str, Tensor], rows: Rows) -> Tensor:
    """Return the mean cross-entropy over the labels, with logits only where some row has one."""
    places, labels = labelled(rows)
    width = inputs["input_ids"].shape[1]
    columns = (places % width).unique()
    known = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**known, logits_to_keep=columns, use_cache=False).logits
    chosen = logits[places // width, torch.searchsorted(columns, places % width)]
    return cross_entropy(chosen.float(), labels)
