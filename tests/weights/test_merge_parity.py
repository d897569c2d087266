"""The same YAML to mergekit's own command and to us, on a tiny Llama; and the recipes that mergekit ships.

`MERGEKIT_EXAMPLES` names a folder with mergekit's `examples/*.yml` (none is committed here).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from helpers import load_state, read_json, tiny_checkpoint, tiny_family
from torch import Tensor

from surgery import anatomy
from surgery.weights import kernels, sparsify
from surgery.weights.merge import merge
from surgery.weights.recipe import load_recipes

EXAMPLES = os.environ.get("MERGEKIT_EXAMPLES")
PAIR = {"weight": 0.5, "density": 0.3}
GRADIENT = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 1]}, {"filter": "mlp", "value": [1, 0.2]}, {"value": 0.5}]

CASES = {
    "linear": ("linear", [{"weight": 0.4}, {"weight": 0.9}], {}, False),
    "linear-sum": ("linear", [{"weight": 0.4}, {"weight": 0.9}], {"normalize": False}, False),
    "task_arithmetic": ("task_arithmetic", [{"weight": 0.4}, {"weight": -0.3}], {"lambda": 0.7}, True),
    "ties": ("ties", [PAIR, PAIR], {}, True),
    "ties-gradient": ("ties", [{"weight": GRADIENT, "density": [1, 0.1]}, PAIR], {"normalize": False}, True),
    "dare_linear": ("dare_linear", [PAIR, PAIR], {}, True),
    "dare_ties": ("dare_ties", [PAIR, PAIR], {"lambda": 0.8}, True),
    "breadcrumbs": ("breadcrumbs", [PAIR, PAIR | {"gamma": 0.1}], {}, True),
    "breadcrumbs_ties": ("breadcrumbs_ties", [PAIR, PAIR], {"gamma": 0.05}, True),
    "della_linear": ("della_linear", [PAIR, PAIR], {"epsilon": 0.1}, True),
    "della": ("della", [PAIR, PAIR], {"epsilon": 0.1}, True),
    "slerp": ("slerp", [{}], {"t": GRADIENT}, True),
    "nuslerp": ("nuslerp", [{"weight": 0.6}, {"weight": 0.2}], {}, True),
    "nuslerp-bare": ("nuslerp", [{"weight": 0.6}, {"weight": 0.2}], {}, False),
    "multislerp": ("multislerp", [{"weight": 0.6}, {"weight": 0.2}], {}, True),
    "karcher": ("karcher", [{}, {}], {}, False),
    "model_stock": ("model_stock", [{}, {}], {}, True),
    "sce": ("sce", [{}, {}], {"select_topk": 0.5}, True),
    "ram": ("ram", [{}, {}], {"epsilon": 0.01}, True),
    "ramplus_tl": ("ramplus_tl", [{}, {}], {"epsilon": 0.05}, True),
    "nearswap": ("nearswap", [{}], {"t": 0.02}, True),
    "arcee_fusion": ("arcee_fusion", [{}], {}, True),
    "passthrough": ("passthrough", [{"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1}]}], {}, False),
}
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")


def document(name, base, tuned, **options):
    """The case as mergekit's YAML."""
    method, own, shared, with_base = CASES[name]
    models = [{"model": str(m), "parameters": p} if p else {"model": str(m)} for m, p in zip(tuned, own, strict=False)]
    made = {"merge_method": method, "models": models, **({"parameters": shared} if shared else {}), **options}
    if with_base:
        made["base_model"] = str(base)
        if method in ("slerp", "nearswap", "arcee_fusion"):
            made["models"].insert(0, {"model": str(base)})
    return yaml.safe_dump(made, sort_keys=False)


def theirs(text, folder) -> dict[str, Tensor]:
    """What `mergekit-yaml --no-copy-tokenizer --quiet` writes for this YAML, run in this process."""
    from click.testing import CliRunner
    from mergekit.scripts.run_yaml import main

    folder.mkdir()
    (folder / "recipe.yml").write_text(text)
    options = ["--no-copy-tokenizer", "--quiet"]
    result = CliRunner().invoke(main, [str(folder / "recipe.yml"), str(folder / "out"), *options])
    if result.exception:
        raise result.exception
    return load_state(folder / "out")


@pytest.fixture
def mergekit():
    pytest.importorskip("mergekit")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Updates large enough for mergekit's SCE to be one (it falls back to a mean for small ones)."""
    return tiny_family(tmp_path_factory.mktemp("family"), 2, delta=0.03, layers=4)


@pytest.fixture
def drawn(monkeypatch):
    """Lets mergekit and us draw the same masks: ours depend on the elements' keys alone, so mergekit is given them.

    Both sides are handed a mask that follows from the probability and the shape only; inputs of one tensor share it.
    """

    def mask(probability: Tensor) -> Tensor:
        bits = torch.rand(probability.shape, generator=torch.Generator().manual_seed(probability.numel()))
        return (bits < probability).to(probability.dtype)

    monkeypatch.setattr(torch, "bernoulli", mask)

    def ours(probability, shape, key, offset=0):
        whole = probability if isinstance(probability, Tensor) else torch.full(tuple(shape), float(probability))
        return mask(whole.reshape(shape)).bool()

    monkeypatch.setattr(sparsify, "bernoulli", ours)
    for name in ("dare_linear", "dare_ties"):  # the kernels draw bits; the reference draws masks
        monkeypatch.delitem(kernels.KERNELS, name)


@pytest.mark.peers
@pytest.mark.parametrize("name", CASES)
def test_float32(name, family, tmp_path, mergekit, drawn):
    text = document(name, *family, dtype="float32")
    expected = theirs(text, tmp_path / "theirs")
    merge(text, tmp_path / "out", threads=2)
    merged = load_state(tmp_path / "out")
    assert merged.keys() == expected.keys()
    for tensor, x in expected.items():
        assert x.dtype == merged[tensor].dtype == torch.float32
        assert (merged[tensor] - x).abs().max() <= 1e-6 * x.abs().max(), tensor


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many bfloat16 numbers lie between two, counted through zero."""

    def place(x: Tensor) -> Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(a) - place(b)).abs()


@pytest.mark.peers
@pytest.mark.parametrize("name", CASES)
def test_bfloat16_output(name, family, tmp_path, mergekit, drawn):
    text = document(name, *family, dtype="float32", out_dtype="bfloat16")
    expected = theirs(text, tmp_path / "theirs")
    merge(text, tmp_path / "out", threads=2)
    merged = load_state(tmp_path / "out")
    apart = torch.cat([ulps(merged[t], x).flatten() for t, x in expected.items()])
    assert apart.max() <= 1 and (apart > 0).float().mean() <= 0.001
    assert read_json(tmp_path / "out/config.json")["dtype"] == "bfloat16"


@pytest.mark.peers
@pytest.mark.parametrize(
    "name", ["linear", "task_arithmetic", "ties", "breadcrumbs", "slerp", "nuslerp", "model_stock"]
)
def test_bfloat16_inputs(name, tmp_path, mergekit):
    """Equal magnitudes are then common, and which of them mergekit takes is chance: those elements are left out."""
    base, tuned = tiny_family(tmp_path, 2, dtype="bfloat16", delta=0.001)
    text = document(name, base, tuned, dtype="float32", out_dtype="bfloat16")
    expected = theirs(text, tmp_path / "theirs")
    merge(text, tmp_path / "out")
    merged, b, states = load_state(tmp_path / "out"), load_state(base), [load_state(t) for t in tuned]
    differing = compared = 0
    for tensor, x in expected.items():
        free = torch.ones_like(x, dtype=torch.bool)
        if name in ("ties", "breadcrumbs"):
            n, density, top = x.numel(), 0.3, 0.1 if name == "breadcrumbs" else 0.0
            for d in (s[tensor].float() - b[tensor].float() for s in states):
                order = d.abs().flatten().sort(descending=True).values
                wanted = max(1, int(density * n)) if name == "ties" else int(density * n)
                for removed in {0, int(0.01 * n), int(top * n)}:
                    for rank in (removed - 1, removed, removed + wanted - 1, removed + wanted):
                        if 0 <= rank < n:
                            free &= d.abs() != order[rank]
        apart = ulps(merged[tensor], x)[free]
        assert apart.numel() == 0 or apart.max() <= 1, tensor
        differing, compared = differing + int((apart > 0).sum()), compared + apart.numel()
    assert compared > 1000 and differing <= 0.001 * compared


@pytest.mark.peers
def test_stacked_layers(family, tmp_path, mergekit):
    _, (a, b) = family
    pieces = [(a, [0, 3]), (b, [1, 4]), (a, [2, 3])]
    slices = [{"sources": [{"model": str(m), "layer_range": r}]} for m, r in pieces]
    text = yaml.safe_dump({"merge_method": "passthrough", "slices": slices, "dtype": "float32"})
    expected = theirs(text, tmp_path / "theirs")
    merge(text, tmp_path / "out")
    merged = load_state(tmp_path / "out")
    assert merged.keys() == expected.keys() and all(torch.equal(merged[n], x) for n, x in expected.items())
    assert read_json(tmp_path / "out/config.json")["num_hidden_layers"] == 7


# ---- the recipes that mergekit ships --------------------------------------------------------------------------------


def stand_ins(recipes, folder):
    """For every model of the recipes a tiny one with as many layers as they ask for, all fine-tunings of one."""
    stages = {recipe.name for recipe in recipes}
    refs = {ref.identity: ref for recipe in recipes for ref in recipe.models if ref.path not in stages}
    pieces = [item for recipe in recipes for piece in recipe.slices for item in [*piece.inputs, piece.base] if item]
    layers = max([item.layers[1] for item in pieces if item.layers], default=4)
    root = tiny_checkpoint(folder / "root", layers=layers, dtype="float16")
    made = {
        identity: tiny_checkpoint(folder / f"m{i}", i + 1, near=root, layers=layers, dtype="float16")
        for i, identity in enumerate(refs)
    }

    def stand_in(ref):
        return ref if ref.path in stages else type(ref)(str(made[ref.identity]))

    return [recipe.with_models(stand_in) for recipe in recipes]


@pytest.mark.skipif(EXAMPLES is None, reason="MERGEKIT_EXAMPLES names no folder")
@pytest.mark.parametrize("path", sorted(Path(EXAMPLES or "/nowhere").glob("*.y*ml")), ids=lambda p: p.stem)
def test_examples_of_mergekit(path, tmp_path):
    recipes = stand_ins(load_recipes(path), tmp_path)
    result = merge(recipes, tmp_path / "out", threads=2)
    merged = load_state(tmp_path / "out")
    config = read_json(tmp_path / "out/config.json")
    assert config["num_hidden_layers"] == anatomy.num_layers(merged)
    stored = recipes[-1].out_dtype
    assert {str(t.dtype) for t in merged.values()} == {f"torch.{'float16' if stored == 'base' else stored}"}
    assert all(t.isfinite().all() for t in merged.values())
    print(f"{path.name}: {result.method}, {len(merged)} tensors, {config['num_hidden_layers']} layers; {result.notes}")
