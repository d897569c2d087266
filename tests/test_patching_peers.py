"""The peers' sweeps of the patching benchmark agree with each other, and a part of a sweep is that part."""

from pathlib import Path

import pytest
import torch
from activations.families import build, prompts

torch.set_num_threads(1)
BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"
DATA = prompts()
FAMILIES = ("gpt2", "llama_gqa")


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import patching_peers

    return patching_peers


def by_hand(model, component, layer, column):
    """One cell, written out for these two families, without the benchmark's code. Llama has two kv heads of width 8."""
    clean, corrupt, answers = DATA
    fused = model.config.model_type == "gpt2"
    block = (model.transformer.h if fused else model.model.layers)[layer]
    if component == "resid":
        module, where = block, (slice(None), column)
    elif component == "z":
        module = block.attn.c_proj if fused else block.self_attn.o_proj
        where = (..., slice(8 * column, 8 * column + 8))
    else:
        start = 8 * column + (32 * "qkv".index(component) if fused else 0)
        module, where = block.attn.c_attn if fused else getattr(block.self_attn, f"{component}_proj"), None
        where = (..., slice(start, start + 8))
    before, seen = component in ("resid", "z"), []

    def hook(value):
        seen.append(value.clone())
        if len(seen) == 2:
            value = value.clone()
            value[where] = seen[0][where]
        return value

    if before:
        handle = module.register_forward_pre_hook(lambda _, arguments: (hook(arguments[0]), *arguments[1:]))
    else:
        handle = module.register_forward_hook(lambda _, __, result: hook(result))
    with torch.no_grad():
        model(clean)
        logits = model(corrupt).logits[:, -1]
    handle.remove()
    rows = torch.arange(len(logits))
    return float((logits[rows, answers[:, 0]] - logits[rows, answers[:, 1]]).mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_baseline_is_what_it_says(name, peers):
    model = build(name)
    table = peers.hooks_resid_sweep(model, *DATA)
    assert table.shape == (3, 9)
    unpatched = peers.logit_difference(model(DATA[1]).logits, DATA[2])
    assert (table[:, :3] - unpatched).abs().max() < 1e-5  # the prompts agree there
    for layer, position in ((0, 3), (1, 5), (2, 8)):
        assert table[layer, position] == pytest.approx(by_hand(model, "resid", layer, position), abs=1e-5)
    for component in peers.COMPONENTS:
        table = peers.hooks_head_sweep(model, *DATA, component)
        assert table.shape == (3, 2 if name == "llama_gqa" and component in "kv" else 4)
        assert (table - unpatched).abs().max() > 0.01
        for layer, head in ((0, 1), (2, 0)):
            assert table[layer, head] == pytest.approx(by_hand(model, component, layer, head), abs=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.peers
@pytest.mark.parametrize("name", FAMILIES)
def test_peers_agree(name, peers):
    pytest.importorskip("transformer_lens")
    pytest.importorskip("nnsight")
    from surgery.interop import to_nnsight, to_transformer_lens

    model = build(name)
    bridge, traced = to_transformer_lens(model), to_nnsight(model)
    plain = peers.hooks_resid_sweep(model, *DATA)
    # fp32: the same kernels in nnsight; eager against sdpa in the bridge
    assert torch.equal(peers.nnsight_resid_sweep(traced, *DATA), plain)
    assert (peers.bridge_resid_sweep(bridge, *DATA) - plain).abs().max() < 5e-6
    for component in peers.COMPONENTS:
        plain = peers.hooks_head_sweep(model, *DATA, component)
        assert torch.equal(peers.nnsight_head_sweep(traced, *DATA, component), plain)
        assert (peers.bridge_head_sweep(bridge, *DATA, component) - plain).abs().max() < 5e-6


@pytest.mark.peers
def test_a_few_cells_are_those_cells_and_time_is_extrapolated(peers):
    pytest.importorskip("transformer_lens")
    pytest.importorskip("nnsight")
    from surgery.interop import to_nnsight, to_transformer_lens

    model = build("llama_gqa")
    runs = [
        (peers.hooks_resid_sweep, model, {}),
        (peers.nnsight_resid_sweep, to_nnsight(model), {}),
        (peers.bridge_resid_sweep, to_transformer_lens(model), {}),
        (peers.hooks_head_sweep, model, {"component": "v"}),
        (peers.nnsight_head_sweep, to_nnsight(model), {"component": "v"}),
        (peers.bridge_head_sweep, to_transformer_lens(model), {"component": "v"}),
    ]
    cells = [(2, 1), (0, 0)]
    for sweep, subject, options in runs:
        whole, part = sweep(subject, *DATA, **options), sweep(subject, *DATA, cells=cells, **options)
        chosen = torch.zeros_like(whole, dtype=torch.bool)
        chosen[[2, 0], [1, 0]] = True
        assert torch.equal(part.isnan(), ~chosen)
        assert (part[chosen] - whole[chosen]).abs().max() < 1e-6
        timing = peers.timed(sweep, subject, *DATA, measure=2, **options)
        assert (timing.cells, timing.measured) == (whole.numel(), 2)
        assert timing.total == timing.clean_run + timing.cells * timing.cell


def test_models_of_the_benchmark(peers):
    model = peers.llama(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2)  # fmt: skip
    assert model.config.num_key_value_heads == 2 and not model.training
    assert model.model.layers[0].mlp.up_proj.weight.std() == pytest.approx(0.06, rel=0.1)  # 0.02 times 3
    clean, corrupt, answers = peers.pairs(50)
    assert clean.shape == (8, 24) and answers.shape == (8, 2)
    assert set((clean != corrupt).any(0).nonzero()[:, 0].tolist()) == {5, 11}
    assert peers.gpt2(n_layer=1, n_embd=16, n_head=2, vocab_size=50).config._attn_implementation == "sdpa"
