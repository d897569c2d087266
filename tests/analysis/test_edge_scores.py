"""What is made of edge scores: circuits, tables, files, pictures; memory that is kept to; models that are unlike."""

import json

import numpy as np
import pytest
import torch
from activations.families import build, prompts
from matplotlib.figure import Figure
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from analysis.attribution import attribute
from analysis.edges import METHODS, EdgeScores, Graph, eap, evaluate_edges
from analysis.metrics import accuracy, log_prob, logit_diff
from analysis.results import Result
from surgery.errors import SurgeryError
from surgery.models import encode

torch.set_num_threads(1)
CLEAN, CORRUPT, ANSWERS = prompts()
METRIC = logit_diff(ANSWERS)
SCORES = eap(build("llama_gqa"), CLEAN, CORRUPT, METRIC)


# ---- selection -----------------------------------------------------------------------------------------------------


def made(graph, **scores):
    """Scores of one example by "writer>reader"; dots are written as underscores."""
    values = np.zeros((1, len(graph.readers), len(graph.writers)), dtype=np.float32)
    for name, score in scores.items():
        writer, reader = (side.replace("_", ".").replace("mlp.out", "mlp_out").replace("mlp.in", "mlp_in")
                          for side in name.split("__"))  # fmt: skip
        values[(0, *graph.place(writer, reader))] = score
    return EdgeScores(values, graph)


def test_top_is_by_size_or_by_value():
    best = SCORES.top(SCORES.graph.n_edges)
    sizes = [abs(score) for _, _, score in best]
    assert sizes == sorted(sizes, reverse=True) and len({edge[:2] for edge in best}) == SCORES.graph.n_edges
    for writer, reader, score in best[:20]:
        assert SCORES.mean[SCORES.graph.place(writer, reader)] == score
    values = [score for _, _, score in SCORES.top(10, absolute=False)]
    assert values == sorted(values, reverse=True) and values[0] == SCORES.mean.max()


def test_edges_on_no_path_are_pruned():
    graph = Graph(2, 2, 1)
    chain = [("embed", "k.0.0"), ("z.0.1", "q.1.0"), ("z.1.0", "logits")]  # a shared key is part of both heads
    loose = [("z.0.0", "mlp_in.0"), ("embed", "v.1.0"), ("mlp_out.1", "logits"), ("embed", "mlp_in.1")]
    assert graph.pruned([*chain, loose[0]]) == chain  # mlp 0 writes nothing
    assert graph.pruned(loose) == loose[2:]
    assert graph.pruned([*loose, *chain]) == [loose[1], *loose[2:], *chain]
    assert graph.pruned(chain[:2]) == [] and graph.pruned([]) == []


def test_pruning_leaves_what_paths_are_made_of():
    """Against a search of all paths, on random sets of edges."""
    graph, generator = Graph(2, 2, 2), np.random.default_rng(0)
    everything = [(graph.writers[c], graph.readers[r]) for r, c in np.argwhere(graph.exists)]
    for share in (0.05, 0.1, 0.3):
        chosen = [edge for edge in everything if generator.random() < share]
        used = set()

        def walk(writer, path, chosen=chosen, used=used):
            for edge in chosen:
                if edge[0] == writer:
                    if edge[1] == "logits":
                        used.update([*path, edge])
                    for inside in graph.inside(edge[1]):
                        walk(inside, [*path, edge])

        walk("embed", [])
        assert set(graph.pruned(chosen)) == used and len(used) < len(chosen)


def test_greedy_grows_from_the_logits():
    graph = Graph(1, 2, 2)
    scores = made(graph, z_0_0__logits=-3, embed__q_0_0=0.5, embed__v_0_1=9, embed__logits=0.1, z_0_1__mlp_in_0=8,
                  mlp_out_0__logits=0.2)  # fmt: skip
    assert [e[:2] for e in scores.circuit(n=2, method="greedy")] == [("z.0.0", "logits"), ("embed", "q.0.0")]
    assert scores.circuit(n=2) == []  # the two greatest lead nowhere
    three = scores.circuit(n=5, method="greedy")
    assert [e[:2] for e in three[2:]] == [("mlp_out.0", "logits"), ("z.0.1", "mlp_in.0"), ("embed", "v.0.1")]
    assert [e[:2] for e in scores.circuit(n=2, method="greedy", absolute=False)] == []
    assert scores.circuit(threshold=0.5, method="greedy") == scores.circuit(n=2, method="greedy")


def test_circuits_by_number_and_by_threshold():
    every = SCORES.circuit(n=SCORES.graph.n_edges)
    assert len(every) == SCORES.graph.n_edges == len(SCORES.circuit(threshold=0))
    for method in ("top", "greedy"):
        few = SCORES.circuit(n=30, method=method)
        assert 0 < len(few) <= 30 and set(SCORES.graph.pruned(few)) == set(few)
        assert [tuple(edge) for edge in json.loads(json.dumps(few))] == few
    bar = abs(SCORES.top(30)[-1][2])
    assert SCORES.circuit(threshold=bar) == SCORES.circuit(n=30)
    better = evaluate_edges(
        build("llama_gqa"), CLEAN, CORRUPT, METRIC, {str(n): SCORES.circuit(n=n) for n in (60, 150)}
    )
    errors = abs(better.values - np.array(better.columns["clean"])[:, None]).mean(0)
    assert errors[1] < errors[0]


# ---- out -----------------------------------------------------------------------------------------------------------


def test_scores_come_back_from_a_file(tmp_path):
    path = SCORES.save(tmp_path / "scores")
    again = EdgeScores.load(path)
    np.testing.assert_array_equal(again.values, SCORES.values)
    assert again.graph == SCORES.graph and again.meta == SCORES.meta and again.columns == SCORES.columns
    assert again.circuit(n=30) == SCORES.circuit(n=30)
    Result.of([1.0]).save(tmp_path / "other")
    with pytest.raises(SurgeryError, match="no edge scores"):
        EdgeScores.load(tmp_path / "other")
    with pytest.raises(SurgeryError, match="missing"):
        EdgeScores.load(tmp_path / "nothing")


def test_tables_and_results_hold_every_edge():
    frame = SCORES.to_dataframe()
    assert len(frame) == SCORES.graph.n_edges and list(frame) == ["writer", "reader", "score", "standard_error"]
    first = SCORES.result().select("reader", frame.reader[0]).select("writer", frame.writer[0])
    assert first.mean == pytest.approx(frame.score[0]) and first.standard_error == pytest.approx(
        frame.standard_error[0]
    )
    assert np.isnan(SCORES.result().values).sum() == 4 * (~SCORES.graph.exists).sum()
    assert str(SCORES) == f"scores of {SCORES.graph.n_edges} edges (eap, noising, logit_diff), 4 examples"


def test_figures():
    figure = SCORES.plot(title="Layers")
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels[0] == "logits" and "q 1" in labels and isinstance(figure, Figure)
    drawn = SCORES.plot(20)
    words = [text.get_text() for text in drawn.axes[0].texts]
    assert "embed" in words and "logits" in words and any(word.startswith("mlp") for word in words)


def test_a_drawing_joins_q_k_and_v_and_only_heads_that_write():
    graph = Graph(1, 2, 1)
    edges = [("embed", "k.0.0", 1.0), ("embed", "q.0.1", 0.5), ("z.0.1", "logits", 2.0)]
    assert graph.drawn(edges) == {("embed", "0.1"): 1.5, ("0.1", "logits"): 2.0}
    assert graph.nodes(edges) == {"embed": (-1, "input"), "0.1": (0, "head"), "logits": (1, "output")}


# ---- memory --------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest tensor that is made inside."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.found = max(self.found, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs"])
def test_a_small_budget_gives_the_same_in_smaller_parts(method):
    model, largest = build("llama_gqa"), {}
    size = 4 * SCORES.values[0].size
    for budget in (1 << 30, 8 * size):
        with Largest() as watched:
            scores = eap(model, CLEAN, CORRUPT, METRIC, method=method, budget=budget, steps=2)
        largest[budget] = watched.found
        assert scores.per_example == (budget == 1 << 30)
    assert largest[1 << 30] >= 4 * 16 * 9 * 32 * 4  # all writers, examples and positions
    assert largest[8 * size] <= 8 * size
    np.testing.assert_allclose(scores.mean, eap(model, CLEAN, CORRUPT, METRIC, method=method, steps=2).mean, atol=1e-6)
    with pytest.raises(SurgeryError, match="Only the mean"):
        scores.result()
    assert list(scores.to_dataframe()) == ["writer", "reader", "score"] and scores.meta["examples"] == 4


def test_examples_are_kept_where_that_is_asked_for():
    kept = eap(build("llama_gqa"), CLEAN, CORRUPT, METRIC, budget=1, per_example=True)  # one position at a time
    np.testing.assert_allclose(kept.values, SCORES.values, atol=1e-6)


def test_plain_functions_know_examples_by_their_rows():
    model, rows, circuit = build("llama_gqa"), torch.arange(4), SCORES.circuit(n=90)

    def by_hand(logits):
        return logits[rows, -1, ANSWERS[:, 0]] - logits[rows, -1, ANSWERS[:, 1]]

    found = eap(model, CLEAN, CORRUPT, by_hand, budget=1, per_example=True)
    np.testing.assert_allclose(found.values, SCORES.values, atol=1e-6)
    one, two = (evaluate_edges(model, CLEAN, CORRUPT, m, circuit, budget=1) for m in (by_hand, METRIC))
    np.testing.assert_allclose(one.values, two.values, atol=1e-6)


# ---- batches and models that are unlike ----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_padding_on_either_side_changes_nothing(name, side):
    model = build(name)
    rows = [(CLEAN[0, :9], CORRUPT[0, :9]), (CLEAN[1, :6], CORRUPT[1, :6])]
    good, bad = (encode(None, [pair[i].tolist() for pair in rows], side=side) for i in (0, 1))
    metric = log_prob(ANSWERS[:2, 0])
    together = eap(model, good, bad, metric)
    circuit = together.circuit(n=40)
    faithful = evaluate_edges(model, good, bad, metric, circuit)
    for i, (one, other) in enumerate(rows):
        pair, alone = (one[None], other[None]), log_prob(ANSWERS[i : i + 1, 0])
        np.testing.assert_allclose(together.values[i], eap(model, *pair, alone).values[0], atol=1e-5)
        np.testing.assert_allclose(
            faithful.values[i], evaluate_edges(model, *pair, alone, circuit).values[0], atol=1e-5
        )


def test_bfloat16_is_near_float32():
    rough = eap(build("llama_gqa", dtype=torch.bfloat16), CLEAN, CORRUPT, METRIC)
    assert np.corrcoef(rough.mean.ravel(), SCORES.mean.ravel())[0, 1] > 0.99
    model = build("llama_gqa", dtype=torch.bfloat16)
    found = evaluate_edges(model, CLEAN, CORRUPT, METRIC, {"none": []})
    np.testing.assert_allclose(found.values[:, 0], found.columns["corrupt"], atol=0.15)


class Wrapped(nn.Module):
    """A projection that is not a plain one, as adapters and quantised layers are."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.extra = inner, nn.Linear(inner.in_features, inner.out_features, bias=True)
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def forward(self, x):
        return self.inner(x) + 0.5 * self.extra(x)


class Odd(nn.Module):
    """A norm that no closed form knows."""

    def forward(self, x):
        return x / (1 + x.abs().mean(-1, keepdim=True)).sqrt()


def adds_up(model):
    scores = eap(model, CLEAN, CORRUPT, METRIC)
    nodes = attribute(model, CLEAN, CORRUPT, METRIC, ("mlp_out", "z"), direction="noising", by="all")
    total, graph = scores.values.sum(1), scores.graph
    for layer in range(3):
        np.testing.assert_allclose(total[:, graph.mlp(layer)], nodes["mlp_out"].values[:, layer], atol=1e-5)
        np.testing.assert_allclose(total[:, graph.heads(layer)], nodes["z"].values[:, layer], atol=1e-5)
    found = evaluate_edges(model, CLEAN, CORRUPT, METRIC, {"none": [], "half": scores.circuit(n=graph.n_edges // 2)})
    np.testing.assert_allclose(found.values[:, 0], found.columns["corrupt"], atol=1e-5)
    assert abs(nodes["z"].values).max() > 1e-2


def test_projections_that_are_not_plain_are_asked():
    model = build("llama_gqa")
    for layer in model.model.layers:
        layer.self_attn.k_proj = Wrapped(layer.self_attn.k_proj)
        layer.self_attn.o_proj = Wrapped(layer.self_attn.o_proj)
    adds_up(model)


def test_norms_that_nobody_knows_go_through_autograd():
    model = build("llama_gqa")
    model.model.layers[1].input_layernorm = Odd()
    model.model.layers[2].post_attention_layernorm = Odd()
    adds_up(model)


def test_what_stands_between_stream_and_projections_is_noticed():
    model = build("gpt2")

    def doubled(module, args, kwargs):
        return (2 * args[0], *args[1:]), kwargs

    model.transformer.h[1].attn.register_forward_pre_hook(doubled, with_kwargs=True)
    with pytest.raises(SurgeryError, match="gradients of layer 1 don't add up"):
        eap(model, CLEAN, CORRUPT, METRIC)


def test_a_norm_behind_attention_that_centres_is_refused():
    model = build("olmo2")
    model.model.layers[0].post_attention_layernorm = nn.LayerNorm(32)
    with pytest.raises(SurgeryError, match="does more than scale"):
        eap(model, CLEAN, CORRUPT, METRIC)


# ---- what is refused, and what stays -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corrupt": CORRUPT[:3]}, "4 clean prompts and 3 corrupt"),
        ({"corrupt": [*CORRUPT[:3].tolist(), CORRUPT[3, :5].tolist()]}, "Pair 3: the clean prompt is 9 tokens long"),
        ({"clean": CLEAN[:0], "corrupt": CORRUPT[:0]}, "No prompts"),
        ({"metric": accuracy(ANSWERS[:, 0])}, "'accuracy' has no gradient"),
        ({"metric": logit_diff(ANSWERS[:2])}, "made for 2 examples"),
        ({"method": "eap-ig-input"}, "Did you mean 'eap-ig-inputs'"),
        ({"direction": "up"}, "direction='up'"),
        ({"steps": 0, "method": "eap-ig-inputs"}, "steps=0"),
        ({"rule": "simpson"}, "rule='simpson'"),
    ],
)
def test_wrong_input_gets_a_sentence(change, said):
    with pytest.raises(SurgeryError, match=said):
        eap(**{"model": build("gpt2"), "clean": CLEAN, "corrupt": CORRUPT, "metric": METRIC, **change})


@pytest.mark.parametrize(
    ("edges", "said"),
    [
        ([("embed", "q.9.0")], "no reader 'q.9.0'"),
        ([("head.0.1", "logits")], "no writer 'head.0.1'"),
        ([("z.1.0", "q.1.0")], "no edge from 'z.1.0' to 'q.1.0'"),
        (["embed->logits"], "An edge is"),
        ({}, "No circuits"),
    ],
)
def test_wrong_edges_are_named(edges, said):
    with pytest.raises(SurgeryError, match=said):
        evaluate_edges(build("gpt2"), CLEAN, CORRUPT, METRIC, edges)


def test_wrong_cuts_are_named():
    for change, said in [({}, "give one"), ({"n": 3, "threshold": 1.0}, "give one"), ({"n": 10**6}, "edges"),
                         ({"n": 3, "method": "best"}, "way to select edges 'best'")]:  # fmt: skip
        with pytest.raises(SurgeryError, match=said):
            SCORES.circuit(**change)
    with pytest.raises(SurgeryError, match="for this graph"):
        EdgeScores(np.zeros((1, 2, 3)), SCORES.graph)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_as_it_was(method):
    model = build("llama_gqa").train()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.grad = mine = torch.ones_like(weight)
    next(model.parameters()).requires_grad_(False)

    def state():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
        wanted = [(p.requires_grad, p.grad is None, float(p.detach().sum())) for p in model.parameters()]
        return hooks, wanted, [m.training for m in model.modules()], [set(vars(m)) for m in model.modules()]

    before, calls = state(), []

    def broken(logits):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("a user's own mistake")
        return logits[:, -1, 0]

    scores = eap(model, CLEAN, CORRUPT, METRIC, method=method, steps=2)
    evaluate_edges(model, CLEAN, CORRUPT, METRIC, scores.circuit(n=20))
    assert state() == before and weight.grad is mine and bool((mine == 1).all())
    with pytest.raises(RuntimeError, match="own mistake"):
        evaluate_edges(model, CLEAN, CORRUPT, broken, {"one": [], "two": [], "three": scores.circuit(n=20)})
    assert state() == before
