"""What did fine-tuning change? A base and its fine-tuning read the same texts, once, and are compared.

    found = diff(pair, texts)                      # KL, agreement, norms, cosine, CKA, Procrustes in one pass
    found.summary(), found.plot(), found.save("what-changed")
    token_kl(pair, texts).html()                   # the texts, coloured by how differently the next token is predicted
    activation_norms(pair, texts).difference.top(20, layer=5)

| call                                  | compares                                                | gives             |
|---------------------------------------|---------------------------------------------------------|-------------------|
| `token_kl`                            | next-token distributions, KL(tuned || base)             | by token          |
| `agreement`                           | most likely next tokens                                 | 0 or 1 by token   |
| `activation_norms`                    | activations: L2 of the difference, absolute, relative   | by token, layer   |
| `similarity_by_layer`                 | activations: cosine, CKA, Procrustes                    | by layer          |
| `difference_lens`                     | activations: what is added whatever the text            | tokens, a vector  |
| `difference_pca`                      | activations: the directions of the difference           | directions        |
| `pattern_divergence`                  | attention patterns, Jensen-Shannon                      | by layer, head    |
| `direct_logit_attribution_difference` | what heads and MLPs write into an answer                | by component      |
| `diff_mining`                         | logits: the tokens most often raised, and lowered       | by token          |

Weights between and beyond the two models, W_b + a (W_t - W_b), are made by `surgery.weights` (`TaskVector`); a pair of
the base and such a model is compared like any other.
Methods and defaults after the diffing-toolkit (Minder et al. 2025, arXiv:2510.13900); all of a token is measured "tuned
given base": KL(tuned || base), x_tuned - x_base.

Files: compare.py (`diff`), measures.py and per_token.py (what it measures), mean_difference.py, mining.py, patterns.py,
lens.py (the logit lens), logit_attribution.py, figures.py.
"""

from analysis.diff.compare import (
    DEFAULT,
    ActivationNorms,
    Diff,
    activation_norms,
    agreement,
    diff,
    similarity_by_layer,
    token_kl,
)
from analysis.diff.lens import logit_lens
from analysis.diff.logit_attribution import direct_logit_attribution_difference
from analysis.diff.mean_difference import difference_lens, difference_pca
from analysis.diff.measures import MEASURES
from analysis.diff.mining import diff_mining
from analysis.diff.patterns import pattern_divergence

__all__ = [
    "DEFAULT", "MEASURES", "ActivationNorms", "Diff", "activation_norms", "agreement", "diff", "diff_mining",
    "difference_lens", "difference_pca", "direct_logit_attribution_difference", "logit_lens", "pattern_divergence",
    "similarity_by_layer", "token_kl",
]  # fmt: skip
