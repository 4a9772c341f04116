"""Thin subclasses of TRL's trainers."""

from lopt.trainers.dpo import LoPTDPOTrainer
from lopt.trainers.grpo import LoPTGRPOTrainer
from lopt.trainers.mixin import LoPTMixin, NonFiniteError
from lopt.trainers.sft import LoPTSFTTrainer

__all__ = ["LoPTDPOTrainer", "LoPTGRPOTrainer", "LoPTMixin", "LoPTSFTTrainer", "NonFiniteError"]
