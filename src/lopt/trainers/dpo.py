"""Direct preference optimization by LoPT: TRL's DPOTrainer with boundaries."""

from __future__ import annotations

from trl import DPOTrainer

from lopt.trainers.mixin import LoPTMixin


class LoPTDPOTrainer(LoPTMixin, DPOTrainer):
    """`trl.DPOTrainer` and one argument more, `lopt_config`."""
