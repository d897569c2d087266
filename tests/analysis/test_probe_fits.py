"""Fits of probes against scikit-learn, TransformerLens and the definitions written out."""

import numpy as np
import pytest

from analysis.probes import fits as probe_fits
from analysis.probes.fits import decide, fit, leave_one_out, log_probabilities, standardise
from surgery.errors import SurgeryError

SHAPES = [(60, 3, 7), (24, 3, 40)]
SIDES = ["tall", "wide"]


def data(shape, classes=2, seed=0, uneven=False):
    """Features (examples, layer, d) of different scale and correlated, and class numbers that they tell of."""
    rng = np.random.default_rng(seed)
    n, layers, d = shape
    y = rng.permutation(np.arange(n) % classes)
    if uneven:
        y[rng.random(n) < 0.4] = 0
    x = rng.standard_normal((n, layers, d)) @ (np.eye(d) + 0.3 * rng.standard_normal((d, d)))
    x[..., :classes] += 1.5 * np.eye(classes)[y][:, None] * np.arange(layers)[:, None]
    return x * np.exp(rng.standard_normal(d)) + 5, y


def none():
    raise AssertionError("nothing is chosen by testing here")


@pytest.mark.parametrize("shape", SHAPES, ids=SIDES)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("C", [1e-3, 1.0])
def test_logistic_is_scikit_learns_to_a_millionth(shape, classes, C):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = data(shape, classes, uneven=True)
    found = fit("logistic", x, y, none, Cs=[C])
    assert (found.chosen == C).all()
    ours = np.exp(log_probabilities(decide(x, found.directions, found.intercepts)))
    for layer in range(3):
        theirs = LogisticRegression(C=C, class_weight="balanced", tol=1e-10, max_iter=100_000)
        theirs = make_pipeline(StandardScaler(), theirs).fit(x[:, layer], y).predict_proba(x[:, layer])
        assert np.abs(ours[:, layer] - theirs).max() < 1e-6


@pytest.mark.parametrize("classes", [2, 3])
def test_c_is_the_best_on_held_out_examples(classes):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = data((60, 3, 7), classes, uneven=True)
    splits = list(StratifiedKFold(3, shuffle=True, random_state=1).split(x, y))
    grid = [1e-3, 1e-2, 1e-1, 1.0]
    found = fit("logistic", x, y, lambda: splits, Cs=grid[::-1])
    weight = (1 / np.bincount(y))[y]
    for layer in range(3):
        losses = []
        for C in grid:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=C, class_weight="balanced", tol=1e-6))
            said = cross_val_predict(model, x[:, layer], y, cv=splits, method="predict_proba")
            losses.append(log_loss(y, said, sample_weight=weight))
        assert found.chosen[layer] == grid[int(np.argmin(losses))]
    assert len(set(found.chosen)) > 1  # else any would do


@pytest.mark.parametrize("shape", SHAPES, ids=SIDES)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("shrinkage", [0.05, 0.7, 1.0])
def test_lda_is_scikit_learns(shape, classes, shrinkage):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y = data(shape, classes, uneven=True)
    found = fit("lda", x, y, none, shrinkage=shrinkage)
    ours = decide(x, found.directions, found.intercepts)
    priors = np.full(classes, 1 / classes)
    for layer in range(3):
        z = standardise(x[:, layer])[0]
        theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage, priors=priors).fit(z, y)
        expected = theirs.decision_function(z).reshape(len(z), -1)
        if classes > 2:  # a common term says nothing
            expected = expected - expected.mean(1, keepdims=True)
        assert np.allclose(ours[:, layer], expected, rtol=1e-8, atol=1e-8)


def test_lda_without_shrinkage_is_fishers():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y = data((60, 2, 7))
    found = fit("lda", x, y, none, shrinkage=0)
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x[:, 1], y)  # balanced classes: priors agree
    assert np.allclose(found.directions[1], theirs.coef_, rtol=1e-8)
    assert np.allclose(found.intercepts[1], theirs.intercept_, rtol=1e-8)


def test_lda_of_more_features_than_examples_without_shrinkage_stays_in_their_span():
    x, y = data((24, 1, 40))
    w = fit("lda", x, y, none, shrinkage=0).directions[0, 0] * standardise(x[:, 0])[2]
    z = standardise(x[:, 0])[0]
    inside = np.linalg.lstsq(z.T, w, rcond=None)[0] @ z
    assert np.isfinite(w).all() and np.allclose(inside, w, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES, ids=SIDES)
def test_shrinkage_is_that_of_ledoit_and_wolf(shape):
    from sklearn.covariance import ledoit_wolf_shrinkage

    x, y = data(shape)
    found = fit("lda", x, y, none).chosen
    for layer in range(3):
        z = standardise(x[:, layer])[0]
        within = z - np.stack([z[y == c].mean(0) for c in (0, 1)])[y]
        assert found[layer] == pytest.approx(ledoit_wolf_shrinkage(within, assume_centered=True), abs=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=SIDES)
def test_ridge_is_scikit_learns_with_its_leave_one_out_errors(shape):
    from sklearn.linear_model import RidgeCV

    x, y = data(shape, 4)
    y = y + np.random.default_rng(1).standard_normal(len(y))
    alphas = [0.1, 1.0, 10.0, 100.0, 1000.0]
    found = fit("ridge", x, y, none, alphas=alphas)
    z, mean, spread = standardise(x.transpose(1, 0, 2))
    errors = leave_one_out(z, y, alphas)
    for layer in range(3):
        theirs = RidgeCV(alphas, store_cv_results=True).fit(z[layer], y)
        assert found.chosen[layer] == theirs.alpha_
        assert np.allclose(errors[layer].T ** 2, theirs.cv_results_, rtol=1e-8)
        assert np.allclose(found.directions[layer, 0] * spread[layer], theirs.coef_, rtol=1e-8, atol=1e-10)
        said = decide(x, found.directions, found.intercepts)[:, layer, 0]
        assert np.allclose(said, theirs.predict(z[layer]), rtol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=SIDES)
def test_leave_one_out_is_leaving_one_out(shape):
    x, y = data(shape, 4)
    x = x.transpose(1, 0, 2)
    found = leave_one_out(x, y.astype(float), [0.5, 50.0])
    for i in (0, 5):
        rest = np.arange(x.shape[1]) != i
        for a, alpha in enumerate((0.5, 50.0)):
            centre, level = x[2, rest].mean(0), y[rest].mean()
            z = x[2, rest] - centre
            w = np.linalg.solve(z.T @ z + alpha * np.eye(z.shape[1]), z.T @ (y[rest] - level))
            assert found[2, a, i] == pytest.approx(y[i] - level - (x[2, i] - centre) @ w, abs=1e-8)


def test_the_mean_difference_is_just_that():
    x, y = data((60, 3, 7))
    found = fit("mean_difference", x, y, none)
    upper, lower = x[y == 1].mean(0), x[y == 0].mean(0)
    assert np.allclose(found.directions[:, 0], upper - lower, rtol=1e-12)
    middle = ((upper + lower) / 2 * found.directions[:, 0]).sum(-1)
    assert np.allclose(found.intercepts[:, 0], -middle, rtol=1e-10)
    x, y = data((60, 3, 7), 4)
    found = fit("mean_difference", x, y, none)
    means = np.stack([x[y == c].mean(0) for c in range(4)])
    nearest = ((x[:, None] - means) ** 2).sum(-1).argmin(1)
    assert np.array_equal(decide(x, found.directions, found.intercepts).argmax(-1), nearest)


@pytest.mark.parametrize("kind", ["logistic", "lda", "ridge"])
@pytest.mark.parametrize("shape", SHAPES, ids=SIDES)
def test_units_of_the_features_do_not_matter(kind, shape):
    x, y = data(shape)
    scale, shift = np.exp(np.random.default_rng(1).standard_normal((2, shape[2])))
    options = {"Cs": [0.1]} if kind == "logistic" else {}
    one, other = fit(kind, x, y, none, **options), fit(kind, x * scale + shift, y, none, **options)
    said = decide(x, one.directions, one.intercepts)
    assert np.allclose(said, decide(x * scale + shift, other.directions, other.intercepts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", list(probe_fits.KINDS))
def test_layers_do_not_see_each_other(kind, monkeypatch):
    x, y = data((24, 3, 10))
    options = {"Cs": [0.1]} if kind == "logistic" else {}
    whole = fit(kind, x, y, none, **options)
    monkeypatch.setattr(probe_fits, "BLOCK", 1)  # a layer at a time
    one_by_one = fit(kind, x.astype(np.float32).astype(np.float64), y, none, **options)
    for a, b in zip(whole, one_by_one, strict=True):
        assert np.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True) and a.dtype == np.float64
    alone = fit(kind, x[:, 1:2], y, none, **options)
    assert np.allclose(alone.directions[0], whole.directions[1], rtol=1e-9)


@pytest.mark.parametrize("kind", ["logistic", "lda", "ridge"])
def test_constant_features_get_no_weight(kind):
    x, y = data((40, 2, 6))
    x[:, 1, 3] = 0.1 + 1e5  # 0.1 has no finite binary form: the mean of equal numbers is rounded
    options = {"Cs": [0.1]} if kind == "logistic" else {}
    found = fit(kind, x, y, none, **options)
    assert np.isfinite(found.directions).all() and abs(found.directions[1, 0, 3]) < 1e-12
    assert abs(found.directions[0, 0, 3]) > 1e-6


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("logistics", {}, "no kind of probe 'logistics'"),
        ("lda", {"Cs": [1]}, "A lda probe has no option 'Cs'"),
        ("mean_difference", {"x": 1}, "no option 'x'"),
        ("lda", {"shrinkage": 2}, "shrinkage=2"),
        ("ridge", {"alphas": [0.0]}, "alphas must be finite numbers above 0"),
        ("logistic", {"Cs": []}, "Cs must be"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(kind, options, words):
    x, y = data((24, 1, 4))
    with pytest.raises(SurgeryError, match=words):
        fit(kind, x, y, none, **options)


@pytest.mark.peers
@pytest.mark.parametrize("shape", SHAPES, ids=SIDES)
@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_logistic_is_transformer_lens_sparse_probe_with_every_feature(shape, strength):
    """Theirs minimises mean(weighted loss) + strength ||w||² / 2 on its own split: ours with C = 1 / (strength n)."""
    peer = pytest.importorskip("transformer_lens.tools.analysis.sparse_probing")
    import torch

    x, y = data(shape, uneven=True)
    for layer in range(3):
        theirs = peer.fit_sparse_probe(
            torch.from_numpy(x[:, layer]), torch.from_numpy(y), k=shape[2], preprocess="standardize", std_floor=0,
            l2_strength=strength, decrement_tolerance=1e-18,
        )  # fmt: skip
        train, test = theirs.train_indices.numpy(), theirs.test_indices.numpy()
        found = fit("logistic", x[train, layer : layer + 1], y[train], none, Cs=[1 / (strength * len(train))])
        w = np.empty(shape[2])
        w[theirs.selected_features.numpy()] = (theirs.coefficients / theirs.preprocess_scale).numpy()
        assert np.allclose(found.directions[0, 0], w, rtol=1e-5, atol=1e-7)
        right = (decide(x[test, layer : layer + 1], *found[:2])[:, 0, 0] >= 0) == (y[test] == 1)
        assert right.mean() == theirs.metrics.accuracy
