"""k-sparse probes find a planted latent and not a random one, choose without the held-out, and pool as said."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from analysis.features import Reader, pooled, sparse_probe
from analysis.features.probing import SELECTIONS, l1, mean_difference
from surgery.errors import SurgeryError
from surgery.models import encode, load
from surgery.sae.activations import Stream
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import TopK
from surgery.tasks import make_task

TEXTS = [r["prompt"] + r["completion"] for t in ("copy", "chain") for r in (
    e.row(t) for e in make_task(t).examples(20, seed=1))]  # fmt: skip


def planted(n=120, latents=60, seed=0, classes=2):
    """Latent 7 says the class (of two), or 7 + c is active in class c; others are active by chance."""
    draw = np.random.default_rng(seed)
    codes = draw.random((n, latents)) * (draw.random((n, latents)) < 0.1)
    y = np.arange(n) % classes
    for c in range(1 if classes == 2 else classes):
        codes[:, 7 + c] = (y == (1 if classes == 2 else c)) * (1 + draw.random(n))
    return codes, [f"class {c}" for c in y]


@pytest.mark.parametrize("select", list(SELECTIONS))
def test_a_planted_latent_is_found(select):
    codes, labels = planted()
    raw = codes @ np.random.default_rng(1).normal(size=(60, 12))
    found = sparse_probe(codes, labels, raw, ks=(1, 2, 5), select=select)
    assert found.accuracy[0, 0] == 1 and all(fold == [7] for fold in found.chosen[1])
    assert found.accuracy[1, 0] < 0.75 and found.majority == 0.5
    assert found.raw is not None and 0.5 < float(found.raw.mean) <= 1
    assert found.correct.values.shape == (120, 2, 3) and set(np.unique(found.correct.values)) <= {0.0, 1.0}
    assert found.stable(1) == [(7, 5)] and found.correct.columns["label"] == labels


def test_three_classes_need_more_latents():
    codes, labels = planted(classes=3)
    found = sparse_probe(codes, labels, ks=(1, 3))
    assert found.accuracy[0, 1] == 1 and 0.4 < found.accuracy[0, 0] < 0.8 and found.raw is None
    assert all(sorted(fold) == [7, 8, 9] for fold in found.chosen[3])


def test_labels_by_chance_are_not_told():
    """Were latents chosen with the held-out examples, 5 of 400 would tell labels well above chance."""
    draw = np.random.default_rng(0)
    codes = draw.random((60, 400)) * (draw.random((60, 400)) < 0.2)
    accuracy = [sparse_probe(codes, draw.permutation([0, 1] * 30).tolist(), ks=(5,), seed=s).accuracy[0, 0]
                for s in range(6)]  # fmt: skip
    assert abs(np.mean(accuracy) - 0.5) < 0.1


def test_selections_against_their_definition():
    codes, labels = planted(seed=3)
    y = np.array([int(label[-1]) for label in labels])
    apart = np.abs(codes[y == 1].mean(0) - codes[y == 0].mean(0))
    matrix = csr_matrix(codes.T)
    np.testing.assert_array_equal(mean_difference(matrix, y, 6), np.argsort(-apart, kind="stable")[:6])
    chosen = l1(matrix, y, 6)
    assert chosen[0] == 7 and len(set(chosen.tolist())) == 6
    assert len(set(l1(matrix, y, 60).tolist())) == 60  # filled up behind the end of the path


def test_groups_are_not_split():
    """Every group has a latent of its own that tells its label: of no use where groups are held out whole."""
    n, groups = 80, np.arange(80) // 4
    y = np.random.default_rng(0).permutation(np.arange(20) % 2)[groups]
    codes = np.zeros((n, 20))
    codes[np.arange(n), groups] = 1 + y
    open_, held = (sparse_probe(codes, y.tolist(), ks=(20,), groups=g) for g in (None, groups.tolist()))
    assert open_.accuracy[0, 0] == 1 and held.accuracy[0, 0] < 0.8


@pytest.mark.parametrize("pool", ["mean", "max", "last"])
def test_pooling(pool):
    torch.set_num_threads(1)
    model, tokenizer = load("tiny-base", "float32")
    dictionary = Dictionary(96, 40, TopK(k=4))
    reader = Reader(dictionary, model, "resid_post.1", tokenizer, batch_size=7)
    codes, raw = pooled(reader, TEXTS, pool)
    for i, text in enumerate(TEXTS):
        (rows,) = Stream(model, ["resid_post.1"], [encode(tokenizer, [text])])
        x = rows["resid_post.1"].double().numpy()
        f = dictionary.codes(rows["resid_post.1"]).dense().detach().double().numpy()
        how = {"mean": lambda v: v.mean(0), "max": lambda v: v.max(0), "last": lambda v: v[-1]}[pool]
        np.testing.assert_allclose(raw[i], how(x), atol=1e-4)
        np.testing.assert_allclose(codes[i].toarray()[0], how(f), atol=1e-4)
    labels = [text[0] for text in TEXTS]
    found = sparse_probe(codes, labels, raw, ks=(1, 5))
    assert float(found.raw.mean) > 0.9 and found.plot().axes[0].get_ylabel() == "held-out accuracy"
    with pytest.raises(SurgeryError, match="not pooled by 'sum'"):
        pooled(reader, TEXTS, "sum")
    with pytest.raises(SurgeryError, match="no token that counts"):
        pooled(reader, [[1], [1, 2]])


def test_codes_and_matrices_are_the_same():
    dictionary = Dictionary(8, 30, TopK(k=3))
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    codes = dictionary.codes(x)
    labels = (x[:, 0] > 0).tolist()
    dense = codes.dense().detach().double().numpy()
    a, b, c = (sparse_probe(form, labels, ks=(2,)) for form in (codes, dense, csr_matrix(dense)))
    assert a.chosen == b.chosen == c.chosen
    np.testing.assert_array_equal(a.correct.values, c.correct.values)


def test_what_does_not_fit_is_refused():
    codes, labels = planted()
    cases = [
        (lambda: sparse_probe(codes, labels[:-1]), "120 rows of codes and 119 labels"),
        (lambda: sparse_probe(codes, ["a"] * 120), "labels are the same"),
        (lambda: sparse_probe(codes, ["a"] * 117 + ["b"] * 3), "'b' has 3"),
        (lambda: sparse_probe(codes, labels, ks=(61,)), "k is from 1 to the 60 latents"),
        (lambda: sparse_probe(codes, labels, ks=()), "k is from 1"),
        (lambda: sparse_probe(codes * 0, labels), "No latent is active"),
        (lambda: sparse_probe((codes, codes), labels), "one matrix, found several"),
        (lambda: sparse_probe(codes, labels, codes[:5]), "Raw activations"),
        (lambda: sparse_probe(codes, labels, select="luck"), "luck"),
        (lambda: sparse_probe(codes, labels, groups=[0] * 120), "as many groups"),
        (lambda: sparse_probe(codes, ["b"] * 6 + ["a"] * 114, groups=[0] * 6 + [*range(1, 115)]), "are in one group"),
    ]  # fmt: skip
    for act, said in cases:
        with pytest.raises(SurgeryError, match=said):
            act()
