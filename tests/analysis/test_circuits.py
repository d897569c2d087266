"""Circuits against the plain form, one whole forward each; criteria against their definitions; files and sets."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from activations.families import CONFIGS, FAMILIES, build, prompts

from analysis.circuits import (
    Circuit,
    EdgeCircuit,
    Group,
    Head,
    Step,
    completeness,
    discover,
    entity_tracking,
    evaluate_circuit,
    faithfulness,
    minimality,
    random_circuit,
)
from analysis.circuits.passes import Setting, Variant
from analysis.edges.graph import Graph
from analysis.metrics import accuracy, log_prob, logit_diff, prob
from analysis.paths import path_patch
from surgery.activations import run
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, encode

torch.set_num_threads(1)
CLEAN, CORRUPT, ANSWERS = prompts()
METRIC = logit_diff(ANSWERS)
CIRCUIT = Circuit.of(
    {"A": [(2, 0), (1, 3)], "B": [(1, 1), (2, 2)], "C": [(1, 0), (0, 2)], "D": [(0, 1)]},
    {"A": -1, "B": -1, "C": -3, "D": "label"},
)
LABEL = torch.tensor([2, 4, 5, 2])
POSITIONS = {"label": LABEL}


@pytest.fixture
def deep(monkeypatch):
    """A Llama with grouped queries and six blocks: backwards from the answer there is a way to go."""

    def config():
        found = CONFIGS["llama_gqa"]()
        found.num_hidden_layers = 6
        return found

    monkeypatch.setitem(CONFIGS, "deep", config)
    return build("deep")


def kept_of(spots, whole, batch, layers, heads, positions=POSITIONS):
    """(layer, batch, pos, head) bool: which heads speak. One by one, as the definition says."""
    kept = torch.full((layers, *batch.ids.shape, heads), whole)
    for layer, head, position in spots:
        for row in range(len(batch)):
            if position == "all":
                kept[layer, row, :, head] = not whole
                continue
            place = int(positions[position][row]) if isinstance(position, str) else position
            kept[layer, row, place if place >= 0 else int(batch.lengths[row]) + place, head] = not whole
    return kept


def plain(model, batch, metric, kept, replaced):
    """The metric (example,) of one whole forward in which heads that are not kept say `replaced`, z by layer."""
    edits = {
        f"z.{layer}": lambda z, layer=layer: torch.where(kept[layer][..., None], z, replaced[layer])
        for layer in range(len(kept))
    }
    logits, _ = run(model, batch, edits=edits)
    return metric.of_logits(logits, batch.last)


def means(model, ids):
    _, seen = run(model, Batch.of(ids), ["z"])
    return [seen[f"z.{layer}"].mean(0, keepdim=True) for layer in range(anatomy_of(model).n_layers)]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_the_plain_form(name):
    """The circuit, the model without it, parts of both, and other circuits; 1e-5, and they differ."""
    model, batch = build(name), Batch.of(CLEAN)
    layers, heads = anatomy_of(model).n_layers, anatomy_of(model).n_heads
    setting = Setting.of(model, CLEAN, METRIC, {"reference": CORRUPT, "positions": POSITIONS})
    spots = CIRCUIT.spots
    variants = [Variant(False, spots), Variant(True, spots), Variant(True), Variant(False)]
    for name_of in CIRCUIT.groups:
        part = CIRCUIT.only(name_of).spots
        variants += [Variant(True, part), Variant(False, spots - part)]
    variants.append(Variant(False, random_circuit(CIRCUIT, setting.anatomy, 5).spots))
    replaced = means(model, CORRUPT)
    expected = torch.stack([
        plain(model, batch, METRIC, kept_of(v.heads, v.whole, batch, layers, heads), replaced) for v in variants
    ], 1)  # fmt: skip
    for against in (None, Variant(False, spots), Variant(True, spots)):
        values, told = setting.values(variants, against)
        assert (values - expected).abs().max() < 1e-5
        assert told["cost"]["loop"] == len(variants)
    assert expected.std(1).min() > 1e-3


@pytest.mark.parametrize("ablation", ["mean", "resample", "counterfactual", "zero"])
def test_ablations(ablation):
    model, batch = build("llama_gqa"), Batch.of(CLEAN)
    _, seen = run(model, Batch.of(CORRUPT), ["z"])
    other = [seen[f"z.{layer}"] for layer in range(3)]
    kept = kept_of(CIRCUIT.spots, False, batch, 3, 4)
    found = evaluate_circuit(model, CLEAN, CIRCUIT, METRIC, ablation=ablation, positions=POSITIONS,
                             reference=None if ablation == "zero" else CORRUPT, seed=3)  # fmt: skip
    if ablation == "resample":
        orders = itertools.product(range(4), repeat=4)
        rows = torch.tensor(found.values)[None]
        every = {row: plain(model, batch, METRIC, kept, [z[list(row)] for z in other]) for row in orders}
        fitting = [row for row, values in every.items() if (rows - values).abs().max() < 1e-5]
        assert len(fitting) == 1  # one draw of other prompts explains all four values
        again = evaluate_circuit(model, CLEAN, CIRCUIT, METRIC, ablation=ablation, positions=POSITIONS, seed=3,
                                 reference=CORRUPT, budget=20_000)  # fmt: skip
        assert abs(again.values - found.values).max() < 1e-5
        return
    replaced = {
        "mean": [z.mean(0, keepdim=True) for z in other],
        "counterfactual": other,
        "zero": [torch.zeros(())] * 3,
    }[ablation]
    assert abs(found.values - plain(model, batch, METRIC, kept, replaced).numpy()).max() < 1e-5
    none = plain(model, batch, METRIC, kept_of([], False, batch, 3, 4), replaced)
    assert abs(np.array(found.columns["ablated"]) - none.numpy()).max() < 1e-5


def test_resampling_from_the_prompts_themselves_leaves_none_its_own():
    model = build("gpt2")
    none = Circuit({"A": Group((), -1)})
    found = evaluate_circuit(model, CLEAN[:2], none, logit_diff(ANSWERS[:2]), ablation="resample")
    _, seen = run(model, Batch.of(CLEAN[:2].flip(0)), ["z"])
    kept = torch.zeros(3, 2, 9, 4, dtype=torch.bool)
    swapped = [seen[f"z.{layer}"] for layer in range(3)]
    expected = plain(model, Batch.of(CLEAN[:2]), logit_diff(ANSWERS[:2]), kept, swapped)
    assert abs(found.values - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("align", ["start", "end"])
def test_padded_prompts_equal_single_ones(side, align):
    model, lengths = build("gpt2"), [9, 6, 7, 8]
    rows = [row[:n] for row, n in zip(CLEAN.tolist(), lengths, strict=True)]
    others = [row[: 15 - n] for row, n in zip(CORRUPT.tolist(), lengths, strict=True)] + CORRUPT.tolist()
    more = {"reference": encode(None, others, side=side), "align": align}
    found = evaluate_circuit(model, encode(None, rows, side=side), CIRCUIT, METRIC, positions=POSITIONS, **more)
    for i, row in enumerate(rows):
        alone = evaluate_circuit(model, [row], CIRCUIT, METRIC.select(slice(i, i + 1)),
                                 positions={"label": int(LABEL[i])}, **more)  # fmt: skip
        assert abs(found.values[i] - alone.values[0]).max() < 1e-5
        # The mean over the other prompts that have the place, one place after the other.
        places = [(len(row) - 1 - p if align == "end" else p) for p in range(len(row))]
        replaced = []
        seen = [run(model, [other], ["z"])[1] for other in others]
        for layer in range(3):
            z = [one[f"z.{layer}"][0] if align == "start" else one[f"z.{layer}"][0].flip(0) for one in seen]
            replaced.append(torch.stack([torch.stack([x[p] for x in z if len(x) > p]).mean(0) for p in places])[None])
        batch, position = Batch.of([row]), {"label": LABEL[i : i + 1]}
        kept = kept_of(CIRCUIT.spots, False, batch, 3, 4, position)
        expected = plain(model, batch, METRIC.select(slice(i, i + 1)), kept, replaced)
        assert found.values[i] == pytest.approx(float(expected[0]), abs=1e-5)


def test_heads_at_all_positions_and_metrics_of_all_logits():
    model, batch = build("qwen3"), Batch.of(CLEAN)
    circuit = Circuit.of({"A": [(2, 0), (0, 3)], "B": [(1, 1)]}, {"A": "all", "B": -2})

    def spread(logits):
        return logits.std(-1).mean(-1)

    class Spread:
        of_logits = staticmethod(lambda logits, last: spread(logits))

    setting = Setting.of(model, CLEAN, spread, {"reference": CORRUPT})
    variants = [Variant(False, circuit.spots), Variant(True, circuit.spots), Variant(False), Variant(True)]
    values, _ = setting.values(variants)
    for i, variant in enumerate(variants):
        kept = kept_of(variant.heads, variant.whole, batch, 3, 4)
        assert (values[:, i] - plain(model, batch, Spread, kept, means(model, CORRUPT))).abs().max() < 1e-5


def test_small_budgets_and_portions_give_the_same_numbers(monkeypatch):
    model, told = build("llama_gqa"), []
    more = {"reference": CORRUPT, "positions": POSITIONS, "subsets": 6}
    whole = completeness(model, CLEAN, CIRCUIT, METRIC, **more)
    small = completeness(model, CLEAN, CIRCUIT, METRIC, **more, budget=30_000, progress=lambda *a: told.append(a))
    monkeypatch.setattr("surgery.activations.resume.TOKENS", 80)
    portions = completeness(model, CLEAN, CIRCUIT, METRIC, **more)
    for other in (small, portions):
        assert abs(whole.model.values - other.model.values).max() < 1e-5
        assert abs(whole.circuit.values - other.circuit.values).max() < 1e-5
    assert told == sorted(told) and len(told) > 6 and told[-1] == (80, 80)


def test_bfloat16():
    """Two bits of logits of order 4."""
    more = {"reference": CORRUPT, "positions": POSITIONS}
    exact = evaluate_circuit(build("gpt2"), CLEAN, CIRCUIT, METRIC, **more)
    found = evaluate_circuit(build("gpt2", dtype=torch.bfloat16), CLEAN, CIRCUIT, METRIC, **more)
    assert abs(found.values - exact.values).max() < 0.06
    assert abs(exact.values - np.array(exact.columns["model"])).max() > 0.1


def test_faithfulness_and_random_circuits():
    model, batch = build("llama_gqa"), Batch.of(CLEAN)
    more = {"reference": CORRUPT, "positions": POSITIONS, "draws": 4, "seed": 7}
    found = faithfulness(model, CLEAN, CIRCUIT, prob(ANSWERS[:, 0]), **more)
    replaced, metric = means(model, CORRUPT), prob(ANSWERS[:, 0])
    mine = plain(model, batch, metric, kept_of(CIRCUIT.spots, False, batch, 3, 4), replaced)
    whole = metric.of_logits(run(model, batch)[0], batch.last)
    assert found.ratio.mean == pytest.approx(float(mine.mean() / whole.mean()), rel=1e-4)
    assert found.ratio.interval().low < found.ratio.mean < found.ratio.interval().high
    for draw, values in enumerate(found.random.values.T):
        drawn = random_circuit(CIRCUIT, anatomy_of(model), 7 + draw)
        expected = plain(model, batch, metric, kept_of(drawn.spots, False, batch, 3, 4), replaced)
        assert abs(values - expected.numpy()).max() < 1e-5
    # A logit difference has no zero of its own: everything counted from the model without heads.
    floored = faithfulness(model, CLEAN, CIRCUIT, METRIC, floor="ablated", **more)
    mine, whole, none = (
        plain(model, batch, METRIC, kept_of(spots, every, batch, 3, 4), replaced).mean()
        for spots, every in ((CIRCUIT.spots, False), ([], True), ([], False))
    )
    assert floored.ratio.mean == pytest.approx(float((mine - none) / (whole - none)), rel=1e-3)
    rows = found.table()
    assert [row["run"] for row in rows] == ["model", "circuit", "random"] and json.dumps(rows)
    every = Circuit({"A": Group([(layer, head) for layer in range(3) for head in range(4)], "all")})
    whole_again = faithfulness(model, CLEAN, every, METRIC, floor="ablated", reference=CORRUPT, draws=1)
    assert whole_again.ratio.mean == pytest.approx(1.0, abs=1e-5)


def test_random_circuits_have_the_groups_sizes_and_no_head_twice_at_a_position():
    anatomy = anatomy_of(build("gpt2"))
    seen = set()
    for seed in range(30):
        drawn = random_circuit(CIRCUIT, anatomy, seed)
        assert [len(g.heads) for g in drawn.groups.values()] == [2, 2, 2, 1]
        assert [g.position for g in drawn.groups.values()] == [-1, -1, -3, "label"]
        assert not set(drawn.groups["A"].heads) & set(drawn.groups["B"].heads)
        assert len(drawn.spots) == 7  # with replacement some of 30 draws would have fewer
        drawn.check(anatomy)
        seen |= drawn.spots
        assert drawn == random_circuit(CIRCUIT, anatomy, seed)
    assert len({(s.layer, s.head) for s in seen}) == 12
    full = Circuit(
        {"A": Group([(layer, head) for layer in range(3) for head in range(4)], -1), "B": Group([(0, 0)], -1)}
    )
    with pytest.raises(SurgeryError, match="more heads than the model, 12"):
        random_circuit(full, anatomy, 0)


def test_completeness_is_the_difference_of_model_and_circuit():
    model, batch = build("gpt2"), Batch.of(CLEAN)
    found = completeness(model, CLEAN, CIRCUIT, METRIC, reference=CORRUPT, positions=POSITIONS, subsets=5, seed=2)
    parts = list(found.model.axes["part"])
    assert parts == ["A", "B", "C", "D", *(f"random {i}" for i in range(5))]
    replaced = means(model, CORRUPT)
    for i, name in enumerate("ABCD"):
        part = CIRCUIT.only(name).spots
        of_model = plain(model, batch, METRIC, kept_of(part, True, batch, 3, 4), replaced)
        of_circuit = plain(model, batch, METRIC, kept_of(CIRCUIT.spots - part, False, batch, 3, 4), replaced)
        assert abs(found.difference.values[:, i] - (of_model - of_circuit).numpy()).max() < 1e-5
        assert found.scores[name] == pytest.approx(abs(float((of_model - of_circuit).mean())), abs=1e-5)
    drawn = [found.scores[f"random {i}"] for i in range(5)]
    assert found.random == pytest.approx((np.mean(drawn), np.std(drawn)))
    assert len(set(drawn)) > 2


def test_minimality_follows_the_published_rule():
    model, batch, metric = build("llama_gqa"), Batch.of(CLEAN), prob(ANSWERS[:, 0])
    circuit = CIRCUIT | Circuit.of({"A": [(0, 0), (2, 3), (1, 2)]}, {"A": -1})
    found = minimality(model, CLEAN, circuit, metric, reference=CORRUPT, positions=POSITIONS)
    replaced = means(model, CORRUPT)

    def value(group, *out):
        position = circuit.groups[group].position
        spots = circuit.spots - {(*head, position) for head in out}
        return float(plain(model, batch, metric, kept_of(spots, False, batch, 3, 4), replaced).mean())

    for name, group in circuit.groups.items():
        for v in group.heads:
            cost = {u: value(name, u) - value(name, u, v) for u in group.heads if u != v}
            ranked = sorted((u for u in cost if cost[u] > 1e-7), key=lambda u: -cost[u])
            removed = ranked[: math.ceil(0.3 * len(group.heads))]
            assert list(found.removed[name, v]) == removed
            score = value(name, *removed) / value(name, *removed, v) - 1
            assert found.scores[name, v] == pytest.approx(score, rel=1e-3, abs=1e-5)
            assert (v in found.circuit.groups[name].heads) == (score >= 0.01)
    assert max(len(heads) for heads in found.removed.values()) == 2
    assert 0 < len(found.circuit) < len(circuit)
    assert found.before.axes["head"][0] == "A 2.0" and found.before.values.shape == (4, 10)
    assert found.before.meta["cost"]["forwards"] < found.before.meta["cost"]["loop"]


def test_discovery_goes_backwards_from_the_answer(deep):
    model, metric = deep, prob(ANSWERS[:, 0])
    steps = [Step("A", 8), Step("B", 6, "A", "q", strongest=5), Step("C", 2, "B", "v", -6)]
    found = discover(model, CLEAN, CORRUPT, metric, steps, note="test")
    logits, _ = run(model, CLEAN)
    clean = metric.of_logits(logits, Batch.of(CLEAN).last).numpy()[:, None, None]

    def ranked(**more):
        effects = path_patch(model, CLEAN, CORRUPT, metric, **more).values / clean
        order = np.argsort(effects.mean(0), axis=None)
        mean = effects.mean(0)
        return [Head(*divmod(int(i), 4)) for i in order if mean.flat[i] < 0], mean

    a, mean = ranked()
    a = a[:8]
    b = ranked(receivers=[f"q.{h.layer}.{h.head}" for h in a[:5]], receiver_position=-1)[0][:6]
    c = ranked(receivers=[f"v.{h.layer}.{h.head // 2}" for h in b], position=-6, receiver_position=-6)[0][:2]
    groups = found.circuit.groups
    assert list(groups["B"].heads) == b and list(groups["C"].heads) == c
    assert set(a) & set(b) and list(groups["A"].heads) == [
        h for h in a if h not in b
    ]  # in both: it stays in the one found last
    assert groups["A"].scores[0] == pytest.approx(mean[groups["A"].heads[0]], abs=1e-6)
    assert (groups["B"].to, groups["B"].by, groups["C"].position) == ("A", "q", -6)
    assert sorted(found.scores["C"].meta["receivers"]) == sorted({f"v.{h.layer}.{h.head // 2}" for h in b})
    plainly = discover(model, CLEAN, CORRUPT, metric, steps[:1], score="difference")
    assert abs(plainly.scores["A"].values / clean - found.scores["A"].values).max() < 1e-5


def test_the_steps_of_entity_tracking(deep):
    steps = entity_tracking()
    assert [(s.group, s.top, s.receivers, s.component, s.strongest) for s in steps] == [
        ("A", 58, "logits", "", None), ("B", 10, "A", "q", 20), ("C", 25, "B", "v", 5), ("D", 5, "C", "v", 10),
    ]  # fmt: skip
    model, steps = deep, entity_tracking(top=(8, 8, 8, 8), receivers=(8, 8, 8))
    with pytest.raises(SurgeryError, match="Step 'D' is at 'previous query label', and nothing says where"):
        discover(model, CLEAN, CORRUPT, prob(ANSWERS[:, 0]), steps)
    names = {"previous query label": [3, 5, 3, 5]}
    there = {"previous query label": lambda batch: torch.tensor([2, 4, 3, 3])}
    found = discover(model, CLEAN, CORRUPT, prob(ANSWERS[:, 0]), steps, positions=names, source_positions=there)
    to = [f"v.{h.layer}.{h.head // 2}" for h in found.circuit.groups["C"].heads]
    again = path_patch(model, CLEAN, CORRUPT, prob(ANSWERS[:, 0]), receivers=to, position=names["previous query label"],
                       source_position=[2, 4, 3, 3], receiver_position=names["previous query label"])  # fmt: skip
    clean = np.array(again.columns["clean"])[:, None, None]
    assert abs(found.scores["D"].values - again.values / clean).max() < 1e-5


# ---- files, sets, drawing ------------------------------------------------------------------------------------------


def test_circuits_as_files(tmp_path):
    circuit = Circuit({
        "A": Group([(9, 6), (10, 0)], -1, "logits", scores=[-0.41, -0.2]),
        "Ä": Group([(3, 0)], "previous query label", "A", "v"),
    }, "a note")  # fmt: skip
    path = circuit.save(tmp_path / "deep" / "circuit.json")
    assert Circuit.load(path) == circuit and Circuit.load(path).note == "a note"
    assert len(path.read_text().splitlines()) == 7  # a group a line
    for text, message in (
        ("{", "is not a circuit"),
        ('{"groups": []}', None),
        ('{"groups": {"A": {"heads": [[0, 1]]}}}', "group 'A' has no position"),
        ('{"groups": {"A": {"position": -1}}}', "group 'A' has no heads"),
        ('{"groups": {"A": {"position": -1, "heads": [[0]]}}}', "pairs"),
        ('{"groups": {"A": {"position": -1, "heads": [[0, 1], [0, 1]]}}}', "named twice"),
        ('{"groups": {"A": {"position": -1, "heads": [], "size": 2}}}', "says 'size'"),
    ):
        path.write_text(text)
        if message is None:
            assert len(Circuit.load(path)) == 0
            continue
        with pytest.raises(SurgeryError, match=message):
            Circuit.load(path)
    with pytest.raises(SurgeryError, match="There is no circuit at"):
        Circuit.load(tmp_path / "none.json")


def test_sets_of_heads():
    other = Circuit.of({"A": [(2, 0), (0, 0)], "C": [(1, 0)], "E": [(1, 1)]}, {"A": -1, "C": -3, "E": 4})
    assert (CIRCUIT | other).groups["A"].heads == ((2, 0), (1, 3), (0, 0))
    assert len(CIRCUIT | other) == 9 and len(CIRCUIT & other) == 2 and len(CIRCUIT - other) == 5
    assert CIRCUIT - CIRCUIT | CIRCUIT == CIRCUIT and (CIRCUIT & CIRCUIT) == CIRCUIT
    recall = CIRCUIT.recall(other)
    assert recall == {"A": (1, 2), "C": (1, 1), "E": (0, 1)} and recall["A"].share == 0.5
    assert CIRCUIT.only("D").spots == {(0, 1, "label")}
    assert str(CIRCUIT) == "circuit of 7 heads: A 2 at -1, B 2 at -1, C 2 at -3, D 1 at label"
    with pytest.raises(SurgeryError, match="'A' is at -1 in one circuit and at -2"):
        CIRCUIT | Circuit.of({"A": [(0, 0)]}, {"A": -2})
    with pytest.raises(SurgeryError, match="no group 'Z'"):
        CIRCUIT.only("Z")
    with pytest.raises(SurgeryError, match="Group 'A' has no position"):
        Circuit.of({"A": [(0, 0)]}, {})
    with pytest.raises(SurgeryError, match="2 heads and 1 scores"):
        Group([(0, 0), (1, 1)], -1, scores=[0.5])


def test_a_circuit_is_drawn():
    circuit = Circuit({
        "A": Group([(2, 0), (1, 3)], -1, "logits", scores=[-0.4, -0.2]),
        "B": Group([(1, 1), (1, 3)], -3, "A", "q", scores=[-0.3, -0.1]),
    })  # fmt: skip
    nodes, edges = circuit._heads_drawn()
    assert set(nodes) == {"A 2.0", "A 1.3", "B 1.1", "B 1.3", "logits"}
    assert edges == {("A 2.0", "logits"): -0.4, ("A 1.3", "logits"): -0.2, ("B 1.1", "A 2.0"): -0.3,
                     ("B 1.3", "A 2.0"): -0.1}  # fmt: skip
    nodes, edges = circuit._groups_drawn()
    assert nodes == {"A (2)": (0, "A"), "B (2)": (-1, "B"), "logits": (1, "")}
    assert edges == {("A (2)", "logits"): pytest.approx(-0.6), ("B (2)", "A (2)"): pytest.approx(-0.4)}
    assert len(circuit.plot().axes[0].texts) == 5
    assert CIRCUIT.plot()  # nothing is said about what leads where
    large = Circuit({"A": Group([(layer, 0) for layer in range(30)], -1, "B"), "B": Group([(0, 1)], -1, "A")})
    assert len(large.plot().axes[0].texts) == 2  # a file may say that two groups lead to each other


def test_circuits_of_edges(tmp_path):
    graph = Graph.of(build("llama_gqa"))
    edges = [("embed", "q.0.1", 0.5), ("z.0.1", "v.2.0", -0.25), ("z.2.1", "logits", 1.0), ("embed", "logits", 0.1)]
    circuit = EdgeCircuit(edges, graph, "some")
    assert EdgeCircuit.load(circuit.save(tmp_path / "edges.json")) == circuit
    other = EdgeCircuit([edges[0], ("embed", "mlp_in.1", 2.0)], graph)
    assert len(circuit | other) == 5 and len(circuit & other) == 1 and len(circuit - other) == 3
    assert circuit.recall(other) == (1, 2)
    assert circuit.heads().spots == {(0, 1, "all"), (2, 1, "all")}
    assert circuit.plot()
    with pytest.raises(SurgeryError, match="does not come later"):
        EdgeCircuit([("z.2.1", "q.1.0", 1.0)], graph)
    (tmp_path / "edges.json").write_text('{"edges": []}')
    with pytest.raises(SurgeryError, match="is not a circuit of edges"):
        EdgeCircuit.load(tmp_path / "edges.json")


# ---- what is wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("circuit", "more", "message"),
    [
        (Circuit.of({"A": [(3, 0)]}, {"A": -1}), {}, "Group 'A' has head 3.0, and the model 3 layers of 4"),
        (Circuit.of({"A": [(0, 4)]}, {"A": -1}), {}, "has head 0.4"),
        (Circuit.of({"A": [(0, 0)]}, {"A": -12}), {}, "position '-12' of prompt 0 is -12, and it has 9 tokens"),
        (CIRCUIT, {}, "at 'label', and nothing says where"),
        (CIRCUIT, {"positions": {"lable": 2}}, "Did you mean 'lable'"),
        (CIRCUIT.only("A"), {"ablation": "median"}, "ablation='median'"),
        (CIRCUIT.only("A"), {"align": "middle"}, "align='middle'"),
        (CIRCUIT.only("A"), {"reference": CORRUPT[:, :8]}, "9 and 8 tokens long"),
        (CIRCUIT.only("A"), {"reference": CORRUPT[:, :8], "align": "end"}, "Prompt 0 has 9 tokens, and what stands"),
        (CIRCUIT.only("A"), {"ablation": "counterfactual"}, "4 prompts and 0 of them"),
        (CIRCUIT.only("A"), {"ablation": "counterfactual", "reference": CORRUPT[:3]}, "4 prompts and 3 of them"),
        (CIRCUIT.only("A"), {"ablation": "resample", "reference": CORRUPT[:, :7]}, "9 and 7 tokens long"),
    ],
)
def test_what_is_wrong_is_said(circuit, more, message):
    with pytest.raises(SurgeryError, match=message):
        evaluate_circuit(build("llama_gqa"), CLEAN, circuit, METRIC, **more)


def test_criteria_say_when_they_are_not_defined():
    model, answers = build("llama_gqa"), (ANSWERS[:, 0] + 1) % 60
    wrong = [a for a in range(60) if not (model(CLEAN).logits[:, -1].argmax(-1) == a).any()][0]
    with pytest.raises(SurgeryError, match="accuracy of the whole model is 0"):
        faithfulness(model, CLEAN, CIRCUIT.only("A"), accuracy([wrong] * 4))
    with pytest.raises(SurgeryError, match="same with all heads as without any"):
        faithfulness(model, CLEAN, CIRCUIT.only("A"), lambda logits: logits[:, 0, 0] * 0 + 1, floor="ablated")
    with pytest.raises(SurgeryError, match="floor='none'"):
        faithfulness(model, CLEAN, CIRCUIT.only("A"), METRIC, floor="none")
    with pytest.raises(SurgeryError, match="'log_prob' is negative here"):
        minimality(model, CLEAN, CIRCUIT.only("A"), log_prob(answers))
    with pytest.raises(SurgeryError, match="no heads"):
        minimality(model, CLEAN, Circuit({"A": Group((), -1)}), METRIC)
    with pytest.raises(SurgeryError, match="made for 4 examples"):
        evaluate_circuit(model, CLEAN[:2], CIRCUIT.only("A"), METRIC)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "no steps"),
        ([Step("A", 2), Step("A", 2)], "two groups 'A'"),
        ([Step("B", 2, "A", "q")], "leads to 'A', which no earlier step finds"),
        ([Step("A", 2, position=-2)], "Nothing that is sent can arrive"),
    ],
)
def test_steps_that_lead_nowhere(steps, message):
    with pytest.raises(SurgeryError, match=message):
        discover(build("llama_gqa"), CLEAN, CORRUPT, METRIC, steps)


def test_steps_and_scores_that_make_no_sense():
    for wrong in ({"top": 0}, {"top": 1, "component": "q"}, {"top": 1, "receivers": "A"},
                  {"top": 1, "receivers": "A", "component": "z"}):  # fmt: skip
        with pytest.raises(SurgeryError, match="Step 'X'"):
            Step("X", **wrong)
    model = build("llama_gqa")
    with pytest.raises(SurgeryError, match="metric is 0 on prompt 0"):
        discover(model, CLEAN, CORRUPT, lambda logits: logits[:, 0, 0] * 0, [Step("A", 2)])
    with pytest.raises(SurgeryError, match="its heads are in layer 0"):
        discover(model, CLEAN, CORRUPT, prob(ANSWERS[:, 0]), [
            Step("A", 9), Step("B", 9, "A", "q"), Step("C", 9, "B", "v"), Step("D", 9, "C", "v"),
        ])  # fmt: skip
    with pytest.raises(
        SurgeryError, match="Nothing leads to 'A': no head"
    ):  # the same prompts: no head lowers anything
        discover(model, CLEAN, CLEAN, prob(ANSWERS[:, 0]), [Step("A", 2), Step("B", 2, "A", "q")])


def test_a_model_is_untouched_also_after_an_exception():
    model = build("llama_gqa").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def broken(logits):
        calls.append(logits)
        if len(calls) == 2:
            raise KeyError("broken")
        return logits[:, -1, 0]

    for measure in (evaluate_circuit, faithfulness, completeness, minimality):
        calls: list = []
        with pytest.raises(KeyError, match="broken"):
            measure(model, CLEAN, CIRCUIT, broken, positions=POSITIONS)
        assert model.training
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_published_tables_are_whole():
    """What stands beside the experiment agrees with itself."""
    table = json.loads((Path(__file__).parents[2] / "experiments" / "published" / "entity_tracking.json").read_text())
    for row in (row for name, row in table["heads"].items() if name != "source"):
        assert sum(row[group] for group in "ABCD") == row["total"]
    for name, row in table["recall_of_llama_heads"].items():
        assert name == "source" or all(row[g][1] == table["heads"]["Llama"][g] for g in "ABCD")
    for name, row in table["faithfulness"].items():
        if isinstance(row, dict):
            assert row["circuit"] / row["full"] == pytest.approx(row["faithfulness"], abs=0.006), name
    assert all(len(table["functionality"][name]) == 6 for name in table["models"])
    steps = {step.group: step for step in entity_tracking()}
    assert {name: (step.receivers, step.component) for name, step in steps.items()} == {
        name: (group["to"], group["by"]) for name, group in table["groups"].items()
    }
    assert [steps[g].top for g in "ABCD"] == [table["heads_before_minimality"]["Llama"][g] for g in "ABCD"]
    receiving = table["receivers_in_path_patching"]["Llama"]
    assert [steps[g].strongest for g in "BCD"] == [receiving[g] for g in "ABC"]
    assert all(
        part.get("source") for name, part in table.items() if name not in ("paper", "code", "models", "task", "groups")
    )
