"""Attribution of nodes: slopes against finite differences, integrated ones add up, peers agree, nothing is touched."""

import numpy as np
import pytest
import torch
from activations.families import FAMILIES, build, prompts

from analysis.attribution import attribute
from analysis.edges.gradients import points_of
from analysis.metrics import accuracy, kl, log_prob, logit_diff
from analysis.patching import patch
from surgery.activations import capture, run
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import encode, untouched

torch.set_num_threads(1)
CLEAN, CORRUPT, ANSWERS = prompts()
METRIC = logit_diff(ANSWERS)
SPAN = ("clean", "corrupt", "span")


def measured(model, ids, edits=None, metric=METRIC):
    logits, _ = run(model, ids, edits=edits)
    return metric.of_logits(logits, torch.full((len(ids),), ids.shape[1] - 1))


# ---- what it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("site", ["embed", "resid_pre.1", "resid_mid.1", "attn_out.2", "mlp_out.0", "z.1", "q.2", "k.0",
                                  "v.1", "mlp_pre.1", "mlp_post.2", "mlp_in.0", "final", "pattern.1"])  # fmt: skip
def test_it_is_the_slope_towards_the_other_run(site, direction):
    """The derivative of the metric as the whole site moves to the other run's value, by central differences."""
    model = build("gpt2", dtype=torch.float64)
    base, source = (CORRUPT, CLEAN) if direction == "denoising" else (CLEAN, CORRUPT)
    here, there = run(model, base, [site])[1][site], run(model, source, [site])[1][site]
    step = 1e-4
    ahead, behind = (measured(model, base, {site: here + sign * step * (there - here)}) for sign in (1, -1))
    slope = ((ahead - behind) / (2 * step)).numpy()
    found = attribute(model, CLEAN, CORRUPT, METRIC, site, direction=direction)[site.partition(".")[0]]
    total = found.values.reshape(len(CLEAN), -1).sum(1)
    np.testing.assert_allclose(total, slope, atol=2e-5 * max(1, abs(slope).max()))  # differences are kept in float32
    assert abs(slope).max() > 1e-3


def test_a_cell_is_the_slope_of_that_head_at_that_position():
    model = build("llama_gqa")
    for name, head in (("z", 3), ("v", 1)):
        site, position, step = f"{name}.1.{head}", 4, 3e-3
        here, there = run(model, CORRUPT, [site])[1][site], run(model, CLEAN, [site])[1][site]
        moves = []
        for sign in (1, -1):
            new = here.clone()
            new[:, position] += sign * step * (there - here)[:, position]
            moves.append(measured(model, CORRUPT, {site: new}))
        slope = ((moves[0] - moves[1]) / (2 * step)).numpy()
        found = attribute(model, CLEAN, CORRUPT, METRIC, name)[name]
        np.testing.assert_allclose(found.values[:, 1, position, head], slope, atol=5e-4)
        assert abs(slope).max() > 5e-3


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox", "olmo2", "mixtral"])
def test_it_is_exact_where_the_rest_is_linear(name):
    """Logits are linear in the last norm's output: there the attribution is the effect of patching, and all of it."""
    model = build(name)
    found = attribute(model, CLEAN, CORRUPT, METRIC, "final")["final"]
    assert list(found.axes) == ["example", "position"]
    np.testing.assert_allclose(found.values.sum(1), found.columns["span"], atol=2e-6)
    np.testing.assert_array_equal(found.values[:, :-1], 0)  # the answer is read at the last token


@pytest.mark.parametrize("name", FAMILIES)
def test_sites_of_every_family_agree_with_each_other(name):
    model = build(name)
    found = attribute(model, CLEAN, CORRUPT, METRIC, ("resid_post", "resid_pre", "embed", "attn_out", "mlp_out"))
    stream = {site: result.values for site, result in found.items()}
    size = max(abs(values).max() for values in stream.values())
    np.testing.assert_allclose(stream["resid_post"][:, :-1], stream["resid_pre"][:, 1:], atol=2e-6 * size)
    if name != "bloom":  # which has a norm behind the embedding
        np.testing.assert_allclose(stream["embed"], stream["resid_pre"][:, 0], atol=2e-6 * size)
    for values in stream.values():
        assert abs(values[..., :3]).max() == 0 and abs(values[..., 3:]).max() > 0.01  # the first difference is at 3


def test_directions_signs_and_columns_are_those_of_patching():
    model = build("gpt2")
    for direction in ("denoising", "noising"):
        exact = patch(model, CLEAN, CORRUPT, METRIC, "resid_pre", direction=direction)
        found = attribute(model, CLEAN, CORRUPT, METRIC, "resid_pre", direction=direction)["resid_pre"]
        assert found.axes == exact.axes and found.meta["direction"] == direction
        for name in SPAN:
            np.testing.assert_allclose(found.columns[name], exact.columns[name], atol=2e-6)
        assert np.corrcoef(found.values.ravel(), exact.values.ravel())[0, 1] > 0.5  # first order, but not noise


# ---- integrated gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox"])
def test_along_activations_a_full_cut_adds_up_to_the_whole_effect(name):
    model = build(name)
    span = measured(model, CLEAN) - measured(model, CORRUPT)
    errors = {}
    for steps in (4, 64):
        found = attribute(model, CLEAN, CORRUPT, METRIC, "resid_pre", steps=steps)["resid_pre"]
        errors[steps] = abs(found.values.sum(2) - span.numpy()[:, None]).max(0)  # by layer
        assert found.meta["steps"] == steps and found.meta["path"] == "activations"
    assert (errors[64] < 1e-3).all() and (errors[64] < errors[4]).all()


def test_along_activations_every_site_adds_up_to_patching_it():
    model = build("llama_gqa")
    exact = patch(model, CLEAN, CORRUPT, METRIC, "mlp_out", direction="noising", by="all")
    found = attribute(model, CLEAN, CORRUPT, METRIC, "mlp_out", direction="noising", by="all", steps=64)["mlp_out"]
    np.testing.assert_allclose(found.values, exact.values, atol=1e-3)
    heads = attribute(model, CLEAN, CORRUPT, METRIC, "z", by="all", steps=64)["z"]
    exact = patch(model, CLEAN, CORRUPT, METRIC, "attn_out", by="all")
    np.testing.assert_allclose(heads.values.sum(2), exact.values, atol=1e-3)  # all heads of a layer move together


def test_along_inputs_the_embedding_adds_up_and_all_sites_share_the_passes():
    model, calls = build("gpt2"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    anatomy_of(model)
    calls.clear()
    found = attribute(model, CLEAN, CORRUPT, METRIC, ("embed", "z", "mlp_out"), steps=64, path="inputs")
    assert len(calls) == 2 + 64
    np.testing.assert_allclose(found["embed"].values.sum(1), found["embed"].columns["span"], atol=1e-3)
    calls.clear()
    attribute(model, CLEAN, CORRUPT, METRIC)
    assert len(calls) == 2  # and one backward, for all four sites


def test_rules_choose_points():
    assert points_of("left", 4) == [0, 0.25, 0.5, 0.75] and points_of("right", 4) == [0.25, 0.5, 0.75, 1]
    assert points_of("midpoint", 2) == [0.25, 0.75]
    model = build("gpt2")
    plain = attribute(model, CLEAN, CORRUPT, METRIC, "z")["z"].values
    left = attribute(model, CLEAN, CORRUPT, METRIC, "z", steps=1, rule="left", path="inputs")["z"].values
    np.testing.assert_allclose(left, plain, atol=1e-6)  # one step from corrupt is the corrupt run's gradient
    right = attribute(model, CLEAN, CORRUPT, METRIC, "z", steps=1, rule="right", path="inputs")["z"].values
    noising = attribute(model, CLEAN, CORRUPT, METRIC, "z", direction="noising")["z"].values
    np.testing.assert_allclose(right, -noising, atol=1e-6)  # and one at clean is that of the clean run


# ---- shapes, batches, types ----------------------------------------------------------------------------------------


def test_axes_by_kind_of_site():
    model = build("llama_gqa")
    sites = ("z", "k", "mlp_post", "pattern", "embed", "attn_out.1", "attn_out.2")
    found = attribute(model, CLEAN, CORRUPT, METRIC, sites)
    axes = {name: {axis: len(labels) for axis, labels in result.axes.items()} for name, result in found.items()}
    base = {"example": 4, "layer": 3, "position": 9}
    assert axes["z"] == {**base, "head": 4} and axes["k"] == {**base, "kv_head": 2}
    assert axes["mlp_post"] == {**base, "neuron": 48} and axes["pattern"] == {**base, "head": 4}
    assert axes["embed"] == {"example": 4, "position": 9} and found["attn_out"].axes["layer"] == [1, 2]
    for name, result in attribute(model, CLEAN, CORRUPT, METRIC, sites, by="all").items():
        np.testing.assert_allclose(result.values, found[name].values.sum(list(found[name].axes).index("position")),
                                   atol=1e-6)  # fmt: skip
    shuffled = attribute(model, CLEAN, CORRUPT, METRIC, "z", batch_size=3)["z"]
    np.testing.assert_allclose(shuffled.values, found["z"].values, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox"])
def test_padding_on_either_side_changes_nothing(name, side):
    model = build(name)
    rows = [(CLEAN[0, :9], CORRUPT[0, :9]), (CLEAN[1, :6], CORRUPT[1, :6])]
    good, bad = (encode(None, [pair[i].tolist() for pair in rows], side=side) for i in (0, 1))
    metric = log_prob(ANSWERS[:2, 0])
    together = attribute(model, good, bad, metric, ("resid_pre", "z"))
    for i, (one, other) in enumerate(rows):
        alone = attribute(model, one[None], other[None], log_prob(ANSWERS[i : i + 1, 0]), ("resid_pre", "z"))
        for site, result in alone.items():
            width = result.values.shape[2]
            np.testing.assert_allclose(together[site].values[i, :, :width], result.values[0], atol=1e-5)
            assert abs(together[site].values[i, :, width:]).max(initial=0) == 0


def test_bfloat16_is_near_float32():
    exact = attribute(build("llama_gqa"), CLEAN, CORRUPT, METRIC, "z", by="all")["z"].values
    rough = attribute(build("llama_gqa", dtype=torch.bfloat16), CLEAN, CORRUPT, METRIC, "z", by="all")["z"].values
    assert abs(rough - exact).max() < 0.1 * abs(exact).max()


def test_metrics_of_all_logits_and_of_distributions():
    model = build("gpt2")
    rows = torch.arange(4)
    plain = attribute(model, CLEAN, CORRUPT, METRIC, "z")["z"].values

    def by_hand(logits):
        return logits[rows, -1, ANSWERS[:, 0]] - logits[rows, -1, ANSWERS[:, 1]]

    found = attribute(model, CLEAN, CORRUPT, by_hand, "z", batch_size=1)["z"].values  # it knows examples by their rows
    np.testing.assert_allclose(found, plain, atol=1e-6)
    logits, _ = run(model, CLEAN)
    found = attribute(model, CLEAN, CORRUPT, kl(logits[:, -1]), "resid_pre", direction="noising")["resid_pre"]
    np.testing.assert_allclose(found.values, 0, atol=1e-5)  # a divergence is flat at its least


def test_captured_parts_have_gradients():
    """Of a head or a position: the gradient with respect to what was captured is that part of the whole one."""
    model = build("llama_gqa")
    sites = ["z.1", "z.1.2", "resid_pre.1@-1", "k.0.1", "resid_pre.1"]
    with untouched(model, gradients=True):
        model.get_input_embeddings().weight.requires_grad_(True)
        with capture(model, sites, grad=True) as seen:
            METRIC.of_logits(model(CLEAN).logits, torch.full((4,), 8)).sum().backward(inputs=list(seen.values()))
    gradients = {site: seen[site].grad for site in sites}
    torch.testing.assert_close(gradients["z.1.2"], gradients["z.1"][:, :, 2])
    torch.testing.assert_close(gradients["resid_pre.1@-1"], gradients["resid_pre.1"][:, -1])
    assert gradients["k.0.1"].shape == (4, 9, 8) and all(bool(g.any()) for g in gradients.values())


# ---- a peer --------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_transformer_lens_agrees(name):
    pytest.importorskip("transformer_lens")
    from transformer_lens.tools.analysis import attribution_patching as peer

    from surgery.interop import to_transformer_lens

    model = build(name, attn="eager")
    bridge = to_transformer_lens(model)
    found = attribute(model, CLEAN[:2], CORRUPT[:2], METRIC.select(slice(2)), ("embed", "z", "mlp_out"))
    for i in range(2):
        one, two = ANSWERS[i].tolist()
        theirs = peer.attribution_patch(bridge, CLEAN[i : i + 1], CORRUPT[i : i + 1],
                                        lambda logits, one=one, two=two: logits[0, -1, one] - logits[0, -1, two],
                                        peer.EdgeAttributionConfig(granularity="node")).node_scores  # fmt: skip
        assert len(theirs) == 9 * (1 + 3 * 4 + 3)
        for node, score in theirs.items():
            site, place = {"embed": ("embed", (node.position,)), "mlp_out": ("mlp_out", (node.layer, node.position)),
                           "attn_head_out": ("z", (node.layer, node.position, node.head))}[node.kind]  # fmt: skip
            ours = found[site].values[(i, *place)]
            assert ours == pytest.approx(score, abs=1e-5), node


# ---- what is refused, and what stays -------------------------------------------------------------------------------


def broken(logits):
    raise RuntimeError("a user's own mistake")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corrupt": CORRUPT[:3]}, "4 clean prompts and 3 corrupt"),
        ({"corrupt": [*CORRUPT[:3].tolist(), CORRUPT[3, :5].tolist()]}, "Pair 3: the clean prompt is 9 tokens long"),
        ({"clean": CLEAN[:0], "corrupt": CORRUPT[:0]}, "No prompts"),
        ({"metric": accuracy(ANSWERS[:, 0])}, "'accuracy' has no gradient"),
        ({"metric": lambda logits: logits.detach()[:, -1, 0]}, "has no gradient"),
        ({"metric": lambda logits: logits.mean()}, "one value an example"),
        ({"metric": lambda logits: (logits[:, -1, 0] * 0).sqrt()}, "not finite"),
        ({"metric": logit_diff(ANSWERS[:2])}, "made for 2 examples"),
        ({"sites": "z.1.2"}, "'z.1.2' names some"),
        ({"sites": "resid_pre@-1"}, "names some"),
        ({"sites": "resid"}, "no site 'resid'"),
        ({"sites": "z.7"}, "no layer 7"),
        ({"sites": ()}, "No sites"),
        ({"direction": "up"}, "direction='up': expected 'denoising' or 'noising'"),
        ({"by": "token"}, "by='token'"),
        ({"path": "weights", "steps": 2}, "path='weights'"),
        ({"rule": "simpson", "steps": 2}, "rule='simpson'"),
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_input_gets_a_sentence(change, said):
    model = build("gpt2")
    before = state(model)
    with pytest.raises(SurgeryError, match=said):
        attribute(**{"model": model, "clean": CLEAN, "corrupt": CORRUPT, "metric": METRIC, **change})
    assert state(model) == before


def test_sites_that_an_architecture_has_not_are_named():
    with pytest.raises(SurgeryError, match="parallel"):
        attribute(build("gptj"), CLEAN, CORRUPT, METRIC, "resid_mid")
    with pytest.raises(SurgeryError, match="mixtures of experts"):
        attribute(build("mixtral"), CLEAN, CORRUPT, METRIC, "mlp_post")


def state(model):
    """All that must stay: which parameters want gradients and have some, modes, hooks, the attention that was set."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    parameters = [(p.requires_grad, p.grad is None, float(p.detach().sum())) for p in model.parameters()]
    return parameters, hooks, [m.training for m in model.modules()], model.config._attn_implementation


@pytest.mark.parametrize("metric", [METRIC, broken, accuracy(ANSWERS[:, 0])])
def test_the_model_is_as_it_was(metric):
    model = build("llama_gqa").train()
    first = next(model.parameters())
    first.requires_grad_(False)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.grad = mine = torch.ones_like(weight)
    before = state(model)
    try:
        attribute(model, CLEAN, CORRUPT, metric, ("resid_pre", "pattern"), steps=2)
    except (RuntimeError, SurgeryError) as error:
        assert metric is not METRIC, error
    else:
        assert metric is METRIC
    assert state(model) == before and weight.grad is mine and bool((mine == 1).all())


def test_it_works_where_the_caller_has_gradients_off():
    model = build("gpt2")
    plain = attribute(model, CLEAN, CORRUPT, METRIC, "z")["z"].values
    with torch.no_grad():
        np.testing.assert_array_equal(attribute(model, CLEAN, CORRUPT, METRIC, "z")["z"].values, plain)
    with torch.inference_mode():
        np.testing.assert_array_equal(attribute(model, CLEAN, CORRUPT, METRIC, "z")["z"].values, plain)
