"""Rewards: what a completion is worth. A recipe adds them up: `reward: {accuracy: 1.0, format: 0.5}`.

| name | value | source |
|---|---|---|
| accuracy | 1 right, 0 wrong, by task, exact text, number or math-verify | |
| partial | 1 right, 0.1 an answer but wrong, 0 none | ReFT, arXiv:2401.08967 |
| format | 1 when the whole completion matches a pattern, else 0 | |
| tag_count | share of the tags present exactly once | open-r1 |
| cosine_length | right: 1 falling to 0.5, wrong: -1 rising to -0.5, along half a cosine of length | arXiv:2502.03373 |
| kimi_length | x = 1/2 - (len - min)/(max - min) in the group: right x, wrong min(0, x) | Kimi k1.5, arXiv:2501.12599 |
| soft_overlong | 0, then down to -1 over the last `cache` tokens before `max_len` | DAPO, arXiv:2503.14476 |
| repetition | -(1 - different n-grams / all n-grams) | arXiv:2502.03373 |
| tool_call | 6 s - 3, s from names, parameter names and values of matched calls | ToolRL, arXiv:2504.13958 |
| tool_format | 1 for a thought and a call block | ToolRL |
| think_length | words of the thought / 512, at most 1 | ToolRL's ablation |
| triples | 5, 1.5 or 0.5 a predicted triple, -1 for each matching nothing or missing | STAR-R1, arXiv:2505.15804 |
| iou | intersection over union of intervals or boxes | |
| numeric | 1 within a tolerance, then linearly down to 0 | |
| similarity | ROUGE-L F1 with the gold text | Lin 2004 |
| hierarchical_action | type; then, only if right, attributes present and alike | Shop-R1, arXiv:2507.17842 |
| win_rate | mean over the rest of the group of 1[judge prefers this one] | Think-RM, arXiv:2505.16265 |
| execution | 1 for equal results of a query or program, else their overlap, 0 when it fails | |
| residual | R - g(z), g cross-fitted on confounders such as length | after DeconfoundLM |
| quantile_rescale | (s - q10) / (q90 - q10) with running quantiles, clipped to [0, 1] | ours |
| measured | the number in a column | |

A new reward is a function of `(prompts, completions, **columns)` in the user's own file (`reward: my.py:function`),
or a small class with its parameters as fields under `@REWARDS.register("name")` here. See `base` for the contract
and `build` for what a recipe may write.
"""

from surgery.training.rewards import execution, pairwise, similarity, structure, tools, wrapped
from surgery.training.rewards.audit import Audit, audit, audit_log
from surgery.training.rewards.base import REWARDS, Reward
from surgery.training.rewards.build import build_rewards, make_reward
from surgery.training.rewards.correctness import VERIFIERS
from surgery.training.rewards.score import Rewards, Scored
from surgery.training.rewards.wrapped import self_certainty

__all__ = [
    "REWARDS", "VERIFIERS", "Audit", "Reward", "Rewards", "Scored", "audit", "audit_log", "build_rewards", "execution",
    "make_reward", "pairwise", "self_certainty", "similarity", "structure", "tools", "wrapped",
]  # fmt: skip
