"""Surgery on what models say next: several models read the same response, and a sum of their log-probabilities decodes.

    large, tuned, small = member("large"), member("small-tuned"), member("small")
    generate(large + 1.0 * (tuned - small), ["How tall is it?"])       # emulated fine-tuning

| file | holds |
|---|---|
| ensemble.py | `member`, `Ensemble`: the algebra, and a `Decoder` wherever one is taken |
| rules.py | EFT, proxy-tuning, contrast, UniR, CGE, ...: a line each |
| combine.py | the arithmetic and the filters, as pure functions |
| members.py, lockstep.py | what a member reads of a prompt; one forward pass a model and token |
| vocabulary.py, foreign.py | which token of one model is which of another; a tokenizer that splits otherwise |
| generate.py | `generate`, `stream` |
| speculative.py | `speculate`: one member drafts, the others judge blocks |
| hooks.py | `as_generate`, `EnsembleLogitsProcessor`: an ensemble inside transformers' own `generate` |
| score.py | `log_likelihood`, `perplexity` of given texts |
| search/ | Transfer Q*, REBASE, votes, clusters, best of n |
| explore.py, contrasts.py | `explore`: what is new in a fine-tuning's data; given tokens and texts by contrast |
"""

from surgery.logits.combine import Filter
from surgery.logits.contrasts import Contrasted, TokenContrast, contrast_texts, contrast_tokens
from surgery.logits.ensemble import Ensemble, member
from surgery.logits.explore import Exploration, explore
from surgery.logits.generate import Generation, Piece, generate, stream
from surgery.logits.hooks import EnsembleLogitsProcessor, as_generate
from surgery.logits.members import Member
from surgery.logits.score import Scored, log_likelihood, perplexity
from surgery.logits.speculative import Speculation, speculate

__all__ = [
    "Contrasted", "Ensemble", "EnsembleLogitsProcessor", "Exploration", "Filter", "Generation", "Member", "Piece",
    "Scored", "Speculation", "TokenContrast", "as_generate", "contrast_texts", "contrast_tokens", "explore", "generate",
    "log_likelihood", "member", "perplexity", "speculate", "stream",
]  # fmt: skip
