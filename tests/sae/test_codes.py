"""Sparse codes equal the dense form, forward and backward; choices are exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.sae import codes as sparse
from surgery.sae.codes import decode, encode
from surgery.sae.sparsity import Dead, above, batch_top_k, largest, top_k
from surgery.sae.sparsity import settings as rule

ROWS, D, LATENTS = 64, 24, 300


def parameters(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    sizes = [(LATENTS, D), (LATENTS,), (D,), (LATENTS, D)]
    return [(torch.randn(size, generator=g, dtype=dtype) * 0.3).requires_grad_() for size in sizes]


def batch(seed=1, dtype=torch.float64):
    return torch.randn(ROWS, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_top_k(h, k, scale=None):
    weighed = h if scale is None else h * scale
    index = weighed.topk(k).indices
    return torch.zeros_like(h).scatter(1, index, h.gather(1, index)).relu()


def dense_batch_top_k(h, k, scale=None):
    weighed = (h if scale is None else h * scale).relu()
    wanted = round(k * len(h))
    kept = torch.zeros(h.numel(), dtype=torch.bool)
    kept[weighed.reshape(-1).argsort(descending=True, stable=True)[:wanted]] = True
    return (h * kept.view(h.shape)).relu()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize(("chosen", "dense"), [(top_k, dense_top_k), (batch_top_k, dense_batch_top_k)])
@pytest.mark.parametrize("centered", [True, False])
def test_values_and_gradients_are_those_of_the_dense_form(monkeypatch, chosen, dense, k, scaled, centered):
    monkeypatch.setattr(sparse, "BLOCK", 10 * LATENTS)  # several blocks of rows, the last one shorter
    mine, theirs, x = parameters(), parameters(), batch().requires_grad_()
    scale = mine[3].detach().norm(dim=1) if scaled else None
    center = mine[2] if centered else None
    (found,) = encode(x, mine[0], mine[1], center, rule(chosen, LATENTS, k=k, scale=scale))
    out = decode(found, mine[3], mine[2])
    other = batch().requires_grad_()
    h = (other - theirs[2] if centered else other) @ theirs[0].T + theirs[1]
    f = dense(h, k, scale)
    expected = f @ theirs[3] + theirs[2]
    torch.testing.assert_close(found.dense(), f)
    torch.testing.assert_close(out, expected)
    penalty = lambda values: (values**2).sum() + values.sum().sin()  # noqa: E731 - of codes too, not of the sum alone
    (((out - 1) ** 2).sum() + penalty(found.values)).backward()
    (((expected - 1) ** 2).sum() + penalty(f)).backward()
    for a, b in zip((*mine, x), (*theirs, other), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_in_float32_gradients_agree_to_a_hundred_thousandth():
    mine, theirs = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    x = batch(dtype=torch.float32)
    (found,) = encode(x, mine[0], mine[1], mine[2], rule(top_k, LATENTS, k=8))
    ((decode(found, mine[3], mine[2]) - x) ** 2).sum(1).mean().backward()
    f = dense_top_k((x - theirs[2]) @ theirs[0].T + theirs[1], 8)
    ((f @ theirs[3] + theirs[2] - x) ** 2).sum(1).mean().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-5 * b.grad.abs().max()


@pytest.mark.parametrize("chosen", [top_k, batch_top_k])
def test_dead_latents_are_chosen_beside_and_have_gradients(chosen):
    """The released fused encoder drops the gradients of everything but its own choice: here both have theirs."""
    mine, theirs, x = parameters(), parameters(), batch()
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[[3, 50, 51, 299]] = True
    main, aside = encode(x, mine[0], mine[1], mine[2], rule(chosen, LATENTS, k=5, dead=Dead(dead, 2)))
    h = (x - theirs[2]) @ theirs[0].T + theirs[1]
    second = torch.full_like(h, -torch.inf)
    second[:, dead] = h[:, dead]
    index = second.topk(2).indices
    g = torch.zeros_like(h).scatter(1, index, h.gather(1, index))  # of either sign
    assert float(g.detach().min()) < 0
    torch.testing.assert_close(aside.dense(), g)
    assert set(aside.layout.index.tolist()) <= {3, 50, 51, 299}
    f = (dense_top_k if chosen is top_k else dense_batch_top_k)(h, 5)
    (decode(main, mine[3]).square().sum() + decode(aside, mine[3]).cos().sum()).backward()
    ((f @ theirs[3]).square().sum() + (g @ theirs[3]).cos().sum()).backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_rows_whose_numbers_are_all_negative_have_no_codes_and_no_gradient():
    mine, x = parameters(), batch()
    with torch.no_grad():
        mine[1].fill_(-1e3)
    (found,) = encode(x, mine[0], mine[1], mine[2], rule(top_k, LATENTS, k=5))
    assert len(found.values) == 0 and found.layout.starts.tolist() == [0] * (ROWS + 1)
    out = decode(found, mine[3], mine[2])
    assert torch.equal(out, mine[2].expand_as(out))
    out.square().sum().backward()
    assert all(float(p.grad.abs().max()) == 0 for p in (mine[0], mine[1], mine[3]))


@given(st.integers(0, 2**31), st.floats(0.1, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_choice_over_the_batch_is_exact_whatever_the_first_rows_foretell(seed, k, skewed):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(90, 40, generator=g).round(decimals=1)  # with ties
    if skewed:  # the first rows are much smaller, or much larger, than the others
        h[:30] *= 10 if seed % 2 else 0.01
    old, sparse.BLOCK = sparse.BLOCK, 40 * 30
    try:
        ((values, layout),) = batch_top_k(lambda rows: h[rows], 90, 40, k)
    finally:
        sparse.BLOCK = old
    expected = dense_batch_top_k(h, k)
    torch.testing.assert_close(sparse.Codes(values, layout).dense(), expected, rtol=0, atol=0)


@given(st.integers(0, 2**31), st.integers(1, 700), st.integers(1, 20), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_largest_are_found_by_groups(seed, width, k, ties):
    """Groups that are whole, or leave a rest; numbers all apart, or of few different values."""
    h = torch.randn(5, width, generator=torch.Generator().manual_seed(seed))
    h = h.round() if ties else h
    values, places = largest(h, min(k, width))
    assert torch.equal(values.sort(1).values, h.topk(min(k, width)).values.flip(1)) and torch.equal(
        values, h.gather(1, places)
    )
    assert all(len(set(row)) == len(row) for row in places.tolist())


@pytest.mark.parametrize("chosen", [top_k, batch_top_k])
def test_latents_without_a_norm_are_not_chosen_and_no_rows_have_no_codes(chosen):
    mine, scale = parameters(), torch.rand(LATENTS, dtype=torch.float64)
    scale[:250] = 0
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[200:260] = True
    main, aside = encode(batch(), *mine[:3], rule(chosen, LATENTS, k=4, scale=scale, dead=Dead(dead, 30)))
    assert int(main.layout.index.min()) >= 250 and bool(aside.values.isfinite().all())
    (none,) = encode(batch()[:0], *mine[:3], rule(chosen, LATENTS, k=4, scale=scale))
    assert len(none.values) == 0 and len(none.layout) == 0


def test_above_a_threshold():
    h = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    for threshold in (torch.tensor(0.5), torch.tensor(-1.0), torch.linspace(-1, 1, 40)):
        ((values, layout),) = above(lambda rows: h[rows], 50, 40, threshold)
        assert torch.equal(sparse.Codes(values, layout).dense(), torch.where(h > threshold, h, 0.0).relu())


def test_what_codes_say_of_themselves():
    h = torch.tensor([[1.0, -1.0, 3.0], [0.0, 2.0, -1.0], [-1.0, -1.0, -1.0]])
    ((values, layout),) = top_k(lambda rows: h[rows], 3, 3, 2)
    assert values.tolist() in ([1.0, 3.0, 2.0], [3.0, 1.0, 2.0]) and layout.rows.tolist() == [0, 0, 1]
    assert layout.fired.tolist() == [1, 1, 1] and len(layout) == 3
    codes = sparse.Codes(values, layout)
    assert torch.equal(codes.only(layout.index != 2).dense(), torch.tensor([[1.0, 0, 0], [0, 2.0, 0], [0, 0, 0]]))
