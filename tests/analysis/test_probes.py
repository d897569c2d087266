"""Probes: what is planted is found where it is, held out means held out, controls catch memory, measures are exact."""

import json
import math

import numpy as np
import pytest
import torch
from activations.families import build

from analysis.probes import Probe, features_of, probe, probe_model, probe_transfer
from analysis.probes.data import as_labels, control_labels, folds_of
from analysis.probes.scores import Scores, auc_values, balanced
from surgery.errors import SurgeryError
from surgery.models import Pair

torch.set_num_threads(1)
FAST = {"logistic": {"Cs": [0.1]}, "mean_difference": {}, "lda": {}, "ridge": {}}


def planted(n=120, d=8, classes=2, seed=0, strength=(0.0, 1.0, 4.0)):
    """Features (n, layer, d) that tell a class along its own axis, more so in later layers; classes evenly often."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % classes)
    x = rng.standard_normal((n, len(strength), d))
    x[..., :classes] += np.eye(classes)[y][:, None] * np.array(strength)[:, None]
    return x, y


# ---- what is found


@pytest.mark.parametrize("kind", ["logistic", "mean_difference", "lda"])
@pytest.mark.parametrize("classes", [2, 3])
def test_what_is_planted_is_found_where_it_is(kind, classes):
    x, y = planted(classes=classes)
    names = np.array(["blue", "green", "red"])[y]
    found = probe(x, names, kind=kind, name="colour", **FAST[kind])
    assert found.classes == ["blue", "green", "red"][:classes] and found.layers == [0, 1, 2]
    low, high = found.accuracy.interval()
    assert abs(found.accuracy.mean[0] - 1 / classes) < 0.12 and found.accuracy.mean[2] > 0.9 and low[2] > high[0]
    assert abs(found.auc.mean[0] - 0.5) < 0.2 and found.auc.mean[2] > 0.97
    assert found.baseline.mean == pytest.approx(1 / classes, abs=0.03)
    assert (found.predict(x)[:, 2] == names).mean() > 0.9
    assert found.directions.shape == (3, 1 if classes == 2 else 3, 8)
    if classes == 2:  # towards the second class
        assert found.directions[2, 0, 1] > 0 > found.directions[2, 0, 0]
    else:
        assert np.allclose(found.directions.sum(1), 0, atol=1e-10)
        assert found.directions[2].argmax(1).tolist() == [0, 1, 2]


def test_ridge_reads_a_count():
    rng = np.random.default_rng(0)
    x, counts = rng.standard_normal((90, 2, 6)), rng.integers(0, 9, 90)
    x[:, 1, 2] += counts
    found = probe(x, counts, kind="ridge")
    assert found.r2.mean[0] < 0.1 < 0.8 < found.r2.mean[1] < 1 and found.score.name == "R²"
    assert found.baseline.mean == 0 and found.classes == []
    assert np.abs(found.predict(x)[:, 1] - counts).mean() < 1
    for wrong in ("accuracy", "auc", "correct"):
        with pytest.raises(SurgeryError, match="predicts numbers"):
            getattr(found, wrong)
    with pytest.raises(SurgeryError, match="no R²"):
        probe(x, counts > 4, kind="lda").r2  # noqa: B018


def test_probabilities_are_of_each_class_in_order():
    for classes in (2, 3):
        x, y = planted(classes=classes)
        found = probe(x, y, kind="lda")
        said = found.probabilities(x)
        assert said.shape == (120, 3, classes) and np.allclose(said.sum(-1), 1)
        assert np.array_equal(np.array(found.classes)[said.argmax(-1)], found.predict(x))
    with pytest.raises(SurgeryError, match="mean_difference probe has no probabilities"):
        probe(x, y, kind="mean_difference").probabilities(x)


def test_features_come_as_tensors_of_any_kind_and_by_layer():
    x, y = planted()
    half = torch.from_numpy(x).bfloat16()
    one = probe(half, torch.from_numpy(y), kind="lda")
    other = probe({"first": half[:, 0], "last": half[:, 2].float().numpy()}, y.tolist(), kind="lda")
    assert other.layers == ["first", "last"] and other.classes == [0, 1]
    assert np.array_equal(other.accuracy.values, one.accuracy.values[:, [0, 2]])


# ---- held out


@pytest.mark.parametrize("kind", list(FAST))
def test_a_held_out_example_has_no_part_in_the_fit_that_judges_it(kind):
    x, y = planted()
    before = probe(x, y, kind=kind, **({} if kind == "logistic" else FAST[kind]))
    out = before.held_out.folds == 1
    after = probe(np.where(out[:, None, None], 100 - 50 * x, x), y, kind=kind)
    assert np.array_equal(before.held_out.folds, after.held_out.folds)
    assert np.array_equal(before.fold_directions[1], after.fold_directions[1])
    assert not np.allclose(before.fold_directions[0], after.fold_directions[0])


@pytest.mark.parametrize("kind", ["logistic", "lda"])
def test_groups_are_never_on_both_sides(kind):
    """Each template has a place of its own, and a label that has nothing to do with it: only leaks can tell."""
    rng = np.random.default_rng(0)
    groups, by_group = np.repeat(np.arange(30), 6), rng.permutation(np.arange(30) % 2)
    y = by_group[groups]
    x = rng.standard_normal((30, 1, 40))[groups] + 0.1 * rng.standard_normal((180, 1, 40))
    leaky = probe(x, y, kind=kind, **FAST[kind])
    assert leaky.accuracy.mean[0] > 0.95
    found = probe(x, y, kind=kind, groups=[f"template {g}" for g in groups], **FAST[kind])
    assert abs(found.accuracy.mean[0] - 0.5) < 0.25 and found.meta["grouped"]
    for g in range(30):
        assert len(set(found.held_out.folds[groups == g])) == 1
    assert [len({y[i] for i in np.flatnonzero(found.held_out.folds == f)}) for f in range(5)] == [2] * 5


def test_groups_stay_together_when_c_is_chosen():
    """Within a template everything is known from a neighbour: with leaks the weakest penalty would look best."""
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(24), 5)
    y = rng.permutation(np.arange(24) % 2)[groups]
    x = rng.standard_normal((24, 1, 30))[groups] + 0.01 * rng.standard_normal((120, 1, 30))
    grid = [1e-4, 10.0]
    assert probe(x, y, Cs=grid).chosen == 10.0
    assert probe(x, y, Cs=grid, groups=groups).chosen == 1e-4


def test_the_seed_is_all_that_decides():
    x, y = planted()
    one, same, other = (probe(x, y, kind="lda", control=y, seed=s) for s in (0, 0, 1))
    assert np.array_equal(one.accuracy.values, same.accuracy.values)
    assert np.array_equal(one.control.values, same.control.values)
    assert not np.array_equal(one.held_out.folds, other.held_out.folds)


# ---- control tasks


def test_a_control_catches_what_is_memorised_by_type():
    rng = np.random.default_rng(0)
    types = rng.permutation(np.repeat(np.arange(12), 20))
    x = np.stack([np.eye(12)[types] * 6, rng.standard_normal((240, 12))], axis=1) + rng.standard_normal((240, 2, 12))
    y = rng.integers(0, 2, 12)[types]
    found = probe(x, y, kind="lda", control=types, control_draws=3)
    assert found.accuracy.mean[0] > 0.9 and found.control.mean[0] > 0.9  # type is read, and any label with it
    assert abs(found.selectivity.mean[0]) < 0.05
    assert abs(found.control.mean[1] - 0.5) < 0.1
    assert found.control.meta["seen"] == 1 and found.control.columns["type"] == types.tolist()
    assert np.allclose(found.selectivity.values, found.accuracy.values - found.control.values)
    alone = probe(x, y, kind="lda", control=range(240), control_draws=3)
    assert alone.control.meta["seen"] == 0 and abs(alone.control.mean[0] - 0.5) < 0.1


def test_a_control_of_numbers():
    rng = np.random.default_rng(0)
    types = rng.permutation(np.repeat(np.arange(12), 10))
    x = np.eye(12)[types][:, None] * 6 + rng.standard_normal((120, 1, 12))
    found = probe(x, rng.integers(0, 9, 120), kind="ridge", control=types)
    assert found.control.mean[0] > 0.7 and found.r2.mean[0] < 0.1 and found.selectivity.mean[0] < -0.6


def test_control_labels_are_one_a_type_in_the_frequencies_of_the_task():
    labels = as_labels(["a"] * 300 + ["b"] * 100, 400, numeric=False)
    types = [f"t{i % 200}" for i in range(400)]
    folds, rng = folds_of(labels, None, 5, 0), np.random.default_rng(0)
    drawn = [control_labels(types, labels, folds, rng).codes for _ in range(50)]
    assert all(len(set(d[[i, i + 200]])) == 1 for d in drawn for i in range(200))
    assert np.mean(drawn) == pytest.approx(0.25, abs=0.02)
    assert np.std([d.mean() for d in drawn]) > 0.01


# ---- measures


def scores(values, codes, classes, folds=None, reference=None):
    values, codes = np.asarray(values, float), np.asarray(codes)
    folds = np.zeros(len(codes), int) if folds is None else folds
    reference = np.zeros_like(codes) if reference is None else reference
    return Scores(values, codes, list(range(classes)), list(range(values.shape[1])), folds, reference)


@pytest.mark.parametrize("classes", [2, 4])
def test_measures_are_those_of_scikit_learn(classes):
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    rng = np.random.default_rng(0)
    codes = rng.choice(classes, 80, p=np.arange(1, classes + 1) / sum(range(classes + 1)))
    values = rng.standard_normal((80, 3, 1 if classes == 2 else classes)).round(1)  # with ties
    found = scores(values, codes, classes)
    odds = np.exp(values) / (np.exp(values).sum(-1, keepdims=True) if classes > 2 else 1)
    for layer in range(3):
        theirs = odds[:, layer] if classes > 2 else odds[:, layer, 0]
        auc = roc_auc_score(codes, theirs, **({"multi_class": "ovr"} if classes > 2 else {}))
        assert found.auc.mean[layer] == pytest.approx(auc, abs=1e-12)
        said = values[:, layer].argmax(-1) if classes > 2 else values[:, layer, 0] > 0
        assert found.accuracy.mean[layer] == pytest.approx(balanced_accuracy_score(codes, said), abs=1e-12)
        assert found.correct.mean[layer] == pytest.approx((codes == said).mean())
    assert found.correct.binary and found.correct.columns["label"] == codes.tolist()


def test_classes_are_ranked_where_probabilities_are_rounded_to_one():
    values = np.array([[[800.0, 0, 0]], [[900, 0, 0]], [[850, 0, 0]], [[0, 1, 0]], [[0, 0, 1]]])
    found = scores(values, [1, 0, 0, 1, 2], 3)
    assert found.auc.mean[0] < 1
    first = auc_values(values[:, :, 0], np.array([0, 1, 1, 0, 0]) == 1, np.zeros(5))
    assert first.mean() == 1


def test_errors_are_delongs_and_those_of_a_stratified_sample():
    from analysis.similarity import auc

    rng = np.random.default_rng(0)
    codes = np.arange(200) % 4 // 3  # 3 to 1
    values = rng.standard_normal((200, 4)) + codes[:, None]
    found = scores(values[..., None], codes, 2)
    delong = auc(values[codes == 1], values[codes == 0])
    assert np.allclose(found.auc.mean, delong.value, atol=1e-12)
    assert np.allclose(found.auc.standard_error, delong.standard_error, rtol=0.02)
    right = found.correct.values
    each = [right[codes == c].mean(0) * (1 - right[codes == c].mean(0)) / (codes == c).sum() for c in (0, 1)]
    assert np.allclose(found.accuracy.standard_error, np.sqrt(sum(each)) / 2, rtol=0.01)


def test_only_examples_of_one_fold_are_ranked():
    codes, folds = np.array([0, 1, 0, 1, 1]), np.array([0, 0, 1, 1, 2])
    values = np.array([0.0, 1, 100, 101, -5])[:, None]
    assert auc_values(values, codes == 1, folds).mean() == 1
    assert auc_values(values, codes == 1, np.zeros(5)).mean() == pytest.approx(3 / 6)
    assert np.isnan(auc_values(values, codes == 1, np.arange(5))).all()


def test_r2_is_what_is_explained_of_what_the_mean_leaves():
    rng = np.random.default_rng(0)
    y, said = rng.standard_normal(50), rng.standard_normal((50, 2))
    found = Scores(said[..., None], y, [], [0, 1], np.zeros(50, int), np.full(50, 0.3)).r2
    assert np.allclose(found.mean, 1 - ((y[:, None] - said) ** 2).sum(0) / ((y - 0.3) ** 2).sum())


def test_a_perfect_probe_of_uneven_classes_is_certain():
    codes = np.array([0] * 9 + [1])
    assert (balanced(np.ones((10, 2)), codes) == 1).all()
    half = balanced((codes == 0)[:, None], codes)
    assert half.mean() == pytest.approx(0.5)


# ---- other activations


def test_the_same_prompts_are_judged_by_the_fit_that_did_not_see_them():
    x, y = planted()
    found = probe(x, y, kind="lda", columns={"prompt": [f"p{i}" for i in range(120)]})
    same = found.transfer(x)
    assert np.allclose(same.values, found.held_out.values) and same.accuracy.columns["prompt"][3] == "p3"
    assert np.allclose(found.transfer(x, y).values, same.values)
    noise = np.random.default_rng(5).standard_normal((120, 3, 300))
    memory = probe(noise, y, kind="lda", shrinkage=0.01)
    assert (memory.predict(noise)[:, 0] == y).mean() == 1  # its fit to all knows them by heart
    assert abs(memory.transfer(noise, y).accuracy.mean.mean() - 0.5) < 0.1


def test_other_prompts_are_judged_by_the_fit_to_all():
    x, y = planted()
    found = probe(x, y, kind="logistic", Cs=[0.1])
    other_x, other_y = planted(seed=7, n=50)
    moved = found.transfer(other_x, other_y)
    assert np.array_equal(moved.predicted, found.predict(other_x))
    assert moved.accuracy.mean[2] > 0.85 and moved.baseline.mean == pytest.approx(0.5)
    flipped = found.transfer(-other_x[::-1], other_y[::-1])
    assert flipped.auc.mean[2] < 0.1


def test_cosines_by_layer():
    x, y = planted()
    found, opposite = (probe(x, labels, kind="mean_difference") for labels in (y, 1 - y))
    assert np.allclose(found.cosine(found), 1) and np.allclose(found.cosine(opposite), -1)
    with pytest.raises(SurgeryError, match="same layers, classes and width"):
        found.cosine(probe(x[:, :2], y, kind="mean_difference"))


def test_a_probe_comes_back_from_disk(tmp_path):
    x, y = planted(classes=3)
    types = [f"t{i % 10}" for i in range(120)]
    found = probe(dict(zip("abc", x.transpose(1, 0, 2), strict=True)), y, kind="lda", control=types, name="it")
    path = found.save(tmp_path / "new" / "probe")
    again = Probe.load(path)
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "probe-control.json", "probe-control.safetensors", "probe.json", "probe.safetensors",
    ]  # fmt: skip
    assert np.array_equal(again.predict(x), found.predict(x)) and again.layers == ["a", "b", "c"]
    assert np.array_equal(again.transfer(x).values, found.transfer(x).values)
    assert np.array_equal(again.selectivity.values, found.selectivity.values) and again.name == "it"
    assert again.meta == json.loads(json.dumps(found.meta)) and again.control.meta == found.control.meta
    with pytest.raises(SurgeryError, match="No probe at"):
        Probe.load(tmp_path / "none")
    found.control.save(tmp_path / "result")
    with pytest.raises(SurgeryError, match="not a saved probe"):
        Probe.load(tmp_path / "result")


# ---- figures


def test_the_figure_shows_control_and_majority():
    x, y = planted()
    found = probe(x, y, kind="lda", name="colour", control=y)
    figure = found.plot(title="T")
    axis = figure.axes[0]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["colour", "control task"]
    assert [t.get_text() for t in axis.texts] == ["majority"] and axis.get_xlabel() == "layer"
    assert axis.get_ylabel() == "class-balanced accuracy" and figure.get_suptitle() == "T"
    assert max(axis.dataLim.y1, 1) == 1
    named = probe({"early": x[:, 0], "late": x[:, 2]}, y, kind="lda").plot()
    assert [t.get_text() for t in named.axes[0].get_xticklabels()] == ["early", "late"]


def test_heads_are_a_map():
    x, y = planted(strength=(0.0, 4.0, 0.0, 1.0))
    found = probe(
        dict(zip(["0.0", "0.1", "2.0", "2.1"], x.transpose(1, 0, 2), strict=True)), y, kind="lda", axis="head"
    )
    axis = found.plot().axes[0]
    assert axis.images[0].get_array().shape == (2, 2)
    assert [t.get_text() for t in axis.get_yticklabels()] == ["0", "2"]
    assert axis.images[0].get_array()[0, 1] == pytest.approx(found.accuracy.mean[1])


# ---- wrong input

X, Y = planted(n=40)
NAN = X.copy()
NAN[7, 1, 3] = np.nan


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: probe(X, [1] * 40), "All labels are 1: a probe needs at least two classes"),
        (lambda: probe(X, Y[:39]), "39 labels for 40 examples"),
        (lambda: probe(X, Y, groups=range(3)), "3 groups for 40 examples"),
        (lambda: probe(X, Y, control=range(3)), "3 types for 40 examples"),
        (lambda: probe(X[:4], [0, 1, 0, 1]), "4 examples can't be split into 5 folds"),
        (lambda: probe(X, [0] * 37 + [1] * 3), "Class 1 has 3 examples, fewer than the 5 folds"),
        (lambda: probe(X, Y, folds=1), "at least 2 folds"),
        (lambda: probe(NAN, Y), "layer 1 are NaN or infinite in 1 of 40 examples, first in example 7"),
        (lambda: probe({"a": X[:, 0], "b": NAN[:, 1]}, Y), "layer b are NaN"),
        (lambda: probe({"a": X[:, 0], "b": X[:, 1, :5]}, Y), "layer b have shape"),
        (lambda: probe({}, Y), "no layers"),
        (lambda: probe(X[:, 0], Y), "expected \\(examples, layer, d\\)"),
        (lambda: probe(X, Y, groups=Y), "2 groups can't be split into 5 folds"),
        (lambda: probe(X, [0] * 20 + [1] * 20, groups=np.arange(40) // 4 * (np.arange(40) < 20)),
         "Fold . has no example of class 1 to train on"),
        (lambda: probe(X, Y, kind="logistics"), "no kind of probe"),
        (lambda: probe(X, Y, kind="lda", Cs=[1.0]), "no option 'Cs'"),
        (lambda: probe(X, ["a", 1] * 20), "of one kind"),
        (lambda: probe(X, ["a", "b"] * 20, kind="ridge"), "predicts numbers"),
        (lambda: probe(X, [math.nan] * 40, kind="ridge"), "finite numbers"),
        (lambda: probe(X, [2] * 40, kind="ridge"), "All labels are 2"),
        (lambda: probe(X, Y, kind="lda", control=["one"] * 40), "1 types are too few"),
        (lambda: probe(X, Y, kind="lda", control=Y, control_draws=0), "at least one drawing"),
        (lambda: probe(X, Y, kind="lda").selectivity, "has no control task"),
        (lambda: probe(X, Y, kind="lda").transfer(X[:, :2]), "\\(layers, width\\) \\(2, 8\\)"),
        (lambda: probe(X, Y, kind="lda").transfer(X[:9]), "9 examples, and the probe has 40"),
        (lambda: probe(X, Y, kind="lda").transfer(X[:2], [0, 5]), "knows no class 5"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(call, words):
    with pytest.raises(SurgeryError, match=words):
        call()


# ---- models


@pytest.fixture(scope="module")
def model():
    return build("llama_gqa")


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [3, 4, 5, 6]]


def alone(model, ids, layer):
    """What leaves a block, for one prompt without padding, by transformers' own account."""
    with torch.no_grad():
        return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]


def test_features_are_those_of_each_prompt_alone(model):
    found = features_of(model, PROMPTS, layers=[0, 1], batch_size=3)
    assert list(found) == [0, 1] and found[0].shape == (4, 32) and found[0].dtype == np.float32
    for layer in (0, 1):
        for i, ids in enumerate(PROMPTS):
            assert np.allclose(found[layer][i], alone(model, ids, layer)[-1], atol=1e-5)
    each = features_of(model, PROMPTS, layers=[1], position=[0, -2, 1, 3])[1]
    for i, (ids, p) in enumerate(zip(PROMPTS, [0, -2, 1, 3], strict=True)):
        assert np.allclose(each[i], alone(model, ids, 1)[p], atol=1e-5)
    assert np.allclose(
        features_of(model, PROMPTS, site="resid_post.1@1")[1], features_of(model, PROMPTS, position=1)[1]
    )


def test_heads_are_features_of_their_own(model):
    whole, heads = features_of(model, PROMPTS, site="z"), features_of(model, PROMPTS, site="z", heads=True)
    assert list(heads) == [f"{layer}.{head}" for layer in range(3) for head in range(4)] and heads["0.0"].shape == (
        4,
        8,
    )
    assert np.array_equal(np.concatenate([heads[f"2.{h}"] for h in range(4)], axis=1), whole[2])
    assert np.array_equal(features_of(model, PROMPTS, site="z.2.3", heads=True)["2.3"], heads["2.3"])
    assert len(features_of(model, PROMPTS, site="k", heads=True)) == 3 * 2
    assert list(features_of(model, PROMPTS, site="final")) == ["final"]


@pytest.mark.parametrize(
    "more, words",
    [
        ({"site": "resid_pots"}, "no site"),
        ({"site": "pattern"}, "no features of a token"),
        ({"site": "resid_pre", "heads": True}, "not divided into heads"),
        ({"position": 2}, "Prompt 2 has 2 tokens: there is no position 2"),
        ({"position": [0, 1]}, "2 positions for 4 examples"),
        ({"layers": [7]}, "no layer 7"),
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"layers": [-1]}, "no site 'resid_post.-1'"),
    ],
)  # fmt: skip
def test_wrong_places_are_named(model, more, words):
    with pytest.raises(SurgeryError, match=words):
        features_of(model, PROMPTS, **more)


def prompts_and_labels(n=60):
    """Prompts of different length that end alike; the label is whether token 7 was there."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 50, rng.integers(3, 8)).tolist() + [2] for _ in range(n)]
    for prompt in prompts[: n // 2]:
        prompt[len(prompt) // 2] = 7
    return prompts, ["with"] * (n // 2) + ["without"] * (n // 2)


def state(model):
    tensors = {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    flags = [m.training for m in model.modules()] + [p.requires_grad for p in model.parameters()]
    return tensors, hooks, flags, model.config._attn_implementation, model.config.use_cache


def test_a_model_is_probed_and_left_as_it_was(model):
    prompts, labels = prompts_and_labels()
    model.train()
    before = state(model)
    found = probe_model(model, prompts, labels, kind="lda", batch_size=7, control=[len(p) for p in prompts])
    with pytest.raises(SurgeryError):
        probe_model(model, prompts, labels[:-1])
    after = state(model)
    model.eval()
    assert before[1:] == after[1:] and all(before[0][n].equal(after[0][n]) for n in before[0])
    assert found.accuracy.mean.max() > 0.8 and found.name == "probe of resid_post" and found.layers == [0, 1, 2]
    heads = probe_model(model, prompts, labels, site="z", heads=True, layers=[1], kind="mean_difference")
    assert heads.accuracy.axes["head"] == ["1.0", "1.1", "1.2", "1.3"]


def test_texts_are_kept_beside_what_is_said_of_them():
    from surgery.models import load

    tiny, tokenizer = load("tiny-base")
    prompts = [f"m {a}+{b}=" for a in range(5) for b in range(5)]
    sums = [a + b for a in range(5) for b in range(5)]
    found = probe_model(tiny, prompts, sums, tokenizer=tokenizer, kind="ridge", layers=[1], name="sum")
    assert found.r2.columns["prompt"] == prompts and found.r2.columns["label"] == sums and found.r2.mean[0] > 0.5


def test_transfer_between_models(model):
    from copy import deepcopy

    prompts, labels = prompts_and_labels()
    same = probe_transfer(Pair(model, deepcopy(model), None), prompts, labels, kind="lda")
    assert np.allclose(same.score.values, same.score.values[:, :1, :1]) and np.allclose(same.cosine, 1)
    assert np.allclose(same.score.values[:, 0, 0], same.base.accuracy.values)
    other = deepcopy(model)
    with torch.no_grad():  # the stream of the other is turned round: what reads one reads the other backwards
        for name, parameter in other.named_parameters():
            if "norm" not in name and "lm_head" not in name:  # what reads the stream, and what writes to it
                parameter.neg_()
    found = probe_transfer(Pair(model, other, None), prompts, labels, kind="lda", layers=[0, 1])
    assert list(found.score.axes) == ["example", "trained on", "tested on", "layer"]
    auc = found.auc.mean
    assert np.allclose(found.cosine, -1) and np.allclose(auc[0, 0], auc[1, 1]) and np.allclose(auc[0, 1], 1 - auc[0, 0])
    assert auc[0, 0].max() > 0.8
    figure = found.plot()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "base to base", "base to tuned", "tuned to base", "tuned to tuned",
    ]  # fmt: skip
    numbers = probe_transfer(Pair(model, other, None), prompts, [len(p) for p in prompts], kind="ridge", layers=[1])
    assert numbers.auc is None and numbers.score.name == "R²" and numbers.plot().axes
