"""Ablations and attention knockout against passes of one's own."""

import numpy as np
import pytest
import torch
from activations.families import PARALLEL, build, prompts
from activations.state import disturbed, unchanged

from analysis.metrics import logit_diff
from analysis.patching import ablate, knockout
from surgery.activations import run
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import encode

torch.set_num_threads(1)
CLEAN, CORRUPT, ANSWERS = prompts()
DIFF = logit_diff(ANSWERS)
LENGTHS = (6, 9, 4, 7)
PADDED = encode(None, [row[:n].tolist() for row, n in zip(CLEAN, LENGTHS, strict=True)])
OTHERS = encode(None, [row[:n].tolist() for row, n in zip(CORRUPT, (9, 9, 5, 8), strict=True)])
CLOSE = 5e-6
"""Effects of order one to four, float32, the same kernel."""
SITES = ["resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "q", "k", "v", "mlp_post", "mlp_in"]


def measured(model, batch=PADDED, edits=None):
    return DIFF.of_logits(run(model, batch, edits=edits)[0], batch.last)


def naive(model, site, value, batch=PADDED, layers=range(3), parts=None):
    """Effects of writing `value(layer)` of a site's shape over everything, one layer and part at a time."""
    before, found = measured(model, batch), []
    for layer in layers:
        for part in [None] if parts is None else parts:

            def change(old, layer=layer, part=part):
                new = value(layer).expand(old.shape)
                if part is None:
                    return new
                old = old.clone()
                index = (slice(None), part) if site == "pattern" else (slice(None), slice(None), part)
                old[index] = new[index]
                return old

            found.append(measured(model, batch, {f"{site}.{layer}": change}) - before)
    shape = (len(before), len(layers), *([] if parts is None else [len(parts)]))
    return torch.stack(found, 1).view(shape).numpy()


def parts_of(site):
    return [0, 1] if site in ("z", "q", "k", "v", "mlp_post", "pattern") else None


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "olmo2", "gpt_neox"])
def test_zero_number_and_mean(name, site):
    if name in PARALLEL and site == "resid_mid":
        return
    model, parts = build(name), parts_of(site)
    _, seen = run(model, OTHERS, [site])

    def mean(layer):
        return seen[f"{site}.{layer}"][OTHERS.mask].mean(0)  # of the real tokens

    for value, wanted, more in (
        ("zero", lambda layer: torch.zeros(()), {}),
        (0.7, lambda layer: torch.tensor(0.7), {}),
        ("mean", mean, {"reference": OTHERS}),
    ):
        if site == "resid_mid" and value != "mean":
            continue  # a sum that no module makes: a constant is met but for rounding, of which norms make much
        for reuse in (True, False):
            found = ablate(model, PADDED, DIFF, site, value, parts=parts, reuse=reuse, **more)
            np.testing.assert_allclose(found.values, naive(model, site, wanted, parts=parts), rtol=0, atol=CLOSE)
    assert found.columns["clean"] == pytest.approx(measured(model).tolist(), abs=CLOSE)
    assert found.name == "effect on logit_diff" and found.meta["kind"] == "ablation" and found.meta["value"] == "mean"


def test_a_mean_of_the_prompts_themselves_is_the_default():
    model = build("gpt2")
    own, given = ablate(model, PADDED, DIFF), ablate(model, PADDED, DIFF, "z", "mean", reference=PADDED)
    np.testing.assert_array_equal(own.values, given.values)
    assert list(own.axes) == ["example", "layer", "head"] and own.values.shape == (4, 3, 4)


@pytest.mark.parametrize("site", ["resid_pre", "z", "v"])
def test_a_mean_by_position(site):
    """At each column over the reference prompts that are long enough to have it."""
    model, parts = build("llama_gqa"), parts_of(site)
    _, seen = run(model, OTHERS, [site])

    def mean(layer):
        value = seen[f"{site}.{layer}"]
        return torch.stack([value[OTHERS.mask[:, p], p].mean(0) for p in range(9)])

    found = ablate(model, PADDED, DIFF, site, "position_mean", reference=OTHERS, parts=parts)
    np.testing.assert_allclose(found.values, naive(model, site, mean, parts=parts), rtol=0, atol=CLOSE)
    with pytest.raises(SurgeryError, match="(?s)reference prompts are 5 tokens long and the prompts 9.*value='mean'"):
        ablate(model, PADDED, DIFF, site, "position_mean", reference=CLEAN[:, :5])


@pytest.mark.parametrize("site", ["resid_pre", "z", "k", "pattern"])
def test_another_prompts_values(site):
    model, parts = build("gpt2"), parts_of(site)
    _, seen = run(model, CLEAN, [site])
    for seed in range(3):
        found = ablate(model, CLEAN, DIFF, site, "resample", seed=seed, parts=parts)
        fits = []
        for order in torch.cartesian_prod(*[torch.arange(4)] * 4):  # which prompt stood in for which
            if (order.bincount(minlength=4) == 1).all() and (order != torch.arange(4)).all():
                fits.append(order)
        wanted = [
            naive(model, site, lambda l, o=o: seen[f"{site}.{l}"][o], encode(None, CLEAN.tolist()), [1], parts)
            for o in fits
        ]
        apart = [np.abs(found.values[:, 1:2] - w).max() for w in wanted]
        assert min(apart) < CLOSE < sorted(apart)[1]  # one order, in which nobody stands for himself
        again = ablate(model, CLEAN, DIFF, site, "resample", seed=seed, parts=parts, reuse=False)
        np.testing.assert_allclose(again.values, found.values, rtol=0, atol=CLOSE)
    # of given prompts, which may be longer
    long = torch.cat([CORRUPT, CORRUPT[:, :3]], 1)
    found = ablate(model, CLEAN, DIFF, site, "resample", reference=long[:1], parts=parts)
    _, seen = run(model, CORRUPT[:1], [site])
    wanted = naive(model, site, lambda l: seen[f"{site}.{l}"], encode(None, CLEAN.tolist()), parts=parts)
    np.testing.assert_allclose(found.values, wanted, rtol=0, atol=CLOSE)
    with pytest.raises(SurgeryError, match="A resampled prompt is shorter than the one that it stands in for"):
        ablate(model, CLEAN, DIFF, site, "resample", reference=CLEAN[:, :5])
    with pytest.raises(SurgeryError, match="One prompt can't be resampled from itself"):
        ablate(model, CLEAN[:1], DIFF.select([0]), site, "resample")


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "z", "k", "pattern", "mlp_post"])
@pytest.mark.parametrize("value", ["zero", "mean", "position_mean", "resample"])
def test_by_position(site, value):
    if site == "pattern" and "mean" in value:
        return
    model, parts = build("gpt2"), parts_of(site)
    batch = CLEAN if value == "resample" else PADDED
    fast, slow = (
        ablate(model, batch, DIFF, site, value, positions=[0, 5, -1], parts=parts, reuse=r) for r in (True, False)
    )
    assert list(fast.axes["position"]) == [0, 5, -1]
    np.testing.assert_allclose(fast.values, slow.values, rtol=0, atol=CLOSE)
    assert np.abs(fast.values[:, :, -1]).max() > 1e-3
    if value != "resample":
        assert (fast.values[2, :, 1] == 0).all()  # four tokens


def test_a_pattern_has_no_mean():
    with pytest.raises(SurgeryError, match="(?s)'pattern' has no mean over tokens.*knockout"):
        ablate(build("gpt2"), CLEAN, DIFF, "pattern", "mean")
    with pytest.raises(SurgeryError, match="value='median': expected 'zero', 'mean', 'position_mean', 'resample' or a"):
        ablate(build("gpt2"), CLEAN, DIFF, "z", "median")


# ---- knockout


def cut_by_mask(model, batch, cuts, window):
    """The metric when attention is cut by a mask that is handed to the attention modules of some layers."""
    width = batch.ids.shape[1]
    mask = torch.full((width, width), torch.finfo(torch.float32).min).triu(1).repeat(len(batch), 4, 1, 1)
    mask = mask.masked_fill(~batch.mask[:, None, None], torch.finfo(torch.float32).min)
    for row, (heads, to, of) in enumerate(cuts):
        mask[row, heads, to, of] = torch.finfo(torch.float32).min

    def hook(module, args, kwargs):
        return args, {**kwargs, "attention_mask": mask}

    a = anatomy_of(model)
    handles = [a.attention(l).register_forward_pre_hook(hook, with_kwargs=True) for l in window]
    try:
        return measured(model, batch)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox"])
def test_knockout_is_a_mask(name):
    model = build(name)
    before = measured(model)
    last = PADDED.last.tolist()
    found = knockout(model, PADDED, DIFF, source=1)
    assert list(found.axes["layers"]) == ["0-2", "1-2", "2"] and found.columns["clean"] == pytest.approx(
        before.tolist(), abs=CLOSE
    )
    for i, window in enumerate(([0, 1, 2], [1, 2], [2])):
        wanted = cut_by_mask(model, PADDED, [(slice(None), to, 1) for to in last], window) - before
        np.testing.assert_allclose(found.values[:, i], wanted, rtol=0, atol=1e-5)  # eager against sdpa
    assert np.abs(found.values).min() > 1e-6
    # places of each example, some heads, windows of one's own
    to, of = [4, 5, 3, -2], [2, 2, 0, 1]
    found = knockout(model, PADDED, DIFF, destination=to, source=of, heads=[0, 3], windows=[[1], (0, 2)])
    assert list(found.axes["layers"]) == ["1", "0,2"]
    cuts = [([0, 3], t if t >= 0 else n + t, o) for t, o, n in zip(to, of, LENGTHS, strict=True)]
    for i, window in enumerate(([1], [0, 2])):
        wanted = cut_by_mask(model, PADDED, cuts, window) - before
        np.testing.assert_allclose(found.values[:, i], wanted, rtol=0, atol=1e-5)
    single = knockout(model, PADDED, DIFF, source=1, windows=[0, 2])
    assert list(single.axes["layers"]) == ["0", "2"] and single.meta["kind"] == "knockout"


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"source": 4}, "The source of prompt 2 is 4, and it has 4 tokens"),
        ({"source": 1, "destination": [0, 0, -5, 0]}, "The destination of prompt 2 is -5, and it has 4 tokens"),
        ({"source": "the"}, "The source is 'the', and a number is expected, or one for each prompt"),
        ({"source": [1, 2]}, "The source is one number, or one for each of the 4 prompts, and not 2"),
        (
            {"source": 3, "destination": 2},
            "The source of prompt 0 comes after its destination: nothing is there to cut",
        ),
        ({"source": 0, "destination": 0}, "The first token of prompt 0 sees itself alone: that can't be cut"),
        ({"source": 1, "heads": [0, 4]}, "'z.0.4': there is no head 4"),
        ({"source": 1, "windows": [[0, 3]]}, "'scores.3': there is no layer 3"),
        ({"source": 1, "windows": []}, "windows= are sets of layers, one at least with a layer in each"),
        ({"source": 1, "windows": [[0], []]}, "windows= are sets of layers, one at least with a layer in each"),
        ({"source": 1, "heads": []}, r"heads=\[\]: whole numbers are expected, one at least"),
    ],
)
def test_cuts_that_can_not_be_made(more, sentence):
    model = disturbed(build("gpt2"))
    with unchanged(model), pytest.raises(SurgeryError, match=sentence):
        knockout(model, PADDED, DIFF, **more)


@pytest.mark.parametrize("sweep", [lambda m, **more: ablate(m, PADDED, DIFF, "k", "mean", **more),
                                   lambda m, **more: knockout(m, PADDED, DIFF, source=1, **more)],
                         ids=["ablate", "knockout"])  # fmt: skip
def test_the_model_is_as_it_was(sweep):
    model, steps = disturbed(build("gpt2")), []
    with unchanged(model):
        sweep(model, progress=lambda *at: steps.append(at))
        assert steps[-1][0] == steps[-1][1]
        with pytest.raises(ZeroDivisionError):
            sweep(model, progress=lambda *at: 1 / 0)
