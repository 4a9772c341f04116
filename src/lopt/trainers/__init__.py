"""Thin subclasses of TRL's trainers."""

from lopt.trainers.dpo import LoPTDPOTrainer
from lopt.trainers.grpo import LoPTGRPOTrainer
from lopt.trainers.guards import DivergedError, NonFiniteError
from lopt.trainers.mixin import LoPTMixin
from lopt.trainers.sft import LoPTSFTTrainer
from lopt.trainers.trouble import OutOfMemory, WorkerDied

__all__ = [
    "DivergedError",
    "LoPTDPOTrainer",
    "LoPTGRPOTrainer",
    "LoPTMixin",
    "LoPTSFTTrainer",
    "NonFiniteError",
    "OutOfMemory",
    "WorkerDied",
]
