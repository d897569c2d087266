"""Patching sweeps against one whole forward pass a cell, on every family; effects, directions, places, budgets."""

import functools

import numpy as np
import pytest
import torch
from activations.families import FAMILIES, PARALLEL, build, prompts
from activations.state import disturbed, unchanged
from activations.unlisted import UNLISTED, build_unlisted

from analysis.metrics import kl, logit_diff, prob
from analysis.patching import cells, patch
from analysis.results import Result
from surgery.activations import edit, run
from surgery.anatomy import anatomy_of
from surgery.models import encode

torch.set_num_threads(1)
CLEAN, CORRUPT, ANSWERS = prompts()
DIFF = logit_diff(ANSWERS)
LENGTHS = (6, 9, 4, 7)
GOOD = encode(None, [row[:n].tolist() for row, n in zip(CLEAN, LENGTHS, strict=True)])
BAD = encode(None, [row[:n].tolist() for row, n in zip(CORRUPT, LENGTHS, strict=True)])
SITES = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "mlp_post"]
MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}
CLOSE = 3e-6
"""Times the size of metrics, where they are more than one: float32, the same kernel, fast against whole passes."""


@functools.cache
def kept(name, attn="sdpa"):
    """A model that tests only look at; `build` makes one that they may change."""
    return build(name, attn)


def sites_of(name):
    absent = {"resid_mid"} if name in PARALLEL else {"mlp_post"} if name in MIXTURES else set()
    return [site for site in SITES if site not in absent]


def built(name, site):
    """Falcon's eager attention is another function than its sdpa one where there is alibi."""
    return kept(name, "eager" if name == "falcon_alibi" and site == "pattern" else "sdpa")


def parts_of(name, site, wanted=(0, 3)):
    if site in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
        return None
    return [p for p in wanted if site not in ("k", "v") or p < anatomy_of(kept(name)).n_kv_heads]


def both(model, *arguments, **more):
    """Effects of the fast sweep, which are those of whole passes."""
    fast, slow = patch(model, *arguments, **more), patch(model, *arguments, **more, reuse=False)
    assert fast.axes == slow.axes and fast.columns.keys() == slow.columns.keys()
    size = CLOSE * max(1.0, np.abs(slow.values).max(), *(np.abs(column).max() for column in slow.columns.values()))
    np.testing.assert_allclose(fast.values, slow.values, rtol=0, atol=size)
    for column in fast.columns:
        np.testing.assert_allclose(fast.columns[column], slow.columns[column], rtol=0, atol=size)
    return fast


# ---- exact


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_of_every_family(name):
    """Over all positions, and at two places of padded prompts."""
    for site in sites_of(name):
        model, parts = built(name, site), parts_of(name, site)
        found = both(model, CLEAN, CORRUPT, DIFF, site, by="all", parts=parts, layers=[0, 2])
        assert np.abs(found.values).max() > 1e-3, site
        both(model, GOOD, BAD, DIFF, site, by="position", positions=[3, -1], parts=parts and parts[:1], layers=[1])


@pytest.mark.parametrize("name", UNLISTED)
def test_families_that_nobody_listed(name):
    """Also where heads are not apart (BitNet, DiffLlama), and where attention has a sink (GPT-OSS)."""
    model = build_unlisted(name)
    for site in ("resid_pre", "attn_out", "z", "q", "v", "pattern"):
        parts = [0] if site in ("z", "q", "v", "pattern") else None
        both(model, GOOD, BAD, DIFF, site, by="position", positions=[3, -1], layers=[1], parts=parts)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_neox"])
def test_every_position_of_padded_prompts_in_both_directions(name, site):
    if site not in sites_of(name):
        return
    model, parts = kept(name), parts_of(name, site, (1,))
    for direction in ("denoising", "noising"):
        found = both(model, GOOD, BAD, DIFF, site, by="position", direction=direction, parts=parts)
        values = found.values.reshape(4, 3, 9)
        assert (values[:, :, :3] == 0).all() and np.abs(values).max() > 1e-3
        for row, length in enumerate(LENGTHS):
            assert (values[row, :, length:] == 0).all()  # no such token


def test_by_hand():
    """Hooks of one's own around whole passes: nothing of ours is used but the call."""
    model = build("llama_gqa")
    layers = model.model.layers

    def metric(ids, module=None, change=None):
        handle = module and module.register_forward_pre_hook(change, with_kwargs=True)
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        if handle:
            handle.remove()
        rows = torch.arange(4)
        return logits[rows, ANSWERS[:, 0]] - logits[rows, ANSWERS[:, 1]]

    kept = {}
    handles = [
        m.register_forward_pre_hook(lambda module, args: kept.__setitem__(module, args[0]))
        for layer in layers
        for m in (layer, layer.self_attn.o_proj)
    ]
    clean, corrupt = metric(CLEAN), None
    clean_kept = dict(kept)
    corrupt = metric(CORRUPT)
    for handle in handles:
        handle.remove()

    def writing(index):
        def change(module, args, kwargs):
            new = args[0].clone()
            new[index] = clean_kept[module][index]
            return (new, *args[1:]), kwargs

        return change

    stream = patch(model, CLEAN, CORRUPT, DIFF, "resid_pre")
    heads = patch(model, CLEAN, CORRUPT, DIFF, "z")
    assert stream.columns["clean"] == pytest.approx(clean.tolist(), abs=CLOSE)
    assert stream.columns["corrupt"] == pytest.approx(corrupt.tolist(), abs=CLOSE)
    assert stream.columns["span"] == pytest.approx((clean - corrupt).tolist(), abs=CLOSE)
    for l, layer in enumerate(layers):
        for p in range(9):
            wanted = metric(CORRUPT, layer, writing((slice(None), p))) - corrupt
            np.testing.assert_allclose(stream.values[:, l, p], wanted, rtol=0, atol=CLOSE)
        for h in range(4):
            place = (slice(None), slice(None), slice(8 * h, 8 * h + 8))
            wanted = metric(CORRUPT, layer.self_attn.o_proj, writing(place)) - corrupt
            np.testing.assert_allclose(heads.values[:, l, h], wanted, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", FAMILIES)
def test_putting_the_whole_stream_back_recovers_the_clean_run(name):
    model = kept(name)
    found = patch(model, CLEAN, CORRUPT, DIFF, by="all")
    # 1 of the recovery, -1 of the damage: each pair's own, within rounding
    np.testing.assert_allclose(found.values, np.array(found.columns["span"])[:, None].repeat(3, 1), rtol=0, atol=CLOSE)
    rounding = CLOSE / abs(np.mean(found.columns["span"]))
    np.testing.assert_allclose(found.normalized().mean, 1, atol=rounding)
    damage = patch(model, CLEAN, CORRUPT, DIFF, by="all", direction="noising", layers=[0]).normalized()
    np.testing.assert_allclose(damage.mean, -1, atol=rounding)


def test_what_changes_nothing_is_exactly_zero():
    model = kept("gpt2")
    found = patch(model, CLEAN, CORRUPT, DIFF)
    differ = (CLEAN != CORRUPT).any(0)
    assert differ.tolist() == [False] * 3 + [True, False, True] + [False] * 3
    assert (found.values[:, :, :3] == 0).all()  # before the first difference
    assert (found.values[:, 0][:, ~differ] == 0).all()  # the same token, which has seen nothing yet
    assert (found.values[:, 1:, 3:] != 0).any((0, 1)).all()
    for site in ("resid_post", "z", "k", "pattern"):
        same = patch(model, CLEAN, CLEAN, DIFF, site)
        assert (same.values == 0).all() and same.columns["span"] == [0] * 4
    own = patch(model, CLEAN, CLEAN, DIFF, "z", anchors={"end": (-1, -1)})
    assert np.abs(own.values).max() < CLOSE


# ---- which cells


def test_layers_positions_and_parts_are_cells_of_the_whole():
    model = kept("llama_gqa")
    whole = patch(model, GOOD, BAD, DIFF)
    some = patch(model, GOOD, BAD, DIFF, layers=[2, 0], positions=[5, 3])
    assert list(some.axes["layer"]) == [2, 0] and list(some.axes["position"]) == [5, 3]
    np.testing.assert_allclose(some.values, whole.values[:, [2, 0]][:, :, [5, 3]], rtol=0, atol=CLOSE)
    ends = patch(model, GOOD, BAD, DIFF, positions=[-1, -3])
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(ends.values[row], whole.values[row][:, [length - 1, length - 3]], rtol=0, atol=CLOSE)
    heads = patch(model, GOOD, BAD, DIFF, "z", by="position")
    assert list(heads.axes) == ["example", "layer", "position", "head"] and heads.values.shape == (4, 3, 9, 4)
    one = patch(model, GOOD, BAD, DIFF, "z", positions=[4], parts=[3, 1], layers=[1])
    np.testing.assert_allclose(one.values[:, 0, 0], heads.values[:, 1, 4][:, [3, 1]], rtol=0, atol=CLOSE)
    neurons = patch(model, GOOD, BAD, DIFF, "mlp_post", parts=range(5))
    assert list(neurons.axes) == ["example", "layer", "neuron"] and neurons.values.shape == (4, 3, 5)
    assert patch(model, GOOD, BAD, DIFF, "mlp_post").values.shape == (4, 3, 48)
    assert list(patch(model, GOOD, BAD, DIFF, "k").axes) == ["example", "layer", "kv_head"]
    assert patch(model, GOOD, BAD, DIFF, layers=1).axes["layer"] == [1]


UNEQUAL = [row[: n + 1].tolist() for row, n in zip(CORRUPT, LENGTHS, strict=True)]
ANCHORS = {"subject": ([3, 5, 2, 4], [4, 6, 1, 0]), "end": (-1, -1), "begin": (0, 1)}


@pytest.mark.parametrize(
    "site", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "q", "k", "v", "mlp_post", "mlp_in"]
)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_anchors_of_prompts_of_unequal_length(site, direction):
    model = kept("gpt2")
    parts = None if parts_of("gpt2", site) is None or site == "mlp_in" else [2]
    found = both(model, GOOD, UNEQUAL, DIFF, site, direction=direction, anchors=ANCHORS, parts=parts)
    assert list(found.axes["position"]) == ["subject", "end", "begin"]
    # by hand, a pair at a time
    for row in (0, 2):
        clean, corrupt = GOOD.ids[row, : LENGTHS[row]][None], torch.tensor(UNEQUAL[row])[None]
        base, source = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
        metric, last = DIFF.select([row]), torch.tensor([base.shape[1] - 1])
        before = metric.of_logits(run(model, base)[0], last)
        _, seen = run(model, source, f"{site}.1")
        for i, (here, there) in enumerate(ANCHORS.values()):
            columns = [c if isinstance(c, int) else c[row] for c in (here, there)]
            of_base, of_source = columns[::-1] if direction == "denoising" else columns

            def change(old, value=seen[f"{site}.1"], to=of_base, of=of_source):
                new = old.clone()
                index = slice(None) if parts is None else 2
                new[:, to][:, index] = value[:, of][:, index]
                return new

            after = metric.of_logits(run(model, base, edits={f"{site}.1": change})[0], last)
            got = found.values[row, 1, i] if parts is None else found.values[row, 1, i, 0]
            assert got == pytest.approx(float(after - before), abs=CLOSE)


# ---- which way


@pytest.mark.parametrize("site, more", [("resid_pre", {}), ("z", {}), ("k", {"by": "position", "positions": [3, 5]}),
                                        ("pattern", {}), ("mlp_post", {"parts": range(7)})])  # fmt: skip
def test_a_tight_budget_equals_a_wide_one(site, more):
    model = kept("llama_gqa")
    wide = patch(model, GOOD, BAD, DIFF, site, **more)
    steps = []
    for budget in (1, 20_000, 100_000):
        tight = patch(model, GOOD, BAD, DIFF, site, budget=budget, progress=lambda *at: steps.append(at), **more)
        np.testing.assert_allclose(tight.values, wide.values, rtol=0, atol=CLOSE)
        assert tight.columns["clean"] == pytest.approx(wide.columns["clean"], abs=CLOSE)
        assert steps[-1][0] == steps[-1][1] and all(done <= total for done, total in steps)


def test_a_budget_is_kept(monkeypatch):
    """Rows that run at a time: as many as fit, one example at the least."""
    model, rows, finish = build("gpt2"), [], cells.finish
    monkeypatch.setattr(
        cells, "finish", lambda *given: rows.append(sum(len(e.value) for e in given[1])) or finish(*given)
    )
    patch(model, CLEAN, CORRUPT, DIFF, budget=1)
    assert set(rows) == {1}
    patch(model, CLEAN, CORRUPT, DIFF)
    assert max(rows) > 30


def mine(logits):
    """A function of all logits that needs all examples at once."""
    assert logits.shape == (4, 9, 60)
    chosen = logits[:, -1].gather(1, ANSWERS)
    return chosen[:, 0] - chosen[:, 1]


@pytest.mark.parametrize("budget", [1, 1 << 30])
@pytest.mark.parametrize("site", ["resid_pre", "z"])
def test_a_function_of_all_logits_as_metric(site, budget):
    model = kept("gpt2")
    found = both(model, CLEAN, CORRUPT, mine, site, budget=budget)
    wanted = patch(model, CLEAN, CORRUPT, DIFF, site)
    np.testing.assert_allclose(found.values, wanted.values, rtol=0, atol=CLOSE)
    assert found.name == "effect on mine" and wanted.name == "effect on logit_diff"
    # earlier tokens count too: what lies before the first difference is there, and the same
    everywhere = both(model, CLEAN, CORRUPT, lambda logits: logits.logsumexp(-1).mean(1), site, budget=budget)
    assert np.abs(everywhere.values).max() > 1e-3


@pytest.mark.parametrize("make", [lambda logits: prob(ANSWERS[:, 0]), lambda logits: kl(logits)], ids=["prob", "kl"])
def test_metrics_of_the_whole_distribution(make):
    model = kept("gemma2")
    metric = make(run(model, CLEAN)[0][:, -1])
    found = both(model, CLEAN, CORRUPT, metric, "attn_out", positions=[3, 8])
    if metric.name == "kl":
        assert max(map(abs, found.columns["clean"])) < 1e-6 and min(found.columns["corrupt"]) > 0


def test_padding_on_either_side_and_the_models_own_mode_make_no_difference():
    model = build("gpt2")
    wanted = patch(model, GOOD, BAD, DIFF, "z", by="position")
    left = [
        encode(None, [row[:n].tolist() for row, n in zip(ids, LENGTHS, strict=True)], side="left")
        for ids in (CLEAN, CORRUPT)
    ]
    np.testing.assert_allclose(patch(model, *left, DIFF, "z", by="position").values, wanted.values, rtol=0, atol=CLOSE)
    model.config.attn_pdrop = model.config.resid_pdrop = 0.5
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    disturbed(model)
    with torch.inference_mode(), unchanged(model):
        np.testing.assert_array_equal(patch(model, GOOD, BAD, DIFF, "z", by="position").values, wanted.values)


def test_padding_is_no_longer_than_it_must_be():
    """Columns that no prompt reaches don't count: one more pad token changes nothing, on either side of a pair."""
    model = kept("llama_gqa")
    wide = encode(None, [*GOOD.ids.tolist(), CLEAN[0].tolist() * 2]).select(slice(4))
    wide = type(GOOD)(wide.ids, torch.nn.functional.pad(GOOD.mask, (0, wide.ids.shape[1] - 9)))
    wanted = patch(model, GOOD, BAD, DIFF)
    for pair in ((wide, BAD), (GOOD, wide)):
        found = patch(model, *pair, DIFF)
        assert found.values.shape == wanted.values.shape
    np.testing.assert_allclose(patch(model, wide, BAD, DIFF).values, wanted.values, rtol=0, atol=CLOSE)


def test_short_prompts():
    """Fewer tokens than heads; and a single one."""
    model = kept("gpt2")
    for length in (1, 2, 3):
        clean, corrupt = CLEAN[:, 3 : 3 + length], CORRUPT[:, 3 : 3 + length]
        for site in SITES:
            parts = None if parts_of("gpt2", site) is None else [0, 3]
            both(model, clean, corrupt, DIFF, site, by="all", parts=parts, layers=[1])
        both(model, clean, corrupt, DIFF, "pattern", by="position", parts=[3])


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox"])
def test_bf16(name):
    """Within 2e-2 of the logits' scale."""
    model = build(name, dtype=torch.bfloat16)
    scale = float(run(model, CLEAN)[0].abs().max())
    for site in ("resid_pre", "z", "k"):
        fast, slow = (patch(model, CLEAN, CORRUPT, DIFF, site, reuse=r) for r in (True, False))
        assert np.abs(fast.values - slow.values).max() < 2e-2 * scale


@pytest.mark.parametrize(
    "change",
    [{"resid_pre.1": lambda x: x + torch.linspace(-1, 1, 32)}, {"attn_out.1": lambda x: 2 * x}, {"attn_out.1": 0.0},
     {"mlp_out.2": torch.tanh}, {"mlp_post.1": lambda x: x.relu()}, {"z.1.2": 0.0}],
)  # fmt: skip
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_neox"])
def test_inside_of_an_edit_the_edited_model_is_patched(name, change):
    model = kept(name)
    plain = patch(model, CLEAN, CORRUPT, DIFF, by="all")
    with edit(model, change):
        for site in ("resid_pre", "attn_out", "z", "q", "v", "mlp_post"):
            parts = None if parts_of(name, site) is None else [0, 1]
            found = both(model, CLEAN, CORRUPT, DIFF, site, by="all", parts=parts)
        assert found.columns["clean"] != pytest.approx(plain.columns["clean"], abs=1e-3)


def test_hooks_that_transformers_leaves_behind_do_not_slow_a_sweep_down(monkeypatch):
    model, calls, finish = build("llama_gqa"), [], cells.finish
    model(CLEAN, output_hidden_states=True, output_attentions=True)
    monkeypatch.setattr(cells, "finish", lambda *given: calls.append(0) or finish(*given))
    patch(model, CLEAN, CORRUPT, DIFF)
    assert calls
    handle = model.model.layers[1].register_forward_hook(lambda *_: None)  # anybody else's may do anything
    calls.clear()
    patch(model, CLEAN, CORRUPT, DIFF, layers=0, positions=[3])
    handle.remove()
    assert not calls


# ---- what comes out


def test_results(tmp_path):
    model = kept("gpt2")
    found = patch(model, CLEAN, CORRUPT, DIFF)
    assert list(found.axes) == ["example", "layer", "position"] and found.values.shape == (4, 3, 9)
    assert list(found.axes["layer"]) == [0, 1, 2] and list(found.axes["position"]) == list(range(9))
    assert found.name == "effect on logit_diff" and set(found.columns) == {"clean", "corrupt", "span"}
    wanted = {
        "kind": "patching",
        "direction": "denoising",
        "site": "resid_pre",
        "metric": "logit_diff",
        "model": "gpt2",
    }
    assert wanted.items() <= found.meta.items()
    span = np.array(found.columns["clean"]) - np.array(found.columns["corrupt"])
    np.testing.assert_allclose(found.columns["span"], span, rtol=0, atol=1e-6)
    ratio = found.normalized()
    np.testing.assert_allclose(ratio.mean, found.values.mean(0) / span.mean(), rtol=1e-5)
    assert ratio.name == "recovery" and ratio.values[:, 0, 3].shape == (4,)
    again = Result.load(ratio.save(tmp_path / "found"))
    np.testing.assert_array_equal(again.values, ratio.values)
    assert again.meta == ratio.meta
    assert patch(model, CLEAN, CORRUPT, DIFF, direction="noising").normalized().name == "damage"


@pytest.mark.parametrize("site", ["resid_pre", "z", "pattern", "mlp_in"])
def test_the_model_is_as_it_was(site):
    model = disturbed(build("gpt2"))

    def fails(logits):
        raise ValueError("mine")

    with unchanged(model):
        patch(model, GOOD, BAD, DIFF, site)
        with pytest.raises(ValueError, match="mine"):
            patch(model, GOOD, BAD, fails, site)
        with pytest.raises(KeyboardInterrupt):
            patch(model, GOOD, BAD, DIFF, site, progress=interrupted)


def interrupted(done, total):
    raise KeyboardInterrupt
