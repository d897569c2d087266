"""Which latents an overview shows, of a crosscoder, of one dictionary in both models, and of any other."""

import json

import numpy as np
import pytest
import torch

from analysis.features import Reader, latent_scaling, overview
from surgery.errors import SurgeryError
from surgery.models import load
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import TopK
from surgery.tasks import make_task

SITE = "resid_post.3"
TEXTS = [e.prompt + e.response for e in make_task("shift").examples(20, seed=1)]
N = 30


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    (base, tokenizer), (tuned, _) = load("tiny-base", "float32"), load("tiny-shift", "float32")
    return base, tuned, tokenizer


@pytest.fixture(scope="module")
def cross(models):
    """Latent j writes into the tuned model with a weight that grows with j, into the base with one that falls."""
    dictionary = Dictionary(192, N, TopK(k=6, by_norm=False), models=2, norm=1.0)
    with torch.no_grad():
        weight = torch.linspace(0, 1, N)[:, None]
        dictionary.decoder[:, :96] *= 1 - weight
        dictionary.decoder[:, 96:] *= weight
    return Reader(dictionary, list(models[:2]), SITE, models[2])


def test_of_a_crosscoder_by_norm(cross):
    scaling = latent_scaling(cross.dictionary, cross.rows(TEXTS))
    used = np.flatnonzero((scaling.rows > 0).numpy()).tolist()
    only = scaling.tuned_only().tolist()
    tuned, base = overview(cross, TEXTS, top=4), overview(cross, TEXTS, top=4, show="base")
    assert tuned.latents == [*sorted(only, reverse=True), *(j for j in used[::-1] if j not in only)][:4]
    assert base.latents == used[:4]
    assert sum(tuned.kinds.values()) == len(scaling.norm) - int(scaling.norm.isnan().sum())
    assert {"kind", "relative norm", "nu error", "norm base", "fires"} <= set(tuned.rows()[0])
    assert tuned.tokens.keys() == set(tuned.latents) and tuned.tokens != base.tokens
    told = json.dumps(tuned.to_dict(2), default=float)
    assert '"promotes"' in told and all(len(row["examples"]) <= 2 for row in tuned.to_dict(2)["latents"])
    assert len(tuned.plot().axes) == 2 and f"latent-{tuned.latents[0]}" in tuned.page("x").document


def test_of_one_dictionary_in_both_models(models):
    base, tuned, tokenizer = models
    dictionary = Dictionary(96, N, TopK(k=4))
    readers = [Reader(dictionary, model, SITE, tokenizer) for model in (base, tuned)]
    rising, falling = overview(readers, TEXTS, top=3), overview(readers, TEXTS, top=3, show="base")
    change = dict(zip(rising.changes.latents, rising.changes.difference().mean, strict=True))
    assert all(change[j] > 0 for j in rising.latents) and all(change[j] < 0 for j in falling.latents)
    assert set(rising.sets) == {"base", "tuned"} and {"fate", "fires base", "fires tuned"} <= set(rising.rows()[0])
    assert {e["model"] for row in rising.to_dict()["latents"] for e in row["examples"]} >= {"tuned"}


def test_both_models_read_as_much_of_a_text_as_the_examples_show(models):
    dictionary = Dictionary(96, N, TopK(k=4), norm=1.0)
    readers = [Reader(dictionary, m, SITE, models[2], max_tokens=4) for m in models[:2]]
    found = overview(readers, TEXTS, top=3)
    assert found.changes.tokens.tolist() == [3] * len(TEXTS)


def test_of_any_other_by_use_and_by_name(models):
    reader = Reader(Dictionary(96, N, TopK(k=4)), models[0], SITE, models[2])
    found = overview(reader, TEXTS, top=5)
    sums = overview(reader, TEXTS, range(N)).sets[""].sums
    assert found.latents == np.argsort(-sums, kind="stable")[:5].tolist() and found.kinds == {}
    assert overview(reader, TEXTS, [4, 2]).latents == [4, 2]
    (one, same, other) = (overview(reader, TEXTS, top=5, random=2, seed=s).to_dict() for s in (1, 1, 2))
    assert one == same != other
    heads = Reader(Dictionary(24, N, TopK(k=4)), models[0], "z.3.1", models[2])
    assert overview(heads, TEXTS, top=2).tokens == {}


def test_what_is_refused(models, cross):
    base, tuned, tokenizer = models
    one = Reader(Dictionary(96, N, TopK(k=4)), base, SITE, tokenizer)
    other = Reader(Dictionary(96, N, TopK(k=4)), tuned, SITE, tokenizer)
    for act, said in ((lambda: overview(one, TEXTS, show="tuned"), "no latents of kind 'tuned'"),
                      (lambda: overview([one, other], TEXTS), "one dictionary at one site"),
                      (lambda: overview(one, []), "no text"), (lambda: overview(one, TEXTS, [N]), f"no latent {N}"),
                      (lambda: overview([one, one], TEXTS), "leans to the tuned model")):  # fmt: skip
        with pytest.raises(SurgeryError, match=said):
            act()
