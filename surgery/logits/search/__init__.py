"""Search over completions: choosing among several, trees of steps, decoding by a reward that looks ahead.

| file | holds | paper |
|---|---|---|
| selection.py | `majority`, `weighted_vote`, `best_of_n`: one of several completions | arXiv:2203.11171 |
| clusters.py | clusters by answer, by any key (an executed trace) or by vectors, ranked; medoids | arXiv:2203.07814 |
| rebase.py | `Rebase`: a tree of steps whose budget goes to steps that score well | arXiv:2408.00724 |
| transfer.py | `TransferQ`: tokens by the value that an aligned model's continuations have | arXiv:2405.20495 |
| steps.py | REBASE's solutions as steps; `contrast_scorer`, `text_scorer`: what rates a step | |
| forwards.py | tokens that a search makes a model read, counted; several models that read one text | |

Nothing here needs more of a model than `surgery.decoding.Decoder`, which an ensemble is too.
"""

from surgery.logits.search.clusters import Cluster, by_answer, by_key, by_vectors, medoid, ranked
from surgery.logits.search.forwards import Counted
from surgery.logits.search.rebase import Rebase, shares
from surgery.logits.search.selection import (
    SELECTORS,
    WEIGHTS,
    Choice,
    Sample,
    best_of_n,
    majority,
    samples,
    weighted_vote,
)
from surgery.logits.search.steps import Path, Scorer, Step, Tree, contrast_scorer, text_scorer
from surgery.logits.search.transfer import Indirect, TransferQ, Transferred, transfer_q

__all__ = [
    "SELECTORS", "WEIGHTS", "Choice", "Cluster", "Counted", "Indirect", "Path", "Rebase", "Sample", "Scorer", "Step",
    "TransferQ", "Transferred", "Tree", "best_of_n", "by_answer", "by_key", "by_vectors", "contrast_scorer", "majority",
    "medoid", "ranked", "samples", "shares", "text_scorer", "transfer_q", "weighted_vote",
]  # fmt: skip
