"""The sweeps of TransformerLens (eager: 5e-6) and of nnsight (the same kernel: 1e-6 of the logits' scale)."""

import numpy as np
import pytest
import torch
from activations.families import build, prompts

from analysis.metrics import logit_diff
from analysis.patching import patch
from surgery.interop import to_nnsight, to_transformer_lens

pytestmark = pytest.mark.peers
torch.set_num_threads(1)
CLEAN, CORRUPT, ANSWERS = prompts()
DIFF = logit_diff(ANSWERS)
FAMILIES = ["gpt2", "llama_gqa", "gpt_neox"]
ACROSS = 5e-6
"""Metrics of order one, float32, another attention kernel."""
STREAM = {"resid_pre": "resid_pre", "resid_mid": "resid_mid", "attn_out": "attn_out", "mlp_out": "mlp_out"}
HEADS = {
    "z": "attn_head_out",
    "q": "attn_head_q",
    "k": "attn_head_k",
    "v": "attn_head_v",
    "pattern": "attn_head_pattern",
}


def per_example(logits):
    chosen = logits[:, -1].gather(1, ANSWERS)
    return chosen[:, 0] - chosen[:, 1]


@pytest.fixture(scope="module", params=FAMILIES)
def theirs(request):
    """A model, its bridge, the bridge's cache of the clean run."""
    pytest.importorskip("transformer_lens")
    model = build(request.param)
    bridge = to_transformer_lens(model)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(CLEAN)
    return request.param, model, bridge, cache


def sweep(theirs, name, **more):
    """Their table: the metric of the patched runs, (cell, ..., example)."""
    from transformer_lens import patching

    _, _, bridge, cache = theirs
    with torch.no_grad():
        found = getattr(patching, f"get_act_patch_{name}")(bridge, CORRUPT, cache, per_example, reduce="none", **more)
    return np.moveaxis(found.values.numpy(), -1, 0)


def raw(found):
    """Our effects as the metric of the patched runs."""
    return found.values + np.array(found.columns["corrupt"]).reshape(-1, *[1] * (found.values.ndim - 1))


@pytest.mark.parametrize("site", STREAM)
def test_the_stream_by_position(theirs, site):
    name, model, _, _ = theirs
    if name == "gpt_neox" and site == "resid_mid":
        with pytest.raises(KeyError, match="hook_resid_mid"):  # parallel blocks: ours says so in a sentence
            sweep(theirs, site)
        return
    found = patch(model, CLEAN, CORRUPT, DIFF, site)
    np.testing.assert_allclose(raw(found), sweep(theirs, site), rtol=0, atol=ACROSS)
    assert np.abs(found.values).max() > 0.1


@pytest.mark.parametrize("site", HEADS)
def test_heads_over_all_positions(theirs, site):
    _, model, _, _ = theirs
    found = patch(model, CLEAN, CORRUPT, DIFF, site)  # of k and v one cell a key-value head, as theirs
    np.testing.assert_allclose(raw(found), sweep(theirs, f"{HEADS[site]}_all_pos"), rtol=0, atol=ACROSS)
    assert np.abs(found.values).max() > 0.01


@pytest.mark.parametrize("site", HEADS)
def test_heads_by_position(theirs, site):
    _, model, _, _ = theirs
    found = raw(patch(model, CLEAN, CORRUPT, DIFF, site, by="position"))
    wanted = sweep(theirs, f"{HEADS[site]}_by_pos")
    if site == "pattern":  # (layer, head, dst) there
        wanted = wanted.swapaxes(2, 3)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ACROSS)


def test_the_noising_direction(theirs):
    from transformer_lens import patching

    _, model, bridge, _ = theirs
    with torch.no_grad():
        _, cache = bridge.run_with_cache(CORRUPT)
        wanted = patching.get_act_patch_attn_head_out_all_pos(bridge, CLEAN, cache, per_example, reduce="none")
    found = patch(model, CLEAN, CORRUPT, DIFF, "z", direction="noising")
    ours = found.values + np.array(found.columns["clean"])[:, None, None]
    np.testing.assert_allclose(ours, np.moveaxis(wanted.values.numpy(), -1, 0), rtol=0, atol=ACROSS)


def test_their_normalised_table_is_our_recovery(theirs):
    """(patched - corrupt) / (clean - corrupt) of batch means."""
    _, model, bridge, _ = theirs
    found = patch(model, CLEAN, CORRUPT, DIFF, "attn_out")
    table = sweep(theirs, "attn_out").mean(0)
    with torch.no_grad():
        clean, corrupt = (float(per_example(bridge(ids)).mean()) for ids in (CLEAN, CORRUPT))
    wanted = (table - corrupt) / (clean - corrupt)
    np.testing.assert_allclose(found.normalized().mean, wanted, rtol=0, atol=2 * ACROSS / abs(clean - corrupt))


# ---- nnsight


def same(model, site, wanted):
    """The fast sweep within 1e-6 of the logits' scale, whole passes to the last bits: they compute the same."""
    with torch.no_grad():
        scale = float(model(CORRUPT).logits.abs().max())
    np.testing.assert_allclose(raw(patch(model, CLEAN, CORRUPT, DIFF, site)), wanted, rtol=0, atol=1e-6 * scale)
    whole = raw(patch(model, CLEAN, CORRUPT, DIFF, site, reuse=False))
    np.testing.assert_allclose(whole, wanted, rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_nnsight_the_stream(name):
    """Each block's input, position by position, in traces of one's own."""
    pytest.importorskip("nnsight")
    model = build(name)
    traced = to_nnsight(model)
    stack = {"gpt2": "transformer.h", "llama_gqa": "model.layers", "gpt_neox": "gpt_neox.layers"}[name]
    wanted = torch.zeros(4, 3, 9)
    for layer in range(3):
        block = traced
        for part in (*stack.split("."), layer):
            block = block[part] if isinstance(part, int) else getattr(block, part)
        with torch.no_grad():
            with traced.trace(CLEAN):
                kept = block.input.clone().save()
            for position in range(9):
                with traced.trace(CORRUPT):
                    stream = block.input.clone()
                    stream[:, position] = kept[:, position]
                    block.input = stream
                    logits = traced.output.logits.save()
                wanted[:, layer, position] = per_example(logits)
    same(model, "resid_pre", wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_nnsight_heads(name):
    """The input of each output projection, head by head."""
    pytest.importorskip("nnsight")
    model = build(name)
    traced = to_nnsight(model)
    wanted = torch.zeros(4, 3, 4)
    for layer in range(3):
        out = {
            "gpt2": lambda l: traced.transformer.h[l].attn.c_proj,
            "llama_gqa": lambda l: traced.model.layers[l].self_attn.o_proj,
            "gpt_neox": lambda l: traced.gpt_neox.layers[l].attention.dense,
        }[name](layer)
        with torch.no_grad():
            with traced.trace(CLEAN):
                kept = out.input.clone().save()
            for head in range(4):
                columns = slice(8 * head, 8 * head + 8)
                with traced.trace(CORRUPT):
                    z = out.input.clone()
                    z[..., columns] = kept[..., columns]
                    out.input = z
                    logits = traced.output.logits.save()
                wanted[:, layer, head] = per_example(logits)
    same(model, "z", wanted)
