"""Thin subclasses of TRL's trainers."""

from lopt.reliability.finite import NonFiniteError
from lopt.reliability.guards import DivergedError
from lopt.reliability.machine_errors import OutOfMemory, WorkerDied
from lopt.trainers.dpo import LoPTDPOTrainer
from lopt.trainers.grpo import LoPTGRPOTrainer
from lopt.trainers.mixin import LoPTMixin
from lopt.trainers.sft import LoPTSFTTrainer

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
