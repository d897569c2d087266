"""Rewards: what a completion is worth."""

from surgery.training.rewards.base import REWARDS, Reward, Rewards, Scored
from surgery.training.rewards.build import build_rewards, make_reward
from surgery.training.rewards.correctness import VERIFIERS, Accuracy
from surgery.training.rewards.structure import Format, TagCount

__all__ = [
    "REWARDS",
    "VERIFIERS",
    "Accuracy",
    "Format",
    "Reward",
    "Rewards",
    "Scored",
    "TagCount",
    "build_rewards",
    "make_reward",
]
