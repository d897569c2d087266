"""Component masks: equal to a plain loop of whole forwards, find what was planted, and leave the model alone."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from activations.families import FAMILIES, build, prompts

from analysis.component_masks import Desideratum, Mask, learn_mask
from analysis.component_masks.gates import GATES
from surgery.activations import edit, run
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import encode

torch.set_num_threads(1)


def pairs(n=16, length=9, seed=0, name="swap", ragged=False, model=None):
    """Prompts and counterfactuals; with `ragged` of different length, pairs too.

    With a model the target is the token that the counterfactual prompt makes likelier than anything else.
    """
    clean, corrupt, answers = prompts(n, length, seed=seed)
    one = [row[: length - i % 3 * ragged].tolist() for i, row in enumerate(clean)]
    other = [row[: length - i % 4 * ragged].tolist() for i, row in enumerate(corrupt)]
    target = answers[:, 1] if model is None else (logits_of(model, other) - logits_of(model, one)).argmax(-1)
    return Desideratum(name, one, other, target)


def rows_of(count, seed=20):
    """The rows of training, validation and test."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count // 2], order[count // 2 : 3 * count // 4], order[3 * count // 4 :]


def one_head_model(family="gpt2", layer=1, head=2):
    """A model in which no other head than one writes anything: only it can move a change to the last token."""
    model = build(family)
    anatomy = anatomy_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or name.endswith("wpe.weight"):  # what is the same for all prompts
                parameter.zero_()
        for l in range(anatomy.n_layers):
            out = anatomy.out(l)
            rows = (out.weight if type(out).__name__ == "Conv1D" else out.weight.T).view(anatomy.n_heads, -1, 32)
            for h in range(anatomy.n_heads):
                rows[h] = 30 * rows[h] if (l, h) == (layer, head) else 0.0
    return model


def logits_of(model, ids):
    """(batch, vocab) at the last token."""
    batch = encode(None, [list(map(int, row)) for row in ids])
    logits, _ = run(model, batch)
    return logits[torch.arange(len(batch)), batch.last]


def planted(n=48, length=9, differ=slice(0, -1), **more):
    """The model of one head; counterfactuals agree in the last token only, and the target is what they are answered."""
    model = one_head_model(**more)
    clean, corrupt = (prompts(n, length, seed=seed)[0] for seed in (0, 1))
    other = clean.clone()
    other[:, differ] = corrupt[:, differ]
    return model, Desideratum("planted", clean, other, logits_of(model, other).argmax(-1))


# ---- the loop, written out


def naive(model, desiderata, positions, epochs, batch, lr=0.1, l1=0.01, component="z"):
    """Projected Adam (Kingma & Ba 2015) on a mask of all heads, or of one part a layer, with whole forwards; losses."""
    anatomy = anatomy_of(model)
    each = anatomy.n_heads if component == "z" else 1
    w = torch.ones(anatomy.n_layers * each)
    first, second, losses = torch.zeros_like(w), torch.zeros_like(w), []
    data = []
    generator = torch.Generator().manual_seed(20)
    for one in desiderata:
        here, there = (encode(None, [list(map(int, row)) for row in p]) for p in (one.prompts, one.counterfactuals))
        train = torch.randperm(len(here), generator=generator)[: len(here) // 2]
        data.append((here, there, torch.as_tensor(one.target), train.split(batch)))
    steps = max(len(d[3]) for d in data)
    for step in range(epochs * steps):
        w = w.detach().clamp(0, 1).requires_grad_()
        loss = l1 * (1 - w).sum()
        for (here, there, target, batches), position in zip(data, positions, strict=True):
            rows = batches[step % steps % len(batches)]
            _, other = run(model, there.select(rows), [component])
            mine, theirs = here.select(rows), there.select(rows)
            at = torch.arange(len(rows))
            column = [mine.lengths + p if p < 0 else torch.full((len(rows),), p) for p in [position or 0]][0]
            from_column = [theirs.lengths + p if p < 0 else torch.full((len(rows),), p) for p in [position or 0]][0]

            def change(layer, w=w, other=other, at=at, column=column, from_column=from_column, position=position):
                mask = w[layer * each : (layer + 1) * each]

                def mix(value):
                    mixing = mask[:, None] if component == "z" else mask
                    new = other[f"{component}.{layer}"]
                    if position is None:
                        return mixing * value + (1 - mixing) * new
                    value = value.clone()
                    value[at, column] = mixing * value[at, column] + (1 - mixing) * new[at, from_column]
                    return value

                return mix

            with edit(model, {f"{component}.{layer}": change(layer) for layer in range(anatomy.n_layers)}):
                logits = model(**mine.inputs(model)).logits
            loss = loss - logits[at, mine.last, target[rows]].mean()
        (gradient,) = torch.autograd.grad(loss, w)
        losses.append(loss.item())
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        steepness = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        w = w.detach() - lr * first / (1 - 0.9 ** (step + 1)) / steepness
    return w.clamp(0, 1), losses


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gptj", "gemma2"])
@pytest.mark.parametrize(("component", "position"), [("z", -1), ("z", -3), ("z", None), ("z", 5), ("attn_out", -1)])
def test_equal_to_the_plain_loop(family, component, position):
    """Weights after the last step to 1e-5 (float64: Adam would enlarge rounding), losses too."""
    model = build(family).double()
    data = pairs(ragged=position in (-1, -3, 5), model=model)
    found = learn_mask(model, data, components=component, position=position, epochs=3, batch_size=3, check=100)
    expected, losses = naive(model, [data], [position], 3, 3, component=component)
    np.testing.assert_allclose(found.values, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.history["loss"].values[0, 0], losses, atol=1e-5, rtol=0)
    assert (abs(expected - 1) > 0.05).any()  # something was learned


def test_several_desiderata_are_one_sum():
    model = build("llama_gqa").double()
    one, two = pairs(16, seed=1, name="one", model=model), pairs(8, seed=2, name="two", model=model)
    found = learn_mask(model, [one, two], epochs=2, batch_size=3, check=100)
    expected, losses = naive(model, [one, two], [-1, -1], 2, 3)
    np.testing.assert_allclose(found.values, expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.history["loss"].values[0, 0], losses, atol=1e-5, rtol=0)
    assert set(found.test) == {"one", "two"} and len(found.test["two"]) == 2
    assert list(dict.fromkeys(found.history["accuracy"].columns["desideratum"])) == ["one", "two"]


@pytest.mark.parametrize("family", FAMILIES)
def test_hard_masks_equal_edits_in_every_family(family):
    """What a mask's selected components do, against a whole forward with `edit`."""
    model = build(family)
    data = pairs(8, ragged=True)
    here, there = encode(None, data.prompts), encode(None, data.counterfactuals)
    found = learn_mask(model, data, components=["z", "mlp_out"], epochs=1, batch_size=4)
    values = np.ones_like(found.values)
    chosen = ["z.0.1@-1", "z.1.2@-1", "z.2.0@-1", "mlp_out.1@-1"]
    values[[list(found.weights).index(name) for name in chosen]] = 0.3
    mask = Mask(found.parts, values, {}, model=model)
    assert sorted(mask.components) == sorted(chosen)
    _, seen = run(model, there, chosen)
    logits, _ = run(model, here, edits={name: seen[name] for name in chosen})
    expected = logits[torch.arange(8), here.last].argmax(-1)
    result = mask.evaluate(Desideratum("", data.prompts, data.counterfactuals, expected))
    assert result.mean == 1.0
    plain, _ = run(model, here)
    assert result.columns["unpatched"] == (plain[torch.arange(8), here.last].argmax(-1) == expected).tolist()


# ---- planted truth


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", ["gpt2", "llama_gqa"])
def test_the_one_head_that_moves_the_answer_is_found(family, gate):
    model, data = planted(family=family)
    found = learn_mask(model, data, gate=gate, epochs=12, batch_size=8, l1=0.05)
    assert found.components == ["z.1.2@-1"], found.weights
    test = found.test["planted"]
    assert test.mean == 1.0 and np.mean(test.columns["unpatched"]) < 0.5
    assert found.evaluate(data).mean == 1.0


def test_the_position_that_carries_the_answer_is_found():
    """Only token 1 differs: below the head its stream is what the answer depends on, named by an anchor too."""
    model, data = planted(length=4, differ=slice(1, 2))
    data = dataclasses.replace(data, anchors={"it": (1, torch.full((48,), -3))})
    names = [f"resid_pre.1@{p}" for p in range(4)]
    found = learn_mask(model, data, components=names, epochs=12, batch_size=8, l1=0.05)
    assert found.components == ["resid_pre.1@1"]
    named = learn_mask(model, data, components=["resid_pre.1", "mlp_out.0"], position="it", epochs=12, batch_size=8)
    assert "resid_pre.1@it" in named.components and named.test["planted"].mean == 1.0


def test_neurons_and_directions():
    """The planted head's directions carry its difference; neurons are masked one by one."""
    model, data = planted()
    found = learn_mask(model, data, components="z.1.2", directions=8, epochs=12, batch_size=8, l1=0.001)
    assert list(found.weights) == [f"z.1.2[{i}]@-1" for i in range(8)]
    basis = found.parts[0].basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(8), atol=1e-5, rtol=0)
    assert found.test["planted"].mean > 0.5
    everything = Mask(found.parts, np.zeros(8), {}, model=model)
    assert everything.evaluate(data).mean == 1.0  # all 8 directions are the whole head
    wide = learn_mask(model, data, components="z.1", directions=40, epochs=1)
    assert len(wide.values) == 24  # as many as there are training examples
    neurons = learn_mask(model, data, components=["mlp_post.1", "mlp_post.2.5"], epochs=1)
    assert len(neurons.values) == 129 and "mlp_post.2.5@-1" in neurons.weights


def test_all_ones_is_a_result():
    """A target that comes out anyhow needs nothing patched."""
    model = build("gpt2")
    clean, corrupt, _ = prompts(16, 9)
    found = learn_mask(model, Desideratum("same", clean, corrupt, logits_of(model, clean).argmax(-1)), l1=10.0)
    assert found.components == [] and (found.values == 1).all() and found.test["same"].mean == 1.0
    assert "none" in str(found)


def test_a_weight_of_one_half_is_selected():
    model, data = planted()
    found = learn_mask(model, data, epochs=1)
    values = np.ones_like(found.values)
    values[6], values[7] = 0.5, np.nextafter(np.float32(0.5), np.float32(1))
    assert Mask(found.parts, values, {}).components == ["z.1.2@-1"]


# ---- the choice, and the same again


def test_the_most_accurate_mask_is_chosen_ties_to_more_components():
    model, data = planted()
    found = learn_mask(model, data, path=[0.001, 0.05, 5.0], epochs=6, batch_size=8, check=1)
    accuracy, size = found.history["accuracy"], found.history["size"]
    assert list(accuracy.axes) == ["example", "lambda", "check"] and accuracy.values.shape == (12, 3, 18)
    keys = {(c, l): (accuracy.mean[l, c], size.values[0, l, c]) for l in range(3) for c in range(18)}
    best = max(keys.values())
    assert (
        accuracy.mean[[0.001, 0.05, 5.0].index(found.meta["lambda"]), found.meta["check"]],
        len(found.components),
    ) == best
    assert found.history["loss"].values.shape == (1, 3, 18)
    assert (size.values[0, 2] == 0).all()  # nothing is worth 5 logits


def test_validation_of_ones_own_and_splits():
    model, data = planted()
    held = Desideratum("held out", data.prompts[:10], data.counterfactuals[:10], data.target[:10])
    found = learn_mask(model, data, validation=held, epochs=12, batch_size=16)
    assert found.test == {} and found.history["accuracy"].values.shape[0] == 10
    assert found.history["loss"].values.shape[2] == 36
    assert learn_mask(model, data, split=(0.7, 0.3, 0.0), epochs=1).test == {}
    train, validation, test = rows_of(48)
    found = learn_mask(model, data, epochs=1)
    assert list(found.history["accuracy"].labels) == validation.tolist()
    assert list(found.test["planted"].labels) == test.tolist() and len(train) == 24


def test_the_same_seed_gives_the_same_mask_whatever_the_threads_and_the_memory():
    model, data = planted(16)
    words = {"gate": "hard_concrete", "epochs": 2, "batch_size": 8, "components": ["z", "mlp_out"]}
    one = learn_mask(model, data, **words)
    again = learn_mask(model, data, **words)
    assert (one.values == again.values).all() and one.meta == again.meta
    assert (learn_mask(model, data, **words, seed=21).values != one.values).any()
    nothing_kept = learn_mask(model, data, **words, memory=0)
    torch.set_num_threads(2)
    try:
        threads = learn_mask(model, data, **words)
    finally:
        torch.set_num_threads(1)
    for other in (nothing_kept, threads):
        assert other.components == one.components
        np.testing.assert_allclose(other.values, one.values, atol=1e-4)


def test_bfloat16_finds_the_head_too():
    model, data = planted()
    found = learn_mask(model.to(torch.bfloat16), data, epochs=12, batch_size=8, l1=0.05)
    assert found.components == ["z.1.2@-1"]


# ---- gates


def test_hard_concrete_draws_and_counts_as_the_paper_says():
    """P(g != 0) is the penalty; g is 0 and 1 with positive probability (Louizos et al. 2018)."""
    gate, generator = GATES["hard_concrete"], torch.Generator().manual_seed(0)
    for log_alpha in (-3.0, 0.0, 2.0):
        number = torch.full((200_000,), log_alpha)
        g = 1 - gate.drawn(number, generator)
        assert (g != 0).double().mean() == pytest.approx(gate.penalty(number[:1]).item(), abs=0.005)
        assert g.min() >= 0 and g.max() <= 1 and (g == 0).any() and (g == 1).any()
    assert gate.kept(torch.tensor([-9.0, 9.0])).tolist() == [1, 0]


@pytest.mark.parametrize("gate", GATES)
def test_gates_start_with_everything_kept(gate):
    start = torch.full((3,), GATES[gate].start)
    assert (GATES[gate].kept(start) > 0.9).all()


# ---- files and pictures


def test_saved_masks_come_back(tmp_path):
    model, data = planted()
    for words in ({"components": ["z.1", "mlp_out"]}, {"components": ["z.1.2", "resid_pre.1"], "directions": 4}):
        found = learn_mask(model, data, epochs=2, **words)
        path = found.save(tmp_path / "masks" / "one.json")
        assert sorted(f.name for f in path.parent.iterdir()) == ["one.json", "one.safetensors"]
        again = Mask.load(path, model)
        assert again.weights == found.weights and again.components == found.components
        assert (again.evaluate(data).values == found.evaluate(data).values).all()
        assert again.history["loss"].axes == found.history["loss"].axes
        assert (again.test["planted"].values == found.test["planted"].values).all() and again.meta == found.meta
        with pytest.raises(SurgeryError, match="no model"):
            Mask.load(path).evaluate(data)
    with pytest.raises(SurgeryError, match="No mask"):
        Mask.load(tmp_path / "other")
    path.write_text("{}")
    with pytest.raises(SurgeryError, match="not a saved mask"):
        Mask.load(path)


def test_figures():
    model, data = planted()
    for words in ({}, {"components": ["attn_out", "mlp_out"]}, {"components": "mlp_post"},
                  {"components": ["z.1", "z.2.3"]}, {"components": "resid_post", "directions": 5}):  # fmt: skip
        figure = learn_mask(model, data, epochs=1, **words).plot()
        assert "components selected" in figure.get_suptitle()


# ---- bad input, and nothing is touched


def test_the_model_is_as_before_also_after_an_exception(monkeypatch):
    model, data = planted()
    model.train()
    model.transformer.h[0].eval()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))

    def state():
        tensors = {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
        flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.get("forward"))
                 for m in model.modules()]  # fmt: skip
        return (
            tensors,
            flags,
            [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        )

    def same(one, other):
        return (
            all(torch.equal(one[0][n], other[0][n]) for n in one[0])
            and one[1] == other[1]
            and all(a[0] == b[0] and (a[1] is b[1] is None or torch.equal(a[1], b[1]))
                    for a, b in zip(one[2], other[2], strict=True))
        )  # fmt: skip

    before = state()
    found = learn_mask(model, data, epochs=1)
    assert same(before, state())
    calm = learn_mask(copy.deepcopy(model).eval(), data, epochs=1)
    assert (calm.values == found.values).all()

    def failing(value):
        raise ValueError("mine")

    handle = model.transformer.h[2].mlp.register_forward_hook(lambda *_: failing(None))
    hooked = state()
    with pytest.raises(ValueError, match="mine"):
        learn_mask(model, data, epochs=1)
    assert same(hooked, state())
    handle.remove()
    monkeypatch.setattr("torch.optim.Adam.step", failing)
    with pytest.raises(ValueError, match="mine"):
        learn_mask(model, data, epochs=1)
    assert same(before, state())


def with_pairs(**more):
    clean, corrupt, answers = prompts(16, 9)
    words = {"name": "swap", "prompts": clean, "counterfactuals": corrupt, "target": answers[:, 1]} | more
    return {"desiderata": Desideratum(**words)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"components": "z.3"}, "no layer 3"),
        ({"components": "z.1.4"}, "no head 4"),
        ({"components": "scores"}, "can't be a component"),
        ({"components": []}, "No components"),
        ({"components": "mlp_post.1.2", "directions": 2}, "has no directions"),
        ({"directions": 0}, "directions=0"),
        ({"position": 9}, "prompt 0 is 9, and it has 9 tokens"),
        ({"position": "query"}, "no anchor 'query'"),
        ({"gate": "soft"}, "no gate 'soft'"),
        ({"epochs": 0}, "epochs"),
        ({"path": []}, "path"),
        ({"split": (0.5, 0.2, 0.2)}, "make 1"),
        ({"split": (0.0, 0.5, 0.5)}, "only the last may be 0"),
        ({"split": (0.5, 0.6, -0.1)}, "make 1"),
        ({"desiderata": []}, "No desideratum"),
        ({"desiderata": [pairs(), pairs()]}, "different names"),
        (with_pairs(prompts=prompts(15, 9)[0]), "15 prompts and 16 counterfactuals"),
        (with_pairs(target=[1] * 15), "one token id an example"),
        (with_pairs(target=[0.5] * 16), "one token id an example"),
        (with_pairs(target=[60] * 16), "token 60 is not among the model's 60"),
        (with_pairs(counterfactuals=prompts(16, 8)[1]) | {"position": None}, "pair 0: the prompt is 9 tokens"),
        (with_pairs(counterfactuals=prompts(16, 8)[1]) | {"position": 8}, r"\(counterfactual\) in prompt 0 is 8"),
        (with_pairs(anchors={"a": ([1, 2], 3)}) | {"position": "a"}, "are 2, and there are 16"),
        ({"desiderata": pairs(2)}, "too few to divide"),
    ],
)
def test_bad_input_is_a_sentence(more, message):
    words = {"desiderata": pairs()} | more
    with pytest.raises(SurgeryError, match=message):
        learn_mask(build("gpt2"), words.pop("desiderata"), **words)
