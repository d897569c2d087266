"""Sources: where batches come from. A source draws what the next updates are made of; the engine does the rest.

| name | gives | of |
|---|---|---|
| dataset | demonstrations, or pairs | rows that hold them |
| on_policy | rollouts | the policy itself |
| dynamic | rollouts | the policy, drawn until enough groups differ (DAPO) |
| pass_rate_band | rollouts | the policy, on prompts that the first model solves sometimes (RIF) |
| prefix | rollouts | the policy, one of each group begun with a piece of a demonstration (Prefix-RFT) |
| relift | rollouts, demonstrations | the policy, and a buffer of what it failed at (ReLIFT) |
| expert_iteration | demonstrations | its own correct completions, round by round |
| rft | demonstrations | correct completions of the first model |
| star | demonstrations | correct and rationalised completions, each round from the first weights (STaR) |

A source is a dataclass whose fields are the recipe's parameters, filed in `SOURCES`. `draw` returns updates; what it
must remember between steps goes into `state_dict`.
"""

from surgery.training.sources.base import COLUMNS, SOURCES, Source, Together, Update, joined
from surgery.training.sources.buffer import ReLIFT
from surgery.training.sources.dataset import Dataset
from surgery.training.sources.on_policy import Dynamic, OnPolicy, PassRateBand
from surgery.training.sources.prefix import Prefix
from surgery.training.sources.self_training import ExpertIteration, RejectionSampling, STaR

__all__ = [
    "COLUMNS", "SOURCES", "Dataset", "Dynamic", "ExpertIteration", "OnPolicy", "PassRateBand", "Prefix", "ReLIFT",
    "RejectionSampling", "STaR", "Source", "Together", "Update", "joined",
]  # fmt: skip
