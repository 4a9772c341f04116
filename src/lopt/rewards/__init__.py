"""Verifiable rewards, one file each, and the answers in a text that they compare."""

from lopt.rewards.checked import checked
from lopt.rewards.gsm8k import gsm8k_reward
from lopt.rewards.load import REWARDS, load_reward
from lopt.rewards.math import math_reward
from lopt.rewards.procedural import procedural_reward

__all__ = ["REWARDS", "checked", "gsm8k_reward", "load_reward", "math_reward", "procedural_reward"]
