"""Patching between the models of a pair: equal to whole forwards with `edit`, on every family; what must hold holds."""

import copy

import pytest
import torch
from activations.families import FAMILIES, PARALLEL, VOCAB, build, prompts, tuned

from analysis.cross_model import cmap, transplant
from analysis.metrics import accuracy, answer_logit, as_metric, logit_diff
from surgery.activations import run
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, Pair, encode

torch.set_num_threads(1)
CLOSE = {"atol": 1e-5, "rtol": 0}
"""The logits of the tiny models are of order one."""


def pair_of(name="llama_gqa", seed=1, size=0.05):
    model = build(name)
    return Pair(model, tuned(model, seed, size), None)


def ragged(seed=0):
    """Four prompts of different length, and two answers each."""
    clean, _, answers = prompts(4, 9, seed=seed)
    return encode(None, [row[: 9 - i].tolist() for i, row in enumerate(clean)]), answers


def naive(source, target, batch, metric, sites, columns=None):
    """The metric (batch,) of one whole forward of the target with each whole site or head of the source written in.

    `columns` (batch,): where; None: at all positions.
    """
    names = [s.split("@")[0] for s in sites]
    _, seen = run(source, batch, [".".join(n.split(".")[:2]) for n in names])

    def change(name):
        parts = name.split(".")
        new = seen[".".join(parts[:2])]
        new = new[:, :, int(parts[2])] if len(parts) > 2 else new

        def write(old):
            if columns is None:
                return new
            old = old.clone()
            rows = torch.arange(len(old))
            old[rows, columns] = new[rows, columns]
            return old

        return write

    logits, _ = run(target, batch, edits={name: change(name) for name in names})
    return as_metric(metric).of_logits(logits, batch.last)


def naive_inputs(source, target, batch, metric, heads, columns, letters="qkv"):
    """Two whole forwards: the group's column with the source's inputs and every other z frozen; then its z written."""
    anatomy = anatomy_of(target)
    _, theirs = run(source, batch, ["q", "k", "v"])
    _, own = run(target, batch, ["z"])
    place = torch.arange(batch.ids.shape[1])
    here, before = place == columns[:, None], place < columns[:, None]
    edits = {}
    for layer, head in heads:
        for letter in letters:
            at = head if letter == "q" else head // anatomy.group
            where, new = (here if letter == "q" else before), theirs[f"{letter}.{layer}"][:, :, at]
            edits[f"{letter}.{layer}.{at}"] = lambda old, where=where, new=new: torch.where(where[..., None], new, old)
    for layer in range(anatomy.n_layers):
        z = own[f"z.{layer}"]
        edits[f"z.{layer}"] = lambda old, z=z: torch.where(here[..., None, None], old, z)
    _, alone = run(target, batch, ["z"], edits=edits)
    # `capture` is entered after `edit`: it sees what the edits made.
    second = {
        f"z.{layer}": lambda old, z=alone[f"z.{layer}"]: torch.where(here[..., None, None], z, old)
        for layer in range(anatomy.n_layers)
    }
    logits, _ = run(target, batch, edits=second)
    return as_metric(metric).of_logits(logits, batch.last)


# ---- groups


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_equal_whole_forwards_with_edits(family):
    pair = pair_of(family)
    batch, answers = ragged()
    metric = logit_diff(answers)
    neurons = "mlp_post" if not anatomy_of(pair.base).missing("mlp_post") else None
    groups = {
        "heads": ["z.0.1", "z.2.3", "z.1.0"],
        "stream": ["resid_pre.1", "mlp_out.2"],
        "written": ["attn_out.0", "resid_post.1"],
        "first": ["q.1.2", "k.0.0", "v.2.0"],
    }
    if neurons:
        groups["neurons"] = ["mlp_post.1.5", "mlp_post.2.7"]
    if family not in PARALLEL:
        groups["between"] = ["resid_mid.1"]
    for positions, columns in ((None, None), (-2, batch.last - 1), ([0, 5, 3, 2], torch.tensor([0, 5, 3, 2]))):
        found = cmap(pair, batch, metric, groups, positions=positions, random=0)
        assert list(found.axes) == ["example", "group"]
        for name, sites in groups.items():
            expected = naive(pair.tuned, pair.base, batch, metric, sites, columns)
            patched = torch.tensor(found.select("group", name).values) + torch.tensor(found.columns["target"])
            torch.testing.assert_close(patched.float(), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_equal_whole_forwards_with_every_other_z_frozen(family):
    pair = pair_of(family)
    batch, answers = ragged()
    metric = logit_diff(answers)
    heads = [(0, 1), (1, 2), (1, 3), (2, 0)]
    groups = {"A": [f"z.{layer}.{head}" for layer, head in heads]}
    for letters in ("inputs", "q", "kv"):
        for place, columns in ((None, batch.last), ([2, 5, 6, 1], torch.tensor([2, 5, 6, 1]))):
            found = cmap(pair, batch, metric, groups, sources=letters, positions=place, random=0)
            expected = naive_inputs(
                pair.tuned, pair.base, batch, metric, heads, columns, letters.replace("inputs", "qkv")
            )
            patched = torch.tensor(found.values[:, 0]) + torch.tensor(found.columns["target"])
            torch.testing.assert_close(patched.float(), expected, **CLOSE)
            assert abs(found.values).max() > 1e-3  # the comparison says something


def test_inputs_by_name_and_at_a_position_of_their_own():
    pair = pair_of("gpt2")
    ids, _, answers = prompts(3, 8)
    metric, batch = logit_diff(answers), Batch.of(ids)
    found = cmap(pair, ids, metric, {"q": ["q.1.2@4"], "v": "v.0.1@4"}, sources="inputs", random=0)
    column = torch.full((3,), 4)
    for name, heads, letters in (("q", [(1, 2)], "q"), ("v", [(0, 1)], "v")):
        expected = naive_inputs(pair.tuned, pair.base, batch, metric, heads, column, letters)
        patched = torch.tensor(found.select("group", name).values) + torch.tensor(found.columns["target"])
        torch.testing.assert_close(patched.float(), expected, **CLOSE)


def test_keys_before_the_first_token_change_nothing():
    pair = pair_of()
    ids, _, answers = prompts(3, 6)
    found = cmap(pair, ids, logit_diff(answers), {"A": ["z.1.1"]}, sources="kv", positions=0, random=2)
    assert abs(found.values).max() < 1e-6


def test_other_direction_left_padding_and_single_prompts():
    pair = pair_of("qwen2")
    batch, answers = ragged()
    metric, group = logit_diff(answers), {"A": ["z.1.1@-1", "mlp_out.0@2"]}
    found = cmap(pair, batch, metric, group, direction="base_to_tuned", random=0)
    logits, _ = run(pair.tuned, batch)
    torch.testing.assert_close(
        torch.tensor(found.columns["target"]).float(), metric.of_logits(logits, batch.last), **CLOSE
    )
    rows = [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    left = cmap(pair, encode(None, rows, side="left"), metric, group, direction="base_to_tuned", random=0)
    assert abs(left.values - found.values).max() < 1e-5
    for i, row in enumerate(rows):
        one = cmap(pair, [row], metric.select(slice(i, i + 1)), group, direction="base_to_tuned", random=0)
        assert abs(one.values[0] - found.values[i]).max() < 1e-5


@pytest.mark.parametrize("budget", [1, 1 << 18])
def test_a_small_budget_changes_nothing(budget):
    pair = pair_of()
    batch, answers = ragged()
    groups = {"A": ["z.0.1", "z.2.3"], "B": ["z.1"]}
    for sources in ("outputs", "inputs"):
        big = cmap(pair, batch, logit_diff(answers), groups, sources=sources, random=3)
        small = cmap(pair, batch, logit_diff(answers), groups, sources=sources, random=3, budget=budget)
        assert abs(big.values - small.values).max() < 1e-5 and big.axes == small.axes


def test_a_plain_function_of_all_logits_is_a_metric():
    pair = pair_of("gemma2")
    batch, answers = ragged()
    whole = logit_diff(answers)

    def plain(logits):
        assert logits.shape == (4, 9, VOCAB)
        return whole.of_logits(logits, batch.last)

    for sources in ("outputs", "inputs"):
        group = {"A": ["z.1.1"], "B": ["z.2"]}
        one = cmap(pair, batch, plain, group, sources=sources, positions=-1, random=1, budget=1)
        two = cmap(pair, batch, whole, group, sources=sources, positions=-1, random=1)
        assert abs(one.values - two.values).max() < 1e-5


# ---- identities


def test_identical_models_change_nothing():
    model = build("llama_gqa")
    pair = Pair(model, copy.deepcopy(model), None)
    batch, answers = ragged()
    for sources in ("outputs", "inputs"):
        found = cmap(pair, batch, logit_diff(answers), {"A": ["z.0", "z.2.1"]}, sources=sources)
        assert abs(found.values).max() < 1e-5
        with pytest.raises(SurgeryError, match="coincide"):
            found.normalized()


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gpt_neox", "gemma2", "bloom"])
def test_the_whole_last_stream_recovers_all(family):
    """With one final norm and one head the last block's output is all there is; so are all streams together."""
    pair = pair_of(family, size=0.2)
    source, target = anatomy_of(pair.tuned), anatomy_of(pair.base)
    source.head.load_state_dict(target.head.state_dict())
    batch, answers = ragged()
    groups = {"last": ["resid_post.2@-1"], "all": ["resid_pre", "resid_post"]}
    found = cmap(pair, batch, logit_diff(answers), groups, random=0).normalized()
    assert abs(found.mean - 1).max() < 1e-4


def test_recovery_is_the_ratio_of_means_with_an_interval():
    pair = pair_of(size=0.2)
    batch, answers = ragged()
    found = cmap(pair, batch, logit_diff(answers), {"A": ["resid_pre.1"]}, random=2)
    span = torch.tensor(found.columns["source"]) - torch.tensor(found.columns["target"])
    recovery = found.normalized().select("draw", "group")
    assert recovery.mean == pytest.approx(found.values[:, 0, 0].mean() / span.mean().item())
    assert recovery.interval().low <= recovery.mean <= recovery.interval().high


# ---- random groups


def test_random_groups_are_as_large_drawn_once_each_and_seeded():
    pair = pair_of()
    ids, _, answers = prompts(3, 6)
    groups = {"A": [f"z.{layer}.{head}@-1" for layer in range(3) for head in range(3)] + ["mlp_out.1", "k.0.1@2"]}
    found = cmap(pair, ids, logit_diff(answers), groups, random=4, seed=5)
    assert found.values.shape == (3, 1, 5) and list(found.axes) == ["example", "group", "draw"]
    told = found.meta["groups"]["A"]
    for sites in told[1:]:
        assert len(set(sites)) == len(sites) == len(told[0])
        assert sorted((s.split(".")[0], s.partition("@")[2]) for s in sites) == sorted(
            (s.split(".")[0], s.partition("@")[2]) for s in told[0]
        )
    assert len({tuple(sites) for sites in told}) == 5
    again = cmap(pair, ids, logit_diff(answers), groups, random=4, seed=5)
    assert (again.values == found.values).all() and again.meta == found.meta
    assert cmap(pair, ids, logit_diff(answers), groups, random=4, seed=6).meta["groups"] != found.meta["groups"]
    everything = cmap(pair, ids, logit_diff(answers), {"all": ["z"]}, random=1)
    assert abs(everything.values[..., 0] - everything.values[..., 1]).max() < 1e-6


# ---- sweeps


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sweep_over_heads_equals_one_whole_forward_a_head(family):
    pair = pair_of(family)
    batch, answers = ragged()
    metric = logit_diff(answers)
    found = cmap(pair, batch, metric, "z")
    assert list(found.axes) == ["example", "layer", "head"] and found.values.shape == (4, 3, 4)
    for layer in range(3):
        for head in range(4):
            expected = naive(pair.tuned, pair.base, batch, metric, [f"z.{layer}.{head}"])
            patched = torch.tensor(found.values[:, layer, head]) + torch.tensor(found.columns["target"])
            torch.testing.assert_close(patched.float(), expected, **CLOSE)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out", "v", "mlp_post"])
def test_transplants_equal_whole_forwards(site):
    pair = pair_of("llama_gqa")
    batch, answers = ragged()
    metric = logit_diff(answers)
    parts = None if site not in ("v", "mlp_post") else [1]
    suffix = "" if parts is None else ".1"
    anchors = {"end": -1, "middle": [1, 2, 3, 2]}
    columns = {"end": batch.last, "middle": torch.tensor([1, 2, 3, 2])}
    whole = transplant(pair, batch, metric, site, by="all", parts=parts)
    named = transplant(pair, batch, metric, site, parts=parts, anchors=anchors)
    for layer in range(3):
        for found, where in ((whole.select("layer", layer), None), *(
            (named.select("layer", layer).select("position", name), columns[name]) for name in anchors)):  # fmt: skip
            expected = naive(pair.tuned, pair.base, batch, metric, [f"{site}.{layer}{suffix}"], where)
            patched = torch.tensor(found.values.reshape(-1)) + torch.tensor(found.columns["target"])
            torch.testing.assert_close(patched.float(), expected, **CLOSE)


def test_transplants_by_position():
    pair = pair_of("gpt2")
    ids, _, answers = prompts(3, 6)
    metric, batch = logit_diff(answers), Batch.of(ids)
    found = transplant(pair, ids, metric)
    assert list(found.axes) == ["example", "layer", "position"] and found.values.shape == (3, 3, 6)
    for layer, position in ((0, 0), (1, 3), (2, 5)):
        column = torch.full((3,), position)
        expected = naive(pair.tuned, pair.base, batch, metric, [f"resid_pre.{layer}"], column)
        patched = torch.tensor(found.values[:, layer, position]) + torch.tensor(found.columns["target"])
        torch.testing.assert_close(patched.float(), expected, **CLOSE)


# ---- bad input, and nothing is touched


def state(model):
    tensors = {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.get("forward"))
             for m in model.modules()]  # fmt: skip
    return tensors, flags, [(p.requires_grad, p.grad) for p in model.parameters()]


def same(one, other):
    return (
        all(torch.equal(one[0][name], other[0][name]) for name in one[0])
        and one[1] == other[1]
        and all(a[0] == b[0] and a[1] is b[1] for a, b in zip(one[2], other[2], strict=True))
    )


def test_both_models_are_as_before_also_after_an_exception_in_the_metric():
    pair = pair_of()
    pair.base.train()
    pair.tuned.model.layers[1].train()
    before = state(pair.base), state(pair.tuned)
    ids, _, answers = prompts(3, 6)
    evaluated = Pair(copy.deepcopy(pair.base).eval(), copy.deepcopy(pair.tuned).eval(), None)
    for sources in ("outputs", "inputs"):
        found = cmap(pair, ids, logit_diff(answers), {"A": ["z.1.1"]}, sources=sources)
        calm = cmap(evaluated, ids, logit_diff(answers), {"A": ["z.1.1"]}, sources=sources)
        assert (found.values == calm.values).all()

        calls = []

        def failing(logits, calls=calls):
            calls.append(1)
            if len(calls) > 2:
                raise ValueError("mine")
            return logits[:, -1, 0]

        with pytest.raises(ValueError, match="mine"):
            cmap(pair, ids, failing, {"A": ["z.1.1"]}, sources=sources)
        assert same(before[0], state(pair.base)) and same(before[1], state(pair.tuned))


def test_models_that_do_not_fit_are_refused_with_the_numbers():
    ids, _, answers = prompts(3, 6)
    metric = logit_diff(answers)

    class Loose(Pair):
        """Lets any two models in, as models without a configuration would."""

        def __post_init__(self):
            pass

    with pytest.raises(SurgeryError, match=r"4 key-value heads.* 2"):
        cmap(Loose(build("llama"), build("llama_gqa"), None), ids, metric, "z")
    with pytest.raises(SurgeryError, match=r"8 numbers a head.* 16"):
        cmap(Loose(build("llama_gqa"), build("gemma3_text"), None), ids, metric, "z")


def test_vocabularies_may_differ_but_tokens_must_be_known():
    pair = pair_of()
    pair.tuned.resize_token_embeddings(VOCAB + 5)
    ids, _, answers = prompts(3, 6)
    assert cmap(pair, ids, logit_diff(answers), {"A": ["z.1.1"]}).values.shape == (3, 1, 11)
    new = ids.clone()
    new[1, 2] = VOCAB + 1
    with pytest.raises(SurgeryError, match=f"token {VOCAB + 1}, and the base knows {VOCAB}"):
        cmap(pair, new, logit_diff(answers), {"A": ["z.1.1"]})
    with pytest.raises(SurgeryError, match="the base has 60 logits"):
        cmap(pair, ids, accuracy(torch.full((3,), VOCAB)), {"A": ["z.1.1"]})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"groups": {"A": ["z.3.1"]}}, "no layer 3"),
        ({"groups": {"A": ["z.1.4"]}}, "no head 4"),
        ({"groups": {"A": ["pattern.1"]}}, "can't be a component"),
        ({"groups": {}}, "No groups"),
        ({"groups": {"A": []}}, "no components"),
        ({"positions": 6}, "prompt 0 is 6, and it has 6 tokens"),
        ({"positions": -7}, "prompt 0 is -7"),
        ({"positions": [0, 1]}, "are 2, and there are 3"),
        ({"positions": 1.5}, "whole number"),
        ({"positions": {"B": 1}}, "'B' that there is not"),
        ({"direction": "sideways"}, "direction="),
        ({"sources": "x"}, "sources="),
        ({"sources": "inputs", "groups": {"A": ["mlp_out.1"]}}, "no q, k or v"),
        ({"sources": "inputs", "groups": {"A": ["z.1.1@2", "z.1.2@3"]}}, "several positions"),
        ({"sources": "inputs", "groups": "z"}, "all positions at once"),
        ({"metric": answer_logit([1, 2])}, "made for 2 examples"),
    ],
)
def test_bad_input_is_a_sentence(more, message):
    ids, _, answers = prompts(3, 6)
    words = {"groups": {"A": ["z.1.1"]}, "metric": logit_diff(answers)} | more
    with pytest.raises(SurgeryError, match=message):
        cmap(pair_of(), ids, words.pop("metric"), **words)
