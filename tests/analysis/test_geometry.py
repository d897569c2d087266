"""The streaming pass against the definitions, written out on whole tensors in float64."""

import itertools
import json

import numpy as np
import pytest
import torch
from helpers import load_state, read_json, save_checkpoint, tiny_checkpoint, tiny_family
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import family, spectra, sweep
from analysis.geometry import Geometry, geometry
from surgery.anatomy import KINDS, kind_of, layer_of
from surgery.checkpoint import open_checkpoint
from surgery.errors import SurgeryError


def rounded_down(x):
    """To 8 significant bits."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.floor(mantissa * 256) / 256, exponent)


def reference(base, tuned, density, dtype):
    """Every quantity of one tensor (or several, flattened together) by its definition."""
    d = [f - base for f in tuned]
    n, top = base.size, []
    for x in d:
        bar = rounded_down(np.sort(np.abs(x))[-max(1, int(density * n))])
        top.append((np.abs(x) >= bar) & (x != 0))
    trimmed = [x * mask for x, mask in zip(d, top, strict=True)]
    elected = np.where(sum(trimmed) >= 0, 1.0, -1.0)
    kept = [x * (np.sign(x) == elected) for x in trimmed]
    mean = sum(d) / len(d)
    moved = torch.from_numpy(base + mean).float()
    stored = moved.to(dtype).double().numpy()
    return {
        "d": d, "top": top, "n": n, "trimmed": [np.sum(x**2) for x in trimmed], "elected": [np.sum(x**2) for x in kept],
        "base_square": np.sum(base**2), "numbers": base,
        "any": np.sum((np.max(d, 0) > 0) & (np.min(d, 0) < 0)), "lost": np.sum((stored - (base + mean)) ** 2),
    }  # fmt: skip


def expected(parts):
    """The quantities of a group of tensors."""
    d = [np.concatenate(x) for x in zip(*(p["d"] for p in parts), strict=True)]
    top = [np.concatenate(x) for x in zip(*(p["top"] for p in parts), strict=True)]
    base = np.concatenate([p["numbers"] for p in parts])
    vectors, pairs = [], []
    for i, x in enumerate(d):
        norm = np.linalg.norm(x)
        vectors.append({
            "l1": np.abs(x).sum(), "l2": norm, "linf": np.abs(x).max(), "relative": norm / np.linalg.norm(base),
            "base_cosine": base @ (base + x) / np.linalg.norm(base) / np.linalg.norm(base + x),
            "zeros": np.mean(x == 0), "kurtosis": np.mean((x - x.mean()) ** 4) / np.var(x) ** 2,
            "kept_by_trim": np.sqrt(sum(p["trimmed"][i] for p in parts)) / norm,
            "kept_by_election": np.sqrt(sum(p["elected"][i] for p in parts)) / norm,
        })  # fmt: skip
    for i, j in itertools.combinations(range(len(d)), 2):
        both = (d[i] != 0) & (d[j] != 0)
        pairs.append({
            "dot": d[i] @ d[j], "cosine": d[i] @ d[j] / np.linalg.norm(d[i]) / np.linalg.norm(d[j]),
            "sign_conflict": np.mean(np.sign(d[i][both]) != np.sign(d[j][both])) if both.any() else np.nan,
            "top_overlap": np.sum(top[i] & top[j]) / np.sum(top[i] | top[j]),
        })  # fmt: skip
    summed = np.linalg.norm(sum(d))
    c = np.mean([p["cosine"] for p in pairs]) if pairs else np.nan
    k = len(d)
    family = {
        "numel": base.size, "any_conflict": sum(p["any"] for p in parts) / base.size,
        "interference": 1 - summed / sum(np.linalg.norm(x) for x in d), "mean_cosine": c,
        "model_stock_t": k * c / (1 + (k - 1) * c),
        "rounding_loss": np.sqrt(sum(p["lost"] for p in parts)) / (summed / k),
    }  # fmt: skip
    return vectors, pairs, [family]


GROUPS = {
    "tensor": lambda name: name,
    "layer": lambda name: (layer_of(name), None if layer_of(name) is not None else kind_of(name)),
    "module": kind_of,
    "total": lambda name: None,
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("count", [1, 3])
def test_every_quantity_is_its_definition(tmp_path, dtype, count):
    base, tuned = tiny_family(tmp_path, count, dtype=dtype, delta=0.002, hidden=32)
    found = geometry(base, tuned, density=0.3)
    weights = [{n: t.double().numpy().ravel() for n, t in load_state(m).items()} for m in (base, *tuned)]
    parts = {
        n: reference(weights[0][n], [w[n] for w in weights[1:]], 0.3, getattr(torch, dtype)) for n in found.tensors
    }
    assert set(found.tensors) == set(weights[0])
    for by, key in GROUPS.items():
        groups = {}
        for name in found.tensors:
            groups.setdefault(key(name), []).append(parts[name])
        keys = list(groups) if by != "module" else sorted(groups, key=KINDS.index)
        wanted = [expected(groups[k]) for k in keys]
        for i, of in enumerate(("vectors", "pairs", "family")):
            frame = found.to_dataframe(by, of)
            each = len(wanted[0][i])
            assert len(frame) == each * len(keys)
            for member in range(each):
                part = frame.iloc[member * len(keys) : (member + 1) * len(keys)]
                for column in wanted[0][i][member]:
                    right = [w[i][member][column] for w in wanted]
                    # The rounding of float32 storage is as small as the noise of the sums.
                    loose = 0.05 if (column, dtype) == ("rounding_loss", "float32") else 3e-5
                    np.testing.assert_allclose(part[column], right, rtol=loose, atol=1e-6, err_msg=f"{by} {column}")


def test_threads_and_chunks_do_not_matter(tmp_path, monkeypatch):
    base, tuned = tiny_family(tmp_path, 2, dtype="bfloat16", hidden=64, vocab=300)
    first = geometry(base, tuned, threads=1)
    second = geometry(base, tuned, threads=3)
    assert all(np.array_equal(first.sums[k], second.sums[k]) for k in first.sums)
    monkeypatch.setattr(family, "CHUNK", family.BLOCK)
    small = geometry(base, tuned)
    for key, values in first.sums.items():
        np.testing.assert_allclose(small.sums[key], values, rtol=1e-5, atol=1e-6, err_msg=key)


def test_rows_longer_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(family, "CHUNK", family.BLOCK)
    wide = torch.randn(3, 2 * family.BLOCK + 77, generator=torch.Generator().manual_seed(0))
    base = save_checkpoint(tmp_path / "base", {"w": wide})
    tuned = save_checkpoint(tmp_path / "tuned", {"w": wide + 0.01 * wide.flip(1)})
    (row,) = geometry(base, [tuned]).to_dataframe("tensor").to_dict("records")
    assert row["l2"] == pytest.approx(0.01 * wide.norm().item(), rel=1e-5)


@given(st.integers(0, 2**31), st.floats(0.001, 1.0), st.sampled_from(["normal", "few", "zeros"]))
@settings(max_examples=60, deadline=None)
def test_the_threshold_keeps_the_largest_and_ties_together(seed, density, kind):
    rng = np.random.default_rng(seed)
    d = np.abs(rng.normal(size=500)).astype(np.float32)
    if kind == "few":
        d = np.round(d * 3) / 3
    elif kind == "zeros":
        d *= rng.random(500) < 0.05
    counts = np.bincount(d.view(np.int32) >> 16, minlength=1 << 15)
    bar = sweep._threshold(counts, density, d.size)
    wanted = max(1, int(density * d.size))
    kept = d >= np.float32(bar)
    assert bar > 0 and kept.sum() >= min(wanted, (d > 0).sum())
    least = np.sort(d)[-wanted]
    assert d[kept].min(initial=np.inf) >= least * (1 - 2**-7)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_ulps_are_those_of_the_base(dtype):
    kind = sweep.torch_dtype(dtype)
    base = torch.tensor([1.0, 1.5, -2.0, 0.01, 100.0, 3e-7, 0.0], dtype=torch.float32).to(kind).float()
    one_up = base.abs().to(kind)
    bits = one_up.view(torch.int32 if dtype == "F32" else torch.int16)
    ulp = (bits + 1).view(kind).double() - one_up.double()
    for steps in (1, 2, 3, 4, 100, 0.5, 0.3, 2.0**-7):
        ulps, histogram = np.zeros((1, sweep.ULP_BINS)), np.zeros((1, 1 << 15), dtype=np.int64)
        d = (steps * ulp).float()
        seen = d >= 2.0**-126  # smaller ones are no float32 numbers any more
        sweep._add_magnitudes(ulps, histogram, base[seen], d[seen][None], dtype, sweep.Workspace())
        assert ulps[0, int(np.floor(np.log2(steps))) - sweep.LOWEST_ULP] == seen.sum(), (steps, ulps)


def test_vectors_and_models_measure_alike(tmp_path):
    class Deltas:
        def __init__(self, deltas):
            self.deltas, self.shapes = deltas, {n: tuple(d.shape) for n, d in deltas.items()}

        def read(self, name, start=0, stop=None):
            return self.deltas[name][start:stop]

    base, (tuned,) = tiny_family(tmp_path, 1)
    before, after = load_state(base), load_state(tuned)
    vector = Deltas({n: after[n] - before[n] for n in before})
    both = geometry(base, {"model": tuned, "vector": vector})
    assert both.cosine()[0, 1] == pytest.approx(1, abs=1e-6)
    del vector.shapes["lm_head.weight"]
    partial = geometry(base, {"model": tuned, "vector": vector})
    assert partial.missing == {"vector": ["lm_head.weight"]} and any("lacks 1" in s for s in partial.summary())
    row = partial.to_dataframe("tensor").query("tensor == 'lm_head.weight' and vector == 'vector'").iloc[0]
    assert row.l2 == 0 and row.zeros == 1


def test_spectra_are_those_of_a_full_svd(tmp_path, monkeypatch):
    monkeypatch.setattr(spectra, "PANEL", 100)
    base, tuned = tiny_family(tmp_path, 2)
    found = geometry(base, tuned, spectra=True)
    before, after = load_state(base), load_state(tuned[1])
    for name, values in found.spectra.items():
        right = torch.linalg.svdvals(after[name].double() - before[name].double()).numpy()
        np.testing.assert_allclose(values[1], right, rtol=1e-4, atol=1e-7)
    assert set(found.spectra) == {n for n, t in before.items() if t.ndim == 2}
    rows = found.to_dataframe("tensor").query("tensor == 'lm_head.weight'")
    s = found.spectra["lm_head.weight"][1]
    p = s / s.sum()
    assert rows.stable_rank.iloc[1] == pytest.approx((s**2).sum() / s[0] ** 2)
    assert rows.entropy_rank.iloc[1] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    held = np.cumsum(s**2) / (s**2).sum()
    assert held[int(rows.rank_90.iloc[1]) - 1] >= 0.9 > held[int(rows.rank_90.iloc[1]) - 2]


def test_layers_come_in_their_order(tmp_path):
    base, tuned = tiny_family(tmp_path, 1, layers=12)
    layers = geometry(base, tuned).to_dataframe("layer")["layer"]
    assert layers.dropna().to_list() == list(range(12))
    assert layers.isna().to_list() == [True, *[False] * 12, True, True]


def test_saved_and_loaded(tmp_path):
    base, tuned = tiny_family(tmp_path / "models", 2)
    found = geometry(base, tuned, spectra=True)
    again = Geometry.load(found.save(tmp_path / "deep" / "geometry"))
    assert again.summary() == found.summary() and again.tensors == found.tensors
    assert all(np.array_equal(again.sums[k], found.sums[k]) for k in found.sums)
    assert all(np.array_equal(again.spectra[k], found.spectra[k]) for k in found.spectra)
    assert read_json(tmp_path / "deep" / "geometry.json")["pairs"][0]["a"] == "tuned0"
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(SurgeryError, match="No geometry at"):
        Geometry.load(tmp_path / "nothing")


def test_words_tables_and_figures(tmp_path):
    import io

    from matplotlib.figure import Figure
    from rich.console import Console

    base, tuned = tiny_family(tmp_path, 2, dtype="bfloat16")
    found = geometry(base, tuned, spectra=True)
    said = "\n".join(found.summary())
    assert "tuned0 changes the base by" in said and "opposite directions" in said and "to rounding" in said
    console = Console(width=120, file=io.StringIO())
    for by in ("tensor", "layer", "module", "total"):
        console.print(found.table(by))
    assert "lm_head.weight" in console.file.getvalue() and "tuned1" in console.file.getvalue()
    for kind in ("heat map", "cosine", "conflict", "ulps", "spectrum"):
        assert isinstance(found.plot(kind), Figure)
    with pytest.raises(SurgeryError, match="no figure of a geometry 'cosines'"):
        found.plot("cosines")
    with pytest.raises(SurgeryError, match="no quantity 'zeroes'"):
        found.plot(quantity="zeroes")
    with pytest.raises(SurgeryError, match="no vector 'tuned9'"):
        found.plot(vector="tuned9")


def test_a_vector_that_changes_nothing(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    same = save_checkpoint(tmp_path / "same", load_state(base))
    found = geometry(base, [same])
    assert found.summary() == ["same changes nothing."]
    json.dumps(found.to_dict(), allow_nan=False)


def test_nan_is_refused_with_every_tensor_and_count(tmp_path):
    base, tuned = tiny_family(tmp_path, 2)
    weights = load_state(tuned[1])
    weights["lm_head.weight"][0, :3] = float("nan")
    weights["model.norm.weight"][0] = float("inf")
    save_checkpoint(tuned[1], weights)
    with pytest.raises(SurgeryError, match="in 2 tensors") as caught:
        geometry(open_checkpoint(base), tuned)
    assert "tuned1: model.norm.weight (1)" in caught.value.problem
    assert "tuned1: lm_head.weight (3)" in caught.value.problem


def test_wrong_input_gets_a_sentence(tmp_path):
    base, tuned = tiny_family(tmp_path, 1)
    other = tiny_checkpoint(tmp_path / "other", vocab=44)
    with pytest.raises(
        SurgeryError, match=r"2 tensors differ in shape: other: lm_head.weight \[44, 16\], base \[40, 16\]"
    ):
        geometry(base, [other])
    with pytest.raises(SurgeryError, match="no tensor in common"):
        geometry(base, [save_checkpoint(tmp_path / "alien", {"w": torch.ones(2)})])
    with pytest.raises(SurgeryError, match="No fine-tuned models"):
        geometry(base, [])
    with pytest.raises(SurgeryError, match="density is 1.5"):
        geometry(base, tuned, density=1.5)
    with pytest.raises(SurgeryError, match="no grouping 'layers'"):
        geometry(base, tuned).to_dataframe("layers")
