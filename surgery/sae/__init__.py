"""Sparse autoencoders: dictionaries of a model's activations, trained on sparse codes from end to end.

    from surgery.sae.dictionary import Dictionary
    from surgery.sae.rules import BatchTopK

| to look for | file |
|---|---|
| the dictionary: encoder, decoder; transcoders and crosscoders too | `dictionary.py` |
| what makes it sparse, and its losses: standard, gated, JumpReLU, TopK, BatchTopK, Matryoshka | `rules.py` |
| training several dictionaries over one stream | `train.py` |
| activations of any site, of one model or of several on the same tokens, shuffled | `activations.py` |
| FVU and the like in one pass; planted directions, and how many are found | `metrics.py` |
| activations on disk, for sweeps | `cache.py` |
| files of SAELens, eai-sparsify and dictionary_learning, in and out | `formats/` |
| codes as (row, latent, value), with exact gradients and one dense product | `codes.py` |
| which latents a row may use: top k, top k over the batch, above a threshold | `sparsity.py` |
"""
