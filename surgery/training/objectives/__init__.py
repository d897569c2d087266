"""Objectives: what is minimised, each as small as its equations.

An objective is a frozen dataclass whose fields are its parameters, filed by `@register("name")`. It says which batches
it reads (`kind`: rollouts, demonstrations or pairs), adds columns to a whole batch once (`prepare`), and gives the loss
of a micro-batch from the policy's scores (`of_scores`), divided by counts of the *whole update*
(`batch.total_rows`, `batch.total_tokens`), so that micro-batches and processes add up exactly.

| file | reads | objectives |
|---|---|---|
| sft.py | demonstrations | sft |
| masked_thought.py | demonstrations | masked_thought |
| preference.py | pairs | dpo (with rationales too), orpo |
| policy_gradient.py | rollouts | grpo, bnpo, dapo, dr_grpo, gspo, rloo, reinforce_pp |
| ppo.py | rollouts | ppo: GAE and a value head (ReFT) |

A new one:

    @register("clipless")
    @dataclass(frozen=True)
    class Clipless(PolicyGradient):
        '''GRPO without its clip.'''

        def surrogate(self, ratio, advantage):
            return -ratio * advantage

and from then on `objective: clipless` works in recipes, `Clipless()` in Python, `0.7 * Clipless() + 0.3 * SFT()` too.
From nothing, an objective on demonstrations that learns only the tokens the model finds unlikely:

    @register("focal")
    @dataclass(frozen=True)
    class Focal(Objective):
        '''Cross-entropy weighted by (1 - p)^gamma (Lin et al. 2017).'''

        gamma: float = 2.0

        @property
        def kind(self):
            return "demonstrations"

        def of_scores(self, scores, batch):
            weight = (1 - scores.log_probs.exp()) ** self.gamma
            return Loss(token_mean(-weight * scores.log_probs, batch))

`scores.log_probs` is (rows, completion); `batch.mask` marks the tokens that count; `batch["reward"]` and other columns
are (rows,) or (rows, completion). Ask for entropies, hidden states or values with `asks`.
"""

from surgery.training.objectives.aggregate import constant, micro_batch_mean, row_sums, sequence_mean, token_mean
from surgery.training.objectives.base import OBJECTIVES, Loss, Objective, Sum, name_of, parse, register
from surgery.training.objectives.masked_thought import MaskedThought
from surgery.training.objectives.policy_gradient import (
    BNPO,
    DAPO,
    GRPO,
    GSPO,
    RLOO,
    DrGRPO,
    PolicyGradient,
    ReinforcePP,
)
from surgery.training.objectives.ppo import PPO
from surgery.training.objectives.preference import DPO, ORPO
from surgery.training.objectives.sft import SFT

__all__ = [
    "BNPO", "DAPO", "DPO", "GRPO", "GSPO", "OBJECTIVES", "ORPO", "PPO", "RLOO", "SFT", "DrGRPO", "Loss",
    "MaskedThought", "Objective", "PolicyGradient", "ReinforcePP", "Sum", "constant", "micro_batch_mean", "name_of",
    "parse", "register", "row_sums", "sequence_mean", "token_mean",
]  # fmt: skip
