"""What fine-tuning changed: identities, sums that close, planted differences that are found; both models left alone."""

import copy

import numpy as np
import pytest
import torch
from activations.families import FAMILIES, build, prompts, tuned

from analysis.diff import (
    Diff,
    activation_norms,
    agreement,
    diff,
    diff_mining,
    difference_lens,
    difference_pca,
    pattern_divergence,
    similarity_by_layer,
    token_kl,
)
from analysis.diff import measures as diff_measures
from analysis.diff.lens import logit_lens, read
from analysis.diff.logit_attribution import (
    FrozenNorm,
    attribution_map,
    direct_logit_attribution,
    direct_logit_attribution_difference,
)
from analysis.diff.measures import Collector, Scope, stream
from analysis.diff.per_token import Texts
from analysis.metrics import logit_diff
from surgery.activations import run
from surgery.activations.steering import steer
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, Pair, encode

torch.set_num_threads(1)
LENGTHS = [9, 3, 6, 1, 9]


def texts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 60, (n,), generator=generator).tolist() for n in LENGTHS]


def pair_of(name, dtype=torch.float32, **options):
    base = build(name, dtype=dtype, **options)
    return Pair(base, tuned(base), None)


@pytest.fixture(scope="module")
def pair():
    return pair_of("llama_gqa")


def state(model):
    """Everything about a model that a look at it could change."""
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    flags = [m.training for m in model.modules()], [(p.requires_grad, p.grad) for p in model.parameters()]
    own = [sorted(vars(m)) for m in model.modules()]
    return tensors, hooks, flags, own, model.config._attn_implementation, model.config.use_cache


def assert_same(before, after):
    assert all(torch.equal(t, after[0][n]) for n, t in before[0].items()) and before[0].keys() == after[0].keys()
    assert before[1:] == after[1:]


# ---- all measures at once


def test_a_model_does_not_differ_from_itself():
    base = build("llama_gqa")
    found = diff(Pair(base, base, None), texts())
    assert found["kl"].values.max() < 1e-12 and (found["agreement"].values == 1).all()
    assert (found["norms"].values == 0).all() and (found["relative norms"].values == 0).all()
    assert np.allclose(found["cosine"].values, 1) and np.allclose(found["cka"].values, 1)
    assert np.allclose(found["procrustes"].values, 0, atol=1e-12)
    assert found["kl"].result.values.shape == (5,) and found["norms"].result.values.shape == (5, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_measures_are_those_of_whole_single_passes(name):
    pair = pair_of(name)
    found = diff(pair, texts(), batch_size=3)
    again = diff(pair, texts(), batch_size=1)
    for key in ("kl", "norms", "relative norms", "cosine"):
        assert np.allclose(found[key].values, again[key].values, rtol=1e-4, atol=1e-5), key
    assert np.allclose(found["cka"].values, again["cka"].values, atol=1e-5)
    kl, same, norms = [], [], []
    for row in texts():
        ids = torch.tensor([row])
        (f, seen_f), (b, seen_b) = (run(model, Batch.of(ids), "resid_post") for model in (pair.tuned, pair.base))
        f, b = f[0].double().log_softmax(-1), b[0].double().log_softmax(-1)
        kl += (f.exp() * (f - b)).sum(-1).tolist()
        same += (f.argmax(-1) == b.argmax(-1)).tolist()
        norms.append((seen_f.stack("resid_post") - seen_b.stack("resid_post"))[:, 0].norm(dim=-1).T)
    assert np.allclose(found["kl"].values, kl, rtol=1e-3, atol=1e-5) and (found["kl"].values >= 0).all()
    assert (found["agreement"].values == same).all()
    assert np.allclose(found["norms"].values, torch.cat(norms), rtol=1e-4, atol=1e-5)


def test_the_mean_is_over_tokens_and_the_texts_have_theirs(pair):
    found = token_kl(pair, texts())
    assert np.isclose(found.result.mean, found.values.astype(float).mean())
    assert np.isclose(found.per_text.values[1], found.of(1).mean()) and len(found.of(1)) == 3
    low, high = found.result.interval()
    assert low <= found.result.mean <= high
    assert found.result.columns["tokens"] == LENGTHS


def test_single_calls_are_those_of_the_whole(pair):
    whole = diff(pair, texts())
    assert (token_kl(pair, texts()).values == whole["kl"].values).all()
    assert (agreement(pair, texts()).values == whole["agreement"].values).all()
    norms = activation_norms(pair, texts())
    assert (norms.difference.values == whole["norms"].values).all()
    assert (norms.relative.values == whole["relative norms"].values).all()
    alike = similarity_by_layer(pair, texts())
    assert set(alike) == {"cosine", "cka", "procrustes"} and (alike["cka"].values == whole["cka"].values).all()
    one = activation_norms(pair, texts(), site="resid_post.1").difference
    assert (one.values[:, 0] == whole["norms"].values[:, 1]).all() and one.result.axes["layer"] == [1]
    assert activation_norms(pair, texts(), site="attn_out").difference.values.shape == (28, 3)


def test_each_model_reads_a_batch_once_and_never_makes_all_its_logits(pair, monkeypatch):
    monkeypatch.setattr(diff_measures, "BLOCK", 4 * 60)
    calls, rows = [], []
    hooks = []
    for model in (pair.base, pair.tuned):
        hooks.append(model.register_forward_pre_hook(lambda *_: calls.append(1)))
        hooks.append(anatomy_of(model).head.register_forward_hook(lambda m, a, out: rows.append(out.numel() // 60)))
    try:
        diff(pair, texts(), batch_size=2)
        assert len(calls) == 2 * 3 and max(rows) <= 4
        calls.clear(), rows.clear()
        activation_norms(pair, texts(), batch_size=5)
        assert len(calls) == 2 and not rows  # both stop behind the last block
    finally:
        for hook in hooks:
            hook.remove()


def test_greatest_tokens_and_coloured_texts(pair):
    found = activation_norms(pair, texts()).difference
    hit = found.top(1, layer=2)[0]
    assert hit.value == found.values[:, 2].max() == found.of(hit.text, 2)[hit.position]
    assert hit.token == f"<{texts()[hit.text][hit.position]}>" and hit.context.endswith(hit.token)
    page = found.html(2, layer=2)
    assert page.body.count("<p ") == 2 and f"id {texts()[hit.text][hit.position]}" in page.body
    with pytest.raises(SurgeryError, match=r"each layer of \[0, 1, 2\], and none is named"):
        found.top(1)
    with pytest.raises(SurgeryError, match="and not 7"):
        found.html(layer=7)


def test_texts_are_cut_at_the_end_and_read_from_any_side_of_padding(pair):
    short = diff(pair, texts(), max_tokens=4)
    whole = diff(pair, texts())
    assert short.texts.lengths.tolist() == [4, 3, 4, 1, 4]
    assert np.allclose(short["kl"].of(0), whole["kl"].of(0)[:4], atol=1e-5)
    left = diff(pair, encode(None, texts(), side="left"))
    assert (left["kl"].values == whole["kl"].values).all()
    long = diff(pair, [[5] * 100], measures=["kl"])
    assert long.texts.total == 64  # what the context holds


def test_vocabularies_of_different_size_are_compared_on_what_both_have(pair):
    wider = copy.deepcopy(pair.tuned)
    wider.resize_token_embeddings(66, mean_resizing=False)
    found = token_kl(Pair(pair.base, wider, None), texts())
    assert np.allclose(found.values, token_kl(pair, texts()).values, rtol=1e-4, atol=1e-5)


def test_bfloat16_runs_and_a_model_of_its_own_does_not_differ():
    pair = pair_of("llama_gqa", torch.bfloat16)
    found = diff(pair, texts())
    exact = diff(pair_of("llama_gqa"), texts())
    assert all(np.isfinite(one.values).all() for one in found.found.values()) and (found["kl"].values >= 0).all()
    assert np.allclose(found["norms"].result.mean, exact["norms"].result.mean, rtol=0.05)
    own = diff(Pair(pair.base, pair.base, None), texts())
    assert own["kl"].values.max() < 1e-12 and own["norms"].values.max() == 0
    assert pattern_divergence(pair, texts()).values.min() >= 0
    assert difference_lens(pair, texts(), positions=3).vectors.isfinite().all()


def test_summary_figure_and_folder(pair, tmp_path):
    found = diff(pair, texts())
    rows = found.summary()
    assert [r["layer"] for r in rows if r["measure"] == "norms"] == [0, 1, 2]
    assert all(r["low"] is None for r in rows if r["measure"] in ("cka", "procrustes"))
    figure = found.plot()
    names = [axis.get_ylabel() for axis in figure.axes]
    assert len(names) == 6 and "cosine" in names and "agreement" in figure.get_suptitle()
    assert len(diff(pair, texts(), measures=["agreement"]).plot().axes) == 1
    folder = found.save(tmp_path / "found")
    assert (folder / "diff.png").stat().st_size > 5000
    back = Diff.load(folder)
    assert back.summary() == rows and (back["norms"].values == found["norms"].values).all()
    assert back.texts.rows == found.texts.rows and back.html("kl", 1).body == found.html("kl", 1).body
    with pytest.raises(SurgeryError, match=r"No comparison in .*diff\.json is missing"):
        Diff.load(tmp_path / "nothing")


def test_wrong_input_is_a_sentence(pair):
    for call, words in {
        "There is no measure 'kll'": lambda: diff(pair, texts(), measures=["kll"]),
        "No measure is named": lambda: diff(pair, texts(), measures=[]),
        "'z.0' is none": lambda: diff(pair, texts(), site="z"),
        "there is no layer 3": lambda: diff(pair, texts(), site="resid_post.3"),
        "No prompts": lambda: diff(pair, []),
        "Text 1 has no tokens": lambda: diff(pair, [[3], []]),
        "max_tokens is at least 1": lambda: diff(pair, texts(), max_tokens=0),
        "'cosine' was not measured": lambda: diff(pair, texts(), measures=["kl"])["cosine"],
        "one value a layer": lambda: diff(pair, texts(), measures=["cka"]).html("cka"),
        "No text has 12 tokens": lambda: difference_lens(pair, texts(), positions=12),
        "There is no layer 5": lambda: difference_lens(pair, texts(), 5),
        "1 to 1 components": lambda: difference_pca(pair, [[3], [4]]),
        "k is at least 1": lambda: diff_mining(pair, texts(), 0),
        "the vocabulary has 60 tokens": lambda: diff_mining(pair, texts(), 61),
        "Every text is one token": lambda: pattern_divergence(pair, [[3], [4]]),
        "Layers are 0 to 2": lambda: logit_lens(pair.base, texts(), [5]),
        "Position 3 is in no prompt": lambda: logit_lens(pair.base, texts(), position=3),
        "5 prompts and 1 answers": lambda: logit_lens(pair.base, texts(), answers=[3]),
        "2 prompts and 1 answers": lambda: direct_logit_attribution(pair.base, texts()[:2], [[3, 4]]),
    }.items():
        with pytest.raises(SurgeryError, match=call.replace("(", r"\(")):
            words()


class Broken(Collector):
    """Fails in the middle of a pass."""

    reads = "stream"

    def see(self, places, tuned, base, layer):
        if layer == 1:
            raise RuntimeError("in the middle")


def test_models_are_as_they_were_also_after_an_exception():
    pair = pair_of("llama_gqa")
    pair.tuned.train()
    pair.tuned.config.use_cache = False
    next(pair.base.parameters()).grad = torch.ones_like(next(pair.base.parameters()))
    before = state(pair.base), state(pair.tuned)
    diff(pair, texts())
    pattern_divergence(pair, texts())
    difference_lens(pair, texts())
    direct_logit_attribution_difference(pair, texts()[:1], [[3, 4]])
    logit_lens(pair.tuned, texts())
    read_texts = Texts.of(pair, texts(), 9)
    with pytest.raises(RuntimeError, match="in the middle"):
        stream(pair, read_texts, [Broken(Scope(read_texts, [0, 1, 2], np.zeros(0)))], layers=[0, 1, 2])

    def stop(done, total):
        raise KeyboardInterrupt

    for call in (diff, pattern_divergence, difference_lens, difference_pca):
        with pytest.raises(KeyboardInterrupt):
            call(pair, texts(), progress=stop)
    for model, known in zip((pair.base, pair.tuned), before, strict=True):
        assert_same(known, state(model))
    assert next(pair.base.parameters()).grad is not None


# ---- attention patterns


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "gemma2", "gpt_neox"])
def test_pattern_divergence_is_that_of_the_models_own_attentions(name):
    pair = pair_of(name, attn="eager")
    found = pattern_divergence(pair, texts(), batch_size=3)
    assert found.values.shape == (5, 3, 4)
    total = np.zeros((3, 4))
    for row in texts():
        ids = torch.tensor([row])
        with torch.no_grad():
            f, b = (torch.stack(m(ids, output_attentions=True).attentions)[:, 0] for m in (pair.tuned, pair.base))
        middle = (f + b) / 2
        terms = [(p * (p / middle).log()).nan_to_num().sum(-1) for p in (f, b)]
        total += ((terms[0] + terms[1]) / 2).sum(-1).numpy()
    assert np.allclose(found.mean, total / sum(n - 1 for n in LENGTHS), atol=1e-6)
    few = pattern_divergence(pair, texts(), budget=100)  # a text and a layer at a time
    assert np.allclose(few.values, found.values, atol=1e-6)
    own = pattern_divergence(Pair(pair.base, pair.base, None), texts())
    assert np.abs(own.values).max() < 1e-12


# ---- lenses


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layer_of_the_logit_lens_is_the_models_prediction(name):
    model = build(name)
    rows = texts()
    answers = [7, 8, 9, 10, 11]
    found = logit_lens(model, rows, answers=answers, k=3, batch_size=2)
    one = logit_lens(model, rows, [-1, 0], answers=answers, k=3, position=-1)
    for i, row in enumerate(rows):
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0].float().log_softmax(-1)
        best = logits.topk(3)
        assert np.allclose(found.probs[i, -1, : len(row)], best.values.exp(), atol=1e-5)
        assert np.isnan(found.probs[i, :, len(row) :]).all() and (found.tokens[i, :, len(row) :] == -1).all()
        assert np.isclose(found.answers.values[i, -1], logits[-1, answers[i]], atol=1e-4)
        assert found.ranks.values[i, -1] == (logits[-1] > logits[-1, answers[i]]).sum()
        assert np.allclose(one.probs[i, 0, 0], found.probs[i, -1, len(row) - 1], atol=1e-5)
    assert one.layers == [2, 0] and np.allclose(one.answers.values[:, 1], found.answers.values[:, 0], atol=1e-4)
    assert found.top(1)[2][0][0] == f"<{found.tokens[1, 2, 2, 0]}>"
    assert len(found.plot(0).axes[0].get_xticklabels()) == 9 and len(one.plot(0).axes[0].get_xticklabels()) == 1


@pytest.mark.peers
@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2", "gpt_neox"])
def test_logit_lens_agrees_with_transformer_lens(name):
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    from surgery.interop import to_transformer_lens

    model = build(name, attn="eager")
    ids = torch.tensor([texts()[0], texts()[4]])
    ours = logit_lens(model, Batch.of(ids), answers=[7, 8], k=4)
    bridge = to_transformer_lens(model)
    theirs = analysis.logit_lens(bridge, ids, positions=None, return_type="log_probs")
    assert list(theirs.labels) == ["0_pre", "1_pre", "2_pre", "final_post"]
    stacked = theirs.readout.values[1:]  # (layer, batch, pos, vocab) of resid_post 0 to 2
    assert np.allclose(ours.answers.values.T, stacked[:, [0, 1], -1, [7, 8]], atol=1e-4)
    assert np.allclose(ours.probs[..., 0], stacked.exp().amax(-1).permute(1, 0, 2), atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_difference_lens_finds_a_planted_vector(layer):
    base = build("gpt2")
    other = copy.deepcopy(base)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        anatomy_of(other).down(layer).bias += vector
    pair = Pair(base, other, None)
    lens = difference_lens(pair, texts(), layer, positions=4)
    assert torch.allclose(lens.vectors, vector.expand(4, -1), atol=1e-5)
    assert np.allclose(lens.constant, 1, atol=1e-5) and lens.counts.tolist() == [5, 4, 4, 3]
    assert np.allclose(lens.norms, vector.norm(), atol=1e-4)
    assert lens.site == f"resid_post.{layer}" and torch.allclose(lens.vector(), vector, atol=1e-5)
    wanted = base.lm_head(base.transformer.ln_f(vector)).argmax()
    row = lens.words(3)[0]
    assert row["promoted"][0][0] == f"<{wanted}>" and row["promoted"][0][1] > row["suppressed"][0][1]
    ids = torch.tensor([texts()[0]])
    with torch.no_grad():  # the vector as steering makes the base what the tuned model is
        with steer(base, lens.steering()):
            steered = base(ids).logits
        assert torch.allclose(steered, other(ids).logits, atol=1e-4)
    assert len(lens.plot(3).axes) == 3


def test_difference_lens_reads_the_middle_and_only_the_first_tokens(pair):
    lens = difference_lens(pair, texts(), positions=3)
    assert lens.site == "resid_post.1" and lens.vectors.shape == (3, 32)
    rows = [row for row in texts() if len(row) >= 3]
    stack = [
        run(m, Batch.of([r[:3] for r in rows]), "resid_post.1")[1]["resid_post.1"] for m in (pair.tuned, pair.base)
    ]
    assert torch.allclose(lens.vectors[2], (stack[0] - stack[1])[:, 2].mean(0), atol=1e-5)
    assert torch.allclose(lens.logits["base"], read(pair.base, lens.vectors), atol=1e-6)
    zero = difference_lens(Pair(pair.base, pair.base, None), texts(), positions=3)
    assert not zero.vectors.any() and not zero.constant.any()


def test_pca_finds_the_direction_that_was_planted():
    base = build("llama_gqa")
    other = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(4)
    direction = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    with torch.no_grad():
        anatomy_of(other).down(1).weight += torch.outer(direction, torch.randn(48, generator=generator))
    found = difference_pca(Pair(base, other, None), texts(), k=3)
    assert found.directions.explained[0] > 0.999
    assert abs(float(found.directions.components[0].float() @ direction)) > 0.999
    hit = found.top(0, 1)[0]
    assert np.isclose(hit.value, found.scores[:, 0].max()) and hit.token == f"<{texts()[hit.text][hit.position]}>"
    words = found.words(Pair(base, other, None), 0, 2)
    assert len(words["+"]) == len(words["-"]) == 2
    assert len(found.plot().axes) == 2
    some = difference_pca(Pair(base, other, None), texts(), k=2, sample=20, seed=3)
    same = difference_pca(Pair(base, other, None), texts(), k=2, sample=20, seed=3, batch_size=1)
    assert len(some.scores) == 20 and (some.sample == same.sample).all()
    assert np.allclose(some.scores, same.scores, atol=1e-4)


def test_diff_mining_counts_what_is_raised_and_lowered(pair):
    found = diff_mining(pair, texts(), 4)
    raised, lowered = np.zeros(60), np.zeros(60)
    for row in texts():
        with torch.no_grad():
            change = (pair.tuned(torch.tensor([row])).logits - pair.base(torch.tensor([row])).logits)[0]
        for counts, signed in ((raised, change), (lowered, -change)):
            np.add.at(counts, signed.topk(4).indices.numpy().ravel(), 1)
    assert (found.raised == raised).all() and (found.lowered == lowered).all() and found.places == sum(LENGTHS)
    word, token, share = found.top(1)[0]
    assert share == raised.max() / 28 and raised[token] == raised.max() and word == f"<{token}>"
    assert not diff_mining(Pair(pair.base, pair.base, None), texts(), 4).raised.any()
    biased = copy.deepcopy(pair.base)
    biased.lm_head = torch.nn.Linear(32, 60)
    with torch.no_grad():
        biased.lm_head.weight.copy_(pair.base.lm_head.weight)
        biased.lm_head.bias.zero_()[[17, 23]] = torch.tensor([1.0, -1.0])
    planted = diff_mining(Pair(pair.base, biased, None), texts(), 1)
    assert planted.top(3) == [("<17>", 17, 1.0)] and planted.top(3, lowered=True) == [("<23>", 23, 1.0)]
    assert len(planted.plot().axes) == 2


# ---- direct logit attribution


@pytest.mark.parametrize("name", FAMILIES)
def test_attributions_sum_to_the_logit_difference(name):
    pair = pair_of(name)
    clean, _, answers = prompts()
    rows = [row[: 9 - i].tolist() for i, row in enumerate(clean)]
    found = direct_logit_attribution(pair.tuned, rows, answers)
    batch = encode(None, rows)
    capped = anatomy_of(pair.tuned).softcap
    with torch.no_grad():
        logits = pair.tuned(**batch.inputs(pair.tuned)).logits
    logits = logits if capped is None else capped * torch.atanh(logits / capped)
    wanted = logit_diff(answers).of_logits(logits, batch.last).numpy()
    assert np.allclose(found.values.sum(1), wanted, atol=1e-4)
    assert np.allclose(found.columns["logit"], wanted, atol=1e-4)
    assert found.values.shape == (4, 2 + 3 * (4 + 2)) and np.abs(found.mean).max() > 0.01
    change = direct_logit_attribution_difference(pair, rows, answers)
    expected = np.subtract(change.columns["tuned"], change.columns["base"])
    assert np.allclose(change.values.sum(1), expected, atol=1e-4) and np.abs(expected).max() > 0.01
    alone = direct_logit_attribution(pair.tuned, rows[1:2], answers[1:2])
    assert np.allclose(alone.values[0], found.values[1], atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2", "gpt_neox", "olmo2"])
def test_an_attribution_is_what_taking_the_part_away_costs_at_the_frozen_scale(name):
    model = build(name)
    a = anatomy_of(model)
    clean, _, answers = prompts()
    found = direct_logit_attribution(model, clean, answers)
    _, seen = run(model, Batch.of(clean), ["mlp_out.1@-1", "resid_post.2@-1"])
    norm = FrozenNorm.at(a.final_norm, seen["resid_post.2@-1"])
    with torch.no_grad():
        rows = a.head.weight[answers[:, 0]] - a.head.weight[answers[:, 1]]
        whole = ((norm(seen["resid_post.2@-1"]) + norm.bias) * rows).sum(-1)
        less = ((norm(seen["resid_post.2@-1"] - seen["mlp_out.1@-1"]) + norm.bias) * rows).sum(-1)
    assert np.allclose(found.select("component", "mlp_out.1").values, whole - less, atol=1e-5)


def test_a_head_whose_output_is_taken_away_attributes_nothing_and_the_rest_stays():
    base = build("llama_gqa")
    other = copy.deepcopy(base)
    with torch.no_grad():
        anatomy_of(other).out(2).weight[:, 8:16] = 0.0  # head 1 of the last layer
    clean, _, answers = prompts()
    change = direct_logit_attribution(other, clean, answers)
    assert (change.select("component", "z.2.1").values == 0).all()
    assert np.abs(change.select("component", "z.2.0").values).max() > 1e-3


def test_one_answer_bfloat16_and_the_map(pair):
    clean, _, answers = prompts()
    single = direct_logit_attribution(pair.base, clean, answers[:, 0])
    with torch.no_grad():
        logits = pair.base(clean).logits[:, -1].gather(1, answers[:, :1])[:, 0]
    assert np.allclose(single.values.sum(1), logits, atol=1e-4)
    half = pair_of("gpt2", torch.bfloat16)
    found = direct_logit_attribution_difference(half, Batch.of(clean), answers)
    expected = np.subtract(found.columns["tuned"], found.columns["base"])
    assert np.allclose(found.values.sum(1), expected, atol=0.1)
    figure = attribution_map(found)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0", "1", "2", "3", "MLP"]
    assert "all" in figure.get_suptitle()


def test_a_norm_that_has_no_scale_is_refused():
    x = torch.randn(2, 8)
    with pytest.raises(SurgeryError, match="Tanh is no norm"):
        FrozenNorm.at(torch.nn.Tanh(), x)
    odd = torch.nn.LayerNorm(7)
    torch.nn.init.normal_(odd.weight)
    frozen = FrozenNorm.at(odd, x[:, :7])
    with torch.no_grad():
        assert torch.allclose((frozen(x[:, :7]) + frozen.bias).float(), odd(x[:, :7]), atol=1e-5)
