"""What is captured is what its definition says, and what is edited is what the rest of the pass computes with."""

import pytest
import torch
from activations.families import FAMILIES, PARALLEL, build, prompts
from activations.state import unchanged

from surgery.activations import capture, edit, run
from surgery.anatomy import SITES, Site, anatomy_of
from surgery.errors import SurgeryError

torch.set_num_threads(1)
CLEAN, CORRUPT, _ = prompts()
BATCH, POS = CLEAN.shape
MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}
CLOSE = {"rtol": 0, "atol": 1e-5}
"""Float32 sums of order one in another order."""


def sites_of(model):
    return [name for name in SITES if not anatomy_of(model).missing(name)]


def at(name, layer=1):
    return name if name in ("embed", "final") else f"{name}.{layer}"


def noise(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def first(output):
    return output[0] if isinstance(output, tuple) else output


# ---- definitions


@pytest.mark.parametrize("name", FAMILIES)
def test_captured_values_are_their_definitions(name):
    model = build(name, "eager")
    a = anatomy_of(model)
    logits, seen = run(model, CLEAN, sites_of(model))
    close = lambda one, other: torch.testing.assert_close(one, other, **CLOSE)  # noqa: E731
    with torch.no_grad():
        assert torch.equal(seen["embed"], a.embed(CLEAN))
        close(a.logits(seen["final"]), logits)
        close(a.final_norm(seen["resid_post.2"]), seen["final"])
        for l in range(3):
            pre, attn, mlp = seen[f"resid_pre.{l}"], seen[f"attn_out.{l}"], seen[f"mlp_out.{l}"]
            close(seen[f"resid_post.{l}"], pre + attn + mlp)
            if name not in PARALLEL:
                close(seen[f"resid_mid.{l}"], pre + attn)
            if l < 2:
                assert torch.equal(seen[f"resid_post.{l}"], seen[f"resid_pre.{l + 1}"])
            # attention: scores, pattern, values, heads, what it writes
            pattern, z = seen[f"pattern.{l}"], seen[f"z.{l}"]
            assert pattern.shape == (BATCH, 4, POS, POS) and z.shape == (BATCH, POS, 4, a.d_head)
            close(pattern.sum(-1), torch.ones(BATCH, 4, POS))
            assert pattern.triu(1).max() == 0
            close(seen[f"scores.{l}"].softmax(-1), pattern)
            v = seen[f"v.{l}"].repeat_interleave(a.group, 2)
            close(torch.einsum("bhds,bshe->bdhe", pattern, v), z)
            norm, written = a.norm("attention_norm", l), a.out(l)(z.flatten(2))
            close(written if norm is None else norm(written), attn)
            assert seen[f"k.{l}"].shape == (BATCH, POS, a.n_kv_heads, a.d_head) == seen[f"v.{l}"].shape
            # MLP: what it reads, its neurons, what it writes
            read, norm = seen[f"mlp_in.{l}"], a.norm("mlp_norm", l)
            stream = pre if name in PARALLEL else pre + attn
            close(stream if norm is None else norm(stream), read)
            if name in MIXTURES:
                close(first(a.mlp(l)(read)), mlp)
                continue
            inner = a.pre(l)(read)
            close(inner[..., : a.d_mlp()], seen[f"mlp_pre.{l}"])
            norm, written = a.norm("mlp_out_norm", l), a.down(l)(seen[f"mlp_post.{l}"])
            close(written if norm is None else norm(written), mlp)
            assert seen[f"mlp_post.{l}"].shape == seen[f"mlp_pre.{l}"].shape == (BATCH, POS, a.d_mlp())


@pytest.mark.parametrize("name", FAMILIES)
def test_queries_and_keys_reach_the_scores_that_they_should(name):
    """A query changes its own row of its own head, a key its own column in the heads that share it."""
    model = build(name, "eager")
    a = anatomy_of(model)
    _, before = run(model, CLEAN, ["scores.1", "pattern.1"])
    allowed = before["pattern.1"][0] > 0  # a sliding window shows less than all before

    def changed(site):
        _, after = run(model, CLEAN, ["scores.1"], edits={site: lambda x: x + noise(x.shape)})
        differs = (after["scores.1"] - before["scores.1"]).abs() > 1e-6
        return differs.any(0)  # (head, dst, src)

    heads = slice(None) if a.norms_over_heads(1) else slice(2, 3)
    expected = torch.zeros(4, POS, POS, dtype=torch.bool)
    expected[heads, 4, :5] = True
    assert torch.equal(changed("q.1.2@4"), expected & allowed)
    shared = range(a.n_kv_heads)[-1]
    heads = slice(None) if a.norms_over_heads(1) else slice(shared * a.group, 4)
    expected = torch.zeros(4, POS, POS, dtype=torch.bool)
    expected[heads, 4:, 4] = True
    assert torch.equal(changed(f"k.1.{shared}@4"), expected & allowed)


# ---- edits on every family


@pytest.mark.parametrize("name", FAMILIES)
def test_edits_by_identity_change_nothing(name):
    model = build(name, "eager")
    wanted, _ = run(model, CLEAN)
    same, _ = run(model, CLEAN, edits=dict.fromkeys(sites_of(model), lambda x: x.clone()))
    torch.testing.assert_close(same, wanted, **CLOSE)
    for part in (dict.fromkeys(sites_of(model), lambda x: None), {at(s) + "@-1": lambda x: x for s in sites_of(model)}):
        if name not in PARALLEL:
            part.pop("resid_mid.1@-1", None)  # a sum, and so a rounding
        same, _ = run(model, CLEAN, edits=part)
        assert torch.equal(same, wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_is_read_back_and_matters(name):
    model = build(name, "eager")
    before, old = run(model, CLEAN, sites_of(model))
    for i, site in enumerate(map(at, sites_of(model))):
        new = noise(old[site].shape, i)
        after, seen = run(model, CLEAN, site, edits={site: new})
        torch.testing.assert_close(seen[site], new, rtol=0, atol=1e-5 if "mid" in site else 0)
        assert (after - before).abs().max() > 1e-3, site
        after, seen = run(model, CLEAN, site, edits={site: 0.25})
        torch.testing.assert_close(seen[site], torch.full_like(new, 0.25), rtol=0, atol=1e-5 if "mid" in site else 0)


PARTS = [
    "z.1.2@4",
    "q.1.3@0",
    "k.1.1@-1",
    "v.1.0@-2",
    "mlp_post.1.7@-1",
    "mlp_pre.1.3",
    "z.1.0",
    "k.1.1",
    "embed@2",
    "attn_out.1@3",
    "resid_mid.1@3",
    "pattern.1.2@4",
    "pattern.1.1",
    "scores.1.3@5",
    "scores.1@2",
    "final@-1",
]


def index_of(site):
    """The part of a whole value that a site names, for prompts without padding."""
    head = slice(None) if site.head is None else site.head
    place = slice(None) if site.position is None else site.position
    if site.kind == "pattern":
        return (slice(None), head, place)
    return (slice(None), place) if site.kind == "stream" else (slice(None), place, head)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox_sequential", "phi3", "gemma2", "opt"])
@pytest.mark.parametrize("text", PARTS)
def test_a_part_is_read_and_written_alone(name, text):
    model = build(name, "eager")
    if name in ("gpt2", "gpt_neox_sequential", "opt"):  # every head has its own keys
        assert anatomy_of(model).n_kv_heads == 4
    site = Site.parse(text)
    _, before = run(model, CLEAN, [site, site.whole])
    assert torch.equal(before[site], before[site.whole][index_of(site)])
    new = noise(before[site].shape)
    _, after = run(model, CLEAN, [site, site.whole], edits={text: new})
    expected = before[site.whole].clone()
    expected[index_of(site)] = new
    torch.testing.assert_close(after[site.whole], expected, rtol=0, atol=1e-5 if "mid" in text else 0)
    torch.testing.assert_close(after[site], new, rtol=0, atol=1e-5 if "mid" in text else 0)


def test_a_head_of_all_layers():
    model = build("gpt2")
    _, before = run(model, CLEAN, "z")
    _, seen = run(model, CLEAN, ["z", "z.*.2@-1"], edits={"z.*.2": 0.0})
    assert all((seen[f"z.{l}"][:, :, 2] == 0).all() and (seen[f"z.{l}.2@-1"] == 0).all() for l in range(3))
    assert torch.equal(seen["z.0"][:, :, :2], before["z.0"][:, :, :2])
    assert seen.stack("z").shape == (3, BATCH, POS, 4, 8) and seen.stack("z.*.2@-1").shape == (3, BATCH, 8)


# ---- kinds of edits


def test_tensors_numbers_and_functions():
    model = build("llama_gqa")
    site, part = "attn_out.1", "attn_out.1@2"
    _, old = run(model, CLEAN, [site])

    def written(edits):
        with unchanged(model):
            return run(model, CLEAN, [site], edits=edits)[1][site]

    assert (written({site: 3}) == 3).all() and (written({site: torch.tensor(2.0)}) == 2).all()
    row = noise((32,))
    assert torch.equal(written({site: row}), row.expand(BATCH, POS, 32))
    assert torch.equal(written({site: noise((POS, 32))}), noise((POS, 32)).expand(BATCH, POS, 32))
    assert torch.equal(written({site: lambda x: x * 2}), old[site] * 2)
    assert torch.equal(written({site: lambda x: None}), old[site])
    assert torch.equal(written({site: torch.zeros_like}), torch.zeros_like(old[site]))
    assert torch.equal(written({site: torch.nn.ReLU()}), old[site].relu())
    assert torch.equal(written({site: lambda x, scale=3.0: x * scale}), old[site] * 3)
    assert torch.equal(written({site: lambda *x: x[0] * 2}), old[site] * 2)
    assert torch.equal(written({site: row.double().numpy()}), row.expand(BATCH, POS, 32))
    assert (written({Site("attn_out", 1): [0.5] * 32}) == 0.5).all()
    per_row = noise((BATCH, 32))
    assert torch.equal(written({part: per_row})[:, 2], per_row)
    assert torch.equal(written({part: row})[:, 2], row.expand(BATCH, 32))
    assert torch.equal(written({part: 1.0})[:, [0, 1, *range(3, POS)]], old[site][:, [0, 1, *range(3, POS)]])


def test_a_function_may_ask_which_tokens_it_is_given():
    model, calls = build("gpt2"), []

    def change(value, call):
        calls.append(call)
        return value + call.positions[..., None]

    _, seen = run(model, CLEAN, ["resid_pre.1"], edits={"resid_pre.1": change})
    _, old = run(model, CLEAN, ["resid_pre.1"])
    assert torch.equal(seen["resid_pre.1"], old["resid_pre.1"] + torch.arange(POS)[:, None])
    (call,) = calls
    assert call.prefill and call.lengths.tolist() == [POS] * BATCH
    assert call.at(-1)[1].tolist() == [POS - 1] * BATCH and call.at(POS)[0].numel() == 0


@pytest.mark.parametrize("name", ["falcon", "falcon_new", "gpt2", "mixtral"])
def test_a_given_tensor_stays_as_it_is_where_the_model_writes_in_place(name):
    model = build(name)
    given = {at(s): noise((32,)) for s in ("attn_out", "mlp_out", "resid_post", "embed", "mlp_in", "final")}
    kept = {site: vector.clone() for site, vector in given.items()}
    wanted, _ = run(model, CLEAN, edits={site: lambda x, v=v: v.expand_as(x).clone() for site, v in given.items()})
    for edits in (given, {site: vector.expand(BATCH, POS, 32) for site, vector in given.items()}):
        assert torch.equal(run(model, CLEAN, edits=edits)[0], wanted)
        assert all(torch.equal(given[site], kept[site]) for site in given)


def test_a_functions_own_writing_in_place_stays_where_it_is_said():
    model = build("llama_gqa")
    _, old = run(model, CLEAN, ["z.1", "resid_pre.1"])

    def zero(x):
        x[:, 3] = 0
        return x

    for site in ("z.1", "resid_pre.1"):
        _, seen = run(model, CLEAN, [site, "resid_post.0"], edits={site: zero})
        expected = old[site].clone()
        expected[:, 3] = 0
        assert torch.equal(seen[site], expected)
        assert (seen["resid_post.0"][:, 3] != 0).any()  # another site, which nobody edited


@pytest.mark.parametrize(
    "edits, sentence",
    [
        ({"z.1": torch.zeros(4, 9, 32)}, r"'z.1': the new value has shape \(4, 9, 32\), and \(4, 9, 4, 8\) is exp"),
        ({"z.1.2": torch.zeros(4, 9, 4, 8)}, r"'z.1.2': the new value has shape .*, and \(4, 9, 8\) is expected"),
        ({"resid_pre.1@-1": torch.zeros(3, 32)}, r"'resid_pre.1@-1': .* \(3, 32\), and \(4, 32\) is expected"),
        ({"pattern.1": lambda x: x[:, :1, :4]}, r"'pattern.1': .*, and \(4, 4, 9, 9\) is expected"),
        ({"mlp_post.0.3": lambda x: x[:, :, None]}, r"'mlp_post.0.3': .*, and \(4, 9\) is expected"),
        ({"attn_out.0": lambda x: "zero"}, "'attn_out.0': the new value is str, and a tensor or a number is needed"),
        ({"attn_out.0": None}, "'attn_out.0': the new value is NoneType, and a tensor"),
        ({"attn_out.0": lambda x: (x, x)}, "'attn_out.0': the new value is tuple"),
        ({"attn.0": 0.0}, "no site 'attn.0'"),
        ({"z.7": 0.0}, "there is no layer 7"),
    ],
)
def test_wrong_edits_are_named_and_leave_no_trace(edits, sentence):
    model = build("llama_gqa")
    with unchanged(model), pytest.raises(SurgeryError, match=sentence):
        run(model, CLEAN, edits=edits)
    with pytest.raises(SurgeryError, match="when='later': expected 'always', 'prefill' or 'decode'"):
        edit(model, {}, when="later").__enter__()
    with pytest.raises(SurgeryError, match="Edits are written {site: what takes its place}, and this is str"):
        edit(model, "z.1").__enter__()


# ---- several at once


@pytest.mark.parametrize(
    "site",
    ["embed", "resid_pre.1", "resid_mid.1", "resid_post.1", "attn_out.1", "mlp_out.1", "q.1", "k.1", "z.1", "scores.1",
     "pattern.1", "mlp_in.1", "mlp_pre.1", "mlp_post.1", "final"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_what_is_entered_later_sees_what_earlier_ones_made(name, site):
    model = build(name, "eager")
    _, old = run(model, CLEAN, [site])
    add, twice = (lambda x: x + 1), (lambda x: 2 * x)
    with torch.no_grad(), capture(model, site) as plain, edit(model, {site: add}), capture(model, site) as one:
        with edit(model, {site: twice}), capture(model, site) as both:
            model(CLEAN)
            value = old[site]
            torch.testing.assert_close(plain[site], value, **CLOSE)
            torch.testing.assert_close(one[site], value + 1, **CLOSE)
            torch.testing.assert_close(both[site], 2 * (value + 1), **CLOSE)
        model(CLEAN)  # the inner contexts are gone
        torch.testing.assert_close(one[site], value + 1, **CLOSE)
        torch.testing.assert_close(both[site], 2 * (value + 1), **CLOSE)
    whole = Site.parse(site)
    part = Site(whole.name, whole.layer, None, 2)
    _, seen = run(model, CLEAN, [site], edits={site: add, part: twice})
    expected = value + 1
    expected[index_of(part)] *= 2
    torch.testing.assert_close(seen[site], expected, **CLOSE)


def test_scores_before_pattern_whatever_the_order():
    model = build("gpt2", "eager")
    _, old = run(model, CLEAN, ["scores.1"])
    wanted = 2 * (3 * old["scores.1"]).softmax(-1)
    three, two = {"scores.1": lambda x: 3 * x}, {"pattern.1": lambda x: 2 * x}
    for edits in (three | two, two | three):
        _, seen = run(model, CLEAN, ["pattern.1"], edits=edits)
        torch.testing.assert_close(seen["pattern.1"], wanted, **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2", "olmo2", "opt", "bloom", "falcon_alibi"])
def test_resid_mid_is_behind_what_is_before_it_whatever_the_order(name):
    model = build(name, "eager")
    _, old = run(model, CLEAN, ["resid_pre.1", "resid_mid.1"])
    vector = noise((32,))
    with torch.no_grad(), capture(model, ["resid_mid.1", "attn_out.1"]) as seen:
        with edit(model, {"attn_out.1": vector}):
            model(CLEAN)
        torch.testing.assert_close(seen["resid_mid.1"], old["resid_pre.1"] + vector, **CLOSE)
        with edit(model, {"resid_pre.1": lambda x: x + vector, "attn_out.1": 0.0}):
            model(CLEAN)
        torch.testing.assert_close(seen["resid_mid.1"], old["resid_pre.1"] + vector, **CLOSE)
    edits = {"resid_mid.1": lambda x: x + vector, "attn_out.1": 0.0, "resid_pre.1": 1.0}
    _, seen = run(model, CLEAN, ["resid_mid.1"], edits=edits)
    torch.testing.assert_close(seen["resid_mid.1"], (1 + vector).expand(BATCH, POS, 32), **CLOSE)


# ---- what is captured


def test_captured_by_any_spelling():
    model = build("llama_gqa")
    with capture(model, ["blocks.1.attn.hook_z", "resid_post@-1"]) as seen:
        assert len(seen) == 0
        with pytest.raises(SurgeryError, match="'z.1' has no value yet: no forward pass went through it"):
            seen["z.1"]
        model(CLEAN)
    assert seen["z.1"] is seen["blocks.1.attn.hook_z"] is seen[Site("z", 1)]
    assert sorted(seen) == ["resid_post.0@-1", "resid_post.1@-1", "resid_post.2@-1", "z.1"] and "z.1" in seen
    assert "z.0" not in seen and seen.get("q.1") is None
    assert seen.stack("resid_post@-1").shape == (3, BATCH, 32)
    assert torch.equal(seen.stack("z"), seen["z.1"][None])
    with pytest.raises(SurgeryError, match="(?s)'z.0' was not captured.*z.1"):
        seen["z.0"]
    with pytest.raises(SurgeryError, match="'attn_out' was not captured in any layer"):
        seen.stack("attn_out")
    with pytest.raises(SurgeryError, match="(?s)'resid_post' was not captured in any layer.*resid_post.0@-1"):
        seen.stack("resid_post")  # one place of it was
    with pytest.raises(SurgeryError, match=r"(?s)'resid_post@-1' was captured in several.*stack\('resid_post@-1'\)"):
        seen["resid_post@-1"]
    assert "z.1 (4, 9, 4, 8)" in repr(seen) and repr(anatomy_of(model)).startswith("Anatomy(llama: 3 blocks of 4 heads")
    seen.clear()
    assert len(seen) == 0


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox", "phi3", "opt", "bloom"])
@pytest.mark.parametrize("site", ["z.1", "z.1.2", "q.1", "k.1", "v.1.0@-1", "resid_post.1", "attn_out.1@3", "mlp_pre.1",
                                  "mlp_post.1.5", "pattern.1.2", "pattern.1.2@4"])  # fmt: skip
def test_only_what_is_named_is_held_in_memory(name, site):
    _, seen = run(build(name, "eager"), CLEAN, [site])
    (value,) = seen.values()
    assert len(seen) == 1 and value.untyped_storage().nbytes() == value.numel() * value.element_size()
    assert not value.requires_grad


def test_a_newer_pass_takes_the_place_of_the_older_and_values_are_the_callers_own():
    model = build("llama_gqa")
    with torch.no_grad(), capture(model, ["resid_pre.1", "z.1"]) as seen:
        model(CLEAN)
        older = seen["z.1"]
        kept = older.clone()
        model(CORRUPT)
    assert not torch.equal(seen["z.1"], older) and torch.equal(older, kept)
    wanted, _ = run(model, CLEAN)
    with torch.no_grad(), capture(model, ["resid_pre.1"]) as seen:
        logits = model(CLEAN).logits
        seen["resid_pre.1"].zero_()
    assert torch.equal(logits, wanted)


def test_gradients_are_those_of_autograd():
    model = build("gpt2")
    for p in model.parameters():
        p.requires_grad_(False)
    block, out = model.transformer.h[1], model.transformer.h[1].attn.c_proj
    streams, zs = [], []

    def keep(store):
        def hook(module, args):
            value = args[0].clone().requires_grad_()
            store.append(value)
            return (value, *args[1:])

        return hook

    handles = [block.register_forward_pre_hook(keep(streams)), out.register_forward_pre_hook(keep(zs))]
    loss = model(CLEAN).logits[:, -1].log_softmax(-1)[:, 5].sum()
    stream, z = torch.autograd.grad(loss, [streams[0], zs[0]])
    for handle in handles:
        handle.remove()
    z = z.unflatten(-1, (4, 8))
    sites = ["resid_pre.1", "z.1", "z.1.2", "z.1@-1", "z.1.3@4", "resid_pre.1@2"]
    wanted = [stream, z, z[:, :, 2], z[:, -1], z[:, 4, 3], stream[:, 2]]
    for site, expected in zip(sites, wanted, strict=True):
        embedded = model.transformer.wte(CLEAN).requires_grad_()
        with capture(model, [site], grad=True) as seen:
            loss = model(inputs_embeds=embedded).logits[:, -1].log_softmax(-1)[:, 5].sum()
        assert seen[site].requires_grad
        (found,) = torch.autograd.grad(loss, seen[site])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2", "olmo2", "gpt_neox", "mixtral"])
def test_gradients_of_every_site(name):
    """What a small step along the gradient does to the loss is its norm, within 2 % (central difference, float32)."""
    model, step = build(name, "eager"), 1e-3 if name == "mixtral" else 1e-2  # short of other experts
    for p in model.parameters():
        p.requires_grad_(False)

    def loss(logits):
        return logits[:, -1].double().log_softmax(-1)[:, 5].sum()

    for site in map(at, sites_of(model)):
        embedding = model.get_input_embeddings().weight.requires_grad_()
        with capture(model, [site], grad=True) as seen:
            before = loss(model(CLEAN).logits)
        (slope,) = torch.autograd.grad(before, seen[site])
        embedding.requires_grad_(False)
        direction = slope / slope.norm()
        up, down = (run(model, CLEAN, edits={site: seen[site].detach() + s * direction})[0] for s in (step, -step))
        found, expected = float(loss(up) - loss(down)) / (2 * step), float(slope.norm())
        assert abs(found - expected) < 0.02 * expected, site
