"""Patching across the models of a pair (CMAP): the same prompt in both, activations of one written into the other.

    groups = {"value fetcher": ["z.9.2", "z.10.0"], "position detector": ["z.6.1"]}
    found = cmap(pair, prompts, logit_diff(answers), groups, positions={"value fetcher": -1, "position detector": -3})
    found.normalized()                              # recovery by group, beside random groups of the same size
    cmap(pair, prompts, metric, "z")                # by head
    transplant(pair, prompts, metric, "resid_pre")  # by layer and position: from where on does the stream suffice?

Prakash et al., ICLR 2024 (arXiv:2402.14811). Values are effects, the target's metric with the change minus without;
`normalized()` is recovery = (patched - target) / (source - target), the ratio of batch means: 0 nothing, 1 all.

| sources | what is written |
|---|---|
| "outputs" | the components (z, attn_out, mlp_out, resid_pre, ...) at the group's position, at all if none is named |
| "inputs" | q at the group's position, k and v before it; only some of them with "q", "kv", ... |

With inputs, every other position is kept as in the target's own run (z of all its heads frozen), so that nothing but
the group's position sees the new q, k and v; what it then writes, later tokens read as usual. Inputs are what the
projections give: norms and rotations behind them are the target's.

Files: calls.py (`cmap`, `transplant`), groups.py (the effect of writing groups of components).
"""

from analysis.cross_model.calls import cmap, transplant

__all__ = ["cmap", "transplant"]
