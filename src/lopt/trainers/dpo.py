"""Direct preference optimization by LoPT: TRL's DPOTrainer with boundaries."""

from __future__ import annotations

from typing import Any

from trl import DPOConfig, DPOTrainer

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
    """`trl.DPOTrainer` with one argument more, `lopt_config`."""

    def __init__(self, *args: Any, lopt_config: LoPTConfig | None = None, **kwargs: Any) -> None:
        if lopt_config is not None:
            check_preference_method(lopt_config)
        for given in (*args, *kwargs.values()):
            if isinstance(given, DPOConfig):
                check_preference_numbers(given)
        if isinstance(kwargs.get("ref_model"), str):
            raise ValueError("`ref_model` must be a model, not a name: load it, or leave it out for a copy")
        super().__init__(*args, lopt_config=lopt_config, **kwargs)

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
