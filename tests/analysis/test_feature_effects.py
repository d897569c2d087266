"""What latents do: exact changes against ones made by hand, first order against exact, and nothing stays behind."""

import numpy as np
import pytest
import torch

from analysis.features import Reader, ablate_latents, attribute_latents, examples, latent_edit, steer_latents
from analysis.metrics import answer_tokens, log_prob, logit_diff
from surgery.activations import edit, run
from surgery.errors import SurgeryError
from surgery.models import encode, load
from surgery.sae.activations import Stream
from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import Standard, TopK
from surgery.tasks import make_task

SITE = "resid_post.1"
N = 40
PROMPTS = [e.prompt for e in make_task("chain").examples(6, seed=1)]


@pytest.fixture(scope="module")
def models():
    torch.set_num_threads(1)
    (base, tokenizer), (tuned, _) = load("tiny-base", "float32"), load("tiny-chain", "float32")
    return base, tuned, tokenizer


def dictionary(models=1, seed=0):
    return Dictionary(96 * models, N, TopK(k=5), models=models, seed=seed, norm=1.0)


def readers(models):
    base, tuned, tokenizer = models
    return {
        "one": Reader(dictionary(), tuned, SITE, tokenizer),
        "crosscoder": Reader(dictionary(2), [base, tuned], SITE, tokenizer),
        "difference": Reader(dictionary(seed=1), [base, tuned], SITE, tokenizer, difference=True),
    }


def metric_of(models):
    return logit_diff(answer_tokens(models[2], [[p[2], "#"] for p in PROMPTS]))


def by_hand(reader, of, latent, change, metric):
    """The metric with f_j changed, from whole passes: read, shift every token but the first, run."""
    batch = encode(reader.tokenizer, PROMPTS)
    kept = batch.mask & (batch.positions > 0)
    (rows,) = Stream(reader.models, [SITE], [batch])
    x = rows[SITE].to(reader.dictionary.bias)
    x = x[:, 96:] - x[:, :96] if reader.difference else x
    f = reader.dictionary.codes(x).dense().detach()[:, latent]
    model, d = reader.model(of), reader.dictionary.decoder.detach()[latent]
    if reader.difference:
        d = d if of == "tuned" else -d
    elif len(d) > 96:
        d = d[96:] if of == "tuned" else d[:96]
    shift = torch.zeros(*kept.shape, 96, dtype=d.dtype)
    shift[kept] = (change(f) - f)[:, None] * d
    logits = [run(model, batch, edits={SITE: lambda v: v + s})[0] for s in (shift, 0 * shift)]  # noqa: B023
    new, old = (metric.of_logits(one, batch.last) for one in logits)
    return (new - old).numpy(), f


def active(reader):
    return [int(j) for j in np.argsort(-examples(reader, PROMPTS, k=1).fired)[:6]]


@pytest.mark.parametrize("kind, of", [("one", -1), ("crosscoder", "tuned"), ("crosscoder", "base"),
                                      ("difference", "tuned"), ("difference", "base")])  # fmt: skip
def test_changes_are_those_made_by_hand(models, kind, of):
    reader, metric = readers(models)[kind], metric_of(models)
    latents = active(reader)[:3]
    out = ablate_latents(reader, PROMPTS, metric, latents, of=of)
    added = steer_latents(reader, PROMPTS, metric, latents, [0.0, 2.0], of=of)
    put = steer_latents(reader, PROMPTS, metric, latents, [0.0, 3.0], how="set", of=of)
    for i, latent in enumerate(latents):
        for found, change in ((out.values[:, i], lambda f: 0 * f), (added.values[:, i, 1], lambda f: f + 2),
                              (put.values[:, i, 1], lambda f: 0 * f + 3)):  # fmt: skip
            expected, _ = by_hand(reader, of, latent, change, metric)
            np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(put.values[..., 0], out.values, atol=1e-5)
    assert not added.values[..., 0].any() and np.abs(out.values).max() > 1e-3


def test_the_error_of_the_dictionary_stays(models):
    """A latent that is nowhere active changes nothing: the site is not replaced by its reconstruction."""
    reader = readers(models)["one"]
    idle = int(np.flatnonzero(examples(reader, PROMPTS, k=1).fired == 0)[0])
    assert not ablate_latents(reader, PROMPTS, metric_of(models), idle).values.any()


def test_several_at_once_and_in_batches(models):
    reader, metric = readers(models)["one"], metric_of(models)
    a, b, *more = active(reader)
    found = ablate_latents(reader, PROMPTS, metric, [a, (a, b)])
    assert found.axes["latent"] == [a, (a, b)]
    again = ablate_latents(reader, PROMPTS, metric, np.array([a])), ablate_latents(reader, PROMPTS, metric, [(a, a)])
    assert all(np.array_equal(one.values[:, 0], found.values[:, 0]) for one in again)
    small = Reader(reader.dictionary, reader.models, SITE, models[2], batch_size=2)
    every = ablate_latents(small, PROMPTS, metric, [a, (a, b), b, *more])
    np.testing.assert_allclose(every.values[:, :2], found.values, atol=1e-5)
    rows = encode(models[2], PROMPTS, side="left")
    np.testing.assert_allclose(ablate_latents(reader, rows, metric, [a, (a, b)]).values, found.values, atol=1e-5)


@pytest.mark.parametrize("kind, of", [("one", -1), ("crosscoder", "base"), ("difference", "tuned")])
def test_first_order_is_the_slope_of_the_exact_effect(models, kind, of):
    """Taking a thousandth of f away changes the metric by a thousandth of what is attributed, in float64."""
    reader = readers([m.double() if hasattr(m, "double") else m for m in models])[kind]
    reader.dictionary.double()
    metric, latents = metric_of(models), active(reader)
    try:
        found = attribute_latents(reader, PROMPTS, metric, latents, of=of)
        for i, latent in enumerate(latents):
            slope, _ = by_hand(reader, of, latent, lambda f: f * 0.999, metric)
            np.testing.assert_allclose(found.values[:, i], slope * 1000, rtol=0.02, atol=2e-3)
        every = attribute_latents(reader, PROMPTS, metric, of=of)
        np.testing.assert_allclose(every.select("latent", latents).values, found.values, atol=1e-9)
        assert every.values.shape == (len(PROMPTS), N)
    finally:
        for model in models[:2]:
            model.float()


def test_first_order_goes_with_exact(models):
    reader, metric = readers(models)["one"], log_prob(answer_tokens(models[2], [p[2] for p in PROMPTS]))
    found = attribute_latents(reader, PROMPTS, metric)
    exact = ablate_latents(reader, PROMPTS, metric, range(N))
    assert np.corrcoef(found.values.ravel(), exact.values.ravel())[0, 1] > 0.8
    np.testing.assert_allclose(found.columns["unchanged"], exact.columns["unchanged"], atol=1e-5)


def test_edits_of_any_pass(models):
    base, tuned, tokenizer = models
    reader, metric = readers(models)["one"], metric_of(models)
    latent, batch = active(reader)[0], encode(tokenizer, PROMPTS)
    out = ablate_latents(reader, PROMPTS, metric, latent).values[:, 0]
    more = steer_latents(reader, PROMPTS, metric, latent, [1.5]).values[:, 0, 0]
    for change, effect in (({"set": 0.0}, out), ({"add": 1.5}, more)):
        with torch.no_grad(), edit(tuned, {reader.writes: latent_edit(reader, latent, **change)}):
            logits = tuned(**batch.inputs(tuned)).logits
        old = metric.of_logits(run(tuned, batch)[0], batch.last)
        np.testing.assert_allclose((metric.of_logits(logits, batch.last) - old).numpy(), effect, atol=2e-5)
    with torch.no_grad(), edit(tuned, {reader.writes: latent_edit(reader, latent, add=1e3)}):
        steered = tuned.generate(**encode(tokenizer, PROMPTS[:1]).inputs(tuned), max_new_tokens=4, do_sample=False)
    assert steered.shape[1] > 4
    with pytest.raises(SurgeryError, match="one of them"):
        latent_edit(reader, latent)
    with pytest.raises(SurgeryError, match="set on the way"):
        latent_edit(readers(models)["crosscoder"], 0, set=0.0)


def test_the_models_are_untouched(models):
    base, tuned, _ = models
    reader = readers(models)["crosscoder"]
    tuned.train()
    before = [{n: v.clone() for n, v in m.state_dict().items()} for m in (base, tuned)]
    attribute_latents(reader, PROMPTS, metric_of(models))
    ablate_latents(reader, PROMPTS, metric_of(models), active(reader)[:1])
    with pytest.raises(RuntimeError):
        ablate_latents(reader, PROMPTS, lambda logits: torch.linalg.inv(logits[0]), active(reader)[:1])
    assert tuned.training and not base.training
    for model, old in zip((base, tuned), before, strict=True):
        assert all(torch.equal(v, old[n]) for n, v in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in reader.dictionary.parameters())
    tuned.eval()


def test_a_transcoder_writes_elsewhere(models):
    base, _, tokenizer = models
    transcoder = Dictionary(96, N, Standard(), d_out=96, centered=False)
    reader = Reader(transcoder, base, "mlp_in.1", tokenizer, target="mlp_out.1")
    metric, latent = metric_of(models), active(reader)[0]
    batch = encode(tokenizer, PROMPTS)
    (rows,) = Stream(base, ["mlp_in.1"], [batch])
    kept = batch.mask & (batch.positions > 0)
    shift = torch.zeros(*kept.shape, 96)
    f = transcoder.codes(rows["mlp_in.1"]).dense().detach()[:, latent]
    shift[kept] = -f[:, None] * transcoder.decoder.detach()[latent]
    values = [
        metric.of_logits(run(base, batch, edits=e)[0], batch.last) for e in ({"mlp_out.1": lambda v: v + shift}, {})
    ]
    found = ablate_latents(reader, PROMPTS, metric, latent).values[:, 0]
    np.testing.assert_allclose(found, (values[0] - values[1]).numpy(), atol=2e-5)


def test_what_does_not_fit_is_refused(models):
    reader, metric = readers(models)["one"], metric_of(models)
    cases = [
        (lambda: ablate_latents(reader, PROMPTS, metric, N), f"no latent {N}"),
        (lambda: ablate_latents(reader, PROMPTS, metric, []), "No latents"),
        (lambda: ablate_latents(reader, PROMPTS[:2], metric, 0), "6 examples, and there are 2"),
        (lambda: ablate_latents(reader, [[1]] * 6, metric, 0), "No token of these prompts counts"),
        (lambda: steer_latents(reader, PROMPTS, metric, 0, [1.0], how="push"), "not steered by 'push'"),
        (lambda: steer_latents(reader, PROMPTS, metric, 0, []), "No amounts"),
        (lambda: attribute_latents(reader, PROMPTS, metric, [-1]), "no latent -1"),
        (lambda: attribute_latents(Reader(dictionary(), models[0], SITE), PROMPTS, metric), "tokenizer"),
        (lambda: ablate_latents(reader, PROMPTS, metric, 0, of="base"), "no model 'base'"),
    ]  # fmt: skip
    for act, said in cases:
        with pytest.raises(SurgeryError, match=said):
            act()


def test_figures(models):
    reader, metric = readers(models)["one"], metric_of(models)
    latents = active(reader)[:2]
    assert ablate_latents(reader, PROMPTS, metric, latents).plot().axes
    assert steer_latents(reader, PROMPTS, metric, latents, [0, 1, 2]).plot().axes
