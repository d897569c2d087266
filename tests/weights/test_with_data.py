"""Fisher, RegMean, AdaMerging, greedy soup and tuning: closed forms on toys, real transformers of a few KB."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint, tiny_family
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.weights.with_data import (
    Grams,
    adamerging,
    fisher_diagonal,
    fisher_merge,
    greedy_soup,
    input_grams,
    loaded,
    regmean_merge,
    state_of,
    tune,
)
from surgery.weights.with_data.adamerging import mean_entropy


def llama(seed: int = 0, **more) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | {"initializer_range": 0.3} | more))).eval()


def gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": 24, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


MODELS = {"llama": llama, "gpt2": gpt2}


def near(model: nn.Module, seed: int, size: float = 0.05) -> dict[str, Tensor]:
    """A fine-tuning: the weights plus noise, ties kept."""
    generator = torch.Generator().manual_seed(seed)
    noisy: dict[int, Tensor] = {}
    for p in model.parameters():
        noisy[p.data_ptr()] = p.detach() + size * torch.randn(p.shape, generator=generator)
    return {n: noisy.get(t.data_ptr(), t) for n, t in model.state_dict().items()}


def text(rows: int = 4, length: int = 7, *, pad: str | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens; `pad` adds three masked columns of another token on that side."""
    ids = torch.randint(1, 24, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if pad:
        parts = [(torch.full((rows, 3), 5), torch.zeros(rows, 3, dtype=torch.long)), (ids, mask)]
        ids, mask = (torch.cat(c, 1) for c in zip(*(parts if pad == "left" else parts[::-1]), strict=True))
    return {"input_ids": ids, "attention_mask": mask}


class Snapshot:
    """What must be as before: weights, gradients, flags, hooks and modes."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before = model, self.look(model)

    @staticmethod
    def look(model: nn.Module) -> list:
        tensors = [(n, p.data_ptr(), p.detach().clone().tolist()) for n, p in model.named_parameters()]
        flags = [(p.grad is None, p.requires_grad) for p in model.parameters()]
        modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return [tensors, flags, modules]

    def check(self) -> None:
        assert self.look(self.model) == self.before


class Broken(nn.Module):
    """Logits that are NaN from the second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 2), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * (float("nan") if self.calls > 1 else 1.0)


# ---- Fisher --------------------------------------------------------------------------------------------------------


def logistic(seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor]:
    """A logistic regression of 3 classes on 5 inputs, in float64: model, x and p(y|x)."""
    torch.manual_seed(seed)
    model = nn.Linear(5, 3).double()
    x = torch.randn(40, 5, dtype=torch.float64)
    return model, x, model(x).softmax(-1).detach()


def test_fisher_of_a_logistic_regression_is_the_closed_form():
    model, x, p = logistic()
    fisher = fisher_diagonal(model, [{"input": x[:25]}, {"input": x[25:]}], labels="expected")
    # E_y (1[y=k] - p_k)^2 x_j^2 = p_k (1 - p_k) x_j^2
    torch.testing.assert_close(fisher["weight"], ((p * (1 - p)).T @ x.square()) / 40, rtol=1e-10, atol=0)
    torch.testing.assert_close(fisher["bias"], (p * (1 - p)).mean(0), rtol=1e-10, atol=0)


def test_fisher_with_given_labels_is_the_mean_of_squares_not_the_square_of_the_mean():
    model, x, p = logistic()
    y = torch.arange(40) % 3
    fisher = fisher_diagonal(model, [{"input": x, "labels": y}], labels="given")
    score = torch.nn.functional.one_hot(y, 3) - p
    torch.testing.assert_close(fisher["weight"], score.square().T @ x.square() / 40, rtol=1e-10, atol=0)


def test_sampled_labels_approach_the_expectation_and_follow_the_seed():
    model, x, p = logistic()
    many = [{"input": x}] * 60
    fisher = fisher_diagonal(model, many, seed=1)
    torch.testing.assert_close(fisher["weight"], ((p * (1 - p)).T @ x.square()) / 40, rtol=0.15, atol=0.01)
    again, other = (fisher_diagonal(model, [{"input": x}], seed=s)["weight"] for s in (3, 4))
    assert again.equal(fisher_diagonal(model, [{"input": x}], seed=3)["weight"]) and not again.equal(other)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("labels", ["sampled", "given"])
def test_padding_and_batching_do_not_change_the_fisher(kind, labels):
    model = MODELS[kind]()
    alone = [{"input_ids": row[None]} for row in text()["input_ids"]]
    want = fisher_diagonal(model, alone, labels=labels, seed=2)
    for pad in ("left", "right"):
        got = fisher_diagonal(model, [text(pad=pad)], labels=labels, seed=2)
        assert all(got[n].equal(want[n]) for n in want), pad


@pytest.mark.parametrize("kind", MODELS)
def test_fisher_of_a_language_model_is_the_squared_gradient_of_its_loss(kind):
    model, batch = MODELS[kind](), text(rows=1)
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    fisher = fisher_diagonal(model, [{**batch, "labels": labels}], labels="given")
    assert set(fisher) == {n for n, _ in model.named_parameters()}
    (3 * model(**batch, labels=labels).loss).backward()  # the loss is the mean over three answers
    for name, p in model.named_parameters():
        torch.testing.assert_close(fisher[name], p.grad.square(), rtol=1e-3, atol=1e-7)


def test_examples_limits_what_is_read():
    model, x, _ = logistic()
    few = fisher_diagonal(model, [{"input": x}], labels="expected", examples=7)
    want = fisher_diagonal(model, [{"input": x[:7]}], labels="expected")
    assert few["weight"].equal(want["weight"])


@pytest.mark.parametrize("kind", MODELS)
def test_equal_fishers_give_the_average(kind):
    model = MODELS[kind]()
    states = [near(model, i) for i in range(3)]
    fisher = fisher_diagonal(model, [text()])
    merged = fisher_merge(states, [fisher] * 3, weights=[1, 1, 2])
    assert merged.keys() == model.state_dict().keys()
    for name, t in merged.items():
        want = 0.25 * states[0][name] + 0.25 * states[1][name] + 0.5 * states[2][name]
        torch.testing.assert_close(t, want, rtol=1e-5, atol=1e-6)
    with loaded(model, merged):
        assert model(**text()).logits.isfinite().all()


def test_fisher_merge_is_the_equation_and_takes_the_parameter_that_matters():
    states = [{"w": torch.tensor([1.0, 2.0, 3.0])}, {"w": torch.tensor([5.0, 6.0, 7.0])}]
    fishers = [{"w": torch.tensor([4.0, 0.0, 1.0])}, {"w": torch.tensor([1.0, 0.0, 3.0])}]
    plain = fisher_merge(states, fishers, weights=[1, 2], normalize=False)["w"]
    torch.testing.assert_close(plain, torch.tensor([(4 + 2 * 5) / 6, (2 + 2 * 6) / 3, (3 + 6 * 7) / 7]))
    rms = [torch.tensor(17 / 3).sqrt(), torch.tensor(10 / 3).sqrt()]
    normal = fisher_merge(states, fishers)["w"]
    a, b = 4 / rms[0], 1 / rms[1]
    torch.testing.assert_close(normal[0], (a * 1 + b * 5) / (a + b))
    assert normal[1] == 4  # where nobody cares: the average
    loud = [fishers[0], {"w": 1000 * fishers[1]["w"]}]
    torch.testing.assert_close(fisher_merge(states, loud)["w"], normal)


@pytest.mark.parametrize(
    ("fishers", "weights", "words"),
    [
        ([{"w": torch.ones(3)}], None, "1 Fisher informations for 2"),
        ([{"w": torch.ones(3)}, {"v": torch.ones(3)}], None, "only one has"),
        ([{"x": torch.ones(3)}] * 2, None, "'x', no tensor"),
        ([{"w": torch.ones(2)}] * 2, None, "is \\(2,\\), the tensor \\(3,\\)"),
        ([{"w": -torch.ones(3)}] * 2, None, "negative"),
        ([{"w": torch.full((3,), float("nan"))}] * 2, None, "not finite"),
        ([{"w": torch.zeros(3)}] * 2, None, "zero everywhere"),
        ([{"w": torch.ones(3)}] * 2, [0, 0], "sum to 0"),
        ([{"w": torch.ones(3)}] * 2, [1, -1], "not negative"),
        ([{"w": torch.ones(3)}] * 2, [1], "1 weights for 2"),
    ],
)
def test_fishers_that_do_not_fit_are_sentences(fishers, weights, words):
    with pytest.raises(SurgeryError, match=words):
        fisher_merge([{"w": torch.ones(3)}, {"w": torch.zeros(3)}], fishers, weights=weights)


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([], "no model"),
        ([{"w": torch.ones(3)}, {"w": torch.ones(4)}], "\\(3,\\) in model 0, but \\(4,\\) in model 1"),
        ([{"w": torch.ones(3)}, {"v": torch.ones(3)}], "in model 0, but not in model 1"),
        ([{"w": torch.ones(3)}, {"w": torch.full((3,), float("inf"))}], "NaN or infinite"),
        (
            [{"w": torch.ones(3), "i": torch.arange(2)}, {"w": torch.ones(3), "i": torch.zeros(2).long()}],
            "whole numbers",
        ),
    ],
)
def test_models_that_do_not_fit_are_sentences(states, words):
    for merge in (fisher_merge, regmean_merge):
        with pytest.raises(SurgeryError, match=words):
            merge(states, [{}] * len(states))


def test_the_fisher_of_wrong_data_is_a_sentence():
    model, x, _ = logistic()
    for batches, options, words in [
        ([], {}, "no batches"),
        (iter(()), {}, "no batches"),
        ([{"input": x}], {"labels": "given"}, "needs `labels`"),
        ([{"input": x}], {"labels": "sampeld"}, "Unknown labels"),
        ([{"input": x}], {"examples": 0}, "at least 1"),
        ([{"input": x, "labels": torch.zeros(3)}], {}, "agree on its number of examples"),
        ([{"input": x * float("nan")}], {}, "NaN"),
    ]:
        with pytest.raises(SurgeryError, match=words):
            fisher_diagonal(model, batches, **options)
    with pytest.raises(SurgeryError, match="not finite at example 1"):
        fisher_diagonal(Broken(), [{"x": torch.ones(2, 3), "labels": torch.zeros(2)}], labels="given")


# ---- RegMean -------------------------------------------------------------------------------------------------------


def test_regmean_of_linear_models_is_the_least_squares_solution():
    torch.manual_seed(0)
    models = [nn.Linear(6, 4, bias=False).double() for _ in range(2)]
    data = [torch.randn(30, 6, dtype=torch.float64) * torch.linspace(0.1, s, 6) for s in (2, 5)]
    grams = [input_grams(m, [x[:11], x[11:]]) for m, x in zip(models, data, strict=True)]
    merged = regmean_merge(models, grams, off_diagonal=1.0, ridge=0.0)["weight"]
    outputs = torch.cat([m(x) for m, x in zip(models, data, strict=True)]).detach()
    want = torch.linalg.lstsq(torch.cat(data), outputs).solution.T
    torch.testing.assert_close(merged, want, rtol=1e-9, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(
    off=st.floats(0, 1), ridge=st.sampled_from([0.0, 1e-6, 0.1]), seed=st.integers(0, 99), share=st.floats(0.05, 0.95)
)
def test_regmean_with_equal_grams_is_the_average(off, ridge, seed, share):
    torch.manual_seed(seed)
    x = torch.randn(20, 5)
    gram = {"weight": x.T @ x}
    states = [{"weight": torch.randn(3, 5), "bias": torch.randn(3)} for _ in range(2)]
    merged = regmean_merge(states, [gram, gram], off_diagonal=off, ridge=ridge, weights=[share, 1 - share])
    for name in merged:
        want = share * states[0][name] + (1 - share) * states[1][name]
        torch.testing.assert_close(merged[name], want, rtol=1e-4, atol=1e-5)


def test_regmean_keeps_each_model_where_only_its_inputs_go():
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    grams = [{"w": torch.diag(torch.tensor(d))} for d in ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0])]
    merged = regmean_merge([{"w": a}, {"w": b}], grams, ridge=1e-9)["w"]
    torch.testing.assert_close(merged[:, :2], a[:, :2], atol=1e-6, rtol=0)
    torch.testing.assert_close(merged[:, 2], b[:, 2], atol=1e-6, rtol=0)
    torch.testing.assert_close(merged[:, 3], (a + b)[:, 3] / 2, atol=1e-6, rtol=0)  # no input goes there: the average
    with pytest.raises(SurgeryError, match="singular"):
        regmean_merge([{"w": a}, {"w": b}], grams, ridge=0)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_masked_positions_do_not_enter_the_grams(kind, pad):
    model = MODELS[kind]()
    want, got = input_grams(model, [text()]), input_grams(model, [text(pad=pad)])
    assert want.keys() == got.keys() and len(want) == (15 if kind == "llama" else 4)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-5)


def test_grams_are_the_means_of_what_enters_the_layers():
    model, batch = llama(), text()
    seen = {}
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
    grams = input_grams(model, [batch, text(seed=1)])
    first = input_grams(model, [batch])
    handle.remove()
    x = seen["x"].detach().flatten(0, 1)
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(first[name], x.T @ x / len(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grams[name], (first[name] + input_grams(model, [text(seed=1)])[name]) / 2)


@pytest.mark.parametrize("kind", MODELS)
def test_regmean_of_one_model_is_the_model_whatever_its_layout(kind):
    model = MODELS[kind]()
    grams = input_grams(model, [text()])
    assert bool(grams.transposed) == (kind == "gpt2")
    own = near(model, 1)
    merged = regmean_merge([own, own], [grams, input_grams(model, [text(seed=1)])])
    assert merged.keys() == own.keys()
    for name in own:
        torch.testing.assert_close(merged[name], own[name], rtol=1e-4, atol=1e-4)


def test_conv1d_is_solved_transposed():
    """GPT-2's square attn.c_proj: only its layout, not its shape, tells which side the inputs are on."""
    model, name = gpt2(), "transformer.h.0.attn.c_proj.weight"
    states = [near(model, i, 0.3) for i in (1, 2)]
    grams = [input_grams(model, [text(seed=i)]) for i in (1, 2)]
    grams = [Grams({name: g[name]}, g.transposed) for g in grams]
    merged = regmean_merge(states, grams, off_diagonal=1, ridge=0)[name]
    a, b = (g[name].double() for g in grams)
    want = torch.linalg.solve(a + b, a @ states[0][name].double() + b @ states[1][name].double())
    torch.testing.assert_close(merged.double(), want, rtol=1e-3, atol=1e-4)
    plain = [dict(g) for g in grams]  # the layout is also read from modules
    modules = [gpt2(), gpt2()]
    for module, state in zip(modules, states, strict=True):
        module.load_state_dict(state)
    torch.testing.assert_close(regmean_merge(modules, plain, off_diagonal=1, ridge=0)[name], merged)


def test_tied_embeddings_are_averaged_and_stay_tied():
    model = llama(tie_word_embeddings=True)
    states = [near(model, i) for i in (1, 2)]
    grams = [input_grams(model, [text(seed=i)]) for i in (1, 2)]
    assert "lm_head.weight" not in grams[0] and "model.embed_tokens.weight" not in grams[0]
    merged = regmean_merge(states, grams)
    assert merged["lm_head.weight"] is merged["model.embed_tokens.weight"]
    want = (states[0]["lm_head.weight"] + states[1]["lm_head.weight"]) / 2
    torch.testing.assert_close(merged["lm_head.weight"], want)
    upside_down = [dict(reversed(list(state.items()))) for state in states]  # the head first
    fisher = fisher_diagonal(model, [text()])
    for again in (regmean_merge(upside_down, grams), fisher_merge(upside_down, [fisher, fisher])):
        assert again["lm_head.weight"] is again["model.embed_tokens.weight"]
        torch.testing.assert_close(again["lm_head.weight"], want)
    checkpoint = {n: t for n, t in states[1].items() if n != "lm_head.weight"}  # as on disk: no head
    assert "lm_head.weight" not in regmean_merge([model, checkpoint], grams)


def test_layers_that_saw_nothing_leave_the_choice_to_others():
    class Two(nn.Module):
        def __init__(self, use: str) -> None:
            super().__init__()
            self.a, self.b, self.use = nn.Linear(3, 3), nn.Linear(3, 3), use

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, self.use)(x)

    one, two = Two("a"), Two("b")
    grams = [input_grams(m, [torch.randn(50, 3)]) for m in (one, two)]
    merged = regmean_merge([one, two], grams, ridge=1e-8)
    torch.testing.assert_close(merged["a.weight"], one.a.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged["b.weight"], two.b.weight.detach(), rtol=1e-4, atol=1e-5)


def test_wrong_grams_are_sentences():
    states = [{"w": torch.ones(2, 3)}, {"w": torch.zeros(2, 3)}]
    eye = torch.eye(3)
    for grams, options, words in [
        ([{"w": eye}], {}, "1 sets of Gram matrices for 2"),
        ([{"w": eye}, {}], {}, "only one has 'w'"),
        ([{"x": eye}] * 2, {}, "no tensor of the models"),
        ([{"w": torch.eye(2)}] * 2, {}, "reads 3 inputs"),
        ([{"w": eye * float("nan")}] * 2, {}, "NaN"),
        ([{"w": eye}] * 2, {"off_diagonal": 1.5}, "off_diagonal"),
        ([{"w": eye}] * 2, {"ridge": -1.0}, "ridge"),
        ([{"w": eye}] * 2, {"weights": [0, 0]}, "sum to 0"),
    ]:
        with pytest.raises(SurgeryError, match=words):
            regmean_merge(states, grams, **options)
    with pytest.raises(SurgeryError, match="no batches"):
        input_grams(nn.Linear(3, 2), [])
    with pytest.raises(SurgeryError, match="no linear layer"):
        input_grams(nn.LayerNorm(3), [torch.ones(2, 3)])
    with pytest.raises(SurgeryError, match="NaN or infinite"):
        input_grams(nn.Linear(3, 2), [torch.full((2, 3), float("nan"))])
    assert Grams({"w": eye}, ["w"]).transposed == {"w"}


# ---- AdaMerging ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["task", "layer", "tensor"])
@pytest.mark.parametrize("kind", MODELS)
def test_adamerging_without_steps_is_task_arithmetic(kind, per):
    model = MODELS[kind]()
    tuned = [near(model, i) for i in (1, 2)]
    merged = adamerging(model, tuned, [text()], per=per, start=[0.3, 0.5], steps=0)
    assert merged.history == [] and merged.state_dict.keys() == model.state_dict().keys()
    for name, t in merged.state_dict.items():
        base = model.state_dict()[name]
        torch.testing.assert_close(t, base + 0.3 * (tuned[0][name] - base) + 0.5 * (tuned[1][name] - base))


def test_coefficients_are_one_a_task_or_one_a_layer():
    model = llama()
    layer = adamerging(model, [near(model, 1)], [text()], per="layer", steps=0).coefficients
    assert set(layer) == {"model.layers.0", "model.layers.1", "embedding", "norm", "head"}
    assert all(lam.tolist() == pytest.approx([0.3]) for lam in layer.values())
    assert set(adamerging(model, [near(model, 1)], [text()], steps=0).coefficients) == {"all"}


@pytest.mark.parametrize("per", ["task", "layer"])
@pytest.mark.parametrize("kind", MODELS)
def test_adamerging_lowers_the_entropy_and_repeats(kind, per):
    model = MODELS[kind]()
    tuned = [near(model, i, 0.2) for i in (1, 2)]
    data = [[text(pad="left"), text(seed=3)], [text(seed=4, pad="right")]]
    start = adamerging(model, tuned, data, per=per, steps=0).state_dict

    def entropy(state: Mapping[str, Tensor]) -> float:
        with loaded(model, state), torch.no_grad():
            return sum(mean_entropy(model, b).item() for d in data for b in d)

    run = [adamerging(model, tuned, data, per=per, steps=20, lr=0.02, seed=s) for s in (1, 1, 2)]
    assert entropy(run[0].state_dict) < entropy(start)
    assert len(run[0].history) == 20
    assert run[0].history == run[1].history and run[0].history != run[2].history
    assert all(run[0].coefficients[g].equal(run[1].coefficients[g]) for g in run[0].coefficients)
    lam = torch.stack(list(run[0].coefficients.values()))
    assert lam.min() >= 0 and lam.max() <= 1


def test_every_data_set_counts_in_every_step():
    model, a, b = llama(), [text()], [text(seed=5)]
    tuned = [near(model, i) for i in (1, 2)]
    runs = [adamerging(model, tuned, data, steps=4, lr=0.01).coefficients["all"] for data in ([a, b], [b, a], [a, a])]
    torch.testing.assert_close(runs[0], runs[1])
    assert (runs[0] - runs[2]).abs().max() > 1e-5


def test_bfloat16_is_worked_in_float32_and_ties_survive_a_cast():
    model = gpt2().bfloat16()
    tuned = [{n: t.bfloat16() for n, t in near(model, i).items()} for i in (1, 2)]  # the head is now a copy
    fisher, grams = fisher_diagonal(model, [text(pad="left")]), input_grams(model, [text(pad="left")])
    assert {t.dtype for t in (*fisher.values(), *grams.values())} == {torch.float32}
    for state in (
        fisher_merge(tuned, [fisher] * 2),
        regmean_merge(tuned, [grams] * 2),
        adamerging(model, tuned, [text()], steps=2).state_dict,
    ):
        assert {t.dtype for t in state.values()} == {torch.bfloat16}
        with loaded(model, state):
            assert model(**text()).logits.isfinite().all()
    untied = {**tuned[0], "lm_head.weight": tuned[0]["lm_head.weight"] + 1}
    with pytest.raises(SurgeryError, match="which a tuned model unties"):
        adamerging(model, [untied], [text()])
    with pytest.raises(SurgeryError, match="which its new weights untie"), loaded(model, untied):
        pass


def test_the_gradient_of_the_coefficients_is_the_slope_of_the_entropy():
    """One plain Adam step moves each coefficient by lr against the sign of a finite difference."""
    model = llama().double()
    tuned = [near(model, i) for i in (1, 2)]
    tuned = [{n: t.double() for n, t in s.items()} for s in tuned]
    step = adamerging(model, tuned, [text()], steps=1, lr=1e-3).coefficients["all"]

    def entropy(lam: list[float]) -> float:
        state = adamerging(model, tuned, [text()], start=lam, steps=0).state_dict
        with loaded(model, state), torch.no_grad():
            return mean_entropy(model, text()).item()

    for k in range(2):
        up, down = ([0.3 + sign * 1e-3 * (j == k) for j in range(2)] for sign in (1, -1))
        slope = entropy(up) - entropy(down)
        assert step[k].item() == pytest.approx(0.3 - 1e-3 * (1 if slope > 0 else -1), abs=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_the_last_position_is_the_last_real_token(kind):
    model = MODELS[kind]()
    want = mean_entropy(model, text(), positions="last")
    for pad in ("left", "right"):
        torch.testing.assert_close(mean_entropy(model, text(pad=pad), positions="last"), want, rtol=1e-4, atol=1e-5)
    logits = model(**text()).logits[:, -1].log_softmax(-1)
    torch.testing.assert_close(want, -(logits.exp() * logits).sum(-1).mean())


def test_wrong_adamerging_is_a_sentence():
    model = llama()
    own = state_of(model)
    for arguments, options, words in [
        (([], [text()]), {}, "no tuned model"),
        (([own], []), {}, "no batches"),
        (([own], [[text()], []]), {}, "no batches"),
        (([own], iter([text()])), {}, "must be a list"),
        (([own], [text()]), {"per": "layers"}, "Unknown per"),
        (([own], [text()]), {"positions": "first"}, "Unknown positions"),
        (([own], [text()]), {"steps": -1}, "steps"),
        (([own], [text()]), {"start": [0.1, 0.2, 0.3]}, "start"),
        (([{n: t[:1] for n, t in own.items()}], [text()]), {}, "in model 0, but"),
    ]:
        with pytest.raises(SurgeryError, match=words):
            adamerging(model, *arguments, **options)


# ---- models are left as found --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_models_are_left_as_found(kind):
    model = MODELS[kind]().train()
    next(model.modules()).training = False
    next(model.parameters()).requires_grad_(False)
    snapshot, tuned = Snapshot(model), near(model, 1)
    for call in (
        lambda data: fisher_diagonal(model, data),
        lambda data: input_grams(model, data),
        lambda data: adamerging(model, [tuned], data, steps=2),
    ):
        with torch.inference_mode():
            call([text()])
        snapshot.check()
        with pytest.raises((IndexError, RuntimeError)):  # a token the embedding has not
            call([{"input_ids": torch.tensor([[1, 99]])}])
        snapshot.check()
    with pytest.raises(ZeroDivisionError), loaded(model, tuned):
        assert model.state_dict()["lm_head.weight"].equal(tuned["lm_head.weight"])
        raise ZeroDivisionError
    snapshot.check()


def test_loading_what_does_not_fit_is_a_sentence_and_changes_nothing():
    model = llama()
    snapshot = Snapshot(model)
    for state, words in [({"x": torch.ones(1)}, "no tensor 'x'"), ({"lm_head.weight": torch.ones(2)}, "\\(2,\\)")]:
        with pytest.raises(SurgeryError, match=words), loaded(model, {**near(model, 1), **state}):
            pass
    snapshot.check()


# ---- greedy soup ---------------------------------------------------------------------------------------------------


def distance(target: float):
    return lambda state: -abs(state["w"].item() - target)


def test_greedy_soup_keeps_what_helps_and_what_does_not_hurt():
    models = [{"w": torch.tensor([v])} for v in (4.0, 0.0, 1.5, 2.5, 2.0)]
    soup = greedy_soup(models, distance(2.0))
    # own scores: 2.0 is right; 1.5 then 2.5 in the given order, each alone would hurt; likewise the others
    assert soup.members == [4] and soup.score == 0 and soup.state_dict["w"].item() == 2.0
    assert soup.scores == {0: -2.0, 1: -2.0, 2: -0.5, 3: -0.5, 4: 0.0}
    soup = greedy_soup(models[:4], distance(2.0))
    assert soup.members == [2, 3] and soup.state_dict["w"].item() == 2.0
    assert [(t.candidate, t.kept) for t in soup.tastes] == [(3, True), (0, False), (1, False)]
    same = greedy_soup([models[4]] * 3, distance(2.0))
    assert same.members == [0, 1, 2]  # ties are kept


def test_greedy_soup_in_a_given_order_scores_one_soup_a_model():
    calls = []
    models = [nn.Linear(2, 1, bias=False) for _ in range(3)]
    soup = greedy_soup(models, lambda s: calls.append(s) or 1.0, order=[2, 0, 1])
    assert len(calls) == 3 and soup.members == [2, 0, 1]
    torch.testing.assert_close(soup.state_dict["weight"], sum(m.weight.detach() for m in models) / 3)


def test_greedy_soup_of_checkpoints_is_their_average(tmp_path):
    folders = [tiny_checkpoint(tmp_path / "a", dtype="bfloat16", tied=True)]
    folders.append(tiny_checkpoint(tmp_path / "b", seed=1, near=folders[0], dtype="bfloat16", tied=True))
    soup = greedy_soup([str(folders[0]), folders[1]], lambda state: 1.0)
    a, b = (state_of(f) for f in folders)
    for name, t in soup.state_dict.items():
        assert t.dtype == torch.bfloat16 and t.equal(((a[name].float() + b[name].float()) / 2).bfloat16())


def test_wrong_soups_are_sentences():
    models = [{"w": torch.ones(1)}, {"w": torch.ones(1)}]
    for arguments, options, words in [
        (([], distance(0)), {}, "no model"),
        ((models, distance(0)), {"order": [0, 0]}, "different indices"),
        ((models, distance(0)), {"order": [0, 2]}, "different indices"),
        ((models, distance(0)), {"order": []}, "different indices"),
        ((models, lambda s: float("nan")), {}, "NaN"),
        ((models, lambda s: "good"), {}, "not a number"),
        (([*models, {"w": torch.ones(2)}], lambda s: 1.0), {}, "\\(2,\\) in model 2"),
    ]:
        with pytest.raises(SurgeryError, match=words):
            greedy_soup(*arguments, **options)


# ---- tuning --------------------------------------------------------------------------------------------------------

RECIPE = {
    "method": "ties",
    "models": [{"model": "a", "parameters": {"weight": 1.0}}, {"model": "b", "parameters": {"weight": 1.0}}],
    "parameters": {"density": 0.5, "elect": True, "steps": 3},
}
SPACE = {"models[0].parameters.weight": (0.0, 2.0), "parameters.density": (0.01, 1.0, "log")}


def bowl(recipe: dict) -> float:
    """Best at weight 1.5, density 0.1."""
    weight, density = recipe["models"][0]["parameters"]["weight"], recipe["parameters"]["density"]
    return -((weight - 1.5) ** 2) - (density - 0.1) ** 2


def search(score=bowl, space=SPACE, **more):
    return tune(RECIPE, space, score, **({"trials": 30, "merge": lambda recipe: recipe} | more))


def test_tuning_finds_the_best_numbers_and_starts_from_the_recipe():
    before = json.dumps(RECIPE)
    found = search()
    assert found.trials[0].parameters == {"models[0].parameters.weight": 1.0, "parameters.density": 0.5}
    assert found.best_score == max(t.score for t in found.trials) > -0.05
    assert (
        found.best_recipe["models"][0]["parameters"]["weight"] == found.best_parameters["models[0].parameters.weight"]
    )
    assert found.best_recipe["models"][1] == RECIPE["models"][1] and json.dumps(RECIPE) == before
    frame = found.to_dataframe()
    assert len(frame) == 30 and frame["parameters.density"].between(0.01, 1).all()
    assert search(lambda r: -bowl(r), direction="minimize").best_score == -found.best_score


def test_tuning_reads_yaml_and_every_kind_of_range(tmp_path):
    import yaml

    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    space = {"parameters.elect": [True, False], "parameters.steps": (1, 9, 2), "parameters.density": (0.0, 1.0, 0.25)}
    seen = []
    found = tune(
        tmp_path / "r.yaml", space, lambda r: seen.append(r["parameters"]) or 0.0, trials=25, merge=lambda r: r
    )
    assert {p["elect"] for p in seen} == {True, False} and {p["steps"] for p in seen} <= {1, 3, 5, 7, 9}
    assert {p["density"] for p in seen} <= {0.0, 0.25, 0.5, 0.75, 1.0} and len(found.trials) == 25


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes"])
def test_the_seed_decides_the_trials(sampler):
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    runs = [[t.parameters for t in search(sampler=sampler, seed=s, trials=15).trials] for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_by_default_recipes_are_merged_in_memory(tmp_path):
    base, (one, two) = tiny_family(tmp_path)
    models = [{"model": str(m), "parameters": {"weight": 0.9}} for m in (one, two)]
    recipe = {"method": "linear", "base": str(base), "models": models}
    want = state_of(one)

    def likeness(state: Mapping[str, Tensor]) -> float:
        return -sum((state[n] - want[n]).square().sum().item() for n in want)

    found = tune(recipe, {"models[1].parameters.weight": (0.0, 2.0)}, likeness, trials=12)
    assert all(t.error is None for t in found.trials)
    assert found.best_parameters["models[1].parameters.weight"] < 0.5  # the less of the other model, the better


def test_failing_trials_are_recorded_and_the_search_goes_on():
    def picky(recipe: dict) -> float:
        if recipe["parameters"]["density"] > 0.3:
            raise SurgeryError("too dense")
        return float("nan") if recipe["parameters"]["density"] < 0.02 else bowl(recipe)

    found = search(picky)
    failed = [t for t in found.trials if t.score is None]
    assert "too dense" in failed[0].error and len(failed) < 30
    assert found.best_parameters["parameters.density"] <= 0.3
    with pytest.raises(SurgeryError, match="All 4 trials failed; the last one: ValueError: no"):
        search(lambda r: (_ for _ in ()).throw(ValueError("no")), trials=4)


def test_a_stopped_search_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = search()
    journal, calls = tmp_path / "journal.jsonl", []

    def stops(recipe: dict) -> float:
        calls.append(recipe)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return bowl(recipe)

    with pytest.raises(KeyboardInterrupt):
        search(stops, journal=journal)
    with journal.open("a") as file:
        file.write('{"number": 11, "par')  # killed while it wrote
    resumed = search(lambda r: calls.append(r) or bowl(r), journal=journal)
    assert len(calls) == 12 + 19
    assert [(t.parameters, t.score) for t in resumed.trials] == [(t.parameters, t.score) for t in whole.trials]
    assert search(lambda r: pytest.fail("done already"), journal=journal).best_score == whole.best_score
    with pytest.raises(SurgeryError, match="another search"):
        search(journal=journal, seed=5)


@pytest.mark.parametrize(
    ("space", "more", "words"),
    [
        ({"parameters.densty": (0, 1)}, {}, "no value at 'parameters.densty'.*\n.*'parameters.density'"),
        ({"models[2].parameters.weight": (0, 1)}, {}, "no value at"),
        ({"parameters": (0, 1)}, {}, "no value at"),
        ({}, {}, "empty"),
        ({"parameters.density": (1.0, 0.5)}, {}, "low must be below high"),
        ({"parameters.density": (0.0, 1.0, "log")}, {}, "above 0"),
        ({"parameters.density": (0.0, 1.0, "lin")}, {}, "third value"),
        ({"parameters.density": []}, {}, "can't be searched"),
        ({"parameters.density": "high"}, {}, "can't be searched"),
        (SPACE, {"trials": 0}, "at least 1"),
        (SPACE, {"sampler": "tpee"}, "Unknown sampler"),
        (SPACE, {"direction": "up"}, "Unknown direction"),
    ],
)
def test_wrong_searches_are_sentences(space, more, words):
    with pytest.raises(SurgeryError, match=words):
        search(space=space, **more)


def test_unreadable_recipes_are_sentences(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "list.yaml").write_text("- a")
    for name, words in [("bad.yaml", "can't be read"), ("none.yaml", "can't be read"), ("list.yaml", "is a mapping")]:
        with pytest.raises(SurgeryError, match=words):
            tune(tmp_path / name, SPACE, bowl, merge=lambda r: r)


@pytest.mark.parametrize(("package", "sampler"), [("optuna", "tpe"), ("cmaes", "cmaes")])
def test_missing_packages_are_sentences(monkeypatch, package, sampler):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SurgeryError, match=f"needs the package '{package}'") as error:
        search(sampler=sampler)
    assert error.value.hint == "pip install model-surgery[tune]"


def test_the_journal_of_something_else_is_a_sentence(tmp_path: Path):
    journal = tmp_path / "j"
    search(trials=2, journal=journal)
    lines = journal.read_text().splitlines()
    journal.write_text(lines[0] + '\n{"a": 1}\n')
    with pytest.raises(SurgeryError, match="no journal of trials"):
        search(trials=2, journal=journal)
    journal.write_text(lines[0] + "\n" + lines[1].replace("0.5", "0.25") + "\n")
    with pytest.raises(SurgeryError, match="was of other numbers"):
        search(trials=2, journal=journal)
