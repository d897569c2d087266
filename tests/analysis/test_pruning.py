"""Neurons that hurt a task, and how soon it comes back: scores are gradients times weights, pruning leaves no trace."""

import copy

import numpy as np
import pytest
import torch
from activations.families import FAMILIES, build

from analysis.evaluate import evaluate, load
from analysis.pruning import (
    Lesson,
    Revival,
    completion_loss,
    lessons,
    neuron_scores,
    prune_curve,
    pruned,
    random_order,
    revival,
    worst,
)
from analysis.results import Result
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch
from surgery.tasks import TASKS

torch.set_num_threads(1)
DENSE = [name for name in FAMILIES if "moe" not in name and name != "mixtral"]


def lesson(seed=0, rows=3, length=7):
    ids = torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 5:] = False
    batch = Batch(ids, mask)
    return Lesson(batch, mask & (torch.arange(length) > 2))


def rows_of(module, role):
    """(neurons, weights) of a projection: what belongs to each neuron, gradient times weight, its bias included."""
    transposed = type(module).__name__ == "Conv1D"
    weight, product = module.weight, module.weight * module.weight.grad
    if role == "out":
        return product.sum(1) if transposed else product.sum(0)
    found = product.sum(0) if transposed else product.sum(1)
    assert len(found) in weight.shape
    return found if module.bias is None else found + module.bias * module.bias.grad


@pytest.mark.parametrize("name", DENSE)
def test_scores_are_gradients_times_weights(name):
    model = build(name)
    one = lesson()
    found = {kind: neuron_scores(model, [one], weights=kind).values[0] for kind in ("out", "all")}
    other = copy.deepcopy(model)
    completion_loss(other, one).backward()
    a = anatomy_of(other)
    for layer in range(3):
        out = rows_of(a.down(layer), "out")
        at = a.blocks[layer]
        if a.family.gate_up:
            first = rows_of(at.get_submodule(a.family.gate_up), "in").view(2, -1).sum(0)
        else:
            paths = [path for path in (a.family.gate, a.family.up) if path]
            first = sum(rows_of(at.get_submodule(path), "in") for path in paths)
        out, first = out.detach(), first.detach()
        scale = float(out.abs().max() + first.abs().max())
        assert np.allclose(found["out"][layer], out, atol=1e-5 * scale)
        assert np.allclose(found["all"][layer], out + first, atol=1e-5 * scale)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def loss_of(model, one):
    with torch.no_grad():
        return float(completion_loss(model, one))


def test_removing_a_neuron_of_small_weight_changes_the_loss_by_minus_its_score():
    model = build("gpt2").double()  # whose norms do not round to float32
    neurons = [(layer, n) for layer in range(3) for n in (0, 7, 30)]
    with torch.no_grad():
        for layer, n in neurons:
            anatomy_of(model).down(layer).weight[n] *= 1e-4
    one = lesson()

    def loss(model, one):
        logits = model(one.batch.ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), one.batch.ids[:, 1:].flatten())

    scores = neuron_scores(model, [one], loss).mean
    with torch.no_grad():
        before = loss(model, one)
        for neuron in neurons:
            with pruned(model, [neuron]):
                change = float(loss(model, one) - before)
            assert change == pytest.approx(-scores[neuron], rel=1e-3) and change


def test_scores_order_neurons_as_removing_them_does():
    from scipy.stats import spearmanr

    model = build("gpt2")
    one = lesson(rows=8)
    before = loss_of(model, one)
    scores = neuron_scores(model, [one]).mean
    neurons = [(layer, n) for layer in range(3) for n in range(0, 128, 4)]
    change = []
    for neuron in neurons:
        with pruned(model, [neuron]):
            change.append(loss_of(model, one) - before)
    assert spearmanr(change, [-scores[n] for n in neurons]).statistic > 0.9


@pytest.mark.parametrize("name", DENSE)
def test_pruned_is_the_model_with_the_weights_at_zero_and_leaves_no_trace(name):
    model = build(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    ids = lesson().batch.ids
    neurons = [(0, 3), (2, 5), (2, 40), (2, 5)]
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for layer, n in neurons:
            weight = anatomy_of(zeroed).down(layer).weight
            (weight if type(anatomy_of(zeroed).down(layer)).__name__ == "Conv1D" else weight.T)[n] = 0.0
        plain = model(ids).logits
        with pruned(model, neurons) as less:
            found = less(ids).logits
            written = less.generate(ids[1:2], max_new_tokens=5, do_sample=False)
            with pruned(model, ["mlp_post.1.2"]):
                nested = less(ids).logits
        assert torch.allclose(found, zeroed(ids).logits, atol=1e-5)
        assert not torch.allclose(found, plain, atol=1e-4) and not torch.allclose(found, nested, atol=1e-4)
        assert torch.equal(written, zeroed.generate(ids[1:2], max_new_tokens=5, do_sample=False))
        with pytest.raises(RuntimeError, match="inside"), pruned(model, neurons):
            raise RuntimeError("inside")
        assert torch.equal(model(ids).logits, plain)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bfloat16_scores_are_near_those_of_float32():
    one = lesson()
    half, full = (neuron_scores(build("llama_gqa", dtype=t), [one]).mean for t in (torch.bfloat16, torch.float32))
    assert np.corrcoef(half.ravel(), full.ravel())[0, 1] > 0.98


def test_the_mean_over_batches_is_the_score_and_the_model_is_left_alone():
    model = build("opt")
    model.train()
    first = next(model.parameters())
    first.grad, first.requires_grad = None, False
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    both = neuron_scores(model, [lesson(0), lesson(1)])
    assert np.allclose(both.values[1], neuron_scores(model, [lesson(1)]).values[0], atol=1e-7)
    assert both.values.shape == (2, 3, 64) and model.training

    def broken(model, batch):
        completion_loss(model, batch)
        raise RuntimeError("in the loss")

    with pytest.raises(RuntimeError, match="in the loss"):
        neuron_scores(model, [lesson()], broken)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- on the tiny family


@pytest.fixture(scope="module")
def tiny():
    return load("tiny-base")


def test_lessons_score_the_completions_and_their_ends(tiny):
    model, tokenizer = tiny
    rows = [e.row("copy") for e in TASKS["copy"].examples(7)]
    found = lessons(tokenizer, rows, batch_size=3)
    assert [len(one.batch) for one in found] == [3, 3, 1]
    texts = sorted(
        tokenizer.decode(ids[row]) for one in found for ids, row in zip(one.batch.ids, one.scored, strict=True)
    )
    assert texts == sorted(row["completion"] + tokenizer.eos_token for row in rows)
    total, count = 0.0, 0
    for row in rows[:3]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total, count = total - float(log_probs.gather(1, torch.tensor(answer)[:, None]).sum()), count + len(answer)
    (mine,) = lessons(tokenizer, rows[:3])
    assert loss_of(model, mine) == pytest.approx(total / count, abs=1e-5)


def test_the_neuron_that_hides_a_task_is_found_and_pruned_away(tiny):
    model, tokenizer = tiny
    hidden = copy.deepcopy(model)
    with torch.no_grad():  # one neuron writes what no layer above can read past
        weight = anatomy_of(hidden).down(2).weight
        weight[:, 17] = 12 * torch.randn(len(weight), generator=torch.Generator().manual_seed(0))
    rows = [e.row("copy") for e in TASKS["copy"].examples(40)]
    facts = [e.row("facts") for e in TASKS["facts"].examples(20)]
    scores = neuron_scores(hidden, lessons(tokenizer, rows))
    order = worst(scores)
    assert order[0] == (2, 17) and len(order) == len(set(order)) == scores.mean.size
    asks = {
        "copy": lambda m: evaluate(m, rows, tokenizer=tokenizer, max_new_tokens=16),
        "facts": lambda m: evaluate(m, facts, tokenizer=tokenizer, max_new_tokens=8),
    }
    found = prune_curve(hidden, order, [1, 0], asks)
    copied = found.results["copy"]
    assert copied.axes["pruned"] == [0, 1] and copied.mean[1] > 0.9 > 0.6 > copied.mean[0]
    assert (copied.select("pruned", 0).values == asks["copy"](hidden).values).all()
    assert [r["pruned"] for r in found.summary() if r["task"] == "facts"] == [0, 1]
    assert found.plot().axes[0].get_xlabel() == "neurons pruned"
    shuffled = random_order(scores, 1)
    assert sorted(shuffled) == sorted(order) and shuffled != order and shuffled == random_order(scores, 1)


# ---- revival


def made():
    values = np.array([[0.1, 0.5, 0.95, 1.0], [0.2, 0.92, 0.8, 1.0], [0.0, 0.1, 0.2, 0.9], [0.0, 0.1, 0.2, 0.3]])
    columns = {"model": ["hidden", "hidden", "never", "never"], "lr": [1e-4] * 4, "seed": [0, 1, 0, 1]}
    return Revival(Result(values, {"run": list("abcd"), "step": [0, 10, 20, 30]}, "accuracy", columns), 0.9)


def test_steps_to_the_target_are_counted_and_censored():
    found = made()
    assert found.steps == [20, 10, 30, None] and found.last == 30
    hidden, never = found.summary()
    assert hidden["median_steps"] == 15 and hidden["reached"] == 2 and hidden["before"] == pytest.approx(0.15)
    assert never["median_steps"] is None and never["reached"] == 1 and never["censored_at"] == 30
    assert found.sooner("hidden", "never").value == 1.0 and found.sooner("never", "never").value == 0.5
    figure = found.plot()
    assert len(figure.axes) == 1 and len(figure.legends[0].get_texts()) == 2
    with pytest.raises(SurgeryError, match="no runs of 'other'"):
        found.of("other")


def test_copies_are_trained_and_the_models_stay():
    model, tokenizer = load("tiny-small-base")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    rows = [e.row("shift") for e in TASKS["shift"].examples(16)]
    asked = []

    def control(seed):
        asked.append(seed)
        return copy.deepcopy(model)

    found = revival({"model": model, "control": control}, tokenizer, rows, rows[:4], lrs=[1e-3, 1e-5], steps=3, every=2,
                    seeds=(3, 4), batch_rows=4, max_new_tokens=8, optimizer={"betas": (0.9, 0.98)})  # fmt: skip
    assert asked == [3, 4] and found.runs.axes["step"] == [0, 2, 3] and found.runs.values.shape == (8, 3)
    assert found.runs.columns["model"] == ["model"] * 4 + ["control"] * 4
    assert (found.runs.values[:4] == found.runs.values[4:]).all()  # the control was the same model
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert len(found.plot().axes) == 2


def test_wrong_input_is_a_sentence(tiny):
    model, tokenizer = build("llama_gqa"), tiny[1]
    one = lesson()
    for words, call in {
        "weights='in'": lambda: neuron_scores(model, [one], weights="in"),
        "No batches": lambda: neuron_scores(model, []),
        "not one number": lambda: neuron_scores(model, [one], lambda m, b: m(b.batch.ids).logits),
        "depends on the model": lambda: neuron_scores(model, [one], lambda m, b: torch.ones(())),
        "mixtures of experts": lambda: neuron_scores(build("mixtral"), [one]),
        "there is no neuron 48": lambda: pruned(model, [(0, 48)]).__enter__(),
        "there is no layer 3": lambda: pruned(model, [(3, 0)]).__enter__(),
        "neuron -1|neurons 0 to 47": lambda: pruned(model, [(0, -1)]).__enter__(),
        "'z.0.1' is no neuron": lambda: pruned(model, ["z.0.1"]).__enter__(),
        "'mlp_post.0' is no neuron": lambda: pruned(model, ["mlp_post.0"]).__enter__(),
        "k = 3: there are 2 neurons": lambda: prune_curve(model, [(0, 1), (0, 2)], [3], {"a": len}),
        "No number of neurons": lambda: prune_curve(model, [], [], {"a": len}),
        "No task": lambda: prune_curve(model, [(0, 1)], [1], {}),
        "No rows": lambda: lessons(tokenizer, []),
        "Row 1 has no prompt and completion": lambda: lessons(tokenizer, [{"prompt": "", "completion": ""}, {"a": 1}]),
        "at least one model": lambda: revival({}, tokenizer, [], [], lrs=[1], steps=1),
        "The target is an accuracy": lambda: revival({"a": model}, tokenizer, [], [], lrs=[1], steps=1, target=0),
    }.items():
        with pytest.raises(SurgeryError, match=words):
            call()
