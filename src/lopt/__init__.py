"""Post-training of decoder-only language models by block-local learning (LoPT)."""

from typing import TYPE_CHECKING, Any

from lopt.core.attach import LoPT, attach
from lopt.core.config import LoPTConfig
from lopt.models.load import load_model, save_model
from lopt.version import __version__

if TYPE_CHECKING:
    from lopt.trainers import LoPTDPOTrainer, LoPTGRPOTrainer, LoPTMixin, LoPTSFTTrainer


__all__ = [
    "LoPT",
    "LoPTConfig",
    "LoPTDPOTrainer",
    "LoPTGRPOTrainer",
    "LoPTMixin",
    "LoPTSFTTrainer",
    "__version__",
    "attach",
    "load_model",
    "save_model",
]


def __getattr__(name: str) -> Any:
    """Trainers on demand: a plain PyTorch loop need not import TRL."""
    if name in __all__:
        import lopt.trainers

        return getattr(lopt.trainers, name)
    raise AttributeError(f"module 'lopt' has no attribute {name!r}")
