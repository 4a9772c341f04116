"""How far a tuned model moved from its base: hidden states and weights, layer by layer."""

from lopt.evaluation.drift.reference import Drift, LayerDrift, Reference, drift

__all__ = ["Drift", "LayerDrift", "Reference", "drift"]
