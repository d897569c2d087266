"""The engine: what comes out of a merge, whatever the threads, chunks and interruptions, and what is said of it."""

from __future__ import annotations

import logging

import pytest
import torch
import yaml
from helpers import load_state, read_json, same_bits, tiny_checkpoint, tiny_family, write_json
from safetensors.torch import save_file

from surgery.errors import SurgeryError
from surgery.weights import engine, streams
from surgery.weights.merge import merge, merge_in_memory
from surgery.weights.methods import METHODS
from surgery.weights.recipe import recipe_from_source
from surgery.weights.sparsify import derive_key, select_model

NEEDED = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.005}}
GEOMETRIC = ("slerp", "nuslerp", "multislerp", "karcher", "model_stock")
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
Q0, Q1 = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"


def recipe(method, base, tuned, parameters=None, **options):
    """A recipe of ours with as many of `tuned` as the method takes, and the base if it wants one."""
    known = METHODS.lookup(method)
    most = known.inputs[1] or len(tuned)
    wants = {"base": str(base)} if known.needs_base else {}
    given = NEEDED.get(method, {}) | (parameters or {})
    models = [str(t) for t in tuned[:most]]
    return {"method": method, "models": models, "parameters": given, **wants, **options}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """bfloat16, sharded, tied, with fewer key-value heads than heads: what real checkpoints look like."""
    return tiny_family(tmp_path_factory.mktemp("family"), 3, dtype="bfloat16", sharded=True, tied=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """float32 in one file, with a head of its own."""
    return tiny_family(tmp_path_factory.mktemp("plain"), 3)


def loaded(folder, caplog):
    """The model as transformers reads it, without a word of complaint."""
    from transformers import AutoModelForCausalLM

    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert not [r.getMessage() for r in caplog.records]
    return model


# ---- every method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_from_yaml(method, family, tmp_path, caplog):
    base, tuned = family
    made = recipe(method, base, tuned, seed=5)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(made))
    result = merge(tmp_path / "recipe.yml", tmp_path / "out", threads=2)
    merged, known = load_state(tmp_path / "out"), METHODS.lookup(method)
    wrong = numbers = 0
    states = [load_state(t) for t in tuned[: len(made["models"])]]
    for name, b in load_state(base).items():
        hidden = {}
        if known.random:
            hidden["keys"] = [derive_key(5, method, i, name) for i in range(len(states))]
        if "depth" in known.hidden:
            hidden["depth"] = float(".layers.1." in name)  # of two layers
        given = [b] if known.needs_base else [None]
        exact = known.function([s[name] for s in states], *given, **made["parameters"], **hidden)
        assert merged[name].dtype == torch.bfloat16
        torch.testing.assert_close(merged[name].float(), exact, rtol=2**-8, atol=1e-7)
        wrong, numbers = wrong + int((merged[name] != exact.bfloat16()).sum()), numbers + b.numel()
    assert wrong <= numbers * 0.005  # which lay in the middle between two, but for the last bit of float32
    assert result.tensors.keys() == merged.keys() and "lm_head.weight" not in merged
    model = loaded(tmp_path / "out", caplog)
    assert model.dtype == torch.bfloat16
    assert model.generate(torch.tensor([[4, 5]]), max_new_tokens=3, do_sample=False).shape[1] > 2


@pytest.mark.parametrize("method", METHODS)
def test_threads_order_and_chunks_do_not_matter(method, family, monkeypatch):
    made = recipe(method, *family, out_dtype="float32")
    whole = merge_in_memory(made, threads=1)
    monkeypatch.setattr(streams, "CHUNK", 64)
    chunked = merge_in_memory(made, threads=1)
    for threads in (2, 5):
        assert same_bits(chunked, merge_in_memory(made, threads=threads))
    in_parallel = engine.in_parallel
    monkeypatch.setattr(engine, "in_parallel", lambda jobs, work, **how: in_parallel(jobs[::-1], work, **how))
    assert same_bits(chunked, merge_in_memory(made, threads=2))
    if method in GEOMETRIC:  # inner products are sums of chunks' sums
        assert all(torch.allclose(whole[n], chunked[n], rtol=1e-5, atol=1e-7) for n in whole)
    else:
        assert same_bits(whole, chunked)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ties", ["index", "all", "none"])
def test_one_threshold_for_the_model(dtype, ties, tmp_path):
    base, tuned = tiny_family(tmp_path, 2, dtype=dtype, delta=0.001)
    given = {"scope": "model", "density": 0.3, "ties": ties, "weight": 0.7}
    merged = merge_in_memory(recipe("ties", base, tuned, given, out_dtype="float32"), threads=2)
    b, states = load_state(base), [load_state(t) for t in tuned]
    names = sorted(b)
    cuts = [select_model([s[n].float() - b[n].float() for n in names], 0.3, ties) for s in states]
    for i, name in enumerate(names):
        tensors = [s[name] for s in states], b[name]
        expected = METHODS["ties"].function(*tensors, **given, selections=[c[i] for c in cuts])
        assert torch.allclose(merged[name], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", ["ties", "slerp", "dare_ties"])
def test_float64_is_computed_in_float64(method, tmp_path):
    base, tuned = tiny_family(tmp_path, 2, dtype="float64")
    made = recipe(method, base, tuned)
    merged, known = merge_in_memory(made), METHODS[method]
    states = [load_state(t) for t in tuned[: len(made["models"])]]
    for name, b in load_state(base).items():
        hidden = {"keys": [derive_key(0, method, i, name) for i in range(len(states))]} if known.random else {}
        exact = known.function([s[name] for s in states], b, **made["parameters"], **hidden)
        assert merged[name].dtype == torch.float64 and torch.equal(merged[name], exact)


def test_float32_inputs_in_float64_arithmetic(plain):
    base, tuned = plain
    made = recipe("linear", base, tuned, dtype="float64", out_dtype="float64")
    exact = sum(load_state(t)[Q0].double() for t in tuned) / 3
    assert torch.allclose(merge_in_memory(made)[Q0], exact, rtol=1e-15, atol=0)


def test_a_mixture_of_types(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", dtype="bfloat16")
    half = tiny_checkpoint(tmp_path / "half", 1, dtype="float16", near=base)
    single = tiny_checkpoint(tmp_path / "single", 2, dtype="float32", near=base)
    merge(recipe("task_arithmetic", base, [half, single], {"weight": 0.5}), tmp_path / "out")
    b, h, s = (load_state(p)[Q0].float() for p in (base, half, single))
    assert torch.equal(load_state(tmp_path / "out")[Q0], (b + 0.5 * (h - b) + 0.5 * (s - b)).bfloat16())
    assert read_json(tmp_path / "out/config.json")["dtype"] == "bfloat16"


def test_float16_output(plain, tmp_path, caplog):
    made = recipe("linear", *plain, out_dtype="float16")
    merge(made, tmp_path / "out")
    assert loaded(tmp_path / "out", caplog).dtype == torch.float16
    made["parameters"], made["dtype"] = {"weight": 1e6, "normalize": False}, "float32"
    with pytest.raises(SurgeryError, match="'.*': .* too large for float16"):
        merge(made, tmp_path / "large")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_in_memory_equals_the_files(family, tmp_path):
    made = recipe("breadcrumbs_ties", *family)
    merge(made, tmp_path / "out", threads=2)
    assert same_bits(merge_in_memory(made), load_state(tmp_path / "out"))


# ---- parameters that vary over the model ----------------------------------------------------------------------------


def test_gradients_and_filters_reach_their_tensors(tmp_path):
    base, tuned = tiny_family(tmp_path, 1, layers=3)
    weight = [{"filter": "self_attn", "value": [0.0, 1.0]}, {"filter": "mlp", "value": [1.0, 0.0, 0.5]}]
    weight.append({"value": 0.25})
    made = recipe("task_arithmetic", base, tuned, {"weight": weight})
    merged, b, f = merge_in_memory(made), load_state(base), load_state(tuned[0])
    attention, mlp = [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]
    for name in b:
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        w = attention[layer] if "self_attn" in name else mlp[layer] if "mlp" in name else 0.25
        assert torch.equal(merged[name], b[name].add(f[name] - b[name], alpha=w)), name


def test_a_gradient_gives_the_head_its_first_value(plain):
    base, tuned = plain
    made = recipe("task_arithmetic", base, tuned[:1], {"weight": [0.0, 1.0]})
    merged, b, f = merge_in_memory(made), load_state(base), load_state(tuned[0])
    for name in ("lm_head.weight", NORM, EMBEDDING, Q0):
        assert torch.equal(merged[name], b[name])
    assert torch.equal(merged[Q1], b[Q1] + (f[Q1] - b[Q1]))


def test_lines_grows_with_depth(tmp_path):
    base, tuned = tiny_family(tmp_path, 2, layers=5)
    merged = merge_in_memory(recipe("lines", base, tuned, {"shallow": 0.2, "deep": 1.0}))
    b, f, g = load_state(base), *(load_state(t) for t in tuned)
    for layer, factor in enumerate([0.2, 0.4, 0.6, 0.8, 1.0]):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.allclose(merged[name], b[name] + factor * (f[name] + g[name] - 2 * b[name]), atol=1e-6)
    assert torch.allclose(merged[NORM], b[NORM] + 0.2 * (f[NORM] + g[NORM] - 2 * b[NORM]), atol=1e-6)


# ---- layers stacked, stages, adapters -------------------------------------------------------------------------------


def test_stacked_layers(family, tmp_path, caplog):
    _, (a, b, _) = family
    slices = [{"inputs": [{"model": str(m), "layers": r}]} for m, r in ((a, [0, 2]), (b, [0, 1]), (a, [1, 2]))]
    merge({"method": "passthrough", "slices": slices}, tmp_path / "out")
    merged, x, y = load_state(tmp_path / "out"), load_state(a), load_state(b)
    origins = [(x, 0), (x, 1), (y, 0), (x, 1)]
    for layer, (state, origin) in enumerate(origins):
        for part in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
            assert torch.equal(merged[f"model.layers.{layer}.{part}"], state[f"model.layers.{origin}.{part}"])
    assert torch.equal(merged[EMBEDDING], x[EMBEDDING]) and torch.equal(merged[NORM], x[NORM])
    assert loaded(tmp_path / "out", caplog).config.num_hidden_layers == 4


def test_slices_merge_and_their_gradients_start_anew(plain):
    base, tuned = plain
    layers = {"layers": [0, 2]}
    slices = [{"inputs": [{"model": str(base), **layers}, {"model": str(tuned[0]), **layers}]} for _ in range(2)]
    made = {"method": "slerp", "base": str(base), "slices": slices, "parameters": {"t": [0.0, 1.0]}}
    merged, b, f = merge_in_memory(made), load_state(base), load_state(tuned[0])
    for layer in range(4):
        name, own = f"model.layers.{layer}.mlp.up_proj.weight", f"model.layers.{layer % 2}.mlp.up_proj.weight"
        assert torch.allclose(merged[name], (b, f)[layer % 2][own], atol=1e-6)


def test_stages(plain, tmp_path):
    base, (a, b, c) = plain
    first = recipe("linear", None, [a, b], name="soup")
    second = recipe("task_arithmetic", base, ["soup", c], {"weight": 0.5})
    result = merge("---\n".join(yaml.safe_dump(r) for r in (second, first)), tmp_path / "out")
    merge(first, tmp_path / "soup")
    merge(recipe("task_arithmetic", base, [tmp_path / "soup", c], {"weight": 0.5}), tmp_path / "again")
    assert same_bits(load_state(tmp_path / "out"), load_state(tmp_path / "again"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "out", "soup"]
    assert result.method == "task_arithmetic"


def test_an_input_of_an_early_stage_is_not_overwritten(plain, tmp_path):
    a = tiny_checkpoint(tmp_path / "a")
    first = recipe("linear", None, [a, plain[1][1]], name="soup")
    before = load_state(a)
    stages = [recipe_from_source(r) for r in (first, recipe("linear", None, ["soup", plain[0]]))]
    with pytest.raises(SurgeryError, match="is the input"):
        merge(stages, a, force=True)
    assert same_bits(before, load_state(a)) and [p.name for p in tmp_path.iterdir()] == ["a"]


def adapter(folder, base, seed=0, rank=2):
    """A LoRA on the query projection of layer 0, and the difference that it makes."""
    a = torch.randn(rank, 16, generator=torch.Generator().manual_seed(seed)) * 0.1
    b = torch.randn(16, rank, generator=torch.Generator().manual_seed(seed + 1)) * 0.1
    folder.mkdir(exist_ok=True)
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": str(base)})
    return 2.0 * b @ a


def test_a_model_with_an_adapter(plain, tmp_path, caplog):
    base, (tuned, *_) = plain
    update = adapter(tmp_path / "lora", base)
    made = recipe("task_arithmetic", base, [f"{base}+{tmp_path / 'lora'}", tuned], {"weight": 0.5})
    result = merge(made, tmp_path / "out")
    merged, b, f = load_state(tmp_path / "out"), load_state(base), load_state(tuned)
    assert torch.allclose(merged[Q0], b[Q0] + 0.5 * update + 0.5 * (f[Q0] - b[Q0]), atol=1e-6)
    assert torch.allclose(merged[Q1], b[Q1] + 0.5 * (f[Q1] - b[Q1]), atol=1e-7)
    assert loaded(tmp_path / "out", caplog) is not None and (tmp_path / "out/tokenizer.json").exists()
    assert not [n for n in result.notes if "not used" in n]
