"""Similarities of activations: invariances, definitions written out, and parity with scikit-learn and scipy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import similarity
from analysis.similarity import agreement, attention_js, auc, cka, cosine, js, kl, placements, principal, procrustes
from surgery.errors import SurgeryError

torch.set_num_threads(1)
few = settings(max_examples=25, deadline=None)


def cloud(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(d, seed=0):
    return torch.linalg.qr(cloud(d, d, seed=seed)).Q


sizes = st.tuples(st.integers(5, 30), st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))


# ---- CKA


@few
@given(sizes, st.booleans(), st.floats(0.01, 100))
def test_cka_does_not_see_rotation_scale_and_shift(size, unbiased, scale):
    n, d1, d2, seed = size
    x, y = cloud(n, d1, seed=seed), cloud(n, d2, seed=seed + 1)
    there = cka(x, y, unbiased=unbiased)
    moved = scale * x @ orthogonal(d1, seed) + cloud(d1, seed=seed + 2)
    back = cka(y, moved, unbiased=unbiased)
    assert torch.allclose(there, back, atol=1e-9, equal_nan=True)
    own = cka(x, moved, unbiased=unbiased)
    assert own.isnan() or own == pytest.approx(1, abs=1e-9)
    assert unbiased or -1e-12 <= there <= 1 + 1e-12


@pytest.mark.parametrize("n, d", [(9, 4), (9, 40)], ids=["tall", "wide"])
def test_cka_is_that_of_the_centred_gram_matrices(n, d):
    x, y = cloud(n, d), cloud(n, d, seed=1) + 0.5 * cloud(n, d)
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h
    expected = (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()
    assert cka(x, y).item() == pytest.approx(expected.item(), abs=1e-12)


def hsic_by_tuples(k, l):
    """The U-statistic behind HSIC_1, summed over all ordered quadruples of different examples."""
    n, total, count = len(k), 0.0, 0
    for i in range(n):
        for j in range(n):
            for q in range(n):
                for r in range(n):
                    if len({i, j, q, r}) == 4:
                        total += k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
                        count += 1
    return total / count


@pytest.mark.parametrize("d", [2, 11], ids=["tall", "wide"])
def test_unbiased_cka_is_the_u_statistic(d):
    x, y = cloud(7, d) + 3, cloud(7, d, seed=1) + 0.7 * cloud(7, d) - 2
    k, l = (x @ x.T).numpy(), (y @ y.T).numpy()
    expected = hsic_by_tuples(k, l) / math.sqrt(hsic_by_tuples(k, k) * hsic_by_tuples(l, l))
    assert cka(x, y, unbiased=True).item() == pytest.approx(expected, abs=1e-9)


def test_unbiased_cka_of_independent_wide_clouds_is_zero_where_the_plain_one_is_near_one():
    x, y = cloud(200, 20, 500), cloud(200, 20, 500, seed=1)
    assert cka(x, y).mean() > 0.9
    found = cka(x, y, unbiased=True)
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(200) and found.std() > 0


def test_layers_are_a_batch_and_half_precision_is_counted_in_double():
    x, y = cloud(3, 2, 10, 6), cloud(3, 2, 10, 5, seed=1)
    for of in (cka, procrustes):
        whole = of(x.bfloat16(), y.bfloat16())
        assert whole.shape == (3, 2) and whole.dtype == torch.float64
        assert whole[2, 1] == of(x[2, 1].bfloat16().double(), y[2, 1].bfloat16().double())


def test_a_single_point_has_no_similarity():
    point = torch.ones(6, 3)
    assert cka(point, cloud(6, 3)).isnan() and procrustes(cloud(6, 3), point).isnan()
    assert cosine(torch.zeros(1, 3), torch.ones(1, 3)).isnan().all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: cka(cloud(5, 3), cloud(6, 3)), "same examples"),
        (lambda: cka(cloud(3, 3), cloud(3, 3), unbiased=True), "at least 4 examples: found 3"),
        (lambda: cka(cloud(2, 5, 3), cloud(2, 5, 3) / torch.tensor([[[1.0]], [[0.0]]])), "layer 1"),
        (lambda: procrustes(cloud(5), cloud(5)), "same examples"),
        (lambda: cosine(cloud(5, 3), cloud(5, 4)), "one shape"),
        (lambda: similarity.rotation(cloud(5, 3), cloud(5, 4)), "one shape"),
        (lambda: principal(cloud(5, 3), 4), "1 to 3 components: 4"),
        (lambda: principal(cloud(3, 9), 3), "1 to 2 components"),
        (lambda: attention_js(cloud(3, 2), cloud(3, 2)), "no more queries"),
        (lambda: kl(cloud(3, 5), cloud(3, 6)), "one shape"),
        (lambda: js(cloud(3, 5), cloud(3, 5).where(torch.tensor([[1], [0], [1]]) > 0, -torch.inf)), "Row 1"),
        (lambda: agreement(cloud(2, 5) * torch.nan, cloud(2, 5)), "Row 0 of the first logits"),
        (lambda: auc([], [1.0]), "at least one"),
        (lambda: auc([math.nan], [1.0]), "NaN"),
        (lambda: auc(np.ones((3, 2)), np.ones((3, 4))), "one shape"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(call, words):
    with pytest.raises(SurgeryError, match=words):
        call()


# ---- Procrustes, cosine, PCA


@few
@given(sizes, st.floats(0.01, 100))
def test_nothing_is_left_of_a_rotated_copy(size, scale):
    n, d, _, seed = size
    x = cloud(n, d, seed=seed)
    turned = x @ orthogonal(d, seed + 1)
    assert procrustes(x, turned, scaling=False) <= 1e-12
    assert procrustes(x, scale * turned + cloud(d, seed=seed + 2)) <= 1e-12
    r = similarity.rotation(x, turned)
    assert torch.allclose(r @ r.T, torch.eye(d, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(x @ r, turned, atol=1e-9)


@few
@given(sizes, st.booleans(), st.booleans())
def test_the_residual_is_symmetric_and_a_share(size, centre, scaling):
    n, d1, d2, seed = size
    x, y = cloud(n, d1, seed=seed), 2 * cloud(n, d2, seed=seed + 1) + 1
    there = procrustes(x, y, centre=centre, scaling=scaling)
    assert there == pytest.approx(procrustes(y, x, centre=centre, scaling=scaling).item(), abs=1e-10)
    assert 0 <= there <= 1


@pytest.mark.parametrize("n, d", [(12, 5), (6, 20)], ids=["tall", "wide"])
def test_residuals_agree_with_scipy(n, d):
    from scipy.linalg import orthogonal_procrustes
    from scipy.spatial import procrustes as disparity

    x, y = cloud(n, d) + 1, 3 * cloud(n, d, seed=1) + cloud(n, d)
    assert procrustes(x, y).item() == pytest.approx(disparity(x.numpy(), y.numpy())[2], abs=1e-12)
    r, nuclear = orthogonal_procrustes(x.numpy(), y.numpy())
    left = ((x.numpy() @ r - y.numpy()) ** 2).sum() / (x.square().sum() + y.square().sum()).item()
    assert procrustes(x, y, centre=False, scaling=False).item() == pytest.approx(left, abs=1e-12)
    if n > d:  # else the rotation of what the rows don't span is free
        assert np.allclose(similarity.rotation(x, y).numpy(), r, atol=1e-10)
    assert (x @ similarity.rotation(x, y) * y).sum().item() == pytest.approx(nuclear, rel=1e-12)


def test_scaling_and_centring_are_what_they_say():
    x = cloud(20, 4)
    assert procrustes(x, 3 * x) <= 1e-12 and procrustes(x, 3 * x, scaling=False) == pytest.approx(1 - 2 * 3 / 10)
    assert procrustes(x, x + 5) <= 1e-12 and procrustes(x, x + 5, centre=False) > 0.1


def test_cosine_by_row():
    x, y = cloud(4, 3, 8), cloud(4, 3, 8, seed=1)
    assert torch.allclose(cosine(x, y), torch.nn.functional.cosine_similarity(x, y, dim=-1), atol=1e-14)
    assert torch.allclose(cosine(x, -2 * x), -torch.ones(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("n, d", [(40, 6), (6, 40)], ids=["tall", "wide"])
@pytest.mark.parametrize("centre", [True, False])
def test_principal_directions_are_those_of_scikit_learn(n, d, centre):
    from sklearn.decomposition import PCA, TruncatedSVD

    x = cloud(n, d) * torch.linspace(3, 0.5, d) + 1
    found = principal(torch.stack([x, x.flip(0)]), 4, centre=centre)
    assert found.components.shape == (2, 4, d) and found.mean.shape == (2, d)
    assert torch.allclose(found.components[0], found.components[1], atol=1e-10)
    if centre:
        theirs = PCA(4, svd_solver="full").fit(x.numpy())
        assert np.allclose(found.variance[0], theirs.explained_variance_, rtol=1e-10)
        assert np.allclose(found.explained[0], theirs.explained_variance_ratio_, rtol=1e-10)
        assert np.allclose(found.mean[0], theirs.mean_, rtol=1e-12)
    else:
        theirs = TruncatedSVD(4, algorithm="arpack").fit(x.numpy())
        assert np.allclose(found.variance[0] * n, theirs.singular_values_**2, rtol=1e-9)
        assert found.mean.count_nonzero() == 0
    assert np.allclose(found.components[0].abs().numpy(), np.abs(theirs.components_), atol=1e-8)
    signs = found.components.gather(2, found.components.abs().argmax(2, keepdim=True))
    assert (signs > 0).all()


def test_principal_directions_of_equal_models_explain_nothing():
    found = principal(torch.zeros(5, 3), 2)
    assert (found.variance == 0).all() and found.explained.isnan().all()


# ---- patterns and predictions


def patterns(*shape, seed=0):
    causal = torch.ones(shape[-2:]).tril() > 0
    return cloud(*shape, seed=seed).where(causal, -torch.inf).softmax(-1)


def test_pattern_divergence_is_that_of_scipy_row_by_row():
    from scipy.spatial.distance import jensenshannon

    f, b = patterns(2, 3, 5, 5), patterns(2, 3, 5, 5, seed=1)
    found = attention_js(f, b)
    assert found.shape == (2, 3, 5) and (found[..., 0] == 0).all()
    for at in np.ndindex(2, 3, 5):
        assert found[at].item() == pytest.approx(jensenshannon(f[at].numpy(), b[at].numpy()) ** 2, abs=1e-14)
    assert (attention_js(f, f) == 0).all()


def test_disjoint_attention_is_log_two_apart():
    f, b = torch.zeros(1, 3, 3), torch.zeros(1, 3, 3)
    f[0, :, 0], b[0, :, 1] = 1, 1
    assert torch.allclose(attention_js(f, b)[0, 1:], torch.tensor(math.log(2), dtype=torch.float64))


def test_padding_and_the_future_count_nothing_whatever_they_hold():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    f, b = patterns(2, 3, 4, 4), patterns(2, 3, 4, 4, seed=1)
    inner = [(0, slice(0, 3)), (1, slice(1, 4))]
    f[1, :, :, 0] = b[1, :, :, 0] = 0  # left padding gets no attention
    f[1, :, 1:] /= f[1, :, 1:].sum(-1, keepdim=True)
    b[1, :, 1:] /= b[1, :, 1:].sum(-1, keepdim=True)
    expected = [attention_js(f[row, :, part, part], b[row, :, part, part]) for row, part in inner]
    f[0, :, 3], b[1, :, 0], f[0, :, :, 3], b[0, 0, 0, 2] = torch.nan, torch.nan, 7, 9
    found = attention_js(f, b, mask[:, None])
    assert torch.allclose(found[0, :, :3], expected[0]) and (found[0, :, 3] == 0).all()
    assert torch.allclose(found[1, :, 1:], expected[1]) and (found[1, :, 0] == 0).all()


def test_queries_that_go_on_from_a_cache_see_what_came_before():
    f, b = patterns(2, 5, 5), patterns(2, 5, 5, seed=1)
    assert torch.allclose(attention_js(f[:, 3:], b[:, 3:]), attention_js(f, b)[:, 3:], rtol=1e-12)


logits = st.lists(st.floats(-60, 60) | st.just(-math.inf), min_size=4, max_size=4).filter(lambda r: max(r) > -math.inf)


@few
@given(st.lists(st.tuples(logits, logits), min_size=1, max_size=4))
def test_divergences_are_never_negative_nor_nan_and_zero_for_equals(rows):
    f, b = (torch.tensor(part, dtype=torch.float64) for part in zip(*rows, strict=True))
    assert (kl(f, b) >= 0).all() and (kl(f, f) == 0).all() and (js(f, f) == 0).all()
    assert (js(f, b) >= 0).all() and (js(f, b) <= math.log(2)).all()
    assert torch.allclose(js(f, b), js(b, f), atol=1e-15)
    alike = (f - f.logsumexp(-1, keepdim=True)).exp() - (b - b.logsumexp(-1, keepdim=True)).exp()
    assert (kl(f, b) >= alike.abs().sum(-1) ** 2 / 2 - 1e-12).all()  # Pinsker


def test_divergences_agree_with_scipy_in_blocks(monkeypatch):
    from scipy.spatial.distance import jensenshannon
    from scipy.stats import entropy

    f, b = cloud(3, 7, 11), cloud(3, 7, 11, seed=1)
    monkeypatch.setattr(similarity, "BLOCK", 11 * 4)  # four rows at a time: 21 rows are cut unevenly
    p, q = f.softmax(-1).numpy(), b.softmax(-1).numpy()
    assert np.allclose(kl(f.float(), b.float()), entropy(p, q, axis=-1), atol=1e-6)
    assert np.allclose(kl(f, b), entropy(p, q, axis=-1), atol=1e-13)
    assert np.allclose(js(f, b), jensenshannon(p, q, axis=-1) ** 2, atol=1e-13)
    assert kl(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)


def test_a_token_that_only_one_model_rules_out():
    f, b = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 0.0, 0.0]])
    assert kl(f, b).item() == pytest.approx(math.log(1.5)) and kl(b, f).item() == math.inf
    assert 0 < js(f, b).item() < math.log(2)


def test_agreement_takes_the_first_of_equals():
    f, b = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]]), torch.tensor([[3.0, 0.0, 3.0], [2.0, 1.0, 0.0]])
    assert agreement(f, b).tolist() == [True, False]


# ---- AUC


@few
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_auc_counts_pairs_with_ties_half(upper, lower):
    from sklearn.metrics import roc_auc_score

    pairs = [(u > v) + (u == v) / 2 for u in upper for v in lower]
    found = auc(upper, lower)
    assert found.value == pytest.approx(np.mean(pairs), abs=1e-14)
    theirs = roc_auc_score([1] * len(upper) + [0] * len(lower), upper + lower)
    assert found.value == pytest.approx(theirs, abs=1e-14)
    assert 0 <= found.low <= found.value + 1e-12 and found.value - 1e-12 <= found.high <= 1 and found.low < found.high
    above, below = placements(upper, lower)
    assert above.mean() == pytest.approx(below.mean(), abs=1e-14)
    assert above[0] == pytest.approx(np.mean([(upper[0] > v) + (upper[0] == v) / 2 for v in lower]), abs=1e-14)
    assert auc(lower, upper).high == pytest.approx(1 - found.low, abs=1e-9)


def test_auc_takes_tensors_layer_by_layer():
    upper, lower = cloud(9, 3) + 1, cloud(7, 3, seed=1)
    found = auc(upper, lower)
    assert found.value.shape == found.low.shape == (3,)
    one = auc(upper[:, 2].numpy(), lower[:, 2].tolist())
    assert all(whole[2] == pytest.approx(part, abs=1e-14) for whole, part in zip(found, one, strict=True))


@pytest.mark.parametrize("shift, m, n", [(0.0, 25, 40), (1.2, 25, 40), (2.5, 40, 40), (5.0, 15, 15)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(shift, m, n):
    from scipy.stats import norm

    rng = np.random.default_rng(0)
    truth = norm.cdf(shift / math.sqrt(2))
    found = auc(rng.normal(shift, 1, (m, 2000)), rng.normal(0, 1, (n, 2000)))
    held = ((found.low <= truth) & (truth <= found.high)).mean()
    assert 0.92 <= held <= 1.0 and (shift > 4 or held <= 0.975)


def test_delongs_error_is_the_spread_over_samples():
    rng = np.random.default_rng(0)
    found = auc(rng.normal(1, 1, (60, 3000)), rng.normal(0, 1, (50, 3000)))
    assert found.standard_error.mean() == pytest.approx(found.value.std(), rel=0.05)


def test_samples_apart_are_not_certain():
    small, large = auc([3.0] * 5, [1.0] * 5), auc(range(100, 200), range(100))
    assert small.value == large.value == 1 and small.low < 0.8 < 0.95 < large.low and small.high == 1
    assert auc([1.0], [0.0, 2.0]).low < 0.2 and np.isnan(auc([1.0], [0.0, 2.0]).standard_error)
