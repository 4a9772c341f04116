"""Thin subclasses of TRL's trainers."""

from lopt.trainers.mixin import LoPTMixin, NonFiniteError
from lopt.trainers.sft import LoPTSFTTrainer

__all__ = ["LoPTMixin", "LoPTSFTTrainer", "NonFiniteError"]
