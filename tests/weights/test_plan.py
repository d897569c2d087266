"""The plan: which tensors come from where, what is missing, tied, copied or left over, and what it will cost."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from helpers import load_state, read_json, same_bits, save_checkpoint, tiny_checkpoint, tiny_family, write_json
from safetensors.torch import save_file

from surgery.errors import SurgeryError
from surgery.weights import plan as planning
from surgery.weights import streams
from surgery.weights.kernels import merged
from surgery.weights.merge import merge, merge_in_memory
from surgery.weights.methods import METHODS
from surgery.weights.plan import STREAMED, job_bytes, plan
from surgery.weights.recipe import recipe_from_source
from surgery.weights.streams import Streams, Workspace

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
EXTRA = "model.layers.0.extra.weight"


def recipe(method, base, tuned, parameters=None, **options):
    made = {"method": method, "models": [str(t) for t in tuned], "parameters": parameters or {}, **options}
    return made if base is None else made | {"base": str(base)}


def planned(*given, **options):
    return plan(recipe_from_source(recipe(*given, **options)))


def with_tensors(folder, changes):
    """The checkpoint with tensors added or changed, or (None) removed."""
    state = load_state(folder) | changes
    save_file({n: t for n, t in state.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def family(tmp_path):
    return tiny_family(tmp_path, 2)


# ---- what a plan says -----------------------------------------------------------------------------------------------


def test_a_plan_needs_no_torch(family):
    base, tuned = family
    code = (
        "import sys; from surgery.weights.plan import plan; from surgery.weights.recipe import recipe_from_command; "
        f"p = plan(recipe_from_command('ties', {[str(t) for t in tuned]!r}, {str(base)!r})); "
        "assert p.to_dict()['merged'] == 21, p.to_dict(); assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=planning.__file__.rpartition("/surgery/")[0])


def test_sizes(family):
    base, tuned = family
    p = planned("ties", base, tuned, out_dtype="bfloat16")
    numbers = sum(t.numel() for t in load_state(base).values())
    assert (p.parameters, p.out_bytes, p.in_bytes) == (numbers, 2 * numbers, 12 * numbers)
    assert p.to_dict()["models"] == [str(base), *map(str, tuned)] and p.to_dict()["copied"] == []
    assert p.memory(2) == sum(sorted(job_bytes("ties", j) for j in p.jobs)[-2:])


@pytest.mark.parametrize("method", METHODS)
def test_streamed_methods_never_read_a_whole_tensor(method, monkeypatch):
    """`STREAMED` against what the kernels do, under our defaults and under mergekit's."""
    from surgery.weights.recipe.mergekit import METHODS as THEIRS

    monkeypatch.setattr(streams, "CHUNK", 64)
    known, tensor = METHODS[method], torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    contracts = [{}] + [
        {p.name: p.convert(p.default) if p.convert else p.default for p in c.parameters.values() if p.name} | c.fixed
        for c in THEIRS.values()
        if c.method == method
    ]
    streamed = []
    for given in contracts:
        asked = []

        def reader(start, stop, asked=asked):
            asked.append(stop - start)
            return tensor[start:stop]

        count = known.inputs[1] or 2
        parameters = {"t": 0.5} if "t" in known.params else {}
        parameters |= {word: value for word, value in given.items() if value is not None}
        if "keys" in known.hidden and known.random:
            parameters["keys"] = list(range(count))
        walk = Streams("x", (64, 8), [reader] * count, reader if known.needs_base else None, Workspace())
        for _ in merged(known, walk, parameters):
            pass
        streamed.append(max(asked) < 64)
    assert all(streamed) == (method in STREAMED)


def test_float64_is_not_streamed(tmp_path):
    base, tuned = tiny_family(tmp_path, 1, dtype="float64")
    (job,) = [j for j in planned("ties", base, tuned).jobs if j.out.name == EMBEDDING]
    assert job.double and job_bytes("ties", job) == 40 * 16 * 8 * 8


# ---- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("untied", ["base", "tuned"])
def test_tied_and_untied_heads(untied, tmp_path, caplog):
    from transformers import AutoModelForCausalLM

    base = tiny_checkpoint(tmp_path / "base", tied=True)
    tuned = tiny_checkpoint(tmp_path / "tuned", 1, tied=True, near=base)
    lone, other = (base, tuned) if untied == "base" else (tuned, base)
    with_tensors(lone, {HEAD: load_state(lone)[EMBEDDING] + 0.5})
    write_json(lone / "config.json", read_json(lone / "config.json") | {"tie_word_embeddings": False})
    result = merge(recipe("task_arithmetic", base, [tuned], {"weight": 0.25}), tmp_path / "out")
    heads = {lone: load_state(lone)[HEAD], other: load_state(other)[EMBEDDING]}
    assert torch.allclose(load_state(tmp_path / "out")[HEAD], heads[base] + 0.25 * (heads[tuned] - heads[base]))
    assert read_json(tmp_path / "out/config.json")["tie_word_embeddings"] is False
    assert any("tie_word_embeddings becomes false" in n and str(other) in n for n in result.notes)
    with caplog.at_level(logging.WARNING):
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and not caplog.records
    assert torch.equal(model.lm_head.weight, load_state(tmp_path / "out")[HEAD])


def test_a_head_stored_by_a_tied_checkpoint(tmp_path):
    base, tuned = tiny_family(tmp_path, 1, tied=True)
    with_tensors(base, {HEAD: load_state(base)[EMBEDDING].clone()})
    merged = merge_in_memory(recipe("ties", base, tuned))
    assert HEAD not in merged and EMBEDDING in merged


def test_a_tied_adapter_keeps_its_tokenizer(tmp_path):
    from test_merge import adapter

    tied = tiny_checkpoint(tmp_path / "tied", tied=True)
    own = tiny_checkpoint(tmp_path / "own", 1, near=tied)
    with_tensors(own, {HEAD: load_state(tied)[EMBEDDING].clone()})
    adapter(tmp_path / "lora", tied)
    merge(recipe("linear", None, [f"{tied}+{tmp_path / 'lora'}", own]), tmp_path / "out")
    assert {"tokenizer.json", "config.json", "generation_config.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


# ---- tensors that are special ---------------------------------------------------------------------------------------


def test_whole_numbers_are_copied_when_equal(family, tmp_path):
    base, tuned = family
    buffer = torch.arange(6, dtype=torch.int64).view(2, 3)
    for folder in (base, *tuned):
        with_tensors(folder, {"position_ids": buffer, "flag": torch.tensor([True, False]), "step": torch.tensor(7)})
    result = merge(recipe("linear", None, tuned, out_dtype="bfloat16"), tmp_path / "out")
    merged = load_state(tmp_path / "out")
    assert same_bits({"x": merged["position_ids"]}, {"x": buffer}) and merged["step"].dtype == torch.int64
    assert result.tensors["flag"]["copied"]


def test_empty_and_single_numbers(family, tmp_path):
    base, tuned = family
    for i, folder in enumerate((base, *tuned)):
        with_tensors(folder, {"gate": torch.tensor(float(i)), "empty": torch.zeros(3, 0)})
    for method in ("ties", "slerp", "dare_linear", "breadcrumbs"):
        models, given = (tuned[:1], {"t": 0.5}) if method == "slerp" else (tuned, {"density": 1.0, "weight": 1.0})
        merge(recipe(method, base, models, given), tmp_path / method)
        merged = load_state(tmp_path / method)
        assert merged["empty"].shape == (3, 0) and merged["gate"].shape == ()
        assert float(merged["gate"]) == pytest.approx({"ties": 1.5, "slerp": 0.5**0.5}.get(method, 3.0))


def test_include_and_exclude(family, tmp_path):
    base, tuned = family
    made = recipe("task_arithmetic", base, tuned, include=["mlp", "self_attn"], exclude="layers.1.")
    result = merge(made, tmp_path / "out")
    merged, b, states = load_state(tmp_path / "out"), load_state(base), [load_state(t) for t in tuned]
    for name in b:
        touched = ("mlp" in name or "self_attn" in name) and ".0." in name
        assert torch.equal(merged[name], b[name]) != touched
        assert result.tensors[name].get("copied", False) != touched
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.allclose(merged[name], sum(s[name] for s in states) - b[name], atol=1e-6)


# ---- missing tensors ------------------------------------------------------------------------------------------------


def test_missing_is_an_error_that_names_all(family):
    base, (a, b) = family
    with_tensors(a, {NORM: None, EXTRA: torch.ones(2)})
    with pytest.raises(SurgeryError) as told:
        planned("task_arithmetic", base, [a, b])
    assert f"{a} lacks 1 tensors: {NORM}" in str(told.value) and f"{b} lacks 1 tensors: {EXTRA}" in str(told.value)
    assert f"{base} lacks 1 tensors: {EXTRA}" in str(told.value) and "missing: base" in str(told.value.hint)


@pytest.mark.parametrize("missing", ["base", "skip"])
def test_missing_tensors_taken_from_the_base_or_skipped(missing, family, tmp_path):
    base, (a, b) = family
    with_tensors(a, {NORM: None})
    with_tensors(b, {EXTRA: torch.ones(2)})
    made = recipe("ties", base, [a, b], {"density": 1.0}, missing=missing)
    result = merge(made, tmp_path / "out")
    merged, x, y = load_state(tmp_path / "out"), load_state(base), load_state(b)
    assert torch.allclose(merged[NORM], y[NORM])  # zeros have no vote
    assert torch.equal(merged[EXTRA], torch.ones(2)) and result.tensors[EXTRA]["copied"]
    assert any(n.startswith(f"{a} lacks 2 tensors: ") and NORM in n and EXTRA in n for n in result.notes)
    half = merge_in_memory(recipe("task_arithmetic", base, [a, b], {"weight": 0.5, "normalize": "weights"},
                                  missing=missing))[NORM]  # fmt: skip
    assert torch.allclose(half - x[NORM], (0.5 if missing == "base" else 1.0) * (y[NORM] - x[NORM]), atol=1e-6)


def test_a_method_that_is_left_with_too_few_models(family, tmp_path):
    base, (a, b) = family
    with_tensors(a, {NORM: None})
    for method in ("model_stock", "nuslerp"):
        merged = merge_in_memory(recipe(method, base, [a, b], missing="skip"))
        assert torch.equal(merged[NORM], load_state(base)[NORM])


def test_what_is_not_used_is_listed(family):
    base, (a, b) = family
    with_tensors(b, {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})
    slices = [{"inputs": [{"model": str(m), "layers": [0, 1]} for m in (a, b)]}]
    p = plan(recipe_from_source({"method": "linear", "slices": slices}))
    assert [line.split(":")[0] for line in p.dropped] == [str(a), str(b)]
    assert "self_attn.q_proj.bias" in p.dropped[1] and p.config_changes == {"num_hidden_layers": 1}


def test_modules(tmp_path):
    """The text of two models merged and stacked, the eyes of the first kept, which the second lacks."""
    base, (tuned,) = tiny_family(tmp_path, 1)
    tower = {f"vision_tower.encoder.layers.{i}.mlp.fc1.weight": torch.full((3, 4), float(i)) for i in range(3)}
    with_tensors(base, tower)
    layers = [{"model": str(m), "layers": [0, 2]} for m in (base, tuned)]
    text = {"slices": [{"inputs": layers}, {"inputs": layers}]}
    made = {"method": "linear", "modules": {"text_decoder": text, "vision_tower": {"models": [str(base)]}}}
    merged, b, f = merge_in_memory(made), load_state(base), load_state(tuned)
    assert all(torch.equal(merged[n], t) for n, t in tower.items())
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.allclose(merged[name.format(3)], (b[name.format(1)] + f[name.format(1)]) / 2)
    assert merged.keys() == {
        *b,
        *(n.replace(f".{i}.", f".{i + 2}.") for n in f for i in (0, 1) if f"model.layers.{i}." in n),
    }
    made["modules"]["eyes"] = made["modules"].pop("vision_tower")
    with pytest.raises(SurgeryError, match="text_decoder, eyes would be that one"):
        merge_in_memory(made)


def test_layers_counted_in_a_nested_config(tmp_path):
    folder = tiny_checkpoint(tmp_path / "a", layers=2)
    config = read_json(folder / "config.json")
    text = {k: config.pop(k) for k in ("num_hidden_layers", "hidden_size")} | {"layer_types": ["full", "sliding"]}
    write_json(folder / "config.json", config | {"text_config": text})
    slices = [{"inputs": [{"model": str(folder), "layers": r}]} for r in ([0, 2], [0, 1])]
    changes = plan(recipe_from_source({"method": "passthrough", "slices": slices})).config_changes
    wanted = {"text_config.num_hidden_layers": 3, "text_config.layer_types": ["full", "sliding", "full"]}
    assert changes == wanted


def test_stacking_takes_each_layers_kind_along(tmp_path):
    folder = tiny_checkpoint(tmp_path / "a", layers=3, layer_types=["full", "sliding", "full"])
    slices = [{"inputs": [{"model": str(folder), "layers": r}]} for r in ([0, 2], [1, 3])]
    changes = plan(recipe_from_source({"method": "passthrough", "slices": slices})).config_changes
    assert changes == {"num_hidden_layers": 4, "layer_types": ["full", "sliding", "sliding", "full"]}


def test_a_folder_of_bare_weights(tmp_path):
    a = save_checkpoint(tmp_path / "a", {"x": torch.ones(2, 3), "y": torch.zeros(2)})
    b = save_checkpoint(tmp_path / "b", {"x": torch.zeros(2, 3), "y": torch.ones(2)})
    merge(recipe("linear", None, [a, b]), tmp_path / "out")
    assert (load_state(tmp_path / "out")["x"] == 0.5).all()
