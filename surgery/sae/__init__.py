"""Sparse autoencoders: dictionaries of a model's activations, trained on sparse codes from end to end.

| to look for | file |
|---|---|
| codes as (row, latent, value), with exact gradients and one dense product | `codes.py` |
| which latents a row may use: top k, top k over the batch, above a threshold | `sparsity.py` |
"""
