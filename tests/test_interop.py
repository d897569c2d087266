"""Bridges, nnsight models, PEFT and parallel wrappers: in and out, offline, the original as it was."""

import copy
import socket

import pytest
import torch
from activations.families import FAMILIES, build, prompts, tuned
from torch import nn

from surgery import interop, zoo
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.interop import to_nnsight, to_transformer_lens, unwrap

torch.set_num_threads(1)
CLEAN, _, _ = prompts()
NO_BRIDGE = {"falcon_new": "can't make a bridge", "falcon_alibi": "other logits"}
"""What TransformerLens 4.3 can't do, and what is said then."""


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test may reach for a network."""

    def refuse(*address, **options):
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def logits(model):
    with torch.no_grad():
        out = model(CLEAN)
    return getattr(out, "logits", out)


def state(model):
    """Everything of a model that must stay: tensors (values and identity), hooks, flags and what else modules carry."""
    tensors = {n: (id(t), t.clone(), t.requires_grad) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    modules = {n: (id(m), m.training, set(vars(m))) for n, m in model.named_modules()}
    hooks = {n: [list(vars(m)[h]) for h in interop._HOOKS] for n, m in model.named_modules()}
    return tensors, modules, hooks, model.config.to_dict(), model.config._attn_implementation


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    for name, (identity, value, grad) in before[0].items():
        assert (identity, grad) == (after[0][name][0], after[0][name][2]), name
        assert torch.equal(value, after[0][name][1]), name
    assert before[1:] == after[1:]


@pytest.mark.peers
@pytest.mark.parametrize("name", FAMILIES)
def test_through_transformer_lens_and_back(name):
    pytest.importorskip("transformer_lens")
    model = build(name)
    model.register_forward_hook(lambda *_: None)  # somebody's, which must stay and must not be copied
    before, expected, random = state(model), logits(model), torch.get_rng_state()
    if name in NO_BRIDGE:
        with pytest.raises(SurgeryError, match=NO_BRIDGE[name]):
            to_transformer_lens(model)
        assert_same(before, state(model))
        return
    bridge = to_transformer_lens(model)
    plain = unwrap(bridge)
    assert type(plain) is type(model)
    assert not interop._has_bridges(plain) and not plain._forward_hooks and not bridge.original_model._forward_hooks
    # fp32; the bridge is eager, the model sdpa
    assert (logits(bridge) - expected).abs().max() < 1e-5
    assert (logits(plain) - expected).abs().max() < 1e-5
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in model.named_parameters()}
    assert_same(before, state(model))
    assert torch.equal(random, torch.get_rng_state())
    assert anatomy_of(plain).n_layers == 3  # found, and checked against the model
    # the bridge has its own weights, and the plain model has the bridge's
    ours = {p.data_ptr() for p in model.parameters()}
    theirs = {p.data_ptr() for p in bridge.original_model.parameters()}
    assert all(p.data_ptr() in theirs and p.data_ptr() not in ours for p in plain.parameters())
    assert unwrap(bridge) is plain and unwrap(bridge.original_model) is plain


@pytest.mark.peers
def test_every_attention_hook_of_the_bridge_fires():
    pytest.importorskip("transformer_lens")
    for name in ("gpt2", "gptj", "opt"):  # the latter two have no pattern under sdpa
        _, cache = to_transformer_lens(build(name)).run_with_cache(CLEAN)
        assert cache["blocks.1.attn.hook_pattern"].shape == (4, 4, 9, 9)


@pytest.mark.peers
def test_bridge_with_tokenizer_in_bf16_and_training_mode_restored():
    pytest.importorskip("transformer_lens")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.resolved("tiny-base"))
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    model = build("llama_gqa", dtype=torch.bfloat16).train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    bridge = to_transformer_lens(model, tokenizer)
    assert modes == [m.training for m in model.modules()]
    assert bridge.cfg.dtype == torch.bfloat16 and unwrap(bridge).dtype == torch.bfloat16
    assert bridge.to_tokens("1+2").shape[0] == 1
    assert (tokenizer.padding_side, tokenizer.pad_token) == (side, pad)
    # bf16, eager against sdpa
    assert (logits(bridge.eval()).float() - logits(model.eval()).float()).abs().max() < 0.1


@pytest.mark.peers
def test_what_a_bridge_no_longer_shares_is_refused_or_followed():
    pytest.importorskip("transformer_lens")
    bridge = to_transformer_lens(build("gpt_neox"))
    plain = unwrap(bridge)
    with torch.no_grad():
        bridge.blocks[0].mlp.out.weight.add_(0.1)  # shared with the plain model
    assert (logits(bridge) - logits(unwrap(bridge))).abs().max() < 1e-5
    moved = bridge.to(torch.float64)
    assert unwrap(moved).dtype == torch.float64 and (logits(moved) - logits(unwrap(moved))).abs().max() < 1e-5
    with torch.no_grad():
        bridge.blocks[1].attn.k.weight.add_(0.1)  # a copy of rows of the fused matrix
    with pytest.raises(SurgeryError, match=r"'k' of gpt_neox.layers.1.attention was changed in the bridge"):
        unwrap(bridge)
    assert plain.dtype in (torch.float32, torch.float64)


@pytest.mark.peers
@pytest.mark.parametrize("process", [True, False], ids=["processed", "aliases only"])
def test_compatibility_mode_is_refused(process):
    pytest.importorskip("transformer_lens")
    bridge = to_transformer_lens(build("gpt2"))
    bridge.enable_compatibility_mode(no_processing=not process)
    with pytest.raises(SurgeryError, match="compatibility mode"):
        unwrap(bridge)
    with pytest.raises(SurgeryError, match="compatibility mode"):
        unwrap(bridge.original_model)


@pytest.mark.peers
@pytest.mark.parametrize("name", FAMILIES)
def test_through_nnsight_and_back(name):
    pytest.importorskip("nnsight")
    model = build(name)
    model.register_forward_hook(lambda *_: None)
    before, expected = state(model), logits(model)
    traced = to_nnsight(model)
    with torch.no_grad(), traced.trace(CLEAN):
        seen = traced.output.logits.save()
    inside = unwrap(traced)
    assert torch.equal(seen, expected) and torch.equal(logits(inside), expected)
    assert_same(before, state(model))
    pairs = zip(inside.named_parameters(), model.named_parameters(), strict=True)
    assert all(a == b and p is q for (a, p), (b, q) in pairs)
    again = unwrap(to_nnsight(traced))  # a model that nnsight has been in
    assert again is not inside and torch.equal(logits(again), expected)


@pytest.mark.peers
def test_nnsight_with_a_tokenizer_takes_text():
    pytest.importorskip("nnsight")
    from surgery.models import load

    model, tokenizer = load("tiny-base")
    side = tokenizer.padding_side
    traced = to_nnsight(model, tokenizer)
    with torch.no_grad():
        with traced.trace("1+2="):
            seen = traced.output.logits.save()
        ids = tokenizer("1+2=", return_tensors="pt").input_ids
        assert (seen - model(ids).logits).abs().max() < 1e-5  # fp32; the trace passes a mask
    assert tokenizer.padding_side == side
    assert unwrap(traced).lm_head.weight is model.lm_head.weight


@pytest.mark.peers
def test_from_nnsight_to_a_bridge():
    pytest.importorskip("nnsight")
    pytest.importorskip("transformer_lens")
    model = build("llama_gqa")
    bridge = to_transformer_lens(to_nnsight(model))
    assert (logits(bridge) - logits(model)).abs().max() < 1e-5


@pytest.mark.peers
def test_nnsight_without_weights_is_refused():
    nnsight = pytest.importorskip("nnsight")
    with torch.device("meta"):
        model = type(build("gpt2"))(build("gpt2").config)
    with pytest.raises(SurgeryError, match="no weights yet"):
        unwrap(nnsight.NNsight(model))


@pytest.mark.peers
@pytest.mark.parametrize(("name", "target"), [("llama_gqa", "q_proj"), ("gpt2", "c_attn")])
def test_peft_adapters_are_inside_and_active(name, target):
    peft = pytest.importorskip("peft")
    model = build(name)
    plain = logits(model)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=[target])).eval()
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    inside = unwrap(adapted)
    assert inside is adapted.get_base_model()
    assert torch.equal(logits(inside), logits(adapted)) and (logits(inside) - plain).abs().max() > 0.1
    layer = next(m for n, m in inside.named_modules() if n.endswith(target))
    assert layer.weight is layer.base_layer.weight  # the base's alone
    assert anatomy_of(inside).n_kv_heads == anatomy_of(model).n_kv_heads  # which checks every site against the model
    seen = []
    handle = layer.register_forward_hook(lambda module, arguments, output: seen.append((arguments[0], output)))
    logits(inside)
    handle.remove()
    with adapted.disable_adapter():
        assert torch.equal(logits(inside), plain)
    x, y = seen[0]
    with torch.no_grad():  # what a hook sees is the base's output and the adapter's
        a, b, scale = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
        assert (y - layer.base_layer(x) - scale * b(a(x))).abs().max() < 1e-5


@pytest.mark.peers
def test_adapters_outside_the_layers_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(SurgeryError, match="works on the prompt"):
        unwrap(peft.get_peft_model(build("gpt2"), config))


def test_parallel_and_compiled_wrappers(tmp_path):
    model = build("llama_gqa")
    assert unwrap(model) is model
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(model)) is model
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert unwrap(nn.parallel.DistributedDataParallel(model)) is model
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("thing", ["gpt2", nn.Linear(2, 2), None, {"model": 1}], ids=lambda t: type(t).__name__)
def test_anything_else_is_named(thing):
    with pytest.raises(SurgeryError, match=type(thing).__qualname__) as told:
        unwrap(thing)
    assert "surgery.models.load" in told.value.hint


def test_a_missing_library_is_a_sentence(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge.sources", None)
    monkeypatch.setitem(sys.modules, "nnsight", None)
    for make in (to_transformer_lens, to_nnsight):
        with pytest.raises(SurgeryError, match="is not installed"):
            make(build("gpt2"))


def test_families_are_random_but_repeatable():
    first, second, other = build("gpt2"), build("gpt2"), build("gpt2", seed=1)
    assert torch.equal(logits(first), logits(second))
    assert (logits(first) - logits(other)).abs().max() > 0.1
    assert (logits(tuned(first)) - logits(first)).abs().max() > 0.1
