"""Post-training of decoder-only language models by block-local learning (LoPT)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lopt.requirements import check_installed
from lopt.version import __version__

if TYPE_CHECKING:
    from lopt.core.attach import LoPT, attach
    from lopt.core.config import LoPTConfig
    from lopt.models.load import load_model, save_model
    from lopt.trainers import LoPTDPOTrainer, LoPTGRPOTrainer, LoPTMixin, LoPTSFTTrainer

_HOMES = {
    "LoPT": "lopt.core.attach",
    "LoPTConfig": "lopt.core.config",
    "LoPTDPOTrainer": "lopt.trainers",
    "LoPTGRPOTrainer": "lopt.trainers",
    "LoPTMixin": "lopt.trainers",
    "LoPTSFTTrainer": "lopt.trainers",
    "attach": "lopt.core.attach",
    "load_model": "lopt.models.load",
    "save_model": "lopt.models.load",
}
"""The module that defines each public name. It is imported when the name is first asked for (PEP 562)."""

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
    """Import the module that defines `name`: `lopt --help` needs no torch, a plain PyTorch loop no TRL."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lopt' has no attribute {name!r}")
    check_installed()
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
