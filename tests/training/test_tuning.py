"""`tuning:` in the engine: only chosen numbers move, whatever the objective; runs go on bit for bit; memory is told."""

import copy
import json

import pytest
import torch
from tiny_runs import demonstrations, llama, many_letters, metrics, pairs, same, tokenizer, weights

from surgery.errors import SurgeryError
from surgery.training import train
from surgery.training.memory import estimate
from surgery.training.recipe import make
from surgery.tuning import Selection, select
from surgery.tuning.plan import Sparse, parse

SFT = {"objective": "sft", "data": demonstrations(), "batch": {"rows": 6, "micro_batch": 2}, "steps": 6}
DPO = {"objective": "dpo", "data": pairs(), "batch": {"rows": 4}, "steps": 6}
GRPO = {
    "objective": {"grpo": {"beta": 0.05}}, "data": demonstrations(), "reward": many_letters,
    "rollouts": {"prompts": 3, "group": 4, "max_new_tokens": 6}, "batch": {"epochs": 2}, "steps": 6,
}  # fmt: skip
PPO = GRPO | {"objective": "ppo"}
OPTIMIZER = {"lr": 1e-2, "weight_decay": 0.1, "clip": 0.5, "betas": (0.9, 0.95)}
STATIC = ["lift", {"magnitude": {"density": 0.1, "direction": "smallest"}}, {"fisher": {"lora_rank": 1}}, "norm",
          {"random": {"count": 100, "scope": "global"}}, {"half": {}}, {"s2ft": {"density": 0.3}},
          {"wanda": {"density": 0.1}}, {"sara": {"density": 0.2, "nuclear": 1e-3}}]  # fmt: skip


def moved(before, after):
    return {n: (before[n] != after[n]) for n in before}


def watched(words, **more):
    """A run whose selections are noted; weights before and after."""
    from surgery.training import moving

    found, adopt = [], moving.Moving.adopt

    def noting(self, selection, step):
        found.append(selection)
        adopt(self, selection, step)

    moving.Moving.adopt = noting
    try:
        model = llama()
        before = weights(model)
        run = train(model, tokenizer(), optimizer=OPTIMIZER, **words | more)
    finally:
        moving.Moving.adopt = adopt
    return found, before, weights(model), run


@pytest.mark.parametrize("words", [SFT, DPO, GRPO, PPO], ids=["sft", "dpo", "grpo", "ppo"])
@pytest.mark.parametrize("tuning", STATIC, ids=str)
def test_numbers_outside_the_selection_keep_their_bits(words, tuning):
    (chosen,), before, after, _ = watched(words, tuning=tuning)
    masks = chosen.masks()
    for name, changed in moved(before, after).items():
        allowed = masks.get(name, torch.zeros_like(changed))
        assert not (changed & ~allowed).any(), name
    changed = sum(int(c.sum()) for c in moved(before, after).values())
    assert changed > 0.5 * chosen.count


@pytest.mark.parametrize("tuning", ["lift", {"sara": {"density": 0.3}}, "half", {"gradient": {"density": 0.05}},
                                    {"delta": {"density": 0.1}}], ids=str)  # fmt: skip
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_selections_that_move_touch_their_union_alone(tuning, precision):
    name = tuning if isinstance(tuning, str) else next(iter(tuning))
    words = {} if isinstance(tuning, str) else dict(tuning[name])
    if name == "delta":
        words["sibling"] = llama(seed=1)
    if name == "lift":
        words |= {"density": 0.1, "rank": 2}
    found, before, after, _ = watched(SFT, tuning={name: words | {"refresh": 2}}, precision=precision)
    assert len(found) == 3
    union = found[0].both(found[1]).both(found[2])
    assert union.count >= found[0].count
    assert name in ("sara", "delta") or union.count > found[0].count  # it did move
    masks = union.masks()
    for key, changed in moved(before, after).items():
        assert not (changed & ~masks.get(key, torch.zeros_like(changed))).any(), key


@pytest.mark.parametrize("words", [SFT, GRPO, PPO], ids=["sft", "grpo", "ppo"])
@pytest.mark.parametrize("tuning", [{"lift": {"density": 0.1, "rank": 2, "refresh": 2}}, {"half": {"refresh": 2}},
                                    {"sara": {"density": 0.3, "refresh": 4, "nuclear": 1e-3}},
                                    {"gradient": {"density": 0.1, "refresh": 3}}], ids=str)  # fmt: skip
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, words, tuning):
    def go(out, stop=None, resume=False):
        def on_step(step, _):
            if step == stop:
                raise KeyboardInterrupt

        return train(llama(), tokenizer(), out=out, resume=resume, optimizer=OPTIMIZER, tuning=tuning,
                     on_step=on_step, checkpoint={"every": 1}, **words)  # fmt: skip

    whole = go(tmp_path / "whole")
    for stop in (3, 4):
        out = tmp_path / f"stopped at {stop}"
        with pytest.raises(KeyboardInterrupt):
            go(out, stop)
        again = go(out, resume=True)
        assert same(weights(again.model), weights(whole.model))
        assert metrics(out) == metrics(tmp_path / "whole")


def test_the_model_is_left_as_it_was_found():
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    for tuning in ("lift", "half", {"s2ft": {"density": 0.2}}):
        train(model, tokenizer(), tuning=tuning, **SFT)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())


def test_frozen_narrows_a_selection_down_and_trainable_contradicts_it():
    (chosen,), before, after, _ = watched(SFT, tuning={"magnitude": {"density": 0.5}}, frozen=["*mlp*"])
    assert chosen.places and not any("mlp" in name for name in chosen)
    assert not any(bool(c.any()) for n, c in moved(before, after).items() if "mlp" in n)
    with pytest.raises(SurgeryError, match="Both `tuning` and `trainable`"):
        train(llama(), tokenizer(), tuning="lift", trainable=["*"], **SFT)


def test_equal_to_all_parameters_when_everything_is_chosen():
    """A selection of every number, and the usual optimizer: the same run to float rounding."""
    full = train(llama(), tokenizer(), optimizer={"lr": 1e-2, "clip": 0.1}, **SFT)
    model = llama()
    everything = Selection.of_masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()})
    scattered = Selection({n: everything.flat(n) for n in everything}, everything.shapes)  # places kept one by one
    for tuning in ("all", everything, scattered):
        one = train(llama(), tokenizer(), optimizer={"lr": 1e-2, "clip": 0.1}, tuning=tuning, **SFT)
        torch.testing.assert_close(weights(one.model), weights(full.model), rtol=0, atol=2e-6)


def test_a_lottery_ticket_is_what_moved_most_and_training_begins_again():
    start = llama()
    (chosen,), before, after, _ = watched(SFT | {"tuning": {"lottery": {"density": 0.1}}})
    assert same(before, weights(start))
    by_hand = train(llama(), tokenizer(), optimizer=OPTIMIZER, **SFT)
    expected = select(start, "delta", density=0.1, sibling=by_hand.model)
    assert chosen.count == expected.count and chosen.overlap(expected) == 1
    masks = chosen.masks()
    assert not any((c & ~masks.get(n, torch.zeros_like(c))).any() for n, c in moved(before, after).items())


def test_tickets_of_several_rounds_grow():
    found, before, after, _ = watched(SFT | {"tuning": {"lottery": {"density": 0.1, "rounds": 2}}})
    first, last = found
    assert first.count == pytest.approx(last.count / 2, abs=1)
    assert first.both(last).count == last.count
    masks = last.masks()
    assert not any((c & ~masks.get(n, torch.zeros_like(c))).any() for n, c in moved(before, after).items())


@pytest.mark.peers
@pytest.mark.parametrize(
    "tuning",
    [{"lora": {"rank": 2}}, {"corda": {"rank": 2}}, {"corda": {"rank": 2, "mode": "kpm", "data": demonstrations(9)}}],
    ids=["lora", "ipm", "kpm"],
)
def test_adapters_are_put_on_trained_and_saved_for_the_models_own_weights(tmp_path, tuning):
    from peft import PeftModel

    start = llama()
    before = copy.deepcopy(start)
    run = train(start, tokenizer(), out=tmp_path / "run", tuning=tuning, optimizer={"lr": 1e-2}, **SFT)
    ids = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    loaded = PeftModel.from_pretrained(copy.deepcopy(before), tmp_path / "run" / "model")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, run.model(ids).logits, rtol=0, atol=1e-4)
        assert (loaded(ids).logits - before(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize(
    ("tuning", "told"),
    [
        ("lifft", "no tuning 'lifft'.*Did you mean 'lift'"),
        ({"lift": {"dencity": 0.1}}, "'lift' has no parameter 'dencity'.*'density'"),
        ({"lift": {"density": 0}}, "density of 0 selects nothing"),
        ({"lift": {"density": 1.5}}, "density of 1.5"),
        ({"lift": {"density": 0.1, "count": 5}}, "density and count are given"),
        ({"delta": {}}, "needs a fine-tuned sibling"),
        ({"half": {"density": 0.1}}, "'half' has no parameter 'density'"),
        ({"lift": {"sibling": "x"}}, "no parameter 'sibling'"),
        ({"corda": {"mode": "kpm"}}, "kpm keeps what its data show"),
        ({"lottery": {"rounds": 0}}, "0 rounds"),
        (["lift"], "One tuning is expected"),
    ],
    ids=str,
)
def test_what_a_recipe_says_wrong_is_refused_before_a_model_is_loaded(tuning, told):
    with pytest.raises(SurgeryError, match=f"(?s){told}"):
        train("no-such-model", tuning=tuning, **SFT)


def test_without_a_budget_it_is_five_per_cent():
    found = parse("lift")
    assert isinstance(found, Sparse) and found.budget.density == 0.05 and found.refresh == 0


@pytest.mark.parametrize(
    "tuning", ["lift", {"half": {}}, {"s2ft": {"density": 0.2}}, {"sara": {"density": 0.1}}], ids=str
)
def test_memory_is_told_before_it_is_taken(tmp_path, tuning):
    model = llama(hidden=32)
    told = estimate(make(SFT | {"tuning": tuning}), model)
    (chosen,), *_ = watched(SFT | {"tuning": tuning})
    model = llama(hidden=32)
    train(model, tokenizer(), tuning=tuning, out=tmp_path / "run", **SFT)
    assert told.moments == pytest.approx(8 * parse(tuning).expected(llama(hidden=32)).moving, rel=0.01)
    assert json.loads((tmp_path / "run" / "memory.json").read_text())["moments"] == told.moments
    full = estimate(make(SFT), model)
    assert told.moments < 0.7 * full.moments and told.peak < full.peak
    assert (told.places > 0) is not chosen.whole


def test_a_run_leaves_a_sparse_delta_that_makes_its_model_of_the_base(tmp_path):
    from safetensors.torch import load_file

    from surgery.weights.deltas.file import SparseDelta

    words = SFT | {"data": {"task": "chain"}, "steps": 3}
    run = train("tiny-base", out=tmp_path / "run", tuning={"lift": {"refresh": 2}}, optimizer={"lr": 1e-3}, **words)
    found = SparseDelta.load(tmp_path / "run" / "delta.safetensors")
    assert found.definition == "run - tiny-base"
    assert 22_124 <= found.count < 2 * 22_124  # two selections of 5 % of 442,368
    found.apply("tiny-base", tmp_path / "again")
    again, whole = (load_file(p / "model.safetensors") for p in (tmp_path / "again", tmp_path / "run" / "model"))
    assert again.keys() == whole.keys() and all(torch.equal(again[n], whole[n]) for n in whole)
    assert run.metrics[-1]["loss"] > 0


@pytest.mark.real
def test_a_real_model_learns_with_five_per_cent_of_its_numbers():
    """SmolLM2-135M-Instruct, four steps on made-up sums: the loss falls, all other numbers keep their bits."""
    from surgery.models import load

    model, names = load("smollm2", "float32")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{"prompt": f"{i} plus {i + 1} is", "completion": f" {2 * i + 1}."} for i in range(4)]
    found = select(model, "lift", density=0.05)
    run = train(model, names, objective="sft", data=rows, batch={"rows": 4}, steps=4, tuning=found,
                optimizer={"lr": 2e-4, "shape": "constant"})  # fmt: skip
    assert run.metrics[-1]["loss"] < 0.8 * run.metrics[0]["loss"]
    masks = found.masks()
    for name, p in model.named_parameters():
        assert (
            torch.equal(p[~masks[name]], before[name][~masks[name]]) if name in masks else torch.equal(p, before[name])
        )
