"""Every kind of dictionary against its dense form, written out with autograd: outputs, losses, gradients."""

import pytest
import torch
from torch.nn.functional import relu

from surgery.errors import SurgeryError
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import RULES, BatchTopK, Gated, JumpRelu, Matryoshka, Standard, TopK, squared

D, LATENTS, ROWS = 12, 80, 40


def batch(width=D, seed=1):
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dictionary(rule, d_in=D, **more):
    """In float64, away from where it begins."""
    found = Dictionary(d_in, LATENTS, rule, **more).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in found.named_parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.01 if name == "threshold" else 0.2))
    return found


def rectangle(x):
    return ((x > -0.5) & (x < 0.5)).to(x)


def norms(p, models=1):
    return p["decoder"].view(LATENTS, models, -1).norm(dim=-1).sum(1)


def standard(p, x, y, rule, models):
    f = relu(x @ p["encoder"].T + p["bias"])
    return f, {"l1": rule.l1 * (f * norms(p, models)).sum(1).mean()}


def gated(p, x, y, rule, models):
    gate = x @ p["encoder"].T + p["bias"]
    magnitude = relu(x @ (p["encoder"] * p["r_mag"].exp()[:, None]).T + p["b_mag"])
    through = relu(gate) @ p["decoder"] + p["b_dec"]
    return (gate > 0) * magnitude, {"l1": rule.l1 * (relu(gate) * norms(p)).sum(1).mean(), "gate": squared(through - y)}


def jumprelu(p, x, y, rule, models):
    """Straight-through terms that are 0 and have the gradients of the paper."""
    h, theta = x @ p["encoder"].T + p["bias"], p["threshold"]
    near = rectangle((h - theta) / rule.bandwidth).detach()
    on = (h > theta).to(h)
    f = h * on - (theta - theta.detach()) * near * theta.detach() / rule.bandwidth
    count = on - (theta - theta.detach()) * near / rule.bandwidth
    return f, {"l0": rule.l0 * count.sum(1).mean()}


def topk(p, x, y, rule, models):
    h = x @ p["encoder"].T + p["bias"]
    index = (h * norms(p, models) if rule.by_norm else h).topk(rule.k).indices
    return relu(torch.zeros_like(h).scatter(1, index, h.gather(1, index))), {}


def batchtopk(p, x, y, rule, models):
    h = x @ p["encoder"].T + p["bias"]
    weighed = relu(h * norms(p, models) if rule.by_norm else h)
    least = weighed.flatten().topk(round(rule.k * len(x))).values[-1]
    return relu(h * (weighed >= least)), {}


def matryoshka(p, x, y, rule, models):
    f, _ = batchtopk(p, x, y, rule, models)
    return f, {w: squared(f[:, :w] @ p["decoder"][:w] + p["b_dec"] - y) for w in rule.widths}


DENSE = {
    Standard(l1=0.3): standard,
    Gated(l1=0.2): gated,
    JumpRelu(l0=0.01, threshold=0.1, bandwidth=0.5): jumprelu,
    TopK(k=7): topk,
    TopK(k=5, by_norm=False): topk,
    BatchTopK(k=3.5): batchtopk,
    Matryoshka(k=6.0, widths=(10, 40)): matryoshka,
}


def loss(found, target):
    return squared(found.output - target) + sum(found.terms.values())


@pytest.mark.parametrize("models", [1, 2])
@pytest.mark.parametrize("rule", DENSE, ids=str)
def test_a_step_is_that_of_the_dense_form(rule, models):
    if models > 1 and isinstance(rule, Gated):
        pytest.skip("no crosscoder is gated")
    mine = dictionary(rule, D * models, models=models)
    x = batch(D * models)
    p = {n: v.detach().clone().requires_grad_() for n, v in mine.named_parameters()}
    centered = x - p["b_dec"]
    f, terms = DENSE[rule](p, centered, x, rule, models)
    expected = f @ p["decoder"] + p["b_dec"]
    total = squared(expected - x) + sum(terms.values())
    found = mine.trained(x)
    torch.testing.assert_close(found.output, expected)
    torch.testing.assert_close(found.fired, (f > 0).sum(0))
    torch.testing.assert_close(loss(found, x), total)
    loss(found, x).backward()
    total.backward()
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rule", [TopK(k=6), BatchTopK(k=4.0), Standard(), JumpRelu()], ids=str)
def test_transcoders_go_from_one_place_to_another(rule, skip):
    mine = dictionary(rule, d_out=7, centered=False, skip=skip)
    x, y = batch(), batch(7, seed=2)
    p = {n: v.detach().clone().requires_grad_() for n, v in mine.named_parameters()}
    f, terms = DENSE[next(r for r in DENSE if type(r) is type(rule))](p, x, y, rule, 1)
    out = f @ p["decoder"] + p["b_dec"] + (x @ p["skip"].T if skip else 0)
    total = squared(out - y) + sum(terms.values())
    found = mine.trained(x, y)
    torch.testing.assert_close(found.output, out)
    loss(found, y).backward()
    total.backward()
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rule", [TopK(k=6), BatchTopK(k=4.0), Matryoshka(k=4.0, widths=(20,))], ids=str)
@pytest.mark.parametrize("many", [3, 30])
@pytest.mark.parametrize("models", [1, 2])
def test_dead_latents_learn_what_is_left(rule, many, models):
    """Their term reaches encoder and decoder (in one released code the encoder gets nothing of it)."""
    width = D * models
    mine, x = dictionary(rule, width, models=models), batch(width)
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[:many] = True
    p = {n: v.detach().clone().requires_grad_() for n, v in mine.named_parameters()}
    h = (x - p["b_dec"]) @ p["encoder"].T + p["bias"]
    f, terms = DENSE[next(r for r in DENSE if type(r) is type(rule))](p, x - p["b_dec"], x, rule, models)
    out = f @ p["decoder"] + p["b_dec"]
    k = min(width // 2, many)
    index = (h * norms(p, models)).masked_fill(~dead, -torch.inf).topk(k).indices
    aside = torch.zeros_like(h).scatter(1, index, h.gather(1, index)) @ p["decoder"]
    term = min(1, many / (width // 2)) * squared(aside - (x - out).detach())
    found = mine.trained(x, dead=dead)
    torch.testing.assert_close(found.terms["aux"], term)
    found.terms["aux"].backward()
    term.backward()
    for name in ("encoder", "decoder", "bias", "b_dec"):
        torch.testing.assert_close(getattr(mine, name).grad, p[name].grad, rtol=1e-8, atol=1e-9)
    assert float(mine.encoder.grad[:many].abs().max()) > 0
    assert "aux" not in mine.trained(x, dead=torch.zeros(LATENTS, dtype=torch.bool)).terms


@pytest.mark.parametrize("rule", DENSE, ids=str)
def test_after_training_codes_are_the_rules_own(rule):
    mine, x = dictionary(rule), batch()
    with torch.no_grad():
        for _ in range(3):
            found = mine.trained(x)
        codes = mine.codes(x).dense()
        torch.testing.assert_close(mine(x.view(4, 10, D)).view(ROWS, D), codes @ mine.decoder + mine.b_dec)
        if not isinstance(rule, BatchTopK):  # whose threshold is a running mean
            torch.testing.assert_close(mine(x), found.output)
        else:
            weighed = codes * mine.norms()
            assert float(weighed[weighed > 0].min()) > float(mine.threshold) > 0


def test_the_threshold_of_a_batch_is_a_running_mean_of_the_smallest_kept_value():
    mine, expected = dictionary(BatchTopK(k=4.0, rate=0.1)), 0.0
    for seed in range(5):
        x = batch(seed=seed)
        f, _ = batchtopk(dict(mine.named_parameters()), x - mine.b_dec, x, mine.rule, 1)
        weighed = f * mine.norms()
        expected = 0.9 * expected + 0.1 * float(weighed[weighed > 0].min().detach())
        mine.trained(x)
    assert float(mine.threshold) == pytest.approx(expected, rel=1e-12) and mine.threshold.dtype == torch.float64


def test_penalties_go_up():
    mine, x = dictionary(Standard(l1=2.0)), batch()
    half, whole = (float(mine.trained(x, warm=w).terms["l1"].detach()) for w in (0.5, 1.0))
    assert whole == pytest.approx(2 * half)


def test_where_it_begins():
    one, other = Dictionary(8, 40, seed=1), Dictionary(8, 40, seed=1)
    assert torch.equal(one.encoder, other.encoder) and torch.equal(one.encoder, one.decoder)
    torch.testing.assert_close(one.norms(), torch.full((40,), 0.1))
    pair = Dictionary(16, 40, models=2)
    assert torch.equal(pair.decoder[:, :8], pair.decoder[:, 8:])
    assert not torch.equal(one.decoder, Dictionary(8, 40, seed=2).decoder)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Dictionary(8, 20, TopK(k=21)), "can't use 21 of 20"),
        (lambda: Dictionary(8, 20, TopK(k=0)), "can't use 0"),
        (lambda: Dictionary(8, 20, Matryoshka(k=2.0, widths=(10, 5))), "Widths grow"),
        (lambda: Dictionary(8, 20, Matryoshka(k=2.0, widths=(20,))), "Widths grow"),
        (lambda: Dictionary(9, 40, models=2), "2 models side by side"),
        (lambda: Dictionary(8, 40, d_out=4), "centered=False"),
        (lambda: Dictionary(8, 40)(torch.zeros(3, 9)), "reads activations of 8 numbers, found 9"),
        (lambda: RULES.lookup("topkk"), "Did you mean 'topk'"),
    ],
)
def test_what_does_not_fit_is_refused(make, told):
    with pytest.raises(SurgeryError, match=told):
        make()


def test_codes_of_a_gated_dictionary_have_gradients():
    """After training too, where its codes are magnitudes and not what chooses them."""
    mine, x = dictionary(Gated()), batch().requires_grad_()
    wanted = [x, *mine.parameters()]
    gate = mine.pre(x)
    f = (gate > 0) * relu((gate - mine.bias) * mine.r_mag.exp() + mine.b_mag)
    expected = torch.autograd.grad(mine.decoded(f, x).square().sum(), wanted)
    found = torch.autograd.grad(mine(x).square().sum(), wanted)
    torch.testing.assert_close(mine.codes(x).dense(), f)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
