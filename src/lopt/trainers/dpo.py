"""Direct preference optimization by LoPT: TRL's DPOTrainer with boundaries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer

from lopt.core.boundaries import BoundaryReached
from lopt.core.config import LoPTConfig
from lopt.data.cells import kept_as_cells
from lopt.data.rows import column_names
from lopt.trainers.mixin import LoPTMixin
from lopt.trainers.preferences import (
    check_left,
    check_preference_method,
    check_preference_numbers,
    check_preferences,
)
from lopt.trainers.rows import say_what_is_lost


class LoPTDPOTrainer(LoPTMixin, DPOTrainer):
    """`trl.DPOTrainer` with one argument more, `lopt_config`.

    In a pipeline the reference is the model as it was given: its log-probabilities are computed before the
    first step (`precompute_ref_log_probs`), so that no process has a second model.
    """

    def __init__(self, model: Any, *args: Any, lopt_config: LoPTConfig | None = None, **kwargs: Any) -> None:
        if lopt_config is not None:
            check_preference_method(lopt_config)
        settings = [given for given in (*args, *kwargs.values()) if isinstance(given, DPOConfig)]
        for given in settings:
            check_preference_numbers(given)
        if isinstance(kwargs.get("ref_model"), str):
            raise ValueError("`ref_model` must be a model, not a name: load it, or leave it out for a copy")
        if lopt_config is None or lopt_config.schedule != "pipeline":
            super().__init__(model, *args, lopt_config=lopt_config, **kwargs)
            return
        if kwargs.get("ref_model") is not None:
            raise ValueError(
                "`ref_model` is whole, and no process of a pipeline has room for it: leave it out"
            )
        for given in settings:
            given.precompute_ref_log_probs = True
        with _known_weights(model):
            super().__init__(model, *args, lopt_config=lopt_config, **kwargs)
        self._add_reference()

    def _add_reference(self) -> None:
        """Add the reference's log-probabilities to the rows, now that the blocks are in their places."""
        size = self.args.precompute_ref_batch_size
        train, held_out = self.args.per_device_train_batch_size, self.args.per_device_eval_batch_size
        self.train_dataset = self._precompute_ref_logps(self.train_dataset, "train", size or train)
        if isinstance(self.eval_dataset, Dataset):
            self.eval_dataset = self._precompute_ref_logps(self.eval_dataset, "eval", size or held_out)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if self.grid is None:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if not isinstance(dataset, Dataset):
            raise ValueError("`schedule` pipeline computes the reference before the first step: no streams")
        if not hasattr(self, "lopt"):
            return dataset  # TRL's call, too early: `_add_reference` follows
        loader = self.accelerator.prepare(
            DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)
        )
        batches = [
            self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, batch))
            for batch in loader
        ]
        for column, values in zip(
            ("ref_chosen_logps", "ref_rejected_logps"), zip(*batches, strict=True), strict=True
        ):
            dataset = dataset.add_column(column, torch.cat(values).tolist())
        return dataset

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> tuple[Tensor, ...]:
        """Return the reference's log-probabilities of chosen and rejected answers, (B,) each.

        They are 0 where another process has the last block, and nobody reads them.
        """
        if self.runs_task:
            return super().compute_ref_log_probs(model, inputs)
        with suppress(BoundaryReached):
            super().compute_ref_log_probs(model, inputs)
        none = torch.zeros(len(inputs["input_ids"]), device=self.args.device)
        return none.chunk(2)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any) -> Any:
        names = column_names(dataset)
        missing = [name for name in ("chosen", "rejected") if name not in names]
        if missing and "chosen_ids" not in names:  # or the rows are tokens already
            raise ValueError(f"DPO needs the columns `chosen` and `rejected` (got {', '.join(names)})")
        name = rest[-1] if rest else "train"
        if not missing:
            check_preferences(dataset, name)
        say_what_is_lost(dataset, processing_class, None, name)
        made = super()._prepare_dataset(kept_as_cells(dataset), processing_class, args, *rest)
        check_left(dataset, made, name)
        return made


@contextmanager
def _known_weights(model: Any) -> Iterator[None]:
    """Within, the model has no state but the weights of this process: TRL hashes them all."""
    whole = model.state_dict
    model.state_dict = lambda *args, **kwargs: {
        name: value for name, value in whole(*args, **kwargs).items() if not value.is_meta
    }
    try:
        yield
    finally:
        del model.state_dict
