"""Latents of one dictionary in two models, and latents at tags: against sums over single texts and brute force."""

import numpy as np
import pytest
import torch

from analysis.features import Reader, changed, tag_scores
from analysis.features import changes as changes_module
from analysis.features.tags import auroc
from analysis.similarity import auc
from surgery.errors import SurgeryError
from surgery.models import encode, load
from surgery.sae.activations import Stream
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import Standard, TopK
from surgery.tasks import make_task

SITE = "resid_post.2"
N = 32
ROWS = [e.row(t) for t in ("copy", "chain", "shift") for e in make_task(t).examples(8, seed=2)]
TEXTS = [row["prompt"] + row["completion"] for row in ROWS]


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    (base, tokenizer), (tuned, _) = load("tiny-base", "float32"), load("tiny-shift", "float32")
    return base, tuned, tokenizer


def codes_of(dictionary, model, tokenizer, text):
    (rows,) = Stream(model, [SITE], [encode(tokenizer, [text])])
    return dictionary.codes(rows[SITE]).dense().detach().double().numpy()


# ---- changed


@pytest.fixture(scope="module")
def both(models):
    dictionary = Dictionary(96, N, TopK(k=4), seed=1)
    return dictionary, changed(dictionary, *models[:2], TEXTS, SITE, models[2], batch_size=5)


def test_sums_are_those_of_every_text(models, both):
    dictionary, found = both
    tokens = overlap = 0
    for i, text in enumerate(TEXTS):
        codes = [codes_of(dictionary, model, models[2], text) for model in models[:2]]
        for side in (0, 1):
            np.testing.assert_array_equal(found.active[side, i], (codes[side] > 0).sum(0))
            np.testing.assert_allclose(found.sums[side, i], codes[side].sum(0), rtol=1e-4, atol=1e-5)
        overlap += ((codes[0] > 0) & (codes[1] > 0)).sum(0)
        tokens += len(codes[0])
    np.testing.assert_array_equal(found.both, overlap)
    rates = found.active.sum(1) / tokens
    np.testing.assert_allclose(found.difference().mean, rates[1] - rates[0], atol=1e-12)
    np.testing.assert_allclose(found.rates(model="base").mean, rates[0], atol=1e-12)
    np.testing.assert_allclose(found.difference([3], "mean").mean, found.sums[1, :, 3].sum() / tokens
                               - found.sums[0, :, 3].sum() / tokens, rtol=1e-5)  # fmt: skip
    table = found.to_dataframe()
    assert ((table["low"] <= table["difference"] + 1e-12) & (table["difference"] <= table["high"] + 1e-12)).all()


def test_made_lost_and_shared(models):
    """Directions that one model alone has: latents that read what both models have, and what only one has."""
    base, tuned, tokenizer = models
    batch = encode(tokenizer, TEXTS)
    (rows,) = Stream([base, tuned], [SITE], [batch])
    before, after = rows[SITE].chunk(2, dim=1)
    dictionary = Dictionary(96, 3, Standard(), centered=False)
    with torch.no_grad():  # linear readers of who it is, trained by least squares on these rows
        x = torch.cat([before, after]).double()
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        y = torch.cat([-torch.ones(len(before)), torch.ones(len(after))]).double()
        w = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
        dictionary.encoder.copy_(torch.stack([w[:-1], -w[:-1], torch.zeros(96)]))
        dictionary.bias.copy_(torch.tensor([float(w[-1]) - 0.5, -float(w[-1]) - 0.5, 1.0]))
    found = changed(dictionary, base, tuned, TEXTS, SITE, tokenizer)
    assert found.fates == ["made", "lost", "shared"]
    assert found.to_dataframe()["overlap"][2] == 1 and found.top(2) != [2] and 2 not in found.top(2)
    same = changed(dictionary, base, base, TEXTS, SITE, tokenizer)
    assert not same.difference().values.any() and set(same.fates) <= {"shared", ""}


def test_few_texts_are_unsure(models, both):
    dictionary, found = both
    fates = np.array(found.fates)
    low, high = found.difference().interval()
    holds = (low <= 0) & (high >= 0)
    assert (fates[~holds] != "unsure").all() and not holds[np.isin(fates, ["made", "lost"])].any()
    some = changed(dictionary, *models[:2], TEXTS, SITE, models[2], latents=[5, 2])
    np.testing.assert_array_equal(some.active, found.active[:, :, [5, 2]])
    with pytest.raises(SurgeryError, match="Latent 3 was not looked at"):
        some.rates([3])


def test_changed_refuses(models, both, monkeypatch):
    base, tuned, tokenizer = models
    with pytest.raises(SurgeryError, match="crosscoder"):
        changed(Dictionary(192, 8, Standard(), models=2), base, tuned, TEXTS, SITE, tokenizer)
    with pytest.raises(SurgeryError, match="of 24 numbers, found 96"):
        changed(Dictionary(24, 8, Standard()), base, tuned, TEXTS, SITE, tokenizer)
    monkeypatch.setattr(changes_module, "LIMIT", 100)
    with pytest.raises(SurgeryError, match="GiB"):
        changed(both[0], base, tuned, TEXTS, SITE, tokenizer)


def test_changed_figure(both):
    axes = both[1].plot().axes[0]
    assert axes.get_xscale() == "log" and len(axes.collections) >= 2


# ---- tags


@pytest.mark.parametrize("tag", ["#", "=#", ["#", "="], [-1], "ab"])
def test_scores_are_those_of_every_text(models, tag):
    base, _, tokenizer = models
    dictionary = Dictionary(96, N, TopK(k=4), seed=1)
    texts = TEXTS if tag != "ab" else [*TEXTS, "c abcab=#abcab"]
    found = tag_scores(Reader(dictionary, base, SITE, tokenizer, batch_size=5), texts, tag)
    at, elsewhere, scores, who = [], [], [], []
    for i, text in enumerate(texts):
        codes = codes_of(dictionary, base, tokenizer, text)
        marks = np.zeros(len(text), dtype=bool)  # one token a letter
        for one in [tag] if isinstance(tag, str) else tag:
            if isinstance(one, int):
                marks[one] = True
            else:
                for start in [j for j in range(len(text)) if text.startswith(one, j)]:
                    marks[start : start + len(one)] = True
        at.append(codes[marks])
        elsewhere.append(codes[~marks])
        if marks.any():
            who.append(i)
            scores.append(codes[marks].mean(0) - codes[~marks].mean(0))
    up, down = np.concatenate(at), np.concatenate(elsewhere)
    assert found.score.labels == who and found.tags == len(up)
    np.testing.assert_allclose(found.score.values, scores, atol=1e-5)
    np.testing.assert_allclose(found.auroc, auc(up, down).value, atol=1e-9)
    np.testing.assert_allclose(found.at, (up > 0).mean(0))
    np.testing.assert_allclose(found.outside, (down > 0).mean(0))
    assert sorted(found.exclusive) == np.flatnonzero((up > 0).any(0) & ~(down > 0).any(0)).tolist()
    table = found.to_dataframe()
    assert table["score"].is_monotonic_decreasing and table["exclusive"].sum() == len(found.exclusive)


def test_auroc_of_sparse_values_with_ties():
    draw = np.random.default_rng(0)
    dense = np.round(draw.random((200, 6)) * (draw.random((200, 6)) < 0.4), 1)
    dense[:, 4], dense[:, 5] = 0, 1
    mark = draw.random(200) < 0.3
    row, column = np.nonzero(dense)
    found = auroc(column, dense[row, column], mark[row], 6, int(mark.sum()), int((~mark).sum()))
    np.testing.assert_allclose(found, auc(dense[mark], dense[~mark]).value, atol=1e-12)
    assert found[4] == 0.5 and found[5] == 0.5
    assert (auroc(column[:0], dense[0, :0], mark[:0], 3, 4, 5) == 0.5).all()


def test_an_exclusive_latent_is_found(models):
    """A latent that reads the embedding of '#' alone, planted."""
    base, _, tokenizer = models
    dictionary = Dictionary(96, 4, Standard(), centered=False, seed=0)
    rows = base.get_input_embeddings().weight.detach()
    mark = tokenizer.convert_tokens_to_ids("#")
    others = torch.cat([rows[:mark], rows[mark + 1 :]])
    direction = torch.linalg.lstsq(torch.cat([rows[mark][None], others]), torch.eye(len(rows))[:, :1]).solution[:, 0]
    with torch.no_grad():
        dictionary.encoder[2], dictionary.bias[2] = direction, -0.5
    reader = Reader(dictionary, base, "resid_pre.0", tokenizer)
    found = tag_scores(reader, TEXTS, "#")
    assert 2 in found.exclusive and found.auroc[2] == 1 and found.at[2] == 1
    assert found.plot().axes[0].get_xscale() == "log"
    by_function = tag_scores(reader, TEXTS, lambda batch: batch.ids == mark)
    np.testing.assert_array_equal(by_function.score.values, found.score.values)


def test_tags_that_do_not_occur_are_refused(models):
    reader = Reader(Dictionary(96, N, TopK(k=4)), models[0], SITE, models[2])
    for tags, said in (("<think>", "'<think>' occurs in none of these 24 texts"), (["#", "%%"], "'%%' occurs in none"),
                       ("", "empty string"), ([500], "500 occurs in none")):  # fmt: skip
        with pytest.raises(SurgeryError, match=said):
            tag_scores(reader, TEXTS, tags)
    with pytest.raises(SurgeryError, match="tokenizer"):
        tag_scores(Reader(reader.dictionary, models[0], SITE), [[1, 2, 3]], "a")
    with pytest.raises(SurgeryError, match="no text"):
        tag_scores(reader, [], "#")
