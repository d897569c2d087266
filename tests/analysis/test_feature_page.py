"""A page of features: self-contained, nothing of a token is markup, every latent has its numbers."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from analysis.features import (
    Reader,
    ablate_latents,
    attribute_latents,
    changed,
    effect_figure,
    examples,
    feature_page,
    latent_scaling,
    promoted,
    steer_latents,
)
from analysis.metrics import answer_tokens, logit_diff
from surgery.errors import SurgeryError
from surgery.models import load
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import TopK
from surgery.tasks import make_task

SITE = "resid_post.2"
TEXTS = [e.prompt + e.response for t in ("copy", "shift") for e in make_task(t).examples(10, seed=1)]


class Seen(HTMLParser):
    """Tags, and the text between."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    (base, tokenizer), (tuned, _) = load("tiny-base", "float32"), load("tiny-shift", "float32")
    return base, tuned, tokenizer


@pytest.fixture(scope="module")
def cross(models):
    base, tuned, tokenizer = models
    dictionary = Dictionary(192, 30, TopK(k=4), models=2, norm=1.0)
    with torch.no_grad():
        dictionary.bias[29] = -1e3  # never active
    return Reader(dictionary, [base, tuned], SITE, tokenizer)


def metric():
    prompts = [e.prompt + "#" for e in make_task("shift").examples(5, seed=2)]
    _, tokenizer = load("tiny-base", "float32")
    return prompts, logit_diff(answer_tokens(tokenizer, [["b", "a"]] * 5))


def test_a_page_of_a_crosscoder(cross, models):
    found = examples(cross, TEXTS, k=3, random=2)
    used = [int(j) for j in np.argsort(-found.fired)[:3]]
    dead = [29]
    assert found.fired[29] == 0
    scaling = latent_scaling(cross.dictionary, cross.rows(TEXTS))
    prompts, m = metric()
    effects = ablate_latents(cross, prompts, m, used)
    tokens = dict(zip(used, promoted(models[1], cross.decoder()[used], 3, models[2]), strict=True))
    page = feature_page(cross.dictionary, found, latents=used + dead, scaling=scaling, tokens=tokens, effects=effects,
                        title="<script>alert(1)</script>")  # fmt: skip
    seen = Seen(page.document)
    assert "script" not in {tag for tag, _ in seen.tags} and "<script>alert(1)" in seen.text
    assert not re.search(r"(src|href)=\"(?!data:)", page.document) and "http" not in re.sub(
        r'"data:[^"]*"|http-equiv', "", page.document
    )
    ids = [attrs["id"] for tag, attrs in seen.tags if "id" in attrs]
    assert ids == [f"latent-{j}" for j in used + dead]
    assert sum(tag == "svg" for tag, _ in seen.tags) == len(used)
    assert "never active" in seen.text and "nan" not in seen.text
    for word in ("nu error", "nu reconstruction", "norm base", "norm tuned", "fires", "promotes: '", "suppresses: '",
                 "effect on logit_diff", "by chance"):  # fmt: skip
        assert word in seen.text
    rects = [a for tag, a in seen.tags if tag == "rect"]
    assert rects and all(float(a["height"]) >= 0 and float(a["y"]) >= 0 for a in rects)


def test_a_page_of_one_dictionary_in_both_models(models):
    base, tuned, tokenizer = models
    dictionary = Dictionary(96, 30, TopK(k=4), norm=1.0)
    sets = {name: examples(Reader(dictionary, model, SITE, tokenizer), TEXTS, k=2)
            for name, model in (("base", base), ("tuned", tuned))}  # fmt: skip
    changes = changed(dictionary, base, tuned, TEXTS, SITE, tokenizer)
    text = Seen(feature_page(dictionary, sets, latents=changes.top(3), changes=changes).document).text
    for word in ("fires base", "fires tuned", "examples, base", "examples, tuned", "fate", "overlap"):
        assert word in text


def test_promoted_tokens_are_those_of_the_unembedding(models):
    tuned, tokenizer = models[1], models[2]
    norm, head = tuned.model.norm.weight.detach(), tuned.lm_head.weight.detach()
    direction = head[12] / norm
    ((up, down),) = promoted(tuned, direction[None], 4, tokenizer)
    logits = head @ (norm * direction / direction.square().mean().sqrt())
    assert [t for t, _ in up] == [tokenizer.decode([i]) for i in logits.topk(4).indices.tolist()]
    np.testing.assert_allclose([v for _, v in up], logits.topk(4).values, rtol=1e-3)
    np.testing.assert_allclose([v for _, v in down], -(-logits).topk(4).values, rtol=1e-3)
    with pytest.raises(SurgeryError, match="96 wide, and these 24"):
        promoted(tuned, torch.zeros(1, 24))


def test_what_does_not_belong_together_is_refused(cross, models):
    found = examples(cross, TEXTS, [1, 2])
    with pytest.raises(SurgeryError, match="latent 5 were not looked for"):
        feature_page(cross.dictionary, found, latents=[5])
    with pytest.raises(SurgeryError, match="not of this dictionary"):
        feature_page(Dictionary(96, 2, TopK(k=1)), found)
    with pytest.raises(SurgeryError, match="needs examples"):
        feature_page(cross.dictionary, {})


def test_figures_of_effects(cross):
    prompts, m = metric()
    first = attribute_latents(cross, prompts, m)
    best = [j for j, _ in first.top(3, absolute=True)]
    exact = ablate_latents(cross, prompts, m, best)
    both = effect_figure({"first order": first, "exact": exact}).axes[0]
    assert [t.get_text() for t in both.get_xticklabels()] == [str(j) for j in best]
    low, high = both.get_ylim()
    assert low <= exact.mean.min() and exact.mean.max() <= high
    one = effect_figure(ablate_latents(cross, prompts, m, [tuple(best), best[0]]))
    assert "+".join(map(str, best)) in [t.get_text() for t in one.axes[0].get_xticklabels()] and not one.legends
    assert effect_figure(steer_latents(cross, prompts, m, best, [0, 1])).axes[0].get_xlabel() == "amount"
    with pytest.raises(SurgeryError, match="in common"):
        effect_figure({"a": exact, "b": ablate_latents(cross, prompts, m, [(0, 1)])})
