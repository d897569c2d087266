"""Features of a model and of a fine-tuning: what a dictionary's latents stand for, whose they are, and what they do.

    reader = Reader(crosscoder, [base, tuned], "resid_post.2", tokenizer)
    latent_scaling(crosscoder, reader.rows(texts)).tuned_only()
    found = examples(reader, texts, [17])
    found.html(17), found.rich(17)
    ablate_latents(reader, prompts, logit_diff(answers), [17])

| file           | what is there                                                                               |
|----------------|---------------------------------------------------------------------------------------------|
| kinds.py       | of a crosscoder: base only, shared, tuned only, and whether that is so (latent scaling)     |
| changes.py     | of a dictionary of one model that reads both: which latents fine-tuning made and lost       |
| reader.py      | `Reader`: a dictionary, the models and the site that it reads; texts to codes               |
| examples.py    | where latents are most active, in one pass over text; coloured text, histograms             |
| best.py        | the k best of each latent, kept while text streams by                                       |
| effects.py     | what a latent does: taken out, set or added, exactly; all of them at once to first order    |
| tags.py        | latents that are active at given tokens (<think>) and not elsewhere                         |
| words.py       | tokens as they read; which tokens spell a string; tokens that a latent promotes             |
| probing.py     | k-sparse probing: how well k latents alone tell labels                                      |
| page.py        | a page of features, self-contained                                                          |
| overview.py    | everything at once: which latents to look at, and what there is to say of each              |
"""

from analysis.features.changes import Changed, changed
from analysis.features.effects import ablate_latents, attribute_latents, effect_figure, latent_edit, steer_latents
from analysis.features.examples import Examples, examples
from analysis.features.kinds import EDGES, KINDS, Scaling, latent_scaling, relative_norms
from analysis.features.overview import Overview, overview
from analysis.features.page import feature_page
from analysis.features.probing import SparseProbe, pooled, sparse_probe
from analysis.features.reader import Reader
from analysis.features.tags import TagScores, tag_scores
from analysis.features.words import promoted

__all__ = [
    "EDGES", "KINDS", "Changed", "Examples", "Overview", "Reader", "Scaling", "SparseProbe", "TagScores",
    "ablate_latents", "attribute_latents", "changed", "effect_figure", "examples", "feature_page", "latent_edit",
    "latent_scaling", "overview", "pooled", "promoted", "relative_norms", "sparse_probe", "steer_latents",
    "tag_scores",
]  # fmt: skip
