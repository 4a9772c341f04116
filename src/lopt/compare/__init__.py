"""Methods side by side on one data set and one budget: what each learns, keeps, moves and costs."""

from lopt.compare.arms import Arm, parse_arms
from lopt.compare.study import Study

__all__ = ["Arm", "Study", "parse_arms"]
