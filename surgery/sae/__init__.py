"""Sparse autoencoders: dictionaries of a model's activations, trained on sparse codes from end to end.

    from surgery.sae.run import train
    from surgery.sae.dictionary import Dictionary
    from surgery.sae.rules import BatchTopK

| to look for | file |
|---|---|
| the dictionary: encoder, decoder; transcoders and crosscoders too | `dictionary.py` |
| what makes it sparse, and its losses: standard, gated, JumpReLU, TopK, BatchTopK, Matryoshka | `rules.py` |
| from a recipe to dictionaries on disk, in one call | `run.py`, `recipe.py`, `recipes/` |
| which activations a run reads; what its dictionaries are worth | `source.py`, `evaluation.py` |
| training several dictionaries over one stream; what resuming needs | `train.py`, `checkpoints.py` |
| activations of any site, of one model or of several on the same tokens, shuffled | `activations.py` |
| texts as sequences of tokens, and which of them count | `text.py` |
| activations on disk, for sweeps | `cache.py` |
| FVU and the like in one pass; planted directions, and how many are found | `metrics.py` |
| what a model loses with a dictionary in it: CE and KL recovered | `spliced.py` |
| fine-tuning through a dictionary (SAE-tuning), and its controls by a recipe | `tune.py`, `tune_*.py`, `stand_in.py` |
| files: our own, and SAELens's, eai-sparsify's and dictionary_learning's | `formats/` |
| codes as (row, latent, value), with exact gradients and one dense product | `codes.py` |
| which latents a row may use: top k, top k over the batch, above a threshold | `sparsity.py` |
"""
