"""Steering vectors against sums by hand; ablated directions against weights that can't write them."""

import pytest
import torch
from activations.families import FAMILIES, PARALLEL, build, prompts
from activations.state import unchanged

from surgery.activations import capture, run
from surgery.activations.steering import ablate_direction, steer, steering_vector, writers
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, encode

torch.set_num_threads(1)
CLEAN, CORRUPT, _ = prompts()
ROWS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [20, 21, 22, 23, 24]]
LEFT, RIGHT = encode(None, ROWS, side="left"), encode(None, ROWS)


def direction(seed=77, rows=None, width=32):
    shape = (width,) if rows is None else (rows, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stream(model, batch=RIGHT, site="resid_post.2"):
    return run(model, batch, [site])[1][site]


# ---- vectors


@pytest.mark.parametrize("site", ["resid_pre.1", "z.2", "z.2.3", "mlp_out.0"])
@pytest.mark.parametrize("position", [-1, 0, -3, "mean", "each"])
def test_a_steering_vector_is_the_difference_of_means_over_prompts(site, position):
    model = build("llama_gqa")
    means = []
    for rows in (ROWS, [ROWS[0], [40, 41, 42, 43]]):
        values = []
        for row in rows:
            value = run(model, [row], [site])[1][site][0]
            picked = {"mean": value.mean(0), "each": value[:3]}
            values.append(picked[position] if isinstance(position, str) else value[position])
        means.append(torch.stack(values).mean(0))
    for side in ("left", "right"):
        with unchanged(model):
            positive = encode(None, ROWS, side=side)
            found = steering_vector(model, positive, [ROWS[0], [40, 41, 42, 43]], site, position, batch_size=2)
        assert found.shape == (means[0] - means[1]).shape
        assert (found - (means[0] - means[1])).abs().max() < 2e-6


# ---- adding


@pytest.mark.parametrize("name", FAMILIES)
def test_steering_adds_at_every_token_or_at_some(name):
    model, vector = build(name), direction()
    before = run(model, LEFT, ["resid_post.1"])[1]["resid_post.1"]
    with unchanged(model):
        with steer(model, {"resid_post.1": vector}, scale=-2.0):
            every = stream(model, LEFT, "resid_post.1")
        with steer(model, {"resid_post.1": vector}, positions=[0, -1]):
            some = stream(model, LEFT, "resid_post.1")
        with steer(model, {"resid_post.1": torch.stack([vector, 2 * vector])}):
            first = stream(model, LEFT, "resid_post.1")
    assert (every - (before - 2 * vector)).abs().max() < 1e-5
    for row, ids in enumerate(ROWS):
        start = 7 - len(ids)
        added = torch.zeros(len(ids), 32)
        added[0] = added[-1] = vector
        assert (some[row, start:] - before[row, start:] - added).abs().max() < 1e-5
        added = torch.zeros(len(ids), 32)
        added[:2] = torch.stack([vector, 2 * vector])
        assert (first[row, start:] - before[row, start:] - added).abs().max() < 1e-5


def test_a_normalised_vector_counts_in_units_of_the_tokens_own_value():
    model, vector = build("gpt2"), direction()
    before = stream(model, site="resid_pre.1")
    with steer(model, {"resid_pre.1": 100 * vector}, 0.5, normalised=True):
        after = stream(model, site="resid_pre.1")
    expected = before + 0.5 * before.norm(dim=-1, keepdim=True) * vector / vector.norm()
    assert (after - expected).abs().max() < 1e-5
    heads = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    for site, given in (("z.1", heads), ("z.1.2", heads[2]), ("mlp_post.1.5", torch.tensor(-3.0))):
        before = stream(model, site=site)
        with steer(model, {site: given}, normalised=True):
            moved = (
                (stream(model, site=site) - before).flatten(2) if site == "z.1" else stream(model, site=site) - before
            )
        own = before.flatten(2) if site == "z.1" else before
        lengths = own.norm(dim=-1) if own.dim() == 3 else own.abs()
        assert ((moved.norm(dim=-1) if own.dim() == 3 else moved.abs()) - lengths).abs().max() < 1e-5


def test_steering_in_generation_knows_prompt_and_steps():
    model, vector = build("gpt2"), direction()
    told = {"do_sample": False, "max_new_tokens": 5}
    seen_of = {}
    for when in ("always", "prefill", "decode"):
        with steer(model, {"resid_post.0": vector}, when=when), capture(model, ["resid_post.0"], steps=True) as seen:
            ids = model.generate(**LEFT.inputs(model), **told)
        plain = run(model, Batch.of(ids, torch.cat([LEFT.mask, torch.ones(3, 5, dtype=bool)], 1)), ["resid_post.0"])[1]
        seen_of[when] = (seen["resid_post.0"] - plain["resid_post.0"][:, :-1])[
            :, [6, 7, 10]
        ]  # last of the prompt, steps
    added = {"always": (1, 1, 1), "prefill": (1, 0, 0), "decode": (0, 1, 1)}
    for when, factors in added.items():
        expected = torch.tensor(factors)[:, None] * vector
        assert (seen_of[when] - expected).abs().max() < 1e-5


def test_activation_addition_of_one_pair_of_prompts():
    model = build("llama_gqa")
    vector = steering_vector(model, [[5, 6, 7]], [[8, 9, 10]], "resid_pre.1", "each")
    assert vector.shape == (3, 32)
    with steer(model, {"resid_pre.1": vector}, 2.0):
        found = run(model, RIGHT)[0]
    stream_ = run(model, RIGHT, ["resid_pre.1"])[1]["resid_pre.1"]
    stream_[:, :3] += 2 * vector
    expected = run(model, RIGHT, edits={"resid_pre.1": stream_})[0]
    assert (found - expected)[RIGHT.mask].abs().max() < 1e-5


# ---- taking out


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_writes_an_ablated_direction(name):
    model, d = build(name), direction()
    sites = ["resid_pre", "resid_post"] + ([] if name in PARALLEL else ["resid_mid"])
    with unchanged(model), ablate_direction(model, d), capture(model, sites) as seen, torch.no_grad():
        model(**LEFT.inputs(model))
    for value in seen.values():
        assert value.abs().max() > 0.1
        assert (value[LEFT.mask] @ (d / d.norm())).abs().max() < 5e-6
    assert len(writers(model)) == 7


@torch.no_grad()
def orthogonalised(model, basis):
    """The model with weights that can't write the directions (Arditi et al. 2024, section 4.1)."""
    project = torch.eye(32) - basis.T @ basis
    anatomy, twin = anatomy_of(model), model
    for module in [model.get_input_embeddings(), getattr(model.base_model, "wpe", None)]:
        if module is not None:
            module.weight.copy_(module.weight @ project)
    for layer in range(anatomy.n_layers):
        for module in (anatomy.out(layer), anatomy.down(layer)):
            written = type(module).__name__ == "Conv1D"
            module.weight.copy_(module.weight @ project if written else project @ module.weight)
            if module.bias is not None:
                module.bias.copy_(module.bias @ project)
    return twin


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("rows", [None, 3])
def test_ablation_is_the_model_whose_weights_are_orthogonal_to_the_directions(name, rows):
    d = direction(rows=rows)
    basis = torch.linalg.qr(d.reshape(-1, 32).T).Q.T
    model, other = build(name), build(name)
    if other.config.tie_word_embeddings:  # the head reads: it stays
        other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.clone())
    other = orthogonalised(other, basis)
    told = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}
    with ablate_direction(model, d), torch.no_grad():
        logits, made = model(**LEFT.inputs(model)).logits, model.generate(**LEFT.inputs(model), **told)
    with torch.no_grad():
        expected, wanted = other(**LEFT.inputs(other)).logits, other.generate(**LEFT.inputs(other), **told)
    assert (logits - expected)[LEFT.mask].abs().max() < 1e-5
    assert torch.equal(made.sequences, wanted.sequences)
    assert (torch.stack(made.scores) - torch.stack(wanted.scores)).abs().max() < 1e-5
    with torch.no_grad():
        assert (model(**LEFT.inputs(model)).logits - expected)[LEFT.mask].abs().max() > 1e-2


def test_ablation_at_some_sites_and_in_bf16():
    model, d = build("llama_gqa"), direction()
    unit = d / d.norm()
    before = stream(model, site="resid_pre.1")
    with ablate_direction(model, d, ["resid_pre.1"]):
        after, later = (stream(model, site=site) for site in ("resid_pre.1", "resid_pre.2"))
    assert (after - (before - (before @ unit)[..., None] * unit)).abs().max() < 1e-6
    assert (later @ unit).abs().max() > 1e-2
    rough = build("llama_gqa", dtype=torch.bfloat16)
    with ablate_direction(rough, d):
        value = stream(rough, site="resid_post.2")
    assert value.dtype == torch.bfloat16 and (value.float() @ unit)[RIGHT.mask].abs().max() < 0.1


# ---- wrong input


def test_wrong_arguments_are_a_sentence():
    model, d = build("llama_gqa"), direction()
    for site, position, said in (
        ("resid_pre", -1, "one site of one layer"),
        ("pattern.1", -1, "one site of one layer"),
        ("resid_pre.1@-1", -1, "one site of one layer"),
        ("resid_pre.1", 3, "no token at position 3 in a prompt of 3"),
        ("resid_pre.1", -4, "no token at position -4"),
        ("resid_pre.1", "last", "a number, 'mean' or 'each'"),
        ("resid_pre.9", -1, "no layer 9"),
    ):
        with pytest.raises(SurgeryError, match=said):
            steering_vector(model, ROWS, ROWS, site, position)
    for vectors, options, said in (
        ({"resid_pre.1": d[:5]}, {}, r"shape \(5,\), and \(32,\) is expected"),
        ({"pattern.1": d}, {}, "can't be added at 'pattern.1'"),
        ({"resid_pre.1": torch.stack([d, d])}, {"positions": 0}, "has its positions already"),
        ({"resid_pre.1": 0 * d}, {"normalised": True}, "no direction"),
        ({"resid_pre.1": d}, {"when": "never"}, "'always', 'prefill' or 'decode'"),
    ):
        with pytest.raises(SurgeryError, match=said), steer(model, vectors, **options):
            pass
    for given, sites, said in (
        (0 * d, "all writers", "zero or not finite"),
        (torch.stack([d, 2 * d]), "all writers", "not independent"),
        (d[:5], "all writers", r"shape \(32,\)"),
        (d, ["z.1"], "not found at 'z.1'"),
    ):
        with pytest.raises(SurgeryError, match=said), ablate_direction(model, given, sites):
            pass


def test_an_exception_inside_leaves_the_model_as_it_was():
    model, d = build("gpt2"), direction()
    for context in (steer(model, {"resid_pre.1": d}), ablate_direction(model, d)):
        with unchanged(model), pytest.raises(ZeroDivisionError), context:
            raise ZeroDivisionError
