"""What a model can do: losses on text, generated answers."""

from lopt.evaluation.generate import complete
from lopt.evaluation.loss import completion_loss, text_loss, text_losses

__all__ = ["complete", "completion_loss", "text_loss", "text_losses"]
