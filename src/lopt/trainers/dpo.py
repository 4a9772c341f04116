"""Direct preference optimization by LoPT: TRL's DPOTrainer with boundaries."""

from __future__ import annotations

from typing import Any

from trl import DPOTrainer

from lopt.core.config import LoPTConfig
from lopt.trainers.mixin import LoPTMixin


class LoPTDPOTrainer(LoPTMixin, DPOTrainer):
    """`trl.DPOTrainer` with one argument more, `lopt_config`."""

    def __init__(self, *args: Any, lopt_config: LoPTConfig | None = None, **kwargs: Any) -> None:
        if lopt_config is not None and lopt_config.is_local and lopt_config.aux_loss == "next_token":
            raise ValueError(
                "`aux_loss` next_token would teach earlier blocks rejected answers as well: "
                "use `aux_loss` recon"
            )
        super().__init__(*args, lopt_config=lopt_config, **kwargs)
