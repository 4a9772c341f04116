"""Post-training of decoder-only language models by block-local learning (LoPT)."""

from lopt.attach import LoPT, attach
from lopt.config import LoPTConfig

__version__ = "0.1.0"
__all__ = ["LoPT", "LoPTConfig", "__version__", "attach"]
