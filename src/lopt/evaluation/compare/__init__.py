"""Methods side by side on one data set and one budget: what each learns, keeps, moves and costs."""

from lopt.evaluation.compare.arms import Arm, parse_arms

__all__ = ["Arm", "parse_arms"]
