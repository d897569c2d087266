"""The merge methods against mergekit's stored answers, and against what each must obey."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_golden import CASES, GOLDEN, SHAPES, chosen, family
from safetensors.torch import load_file
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.weights import sparsify
from surgery.weights.methods import METHODS, Method, geometric, per_input, tall_masks, unify

EVERY = sorted(METHODS)
NEEDED: dict[str, dict[str, Any]] = {"slerp": {"t": 0.4}, "nearswap": {"t": 0.05}}
OF_DIFFERENCES = [name for name in EVERY if METHODS[name].needs_base is True]
SCALED = [name for name in EVERY if "scale" in METHODS[name].params and METHODS[name].needs_base]


def settings_of(method: Method, n: int = 3, **params: Any) -> dict[str, Any]:
    """The parameters that `method` can't do without, and `params`."""
    keys = {"keys": [11 + i for i in range(n)]} if method.random else {}
    return {**NEEDED.get(method.name, {}), **keys, **params}


def inputs_of(method: Method, shape: tuple[int, ...] = (10, 12), seed: int = 0) -> tuple[list[Tensor], Tensor]:
    tuned, base = family(shape, seed)
    return tuned[: method.inputs[1] or 3], base


def run(name: str, tuned: list[Tensor], base: Tensor | None, **params: Any) -> Tensor:
    method = METHODS[name]
    return method.function(tuned, base, **settings_of(method, len(tuned), **params))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_golden(name: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, case = load_file(GOLDEN), CASES[name]
    tuned, base = chosen(case, [stored[f"{shape}/tuned{i}"] for i in range(3)], stored[f"{shape}/base"])
    # The random masks are mergekit's own; each key stands for the mask of one input.
    monkeypatch.setattr(sparsify, "bernoulli", lambda p, s, key, offset=0: stored[f"{shape}/{name}/mask{key}"])
    method = METHODS[case.ours]
    keys = {"keys": list(range(len(tuned)))} if method.random else {}
    close(method.function(tuned, base, **case.params, **keys), stored[f"{shape}/{name}"])


def test_every_method_of_mergekit_is_compared() -> None:
    own = {"lines", "magmax", "emr", "consensus", "iso_c", "iso_cts"}
    assert {case.ours for case in CASES.values()} | own == set(EVERY)


# --- laws of all methods ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_same_models_in_another_order(name: str) -> None:
    method = METHODS[name]
    if method.inputs[1] == 1:
        pytest.skip("takes one model")
    tuned, base = inputs_of(method)
    order = list(reversed(range(len(tuned))))
    params = settings_of(method, len(tuned))
    if "weight" in method.params:
        params["weight"] = [0.5, 0.9, 0.3][: len(tuned)]
    turned = {k: [v[i] for i in order] if isinstance(v, list) else v for k, v in params.items()}
    close(method.function([tuned[i] for i in order], base, **turned), method.function(tuned, base, **params), 1e-5)


@pytest.mark.parametrize("shape", [(6, 5), (7,), (), (0, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", OF_DIFFERENCES)
def test_no_difference_gives_the_base(name: str, shape: tuple[int, ...]) -> None:
    tuned, base = inputs_of(METHODS[name], shape)
    assert torch.equal(run(name, [base.clone() for _ in tuned], base), base)


@pytest.mark.parametrize("name", SCALED)
def test_scale_zero_gives_the_base(name: str) -> None:
    tuned, base = inputs_of(METHODS[name])
    assert torch.equal(run(name, tuned, base, scale=0.0), base)


@pytest.mark.parametrize("name", sorted({*OF_DIFFERENCES} - {"ram", "ram_plus", "nearswap", "slerp", "arcee_fusion"}))
def test_small_updates_are_merged_like_large_ones(name: str) -> None:
    """No absolute threshold hides in a rule: mergekit's SCE and Model Stock change below update sd 1e-3."""
    tuned, _ = inputs_of(METHODS[name])
    zero = torch.zeros_like(tuned[0])
    close(run(name, [f * 2**-20 for f in tuned], zero), run(name, tuned, zero) * 2**-20)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (), (4, 1), (1, 6), (3, 0)], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_odd_shapes_and_zeros_stay_finite(name: str, shape: tuple[int, ...]) -> None:
    tuned, base = inputs_of(METHODS[name], shape)
    for inputs in (tuned, [torch.zeros_like(f) for f in tuned], [f * 1e-30 for f in tuned]):
        for origin in (base, torch.zeros_like(base)):
            merged = run(name, inputs, origin)
            assert merged.shape == shape and merged.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_types_and_untouched_inputs(name: str) -> None:
    tuned, base = inputs_of(METHODS[name])
    half = [f.bfloat16() for f in tuned], base.bfloat16()
    assert run(name, *half).dtype == torch.float32
    close(run(name, *half), run(name, [f.float() for f in half[0]], half[1].float()))
    before = [t.clone() for t in (*tuned, base)]
    double = run(name, [tuned[0].double(), *tuned[1:]], base)
    assert double.dtype == torch.float64
    if name not in ("arcee_fusion",):  # a threshold between nearly equal importances may fall either way
        close(run(name, tuned, base).double(), double, 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tuned, base), strict=True))


BY_BLOCKS = [
    *[(name, {}) for name in EVERY if METHODS[name].unit != "tensor"],
    ("breadcrumbs", {"scope": "row"}),
    ("breadcrumbs_ties", {"scope": "row", "density": 0.5}),
    ("model_stock", {"filter_wise": True}),
    ("nuslerp", {"flatten": False}),
]


@pytest.mark.parametrize(("name", "params"), BY_BLOCKS, ids=str)
@settings(max_examples=15, deadline=None)
@given(cut=st.integers(0, 10), seed=st.integers(0, 100))
def test_blocks_give_the_whole(name: str, params: dict[str, Any], cut: int, seed: int) -> None:
    method = METHODS[name]
    tuned, base = inputs_of(method, (10, 12), seed)
    assert method.unit_for(params) in ("row", "element")
    parts = []
    for rows in (slice(0, cut), slice(cut, 10)):
        place = {"offset": rows.start * 12} if "offset" in method.hidden else {}
        parts.append(run(name, [f[rows] for f in tuned], base[rows], **params, **place))
    assert torch.equal(torch.cat(parts), run(name, tuned, base, **params))


@pytest.mark.parametrize("name", [n for n in EVERY if METHODS[n].unit == "element"])
def test_slices_give_the_whole(name: str) -> None:
    method = METHODS[name]
    tuned, base = inputs_of(method, (120,))
    places = [{"offset": i} if "offset" in method.hidden else {} for i in (0, 37)]
    parts = [
        run(name, [f[part] for f in tuned], base[part], **place)
        for part, place in zip((slice(0, 37), slice(37, 120)), places, strict=True)
    ]
    assert torch.equal(torch.cat(parts), run(name, tuned, base))


def test_units_that_depend_on_parameters() -> None:
    assert METHODS["dare_ties"].unit_for({"rescale": "l1"}) == "tensor"
    assert METHODS["dare_ties"].unit_for({}) == "element"
    assert METHODS["nuslerp"].unit_for({"flatten": False}) == "row"
    assert METHODS["nuslerp"].unit_for({"flatten": False, "row_wise": True}) == "tensor"


# --- identities between methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dare_linear", "breadcrumbs", "della_linear"])
def test_everything_kept_is_task_arithmetic(name: str) -> None:
    tuned, base = inputs_of(METHODS[name])
    weight = [0.2, 0.7, -0.4]
    close(run(name, tuned, base, density=1.0, weight=weight), run("task_arithmetic", tuned, base, weight=weight))


@pytest.mark.parametrize("name", ["ties", "dare_ties", "breadcrumbs_ties", "della"])
def test_everything_kept_with_one_sign_is_the_mean(name: str) -> None:
    tuned, base = inputs_of(METHODS[name])
    agreeing = [base + (f - base).abs() for f in tuned]
    close(run(name, agreeing, base, density=1.0), run("linear", agreeing, base))


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "sce", "ram", "ram_plus", "magmax", "emr",
                                  "multislerp", "karcher", "passthrough"])  # fmt: skip
def test_one_model_with_everything_kept_is_that_model(name: str) -> None:
    (tuned, *_), base = family((9, 7), 4)
    params = {"ties": {"density": 1.0}, "sce": {"topk": 1.0}}.get(name, {})
    close(run(name, [tuned], base, **params), tuned)


def test_ends_of_interpolations() -> None:
    tuned, base = family((9, 7), 5)
    for t, end in ((0.0, base), (1.0, tuned[0])):
        close(run("slerp", tuned[:1], base, t=t), end)
        for origin in (None, base):
            first, second = (tuned[0], tuned[1])
            close(run("nuslerp", [first, second], origin, weight=[1 - t, t]), second if t else first)
    assert torch.equal(run("nearswap", tuned[:1], base, t=0.0), base)
    close(run("nearswap", tuned[:1], base, t=1e9), tuned[0])


# --- single methods ---------------------------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    base = torch.zeros(4)
    tuned = [torch.tensor([4.0, -1.0, 3.0, 0.5]), torch.tensor([-1.0, -2.0, 5.0, 0.1])]
    # Trimmed to two each: (4, 0, 3, 0) and (0, -2, 5, 0).
    assert run("ties", tuned, base, density=0.5).tolist() == [4, -2, 4, 0]
    assert run("ties", tuned, base, density=0.5, normalize="none").tolist() == [4, -2, 8, 0]
    assert run("ties", tuned, base, density=1.0).tolist() == [4, -1.5, 4, pytest.approx(0.3)]


def test_elections_differ() -> None:
    base = torch.zeros(1)
    tuned = [torch.tensor([3.0]), torch.tensor([-1.0]), torch.tensor([-1.0])]
    merged = {e: run("ties", tuned, base, density=1.0, election=e).item() for e in ("total", "frequency", "unweighted")}
    assert merged == {"total": 3, "frequency": -1, "unweighted": 3}
    weight = [0.1, 1.0, 1.0]
    assert run("ties", tuned, base, density=1.0, weight=weight).item() == -1
    assert run("ties", tuned, base, density=1.0, weight=weight, election="unweighted").item() == pytest.approx(3)
    assert run("ties", tuned, base, density=1.0, weight=weight, normalize="count", election="unweighted").item() == (
        pytest.approx(0.3)
    )
    assert run("ties", [-tuned[1], tuned[1]], base, density=1.0).item() == 1  # an exact tie elects plus


def test_ties_over_the_whole_model() -> None:
    tuned, base = family((6, 8), 6)
    flat, rows = [f.reshape(-1) for f in tuned], range(6)
    per_model = [sparsify.select_model([f[i] - base[i] for i in rows], 0.3) for f in tuned]
    merged = [
        run("ties", [f[i] for f in tuned], base[i], scope="model", selections=[s[i] for s in per_model]) for i in rows
    ]
    close(torch.cat(merged), run("ties", flat, base.reshape(-1), density=0.3))
    with pytest.raises(SurgeryError, match="scope='model'"):
        run("ties", tuned, base, scope="model")


def test_random_ties_need_and_use_keys() -> None:
    base, tuned = torch.zeros(50), [torch.ones(50)]
    first, second = (run("ties", tuned, base, density=0.2, ties="random", keys=[k]) for k in (1, 2))
    assert first.sum() == second.sum() == 10 and not torch.equal(first, second)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_dropping_is_unbiased(name: str) -> None:
    (tuned, *_), base = family((8, 8), 7)
    trials = [run(name, [tuned], base, density=0.4, keys=[key]) for key in range(4000)]
    error = torch.stack(trials).mean(dim=0) - tuned
    spread = (tuned - base).abs() * (1 / 0.25 - 1) ** 0.5 / 4000**0.5  # of the least kept element
    assert (error.abs() <= 5 * spread + 1e-6).all()
    l1 = run(name, [tuned], base, density=0.4, rescale="l1") - base
    close(l1.abs().sum(), (tuned - base).abs().sum())


def test_sce_weights_by_energy_however_small() -> None:
    base = torch.zeros(2)
    tuned = [torch.tensor([1e-6, 3e-6]), torch.tensor([1e-6, 1e-6])]
    weight = [10 / 12, 2 / 12]
    close(run("sce", tuned, base, topk=1.0), torch.tensor([1e-6, 3e-6 * weight[0] + 1e-6 * weight[1]]))


def test_ram_by_hand() -> None:
    base = torch.zeros(5)
    tuned = [torch.tensor([1.0, 2.0, 0, 4.0, 0]), torch.tensor([0, 4.0, 3.0, 1e-7, 0])]
    close(run("ram", tuned, base), torch.tensor([1.0, 3.0, 3.0, 4.0, 0.0]))
    # The first model has 1 shared and 2 unique elements, the second 1 and 1.
    strong = run("ram_plus", tuned, base, r=1.0, alpha=0.7)
    close(strong, torch.tensor([1.5, 3.0, 3.0 * 1.7, 6.0, 0.0]))


def test_magmax_by_hand() -> None:
    tuned = [torch.tensor([1.0, -5.0, 2.0]), torch.tensor([-3.0, 4.0, -2.0])]
    assert run("magmax", tuned, torch.zeros(3)).tolist() == [-3, -5, -2]


def test_emr_gives_each_task_its_mean_magnitude_back() -> None:
    tuned, base = family((6, 8), 8)
    deltas = [f - base for f in tuned]
    whole = unify(deltas)
    for d, mask, scale in zip(deltas, whole.masks, whole.scales, strict=True):
        own = whole.vector * mask * scale
        close(own.abs().sum(), d.abs().sum())
        assert (own * d >= 0).all()
    assert (whole.vector.abs() == torch.stack(deltas).abs().amax(dim=0)).float().mean() > 0.5
    alone = unify(deltas[:1])
    close(alone.vector * alone.masks[0] * alone.scales[0], deltas[0])
    assert unify([torch.zeros(3)]).scales == [0.0]


def test_consensus_counts_tall_masks() -> None:
    base = torch.zeros(4)
    tuned = [torch.tensor([1.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 0.0, 0.0, 0.1])]
    masks = tall_masks([f - base for f in tuned], 0.5)
    assert [m.tolist() for m in masks] == [[True, True, False, True], [True, False, False, False]]
    kept = {k: run("consensus", tuned, base, strictness=0.5, agreeing=k).tolist() for k in (0, 1, 2)}
    assert kept[0] == kept[1] == pytest.approx([2, 1, 0, 5.1]) and kept[2] == [2, 0, 0, 0]


def test_lines_grows_with_depth() -> None:
    tuned, base = family((4, 4), 9)
    total = sum(f - base for f in tuned)
    for depth, scale in ((0.0, 1 / 3), (0.5, 2 / 3), (1.0, 1.0)):
        close(run("lines", tuned, base, depth=depth), base + scale * total)
    close(run("lines", tuned, base, shallow=0.2, deep=0.6, depth=0.25), base + 0.3 * total)


def test_slerp_keeps_the_angle() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    close(run("slerp", [b], a, t=1 / 3), torch.tensor([3**0.5 / 2, 0.5]))
    opposite = run("slerp", [-a], a, t=0.25)
    close(opposite, 0.5 * a)  # no direction to turn to: linear


def test_equal_elements_stay_equal_when_slerp_is_linear() -> None:
    base = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    tuned = base.clone()
    tuned[:10] *= 1.01
    assert torch.equal(run("slerp", [tuned], base, t=0.3)[10:], base[10:])


def test_karcher_balances_the_tangents() -> None:
    tuned, _ = family((5, 5), 10)
    vectors = [f.reshape(-1).double() for f in tuned]
    mean = run("karcher", [v.reshape(5, 5) for v in vectors], None, max_iter=100, tol=1e-12).reshape(-1)
    close(mean.norm(), sum(v.norm() for v in vectors) / 3)
    u = mean / mean.norm()
    pull = torch.zeros_like(u)
    for v in vectors:
        cos = (v / v.norm()) @ u
        pull += cos.acos() / (1 - cos**2).sqrt() * (v / v.norm() - cos * u)
    assert pull.norm() < 1e-8


def test_model_stock_follows_the_angle() -> None:
    base = torch.zeros(2)
    across = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    assert torch.equal(run("model_stock", across, base), base)  # nothing in common
    same = [torch.tensor([1.0, 1.0])] * 2
    close(run("model_stock", same, base), same[0])
    against = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])]
    assert torch.equal(run("model_stock", against, base), base)  # 1 + (N - 1) c vanishes


def test_multislerp_of_directions_that_cancel() -> None:
    a = torch.tensor([1.0, 0.0])
    close(run("multislerp", [a, -3 * a], None, weight=[0.5, 0.5]), -a)


def test_gram_and_cosines() -> None:
    vectors = [torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[3.0, 3.0], [1.0, 0.0]])]
    g = geometric.gram(vectors)
    assert g.dtype == torch.float64 and g[0].tolist() == [[9, 9], [9, 18]]
    assert geometric.cosines(g)[0, 0, 1].item() == pytest.approx(0.5**0.5)
    assert geometric.cosines(g)[1].tolist() == [[0, 0], [0, 1]]


def test_arcee_fusion_keeps_outstanding_changes() -> None:
    base = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    tuned = base + 1e-6
    tuned[3, 4] += 1.0
    merged = run("arcee_fusion", [tuned], base)
    changed = (merged != base).nonzero()
    assert (3, 4) in [tuple(c.tolist()) for c in changed] and (changed[:, 0] == 3).all()


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
def test_isotropic_merges_have_one_singular_value(name: str) -> None:
    tuned, base = family((9, 12), 11)
    total = sum(f - base for f in tuned)
    merged = run(name, tuned, base) - base
    values = torch.linalg.svdvals(merged)
    assert values.max() - values.min() < 1e-4 * values.max()
    if name == "iso_c":
        close(values.mean(), torch.linalg.svdvals(total).mean(), 1e-5)
    close(run(name, [f[0] for f in tuned], base[0]), base[0] + total[0] / 3)  # vectors are averaged


def test_iso_cts_with_everything_common_is_iso_c() -> None:
    tuned, base = family((9, 12), 12)
    close(run("iso_cts", tuned, base, common=1.0), run("iso_c", tuned, base), 1e-5)
    run("iso_cts", tuned, base, common=0.0)
    with pytest.raises(SurgeryError, match="common"):
        run("iso_cts", tuned, base, common=1.5)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
def test_isotropic_merges_add_no_direction(name: str) -> None:
    base = torch.zeros(10, 14)
    random = torch.Generator().manual_seed(0)
    thin = [torch.randn(10, 2, generator=random) @ torch.randn(2, 14, generator=random) for _ in range(2)]
    assert torch.linalg.matrix_rank(run(name, thin, base), rtol=1e-4) <= 4


# --- bad input and the schema -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"densty": 0.2}, "no parameter 'densty'"),
        ({"density": 1.5}, "'density' must lie between 0 and 1"),
        ({"density": [0.2, 0.3]}, "'density' has 2 values for 3 inputs"),
        ({"normalize": "sum"}, "'normalize' of 'ties' is 'sum'"),
        ({"weight": [1.0]}, "'weight' has 1 values for 3 inputs"),
    ],
)
def test_wrong_parameters(params: dict[str, Any], message: str) -> None:
    tuned, base = family((4, 4), 13)
    with pytest.raises(SurgeryError, match=message):
        run("ties", tuned, base, **params)


def test_wrong_inputs() -> None:
    tuned, base = family((4, 4), 13)
    for call, message in [
        (lambda: run("ties", tuned, None), "base"),
        (lambda: run("ties", [], base), "at least 1"),
        (lambda: run("model_stock", tuned[:1], base), "at least 2"),
        (lambda: run("nuslerp", tuned, base), "takes 2 tuned"),
        (lambda: run("linear", [tuned[0], tuned[1][:2]], None), r"\[4, 4\], \[2, 4\]"),
        (lambda: run("linear", [tuned[0].long()], None), "not floating point"),
        (lambda: run("linear", tuned, None, weight=[1.0, -1.0, 0.0]), "sum to 0"),
        (lambda: run("nearswap", tuned[:1], base, t=-1.0), "'t'"),
        (lambda: METHODS["slerp"].function(tuned[:1], base), "needs the parameter 't'"),
        (lambda: METHODS.lookup("tise"), "no merge method 'tise'"),
    ]:
        with pytest.raises(SurgeryError, match=message):
            call()
    with pytest.raises(SurgeryError) as known:
        run("ties", tuned, base, densty=0.2)
    assert known.value.hint == "Did you mean 'density'?"


def test_schema() -> None:
    ties = METHODS["ties"]
    assert (ties.needs_base, ties.unit, ties.inputs, ties.random) == (True, "tensor", (1, None), False)
    assert ties.params["density"] == type(ties.params["density"])(float, 0.2, True)
    assert ties.params["normalize"].choices == ("weights", "count", "none")
    assert ties.hidden == {"selections", "keys"}
    assert METHODS["slerp"].params["t"].required and not METHODS["slerp"].params["t"].per_input
    assert METHODS["breadcrumbs"].params["bottom"].per_input and METHODS["breadcrumbs"].params["bottom"].type is float
    assert METHODS["dare_ties"].random and METHODS["nuslerp"].needs_base == "optional"
    assert per_input(0.5, 3, "weight") == per_input((0.5, 0.5, 0.5), 3, "weight") == [0.5] * 3


@pytest.mark.parametrize("name", EVERY)
def test_every_method_explains_itself(name: str) -> None:
    import surgery.weights.methods as package

    method = METHODS[name]
    assert method.summary.endswith(".") and len(method.summary) < 110
    assert all(p.type in (float, int, bool, str) for p in method.params.values())
    row = next(line for line in (package.__doc__ or "").splitlines() if line.startswith(f"| {name} "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3].rstrip("*") == method.unit and cells[3].endswith("*") == bool(method.unit_if)
    assert cells[1] in (method.paper.removeprefix("arXiv:"), "mergekit", "Shoemake 1985")
