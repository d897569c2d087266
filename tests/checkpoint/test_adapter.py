"""LoRA adapters as checkpoints: against the equations, against PEFT, and refused when they do not fit."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import read_json, real_llama, save_checkpoint, tiny_checkpoint, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from surgery.checkpoint import open_checkpoint
from surgery.checkpoint.adapter import AdaptedCheckpoint, Adapter, tied_pair
from surgery.errors import SurgeryError

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def lora(module: str, rows: int, cols: int, rank: int) -> dict[str, torch.Tensor]:
    at = f"base_model.model.{module}."
    return {f"{at}lora_A.weight": random(rank, cols), f"{at}lora_B.weight": random(rows, rank, seed=1)}


def write_adapter(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 6} | config)
    return folder


def product(tensors, module):
    at = f"base_model.model.{module}."
    return tensors[f"{at}lora_B.weight"].float() @ tensors[f"{at}lora_A.weight"].float()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return open_checkpoint(tiny_checkpoint(tmp_path_factory.mktemp("base") / "m", dtype="bfloat16", sharded=True))


# The equations


def test_lora_adds_and_leaves_the_rest(base, tmp_path):
    tensors = lora(Q, 16, 16, 2) | lora(DOWN, 16, 32, 2)
    adapted = AdaptedCheckpoint(base, write_adapter(tmp_path / "a", tensors))
    assert set(adapted.adapter.targets) == {f"{Q}.weight", f"{DOWN}.weight"}
    for name in base.tensors:
        if name in adapted.adapter.targets:
            assert adapted.tensors[name].dtype == "F32"
            delta = 3.0 * product(tensors, name.removesuffix(".weight"))
            torch.testing.assert_close(adapted.read(name), base.read(name).float() + delta, rtol=0, atol=1e-6)
            torch.testing.assert_close(adapted.adapter.delta(name), delta, rtol=0, atol=1e-6)
        else:
            assert adapted.read(name).equal(base.read(name)) and adapted.tensors[name] == base.tensors[name]


def test_rounded_is_rounded_once(base, tmp_path):
    folder = write_adapter(tmp_path / "a", lora(Q, 16, 16, 2))
    exact, rounded = AdaptedCheckpoint(base, folder), AdaptedCheckpoint(base, folder, rounded=True)
    assert rounded.tensors[f"{Q}.weight"].dtype == "BF16"
    assert rounded.read(f"{Q}.weight").equal(exact.read(f"{Q}.weight").bfloat16())


def test_patterns_choose_rank_and_scale(base, tmp_path):
    tensors = lora(Q, 16, 16, 2) | lora(DOWN, 16, 32, 4) | lora("model.layers.1.self_attn.q_proj", 16, 16, 2)
    patterns = {"rank_pattern": {"down_proj": 4}, "alpha_pattern": {r"layers\.0\..*q_proj": 1, "q_proj": 20, "proj": 5}}
    scale = {f"{Q}.weight": 1 / 2, "model.layers.1.self_attn.q_proj.weight": 20 / 2, f"{DOWN}.weight": 6 / 4}
    for rslora in (False, True):
        folder = write_adapter(tmp_path / f"a{rslora}", tensors, use_rslora=rslora, **patterns)
        for name, target in Adapter(folder, base).targets.items():
            rank = target.right.shape[0]
            assert target.scale == pytest.approx(scale[name] * (math.sqrt(rank) if rslora else 1)), name


def test_a_pattern_that_peft_would_not_match_is_found_out(base, tmp_path):
    folder = write_adapter(tmp_path / "a", lora(Q, 16, 16, 4), rank_pattern={"q_pro": 4})
    with pytest.raises(SurgeryError, match="should have rank 2"):
        Adapter(folder, base)


@pytest.mark.parametrize("square", [False, True])
def test_fan_in_fan_out(tmp_path, square):
    out = 8 if square else 24
    base = save_checkpoint(tmp_path / "b", {"h.0.attn.c_attn.weight": random(8, out)}, {"model_type": "gpt2"})
    tensors = lora("transformer.h.0.attn.c_attn", out, 8, 2)  # PEFT writes the prefix, old checkpoints lack it
    adapted = AdaptedCheckpoint(open_checkpoint(base), write_adapter(tmp_path / "a", tensors, fan_in_fan_out=True))
    got = adapted.read("h.0.attn.c_attn.weight")
    want = adapted.base.read("h.0.attn.c_attn.weight") + 3 * product(tensors, "transformer.h.0.attn.c_attn").T
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_replaced_tensors_and_biases(tmp_path):
    base = save_checkpoint(
        tmp_path / "b",
        {"x.weight": random(4, 6), "x.bias": random(4), "norm.weight": random(6), "a.bias": torch.ones(())},
        {},
    )
    tensors = lora("x", 4, 6, 2) | {
        "base_model.model.norm.weight": random(6, seed=9),
        "base_model.model.x.lora_B.bias": random(4, seed=5),
    }
    tensors["base_model.model.x.base_layer.bias"] = random(4, seed=7)
    tensors["base_model.model.a.bias"] = torch.tensor(5.0)
    adapted = AdaptedCheckpoint(open_checkpoint(base), write_adapter(tmp_path / "a", tensors))
    assert adapted.read("a.bias").item() == 5 and adapted.tensors["a.bias"].shape == ()
    assert adapted.read("norm.weight").equal(tensors["base_model.model.norm.weight"])
    torch.testing.assert_close(adapted.read("x.bias"), random(4, seed=7) + 3 * random(4, seed=5))
    assert adapted.adapter.delta("x.weight").shape == (4, 6)
    with pytest.raises(SurgeryError, match="no fixed difference"):
        adapted.adapter.delta("norm.weight")
    with pytest.raises(SurgeryError, match="does not touch"):
        adapted.adapter.delta("y.weight")


def test_a_larger_vocabulary_saved_with_the_adapter(base, tmp_path):
    """PEFT saves the whole embedding when it was resized; head and embedding may grow, other tensors may not."""
    at, more = "base_model.model.", {}
    for module, kind, shapes in (
        ("model.embed_tokens", "lora_embedding_", ((2, 43), (16, 2))),
        ("lm_head", "lora_", ((2, 16), (43, 2))),
    ):
        leaf = "" if "embedding" in kind else ".weight"
        more |= {f"{at}{module}.base_layer.weight": random(43, 16, seed=len(module))}
        more |= {f"{at}{module}.{kind}{side}{leaf}": random(*s) for side, s in zip("AB", shapes, strict=True)}
    adapted = AdaptedCheckpoint(base, write_adapter(tmp_path / "a", more))
    assert adapted.config["vocab_size"] == 43 and base.config["vocab_size"] == 40
    for module, delta in (
        ("model.embed_tokens", (random(16, 2) @ random(2, 43)).T),
        ("lm_head", random(43, 2) @ random(2, 16)),
    ):
        assert adapted.tensors[f"{module}.weight"].shape == (43, 16)
        want = random(43, 16, seed=len(module)) + 3 * delta
        torch.testing.assert_close(adapted.read(f"{module}.weight"), want, rtol=0, atol=1e-6)
        assert adapted.read(f"{module}.weight", 39, 43).equal(adapted.read(f"{module}.weight")[39:])
    with pytest.raises(SurgeryError, match="made for another base"):
        AdaptedCheckpoint(base, write_adapter(tmp_path / "b", {f"{at}{Q}.base_layer.weight": random(20, 16)}))


def test_float64_base_stays_float64(tmp_path):
    base = save_checkpoint(tmp_path / "b", {"x.weight": random(4, 6).double() / 3}, {})
    tensors = lora("x", 4, 6, 2)
    adapted = AdaptedCheckpoint(open_checkpoint(base), write_adapter(tmp_path / "a", tensors))
    at = "base_model.model.x.lora_"
    want = random(4, 6).double() / 3 + 3 * (tensors[f"{at}B.weight"].double() @ tensors[f"{at}A.weight"].double())
    torch.testing.assert_close(adapted.read("x.weight"), want, rtol=0, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=6), dora=st.booleans(), transposed=st.booleans())
def test_same_bits_in_whatever_portions(tmp_path_factory, cuts, dora, transposed):
    tmp = tmp_path_factory.mktemp("portions")
    rows, cols = 200, 37
    base = open_checkpoint(save_checkpoint(tmp / "b", {"x.weight": random(rows, cols).bfloat16()}, {}))
    tensors = lora("x", *((cols, rows) if transposed else (rows, cols)), 2)
    if dora:
        tensors["base_model.model.x.lora_magnitude_vector"] = random(cols if transposed else rows).abs()
    adapted = AdaptedCheckpoint(base, write_adapter(tmp / "a", tensors, use_dora=dora))
    edges = [0, *sorted(cuts), rows]
    parts = [adapted.read("x.weight", i, j) for i, j in zip(edges, edges[1:], strict=False)]
    assert torch.cat(parts).equal(adapted.read("x.weight"))
    if not dora:
        parts = [adapted.adapter.delta("x.weight", i, j) for i, j in zip(edges, edges[1:], strict=False)]
        assert torch.cat(parts).equal(adapted.adapter.delta("x.weight"))


# Refusals


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialisation"),
        ({"lora_alpha": "many"}, "make no sense"),
        ({"r": 0}, "make no sense"),
        ({"alpha_pattern": {"(": 1}}, "make no sense"),
    ],
)
def test_what_is_not_a_change_of_weights_is_refused(base, tmp_path, config, says):
    with pytest.raises(SurgeryError, match=says):
        AdaptedCheckpoint(base, write_adapter(tmp_path / "a", lora(Q, 16, 16, 2), **config))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (lora("model.layers.9.self_attn.q_proj", 16, 16, 2), "no tensor 'model.layers.9.self_attn.q_proj.weight'"),
        (lora(Q, 16, 24, 2), f"'{Q}.weight' is \\(16, 16\\) there"),
        (lora(DOWN, 32, 32, 2), f"'{DOWN}.weight'"),
        ({"base_model.model.model.norm.weight": random(17)}, "'model.norm.weight' is \\(16,\\)"),
        ({"base_model.model.score.weight": random(2, 16)}, "no tensor 'score.weight'"),
        ({f"base_model.model.{Q}.lora_A.weight": random(2, 16)}, "one is missing"),
        ({f"base_model.model.{Q}.lora_S": random(2)}, "not supported"),
        (lora(Q, 16, 16, 2) | {f"base_model.model.{Q}.lora_magnitude_vector": random(3)}, "3 magnitudes"),
        (lora(Q, 16, 16, 2) | {f"base_model.model.{Q}.lora_A.weight": torch.tensor(1.0)}, "should have rank 2"),
        ({f"base_model.model.{Q}.lora_magnitude_vector": random(16)}, "one is missing"),
    ],
)
def test_adapter_of_another_base_is_refused(base, tmp_path, tensors, says):
    with pytest.raises(SurgeryError, match=says):
        AdaptedCheckpoint(base, write_adapter(tmp_path / "a", tensors))


def test_not_an_adapter_and_pickled_adapters(base, tmp_path):
    with pytest.raises(SurgeryError, match="not an adapter"):
        AdaptedCheckpoint(base, tmp_path)
    tensors = lora(Q, 16, 16, 2)
    folder = write_adapter(tmp_path / "a", tensors)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(SurgeryError, match="holds no adapter_model"):
        AdaptedCheckpoint(base, folder)
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(SurgeryError, match="pickled"):
        AdaptedCheckpoint(base, folder)
    adapted = AdaptedCheckpoint(base, folder, allow_pickle=True)
    torch.testing.assert_close(adapted.adapter.delta(f"{Q}.weight"), 3 * product(tensors, Q), rtol=0, atol=1e-6)


def test_named_by_plus(base, tmp_path):
    folder = write_adapter(tmp_path / "a", lora(Q, 16, 16, 2))
    adapted = open_checkpoint(f"{base.path}+{folder}")
    assert isinstance(adapted, AdaptedCheckpoint) and adapted.path != base.path
    with pytest.raises(SurgeryError, match="adapter, not a whole model"):
        open_checkpoint(folder)


def test_tied_pair(tmp_path):
    assert tied_pair(open_checkpoint(tiny_checkpoint(tmp_path / "tied", tied=True))) == (
        "model.embed_tokens.weight",
        "lm_head.weight",
    )
    assert tied_pair(open_checkpoint(tiny_checkpoint(tmp_path / "untied"))) is None


# Parity with PEFT: what it computes with the adapter switched on, and what it merges


def materialise(adapted: AdaptedCheckpoint, folder):
    """The adapted model as a checkpoint, for transformers to load."""
    return save_checkpoint(folder, {n: adapted.read(n).clone() for n in adapted.tensors}, adapted.config)


LLAMA = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rslora": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\..*": 3, "^model.layers.0.self_attn.v_proj": 1},
        "alpha_pattern": {"k_proj": 1, r"model\.layers\.1\.self_attn\.o_proj": 30},
    },
    "embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "both ends": {"target_modules": ["lm_head", "embed_tokens"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "dora embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "tying ensured": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "saved, tying ensured": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", LLAMA)
def test_parity_with_peft_on_llama(tmp_path, case, tied):
    if "ensured" in case and not tied:
        pytest.skip("there is no tie to ensure")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = real_llama(tmp_path / "base", tied=tied)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**{"r": 2, "lora_alpha": 6} | LLAMA[case])
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    adapted = AdaptedCheckpoint(open_checkpoint(base), tmp_path / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(materialise(adapted, tmp_path / "ours"))
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        want, got = model.eval()(tokens).logits, ours.eval()(tokens).logits
    # float32 through two layers: agreement to about 1e-6 of the logits' size.
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    if not tied:
        merged = model.merge_and_unload().state_dict()
        state = ours.state_dict()
        assert merged.keys() == state.keys()
        for name, tensor in merged.items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-6 * max(1.0, float(tensor.abs().max())))
    touched_one_side = tied and case in {"embedding", "head", "both ends", "modules_to_save", "dora embedding"}
    assert read_json(tmp_path / "ours/config.json")["tie_word_embeddings"] is (tied and not touched_one_side)


GPT2 = {
    "plain": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "with head": {"target_modules": ["c_attn", "c_proj", "lm_head"]},
    "biases": {"target_modules": ["c_attn"], "bias": "all"},
    "own biases": {"target_modules": ["c_attn"], "bias": "lora_only"},
    "lora bias": {"target_modules": ["c_attn", "c_proj"], "lora_bias": True},
    "dora": {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
    "embedding": {"target_modules": ["wte", "wpe"]},
}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", GPT2)
def test_parity_with_peft_on_gpt2(tmp_path, case):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40, n_positions=16)).save_pretrained(
        tmp_path / "base"
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 2, "lora_alpha": 6} | GPT2[case]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "adapter")
    adapted = AdaptedCheckpoint(open_checkpoint(tmp_path / "base"), tmp_path / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(materialise(adapted, tmp_path / "ours"))
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        want, got = model.eval()(tokens).logits, ours.eval()(tokens).logits
    torch.testing.assert_close(got, want, rtol=2e-5, atol=5e-6)
