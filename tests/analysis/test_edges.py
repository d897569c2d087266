"""Edges: scores against naive copies of the stream, circuits against a model written out by hand, and peers."""

import numpy as np
import pytest
import torch
from activations.families import FAMILIES, PARALLEL, build, prompts

from analysis.attribution import attribute
from analysis.edges import Graph, eap, evaluate_edges
from analysis.edges.costs import costs
from analysis.metrics import logit_diff
from analysis.patching import patch
from surgery.activations import capture, edit, run
from surgery.anatomy import anatomy_of
from surgery.anatomy.points import projection
from surgery.errors import SurgeryError
from surgery.models import untouched

torch.set_num_threads(1)
CLEAN, CORRUPT, ANSWERS = prompts()
METRIC = logit_diff(ANSWERS)
NORMED = ("gemma2", "gemma3_text", "olmo2")
"""Families with a norm behind the output projection of attention."""


def every_edge(graph):
    return [(graph.writers[c], graph.readers[r]) for r, c in np.argwhere(graph.exists)]


# ---- the graph -----------------------------------------------------------------------------------------------------


def test_the_graph_of_gpt2_small_has_the_published_number_of_edges():
    graph = Graph(12, 12, 12)
    assert graph.n_edges == 32491 and len(graph.writers) == 157 and len(graph.readers) == 445


def test_edges_go_forwards_and_to_the_own_mlp_unless_parallel():
    graph, parallel = Graph(2, 2, 1), Graph(2, 2, 1, parallel=True)
    assert graph.readers[:5] == ["q.0.0", "q.0.1", "k.0.0", "v.0.0", "mlp_in.0"] and graph.readers[-1] == "logits"
    assert graph.writers == ["embed", "z.0.0", "z.0.1", "mlp_out.0", "z.1.0", "z.1.1", "mlp_out.1"]
    for writer, reader, there in [("embed", "q.0.0", True), ("z.0.0", "k.0.0", False), ("z.0.1", "mlp_in.0", True),
                                  ("mlp_out.0", "mlp_in.0", False), ("mlp_out.0", "v.1.0", True),
                                  ("mlp_out.1", "logits", True), ("z.1.0", "q.1.1", False)]:  # fmt: skip
        row, column = graph.readers.index(reader), graph.writers.index(writer)
        assert graph.exists[row, column] == there
        assert parallel.exists[row, column] == (there and (writer, reader) != ("z.0.1", "mlp_in.0"))
    assert graph.inside("k.1.0") == ["z.1.0", "z.1.1"] and graph.reading["z.1.1"] == ["q.1.1", "k.1.0", "v.1.0"]


# ---- scores --------------------------------------------------------------------------------------------------------


def written(model, seen, writer):
    """What a writer adds to the stream, by calls of the model's own modules on all but one head set to zero."""
    anatomy, (kind, *rest) = anatomy_of(model), writer.split(".")
    if kind == "embed":
        return seen["resid_pre.0"]
    if kind == "mlp_out":
        return seen[writer]
    layer, head = map(int, rest)
    z, out, norm = seen[f"z.{layer}"], anatomy.out(layer), anatomy.norm("attention_norm", layer)
    alone = torch.zeros_like(z)
    alone[:, :, head] = z[:, :, head]
    with torch.no_grad():
        own = out(alone.flatten(2)) - out(torch.zeros_like(z).flatten(2))
        if norm is None:
            return own
        whole = out(z.flatten(2))
        return own * norm(whole) / whole  # a share of what the norm makes of all heads together


def read_by(model, reader, ids):
    """The stream that a reader reads, and what makes of a copy of it the edit with which only this reader reads it."""
    anatomy, (kind, *rest) = anatomy_of(model), reader.split(".")
    layer = int(rest[0]) if rest else 2
    before = "resid_pre" if anatomy.parallel else "resid_mid"
    place = {"logits": "resid_post", "mlp_in": before}.get(kind, "resid_pre") + f".{layer}"
    norm = None if kind == "logits" else anatomy.norm("mlp_norm" if kind == "mlp_in" else "input_norm", layer)

    def change(copy):
        read = copy if norm is None else norm(copy)
        if kind in ("q", "k", "v"):
            module, part, _ = projection(anatomy, kind, layer)
            read = part(module(read))[:, :, int(rest[1])]
        return {place if kind == "logits" else reader: lambda value: read}

    return run(model, ids, [place])[1][place], change


def slope_at(model, ids, reader):
    """d metric / d (the reader's own copy of the stream), by running the model with that copy in its place."""
    stream, change = read_by(model, reader, ids)
    copy = stream.clone().requires_grad_()
    with untouched(model, gradients=True):
        with edit(model, change(copy)):
            value = METRIC.of_logits(model(ids).logits, torch.full((4,), 8)).sum()
        return torch.autograd.grad(value, copy)[0]


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox", "falcon", "qwen3", "phi3", "opt", *NORMED])
def test_scores_are_those_of_a_loop_over_edges(name):
    model = build(name)
    graph = Graph.of(model)
    kept = ["resid_pre.0", "z", "mlp_out"]
    good, bad = run(model, CLEAN, kept)[1], run(model, CORRUPT, kept)[1]
    scores, few = eap(model, CLEAN, CORRUPT, METRIC), graph.n_kv_heads
    size = abs(scores.values).max()
    for reader in ["q.0.0", "q.2.3", "k.1.0", f"k.2.{few - 1}", "v.1.0", "v.2.0", "mlp_in.0", "mlp_in.2", "logits"]:
        slope, row = slope_at(model, CLEAN, reader), graph.readers.index(reader)
        for column, writer in enumerate(graph.writers):
            if graph.exists[row, column]:
                difference = written(model, bad, writer) - written(model, good, writer)
                expected = (difference * slope).sum((1, 2)).numpy()
                np.testing.assert_allclose(scores.values[:, row, column], expected, atol=1e-5 * size, err_msg=writer)
            else:
                assert (scores.values[:, row, column] == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_edges_of_a_writer_add_up_to_its_attribution(name):
    """d m / d u is the sum over u's readers, in every family; behind a norm the heads' shares are those of attn_out."""
    model = build(name)
    scores = eap(model, CLEAN, CORRUPT, METRIC)
    graph, total = scores.graph, scores.values.sum(1)
    sites = ("resid_pre", "mlp_out", "attn_out", "z")
    nodes = attribute(model, CLEAN, CORRUPT, METRIC, sites, direction="noising", by="all")
    size = max(abs(result.values).max() for result in nodes.values())
    np.testing.assert_allclose(total[:, 0], nodes["resid_pre"].values[:, 0], atol=5e-6 * size)
    for layer in range(graph.n_layers):
        heads = total[:, graph.heads(layer)]
        np.testing.assert_allclose(total[:, graph.mlp(layer)], nodes["mlp_out"].values[:, layer], atol=5e-6 * size)
        np.testing.assert_allclose(heads.sum(1), nodes["attn_out"].values[:, layer], atol=5e-6 * size)
        if name not in NORMED:
            np.testing.assert_allclose(heads, nodes["z"].values[:, layer], atol=5e-6 * size)
    assert scores.by_writer()["mlp_out.0"] == pytest.approx(total[:, graph.mlp(0)].mean(), abs=1e-6)


@pytest.mark.parametrize("name", ["llama_gqa", "falcon", "gpt2"])
def test_groups_split_by_query_head_add_up(name):
    model = build(name)
    whole, split = eap(model, CLEAN, CORRUPT, METRIC), eap(model, CLEAN, CORRUPT, METRIC, split_groups=True)
    few = whole.graph.n_kv_heads
    for i, reader in enumerate(whole.graph.readers):
        kind, _, place = reader.partition(".")
        if kind in ("k", "v"):
            layer, head = map(int, place.split("."))
            rows = [f"{kind}.{layer}.{h}" for h in range(head * 4 // few, (head + 1) * 4 // few)]
        else:
            rows = [reader]
        found = sum(split.values[:, split.graph.readers.index(row)] for row in rows)
        np.testing.assert_allclose(found, whole.values[:, i], atol=2e-6 * abs(whole.values).max())
    if few < 4:
        with pytest.raises(SurgeryError, match="group"):
            evaluate_edges(model, CLEAN, CORRUPT, METRIC, [("embed", "k.1.3")])


# ---- methods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "olmo2"])
def test_methods_are_what_they_say(name):
    model = build(name)

    def of(method, **more):
        return eap(model, CLEAN, CORRUPT, METRIC, method=method, **more).values

    noising, denoising = of("eap"), of("eap", direction="denoising")
    close = {"rtol": 0, "atol": 2e-6 * abs(noising).max()}
    np.testing.assert_allclose(of("clean-corrupted"), (noising - denoising) / 2, **close)
    np.testing.assert_allclose(of("eap-ig-inputs", steps=1, rule="left"), -denoising, **close)  # at corrupt
    np.testing.assert_allclose(of("eap-ig-inputs", steps=1, rule="right"), noising, **close)  # at clean
    two = [of("eap-ig-inputs", steps=2, rule=rule) for rule in ("left", "right")]
    np.testing.assert_allclose(two[0] - two[1], (-denoising - noising) / 2, **close)  # (0 + 1/2) / 2 and (1/2 + 1) / 2


@pytest.mark.parametrize("name", ["gpt_neox", "olmo2"])
def test_integrated_edges_add_up(name):
    """Of the embedding along inputs: to all of the effect. Of a layer's writers along activations: to patching it."""
    model = build(name)
    scores = eap(model, CLEAN, CORRUPT, METRIC, method="eap-ig-inputs", steps=48)
    span = np.array(scores.columns["corrupt"]) - np.array(scores.columns["clean"])
    np.testing.assert_allclose(scores.values[:, :, 0].sum(1), span, atol=1e-3)
    scores = eap(model, CLEAN, CORRUPT, METRIC, method="eap-ig-activations", steps=20)
    exact = {site: patch(model, CLEAN, CORRUPT, METRIC, site, direction="noising", by="all").values
             for site in ("attn_out", "mlp_out")}  # fmt: skip
    total, graph = scores.values.sum(1), scores.graph
    for layer in range(3):
        np.testing.assert_allclose(total[:, graph.heads(layer)].sum(1), exact["attn_out"][:, layer], atol=5e-3)
        np.testing.assert_allclose(total[:, graph.mlp(layer)], exact["mlp_out"][:, layer], atol=5e-3)
    np.testing.assert_allclose(total[:, 0], span, atol=5e-3)


def test_pooled_activations_are_a_mean_over_all_ways():
    """As the authors' code: every edge's gradient is the mean over the steps of every layer's writers in turn."""
    model, steps = build("llama_gqa"), 2
    scores = eap(model, CLEAN, CORRUPT, METRIC, method="eap-ig-activations-pooled", steps=steps, rule="right")
    graph, ways = scores.graph, ["resid_pre.0", *(f"{s}.{i}" for i in range(3) for s in ("attn_out", "mlp_out"))]
    good, bad = (run(model, ids, [*ways, "z"])[1] for ids in (CLEAN, CORRUPT))
    norm, sums, places = model.model.layers[1].post_attention_layernorm, [0, 0], ["resid_post.2", "mlp_in.1"]
    for way in ways:
        for k in range(1, steps + 1):
            new = (bad[way] + k / steps * (good[way] - bad[way])).requires_grad_()
            with untouched(model, gradients=True):
                model.get_input_embeddings().weight.requires_grad_(True)
                with edit(model, {way: new}), capture(model, [*places, "resid_mid.1"], grad=True) as seen:
                    value = METRIC.of_logits(model(CLEAN).logits, torch.full((4,), 8)).sum()
                last, inside = torch.autograd.grad(value, [seen[p] for p in places], allow_unused=True)
                sums[0] = sums[0] + last / (steps * len(ways))
                if inside is not None:  # None where the MLP's own output is what moves
                    copy = seen["resid_mid.1"].detach().requires_grad_()
                    sums[1] = sums[1] + torch.autograd.grad(norm(copy), copy, inside)[0] / (steps * len(ways))
    for slope, reader in zip(sums, ["logits", "mlp_in.1"], strict=True):
        row = graph.readers.index(reader)
        for column in np.flatnonzero(graph.exists[row]):
            writer = graph.writers[column]
            expected = ((written(model, bad, writer) - written(model, good, writer)) * slope).sum((1, 2))
            np.testing.assert_allclose(scores.values[:, row, column], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "forwards", "backwards"),
    [("eap", 2, 1), ("clean-corrupted", 2, 2), ("eap-ig-inputs", 5, 3), ("eap-ig-activations", 23, 21)],
)
def test_passes_are_counted_and_no_more_than_said(method, forwards, backwards):
    model, calls = build("gpt2"), []
    eap(model, CLEAN, CORRUPT, METRIC)  # the wiring is checked once
    model.register_forward_hook(lambda *_: calls.append(1))
    meta = eap(model, CLEAN, CORRUPT, METRIC, method=method, steps=3).meta
    assert len(calls) == meta["forwards"] == forwards and meta["backwards"] == backwards


def test_costs_are_told_in_forwards():
    rows = costs(build("gpt2"), CLEAN, CORRUPT, METRIC, steps=2, repeats=1)
    assert [row["method"] for row in rows] == ["eap", "clean-corrupted", "eap-ig-inputs", "evaluate_edges"]
    assert rows[2]["forwards"] == 4 and rows[2]["edge_loop"] == Graph(3, 4, 4).n_edges + 1
    assert all(row["seconds"] > 0 and row["in_forwards"] > 0 for row in rows)


# ---- circuits, evaluated -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_all_edges_are_the_clean_run_and_none_the_corrupt_one(name):
    model = build(name)
    found = evaluate_edges(model, CLEAN, CORRUPT, METRIC, {"all": every_edge(Graph.of(model)), "none": []})
    np.testing.assert_allclose(found.values[:, 0], found.columns["clean"], atol=2e-6)
    np.testing.assert_allclose(found.values[:, 1], found.columns["corrupt"], atol=5e-6)
    assert abs(np.array(found.columns["span"])).max() > 0.2


def by_hand(model, clean, corrupt, kept):
    """GPT-2 written out: every head's q, k and v, every MLP and the logits read a stream of their own."""
    t, heads, values = model.transformer, 4, []
    for ids in (clean, corrupt):  # the corrupt pass needs no edges: it goes second, and is run first as all corrupt
        values.append(t.wte(ids) + t.wpe(torch.arange(ids.shape[1])))
    causal = torch.full((clean.shape[1],) * 2, float("-inf")).triu(1)

    def through(start, reads):
        outputs = {"embed": start}

        def stream(reader):
            return sum(reads(writer, reader, value) for writer, value in outputs.items()) + constant

        constant = 0
        for layer, block in enumerate(t.h):
            made = {}
            for head in range(heads):
                parts = []
                for i, kind in enumerate("qkv"):
                    columns = slice(32 * i + 8 * head, 32 * i + 8 * head + 8)
                    normed = block.ln_1(stream(f"{kind}.{layer}.{head}"))
                    parts.append(normed @ block.attn.c_attn.weight[:, columns] + block.attn.c_attn.bias[columns])
                q, k, v = parts
                pattern = (q @ k.transpose(1, 2) / 8**0.5 + causal).softmax(-1)
                made[f"z.{layer}.{head}"] = pattern @ v @ block.attn.c_proj.weight[8 * head : 8 * head + 8]
            outputs |= made
            constant = constant + block.attn.c_proj.bias
            outputs[f"mlp_out.{layer}"] = block.mlp(block.ln_2(stream(f"mlp_in.{layer}")))
        return model.lm_head(t.ln_f(stream("logits"))), outputs

    with torch.no_grad():
        _, other = through(values[1], lambda writer, reader, value: value)
        logits, _ = through(values[0], lambda w, r, value: value if (w, r) in kept else other[w])
    return METRIC.of_logits(logits, torch.full((4,), 8)).numpy()


def test_circuits_are_what_a_model_written_out_by_hand_does():
    model = build("gpt2")
    graph = Graph.of(model)
    all_edges, generator = every_edge(graph), np.random.default_rng(0)
    circuits = {f"{share}": [e for e in all_edges if generator.random() < share] for share in (0.1, 0.5, 0.9)}
    left_out = ("z.0.1", "k.2.3")
    circuits["one edge patched"] = [edge for edge in all_edges if edge != left_out]
    circuits["one edge kept"] = [("embed", "logits")]
    found = evaluate_edges(model, CLEAN, CORRUPT, METRIC, circuits)
    for i, kept in enumerate(circuits.values()):
        expected = by_hand(model, CLEAN, CORRUPT, set(kept))
        np.testing.assert_allclose(found.values[:, i], expected, atol=5e-6)
    assert abs(found.values[:, 3] - found.columns["clean"]).max() > 1e-4
    again = evaluate_edges(model, CLEAN, CORRUPT, METRIC, circuits, budget=1)  # one example at a time
    np.testing.assert_allclose(again.values, found.values, atol=2e-6)
    scored = [(*edge, 1.0) for edge in circuits["0.5"]]
    np.testing.assert_array_equal(evaluate_edges(model, CLEAN, CORRUPT, METRIC, scored).values, found.values[:, 1])


@pytest.mark.parametrize("name", ["llama_gqa", "gpt_neox", "falcon_new", "qwen3", *NORMED])
def test_one_edge_patched_is_one_input_changed(name):
    """Nothing upstream differs from the clean run: only the reader's copy of the stream does."""
    model = build(name)
    graph, kept = Graph.of(model), ["resid_pre.0", "z", "mlp_out"]
    good, bad = run(model, CLEAN, kept)[1], run(model, CORRUPT, kept)[1]
    for writer, reader in [("z.0.1", "q.2.3"), ("embed", "k.1.0"), ("mlp_out.0", "v.2.0"), ("z.1.2", "mlp_in.2"),
                           ("mlp_out.1", "logits")]:  # fmt: skip
        stream, change = read_by(model, reader, CLEAN)
        with torch.no_grad():
            edits = change(stream + written(model, bad, writer) - written(model, good, writer))
        logits, _ = run(model, CLEAN, edits=edits)
        expected = METRIC.of_logits(logits, torch.full((4,), 8))
        others = [edge for edge in every_edge(graph) if edge != (writer, reader)]
        found = evaluate_edges(model, CLEAN, CORRUPT, METRIC, others)
        np.testing.assert_allclose(found.values, expected, atol=5e-6, err_msg=reader)
        assert abs(found.values - found.columns["clean"]).max() > 1e-5


# ---- a peer --------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_transformer_lens_agrees(name):
    """Scores of edges, denoising, summed over positions; and what a circuit of half the edges recovers."""
    pytest.importorskip("transformer_lens")
    from transformer_lens.tools.analysis import attribution_patching as peer

    from surgery.interop import to_transformer_lens

    assert (name in PARALLEL) == (name == "gpt_neox")
    model = build(name, attn="eager")
    bridge, (one, two) = to_transformer_lens(model), ANSWERS[0].tolist()
    clean, corrupt, metric = CLEAN[:1], CORRUPT[:1], logit_diff(ANSWERS[:1])
    kinds = {"embed": "embed", "attn_head_out": "z", "mlp_out": "mlp_out", "q_input": "q", "k_input": "k",
             "v_input": "v", "mlp_in": "mlp_in", "logits": "logits"}  # fmt: skip

    def named(node):
        layer = None if node.kind in ("embed", "logits") else node.layer
        return ".".join(str(part) for part in (kinds[node.kind], layer, node.head) if part is not None)

    config = peer.EdgeAttributionConfig(granularity="edge")
    theirs = peer.attribution_patch(
        bridge, clean, corrupt, lambda logits: logits[0, -1, one] - logits[0, -1, two], config
    )
    scores = eap(model, clean, corrupt, metric, direction="denoising")
    total = np.zeros_like(scores.values[0])
    for (writer, reader), score in theirs.edge_scores.items():
        total[scores.graph.place(named(writer), named(reader))] += score
    np.testing.assert_allclose(scores.values[0], total, atol=1e-5)
    circuit = scores.circuit(n=scores.graph.n_edges // 2)
    kept = {edge[:2] for edge in circuit}
    edges = [edge for edge in theirs.edge_scores if (named(edge[0]), named(edge[1])) in kept]
    recovered = peer.faithfulness(bridge, clean, corrupt, lambda logits: logits[0, -1, one] - logits[0, -1, two], edges)
    ours = evaluate_edges(model, clean, corrupt, metric, circuit)
    share = (ours.values - ours.columns["corrupt"]) / ours.columns["span"]
    np.testing.assert_allclose(share, recovered.recovered, atol=1e-5)
