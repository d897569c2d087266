"""Anatomies of running models: every family, families that nobody listed, and models that are not what they seem."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from activations.families import CONFIGS, FAMILIES, LLAMA_LIKE, PARALLEL, VOCAB, build, prompts
from activations.state import disturbed, unchanged
from activations.unlisted import UNLISTED, build_unlisted, drawn

from analysis.metrics import logit_diff
from analysis.patching import patch
from surgery.activations import capture, edit, run
from surgery.anatomy import SITES, Site, anatomy_of
from surgery.anatomy.families import FAMILIES as ROWS
from surgery.anatomy.families import Family, by_structure, family_of
from surgery.errors import SurgeryError
from surgery.interop import to_nnsight, to_transformer_lens

torch.set_num_threads(1)
CLEAN, CORRUPT, ANSWERS = prompts()
MIXTURES = {"mixtral", "qwen2_moe", "qwen3_moe"}
KV_HEADS = {"gpt2": 4, "gpt_neox": 4, "gpt_neox_sequential": 4, "gptj": 4, "opt": 4, "llama": 4, "phi": 4, "falcon": 1,
            "falcon_alibi": 4, "bloom": 4}  # fmt: skip
D_HEAD = {"gemma2": 16, "gemma3_text": 16}
D_MLP = {"gpt2": 128, "gptj": 128, "gpt_neox": 64, "gpt_neox_sequential": 64, "opt": 64, "falcon": 128,
         "falcon_new": 128, "falcon_alibi": 128, "bloom": 128}  # fmt: skip


def same(one: Family, other: Family) -> None:
    """Equal but for the layout of a fused projection, which structure alone can't tell."""
    assert {k: v for k, v in vars(one).items() if k != "layout"} == {
        k: v for k, v in vars(other).items() if k != "layout"
    }


# ---- every family


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_found_and_checked(name, attn):
    model = disturbed(build(name, attn))
    with unchanged(model):
        a = anatomy_of(model)
    assert anatomy_of(model) is a and a.name == model.config.model_type
    assert (a.n_layers, a.n_heads, a.d_model) == (3, 4, 32)
    assert (a.n_kv_heads, a.d_head) == (KV_HEADS.get(name, 2), D_HEAD.get(name, 8)) and a.group == 4 // a.n_kv_heads
    assert a.parallel == (name in PARALLEL)
    if name not in MIXTURES:
        assert a.d_mlp() == a.heads_of("mlp_post") == D_MLP.get(name, 48)
    assert a.head is model.get_output_embeddings() and a.embed is model.get_input_embeddings()
    assert a.norms_over_heads(1) == (name == "olmo2")
    assert (a.mlp(1) is None) == (name == "opt")


@pytest.mark.parametrize("name", FAMILIES)
def test_structure_says_what_the_table_says(name):
    model = build(name)
    with unchanged(model):
        found = by_structure(model)
    same(found, family_of(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_that_nobody_listed_is_found_fused_layouts_by_trying(name, monkeypatch):
    listed = anatomy_of(build(name)).family
    model = disturbed(build(name))
    monkeypatch.delitem(ROWS, model.config.model_type)
    with unchanged(model):
        assert anatomy_of(model).family == listed


@pytest.mark.parametrize("name", UNLISTED)
def test_further_families_are_found(name):
    assert name not in ROWS
    model = disturbed(build_unlisted(name))
    with unchanged(model):
        a = anatomy_of(model)  # checks every definition
    assert (a.n_layers, a.n_heads, a.d_model, a.d_head) == (3, 4, 32, 8)
    assert a.parallel == (name == "cohere")
    assert a.heads_apart == (name not in ("bitnet", "diffllama"))  # a norm over all heads, heads in pairs


# ---- variants of a family, and what is refused


def gpt_neox(**own):
    shared = {k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"}
    return transformers.GPTNeoXConfig(**(shared | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None} | own))


def falcon(**own):
    return transformers.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                     max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
                                     **own)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        gpt_neox(attention_bias=False),
        falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
        falcon(multi_query=False, parallel_attn=True, bias=True),
        transformers.PhiConfig(**LLAMA_LIKE, qk_layernorm=True, pad_token_id=0, bos_token_id=1, eos_token_id=None),
        transformers.MistralConfig(**LLAMA_LIKE, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=None),
    ],
    ids=["no bias", "one norm", "many queries", "normed queries", "wide heads"],
)
def test_variants_of_a_family(config):
    a = anatomy_of(drawn(config))
    assert a.n_heads == 4 and a.d_head == (16 if config.model_type == "mistral" else 8)


@pytest.mark.parametrize(
    "config, sentence",
    [
        (
            transformers.OPTConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                   ffn_dim=64, word_embed_proj_dim=32, do_layer_norm_before=False, pad_token_id=0,
                                   bos_token_id=1, eos_token_id=None),
            "OPTForCausalLM is not built as models of type 'opt' are",
        ),
        (
            transformers.OPTConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                   ffn_dim=64, word_embed_proj_dim=16, pad_token_id=0, bos_token_id=1,
                                   eos_token_id=None),
            "OPTForCausalLM can't be looked into",
        ),
        (
            transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4, pad_token_id=0,
                                     bos_token_id=1, eos_token_id=None, apply_residual_connection_post_layernorm=True),
            r"The parts of this bloom are not where they were looked for: 'resid_post.0 = resid_pre \+ attn_out",
        ),
        (
            transformers.GraniteConfig(**LLAMA_LIKE, residual_multiplier=0.2, pad_token_id=0, bos_token_id=1,
                                       eos_token_id=None),
            r"The parts of this granite are not where they were looked for: 'resid_post.0",
        ),
        (
            transformers.CodeGenConfig(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4,
                                       pad_token_id=0, bos_token_id=1, eos_token_id=None),
            "The parts of this codegen are not where they were looked for: 'v.0 is what the cache keeps'",
        ),
        (
            transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, pad_token_id=0,
                                     bos_token_id=1, eos_token_id=None),
            "MambaForCausalLM is not a decoder whose parts can be found: no attention with projections",
        ),
    ],
    ids=["norms behind", "narrow embedding", "normed residual", "scaled residual", "permuted heads", "no attention"],
)  # fmt: skip
def test_what_is_not_where_it_should_be_is_refused(config, sentence):
    model = drawn(config)
    with unchanged(model):
        for _ in range(2):  # nothing wrong is remembered
            with pytest.raises(SurgeryError, match=sentence):
                anatomy_of(model)


def test_a_model_without_a_language_model_head_is_refused():
    config = CONFIGS["llama"]()
    config.num_labels = 2
    with pytest.raises(SurgeryError, match="LlamaForSequenceClassification has no language model head"):
        anatomy_of(transformers.AutoModelForSequenceClassification.from_config(config).eval())
    with pytest.raises(SurgeryError, match="GPT2Model is not built as models of type 'gpt2' are"):
        anatomy_of(transformers.AutoModel.from_config(CONFIGS["gpt2"]()).eval())


def test_the_head_itself_is_wrong():
    """Logits that are not head(final): soft-capping that a model's code does and its config does not say."""
    model = build("llama")
    model.register_forward_hook(lambda module, args, output: output.__setitem__("logits", output.logits * 2) or output)
    with pytest.raises(SurgeryError, match=r"'logits = head\(final\)' does not hold"):
        anatomy_of(model)


# ---- what is kept


def test_an_anatomy_follows_the_model():
    model = build("llama")
    a = anatomy_of(model)
    model.resize_token_embeddings(VOCAB + 4)
    b = anatomy_of(model)
    assert b.head is model.lm_head and b.embed is model.model.embed_tokens and a.head is not b.head
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])
    assert anatomy_of(model).blocks[0] is model.model.layers[0]
    del model.model.layers[2]
    model.config.num_hidden_layers = 2
    assert anatomy_of(model).n_layers == 2
    model.model.norm = copy.deepcopy(model.model.norm)
    assert anatomy_of(model).final_norm is model.model.norm


def test_an_anatomy_keeps_no_model_alive():
    model = build("gpt2")
    anatomy, gone = anatomy_of(model), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and anatomy.n_layers == 3


def test_bf16_and_double():
    for name in ("gpt2", "gemma2", "olmo2", "mixtral", "falcon_new"):
        assert anatomy_of(build(name, dtype=torch.bfloat16)).n_layers == 3
    assert anatomy_of(build("gpt2", dtype=torch.float64)).n_layers == 3


# ---- sites that are not there


def test_no_resid_mid_in_parallel_blocks_and_no_neurons_in_mixtures():
    with pytest.raises(SurgeryError, match="no site 'resid_mid' in gpt_neox: its blocks are parallel, attention and"):
        anatomy_of(build("gpt_neox")).expand(["resid_mid.1"])
    for site in ("mlp_pre", "mlp_post.2.5"):
        with pytest.raises(SurgeryError, match=r"no site 'mlp_\w+' in mixtral: its MLPs are mixtures of experts"):
            anatomy_of(build("mixtral")).expand([site])
    with pytest.raises(SurgeryError, match="no site 'mlp_post' in qwen2_moe"):
        anatomy_of(build("qwen2_moe")).d_mlp()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_that_is_there_expands_to_every_layer(name):
    a = anatomy_of(build(name))
    absent = {"resid_mid"} if name in PARALLEL else {"mlp_pre", "mlp_post"} if name in MIXTURES else set()
    assert {site for site in SITES if a.missing(site)} == absent
    there = [site for site in SITES if site not in absent]
    found = a.expand(there)
    assert [str(s) for s in found if s.name == "z"] == ["z.0", "z.1", "z.2"] and Site("embed") in found
    assert len(found) == 3 * len(there) - 4 and a.expand([*there, *there]) == found  # embed and final stand once


# ---- adapters and other libraries' objects at the door


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
    )
    return adapted.eval()


@pytest.mark.peers
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox", "opt", "phi3", "falcon"])
def test_lora_models_at_every_door(name):
    adapted = lora(build(name))
    with torch.no_grad():
        wanted = adapted(CLEAN).logits
    with unchanged(adapted):
        logits, seen = run(adapted, CLEAN, ["attn_out.1", "z.1", "resid_post.2"])
        torch.testing.assert_close(logits, wanted, rtol=0, atol=0)
        with capture(adapted, "mlp_out.0") as kept, torch.no_grad():
            adapted(CLEAN)
        assert kept["mlp_out.0"].shape == (4, 9, 32)
        with edit(adapted, {"resid_post.2": lambda x: 2 * x + 1}), capture(adapted, "resid_post.2") as doubled:
            adapted(CLEAN)
        torch.testing.assert_close(doubled["resid_post.2"], 2 * seen["resid_post.2"] + 1, rtol=0, atol=1e-5)
    out = anatomy_of(adapted.base_model.model).out(1)
    with torch.no_grad():  # base and adapter together
        torch.testing.assert_close(out(seen["z.1"].flatten(2)), seen["attn_out.1"], rtol=0, atol=1e-5)
    with unchanged(adapted):
        for site in ("resid_pre", "z", "k", "mlp_post"):
            more = {"parts": [0, 3]} if site == "mlp_post" else {}
            fast = patch(adapted, CLEAN, CORRUPT, logit_diff(ANSWERS), site, **more)
            slow = patch(adapted, CLEAN, CORRUPT, logit_diff(ANSWERS), site, reuse=False, **more)
            assert abs(fast.values - slow.values).max() < 5e-6


@pytest.mark.peers
def test_adapters_put_in_or_onto_the_head_after_a_first_look():
    peft = pytest.importorskip("peft")
    model = build("llama_gqa")
    before = patch(model, CLEAN, CORRUPT, logit_diff(ANSWERS))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    ).eval()
    with torch.no_grad():
        adapted.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    fast = patch(adapted, CLEAN, CORRUPT, logit_diff(ANSWERS))
    slow = patch(adapted, CLEAN, CORRUPT, logit_diff(ANSWERS), reuse=False)
    assert abs(fast.values - slow.values).max() < 1e-5 < abs(fast.values - before.values).max()


@pytest.mark.peers
def test_a_bridge_at_every_door():
    pytest.importorskip("transformer_lens")
    model = build("llama_gqa")
    bridge = to_transformer_lens(model)
    wanted, seen = run(model, CLEAN, ["z.1"])
    logits, kept = run(bridge, CLEAN, ["blocks.1.attn.hook_z"])
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)  # eager against sdpa
    torch.testing.assert_close(kept["z.1"], seen["z.1"], rtol=0, atol=1e-5)
    ours, theirs = (patch(m, CLEAN, CORRUPT, logit_diff(ANSWERS), "z").values for m in (model, bridge))
    assert abs(ours - theirs).max() < 5e-6
    for door in (capture(bridge, "z.1"), edit(bridge, {"z.1": 0.0})):  # calling the bridge would run other modules
        with pytest.raises(SurgeryError, match="(?s)bridge runs modules of its own.*unwrap"), door:
            pass


@pytest.mark.peers
def test_an_nnsight_model_at_every_door():
    pytest.importorskip("nnsight")
    model = build("llama_gqa")
    traced = to_nnsight(model)
    wanted, seen = run(model, CLEAN, ["z.1"])
    logits, kept = run(traced, CLEAN, ["z.1"])
    assert torch.equal(logits, wanted) and torch.equal(kept["z.1"], seen["z.1"])
    ours, theirs = (patch(m, CLEAN, CORRUPT, logit_diff(ANSWERS), "z").values for m in (model, traced))
    assert abs(ours - theirs).max() < 1e-6
    with capture(traced, "z.1") as kept, edit(traced, {"attn_out.1": 0.0}), torch.no_grad():  # noqa: SIM117
        with traced.trace(CLEAN):  # (nnsight reads the source of its own `with`)
            logits = traced.output.logits.save()
    with edit(model, {"attn_out.1": 0.0}), torch.no_grad():
        wanted = model(CLEAN).logits
    assert torch.equal(kept["z.1"], seen["z.1"])
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), "gpt2", None], ids=["module", "name", "none"])
def test_what_is_no_model_is_named_at_the_door(thing):
    for door in (lambda: run(thing, CLEAN), lambda: patch(thing, CLEAN, CORRUPT, logit_diff(ANSWERS))):
        with pytest.raises(SurgeryError, match="is no model that can be looked into"):
            door()
    with pytest.raises(SurgeryError, match="is no model that can be looked into"), capture(thing, "z"):
        pass


def test_a_model_that_computes_nan_is_told_so():
    from surgery.models import load

    model, _ = load("tiny-small-base")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = torch.nan
    with pytest.raises(SurgeryError, match="computes NaN: its weights hold numbers that are not finite"):
        anatomy_of(model)
