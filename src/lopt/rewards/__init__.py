"""Verifiable rewards, one file each, and the answers in a text that they compare."""

from lopt.rewards.checked import checked
from lopt.rewards.load import REWARDS, load_reward

__all__ = ["REWARDS", "checked", "load_reward"]
