"""What a model can do: losses on text, generated answers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lopt.evaluation.generate import complete
    from lopt.evaluation.loss import completion_loss, text_loss, text_losses

__all__ = ["complete", "completion_loss", "text_loss", "text_losses"]


def __getattr__(name: str) -> Any:
    """Import on demand: plots and command lines need parts of this package, but neither torch nor a model."""
    if name in __all__:
        from lopt.evaluation import generate, loss

        return getattr(generate if name == "complete" else loss, name)
    raise AttributeError(f"module 'lopt.evaluation' has no attribute {name!r}")
