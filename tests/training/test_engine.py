"""The loop: micro-batches add up, the model is left as it was found, masks hold, what is not finite is told."""

import json

import pytest
import torch
from tiny_runs import demonstrations, llama, many_letters, pairs, same, tokenizer, weights

from surgery.errors import SurgeryError
from surgery.training import Trainer, train
from surgery.training.recipe import make
from surgery.tuning import Selection

ROLLOUTS = {"prompts": 3, "group": 4, "max_new_tokens": 6}
SFT = {"objective": "sft", "data": demonstrations(), "batch": {"rows": 7}, "steps": 3, "optimizer": {"lr": 1e-2}}
GRPO = SFT | {"objective": {"grpo": {"beta": 0.05}}, "reward": many_letters, "rollouts": ROLLOUTS}


def gpt(seed=0):
    """A random GPT-2, all of whose arithmetic is in the dtype of its parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=45, eos_token_id=2, bos_token_id=1, pad_token_id=0, **sizes))


def first_gradient(model, words, monkeypatch):
    """The gradient of a run's first step, before it is clipped; by name."""
    found, usual = {}, Trainer._backward

    def backward(self, micros):
        sums = usual(self, micros)
        if not found:
            found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            found["micros"] = len(micros)
        return sums

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_backward", backward)
        train(model, tokenizer(), **words | {"steps": 1})
    return found, found.pop("micros")


OBJECTIVES = {
    "sft": SFT,
    "grpo": GRPO,
    "dapo": GRPO | {"objective": "dapo"},
    "dr_grpo": GRPO | {"objective": "dr_grpo"},
    "dpo": SFT | {"objective": "dpo", "data": pairs()},
    "both": GRPO | {"objective": [{"dapo": {}}, {"sft": {}, "weight": 0.3}], "demonstrations": demonstrations()},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_are_the_big_batch(name, monkeypatch):
    """7 rows in threes, 12 rollouts in fives: ragged lengths and a last window that is not full."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        words = OBJECTIVES[name]
        whole, _ = first_gradient(gpt().to(dtype), words, monkeypatch)
        largest = max(float(g.abs().max()) for g in whole.values())
        for micro in (1, 3, 5):
            if name == "dpo" and micro == 1:
                continue  # a pair stays together: the same as 2
            batch = words["batch"] | {"micro_batch": micro}
            parts, count = first_gradient(gpt().to(dtype), words | {"batch": batch}, monkeypatch)
            assert count > 1 and parts.keys() == whole.keys()
            worst = max(float((parts[n] - whole[n]).abs().max()) for n in whole)
            assert worst <= tolerance * (1 if dtype == torch.float64 else largest)


# ---- as it was found


def state(model):
    """Everything about a model that is not a number in a parameter."""
    return {
        "modes": [m.training for m in model.modules()],
        "moves": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "checkpointing": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        "rates": [(getattr(m, "p", None), getattr(m, "attention_dropout", None)) for m in model.modules()],
        "config": json.dumps(model.config.to_dict(), default=str, sort_keys=True),
        "generation": json.dumps(model.generation_config.to_dict(), default=str, sort_keys=True),
    }


def broken(prompts, completions, **columns):
    """A reward that raises."""
    raise ZeroDivisionError("nothing to divide by")


@pytest.mark.parametrize("make_model", [llama, gpt], ids=["llama", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}, {"dropout": True}, {"reward": broken}],
                         ids=["plain", "checkpointing", "dropout", "error"])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_the_model_is_left_as_it_was_found(make_model, more):
    model = make_model()
    model.config.use_cache = False
    next(model.parameters()).requires_grad_(False)
    model.train()
    next(iter(model.children())).eval()
    before = state(model)
    words = GRPO | {"optimizer": {"lr": 0.0}, "evaluate": {"every": 2, "n": 3}} | more
    prompt = torch.tensor([[5, 6, 7]])
    generated = model.generate(prompt, do_sample=False, max_new_tokens=8, use_cache=True)
    old = weights(model)
    if "reward" in more:
        with pytest.raises(SurgeryError, match="nothing to divide by"):
            train(model, tokenizer(), **words)
    else:
        train(model, tokenizer(), **words)
    assert state(model) == before
    assert same(weights(model), old)
    assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=8, use_cache=True), generated)


def test_gradient_checkpointing_changes_nothing():
    found = train(llama(), tokenizer(), **SFT | {"gradient_checkpointing": True}).model
    expected = train(llama(), tokenizer(), **SFT).model
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(found)[name], value, rtol=1e-5, atol=1e-6)


def test_both_precisions_in_one_process():
    full = train(llama(), tokenizer(), **SFT)
    half = train(llama(), tokenizer(), **SFT | {"precision": "bfloat16"})
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert half.last["loss"] == pytest.approx(full.last["loss"], rel=0.05)
    assert not same(weights(half.model), weights(full.model))


def test_rollouts_are_drawn_in_the_arithmetic_of_the_updates(monkeypatch):
    gaps, usual = [], Trainer._backward

    def backward(self, micros):
        with torch.no_grad():
            for micro in micros:
                with self.context.autocast:
                    now = self.policy(micro).log_probs
                full = self.policy(micro).log_probs
                drawn = micro["sampled_log_probs"]
                gaps.append([float(((x - drawn) * micro.mask).abs().mean()) for x in (now, full)])
        return usual(self, micros)

    monkeypatch.setattr(Trainer, "_backward", backward)
    train(llama(), tokenizer(), **GRPO | {"precision": "bfloat16", "steps": 1})
    ((own, other),) = gaps
    assert own < 0.5 * other


# ---- what moves


def test_entries_outside_a_selection_keep_their_bits():
    model = llama()
    before, masks = weights(model), {}
    for i, (name, p) in enumerate(model.named_parameters()):
        if i % 2:
            masks[name] = torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) < 0.3
    settings = SFT | {"optimizer": {"lr": 1e-2, "weight_decay": 0.1}}
    train(model, tokenizer(), tuning=Selection.of_masks(masks), **settings)
    for name, p in model.named_parameters():
        kept = p == before[name]
        if name in masks:
            assert kept[~masks[name]].all()
            assert not kept[masks[name]].all()
        else:
            assert kept.all()


def test_selections_that_fit_nothing_are_refused():
    for masks, told in (({"model.norm.weight": torch.ones(3) > 0}, r"is \[3\] in it, \[16\] in"),
                        ({"model.norm.wait": torch.ones(16) > 0}, "'model.norm.weight'")):  # fmt: skip
        with pytest.raises(SurgeryError, match=told):
            train(llama(), tokenizer(), tuning=Selection.of_masks(masks), **SFT)


def test_frozen_parameters_keep_their_bits():
    model = llama()
    before = weights(model)
    train(model, tokenizer(), **SFT | {"trainable": ["*mlp*", "*norm*"], "frozen": ["*layers.0*"]})
    for name, p in model.named_parameters():
        moves = ("mlp" in name or "norm" in name) and "layers.0" not in name
        assert torch.equal(p, before[name]) != moves, name
    with pytest.raises(SurgeryError, match="No parameter of the model may move"):
        train(llama(), tokenizer(), **SFT | {"frozen": ["*"]})


# ---- what is not finite


def poisoned():
    """A model whose embedding of one character, which only some rows have, is not a number from the start."""
    model = llama(tie_word_embeddings=False)
    model.model.embed_tokens.weight.data[tokenizer()("z")["input_ids"][-1]] = float("nan")
    return model


ROWS = [*demonstrations(8), {"prompt": "c z=", "completion": "#z"}]


def test_a_loss_that_is_not_finite_names_the_row_and_saves_nothing(tmp_path):
    model = poisoned()
    words = SFT | {"data": ROWS, "curriculum": "in_order", "batch": {"rows": 3, "micro_batch": 1}, "steps": 6}
    before = []
    with pytest.raises(SurgeryError, match=r"Step 3: the loss is not finite in a micro-batch of 1 row.*'c z='.*'#z'"):
        more = {"checkpoint": {"every": 1}, "on_step": lambda *_: before.append(weights(model))}
        train(model, tokenizer(), out=tmp_path, **words | more)
    assert [p.name for p in sorted(tmp_path.glob("checkpoint-*"))] == ["checkpoint-000001", "checkpoint-000002"]
    assert not (tmp_path / "model").exists()
    for name, value in weights(model).items():
        assert torch.equal(value.nan_to_num(), before[-1][name].nan_to_num())


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    model = poisoned()
    words = SFT | {"data": ROWS, "curriculum": "in_order", "batch": {"rows": 3}, "steps": 6, "nonfinite": "skip"}
    seen = []
    run = train(model, tokenizer(), out=tmp_path, on_step=lambda *_: seen.append(weights(model)), **words)
    assert [line["skipped"] for line in run.metrics] == [0, 0, 1, 0, 0, 1]
    for i, (before, after) in enumerate(zip(seen, seen[1:], strict=False), 2):
        still = all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)
        assert still == (i in (3, 6))
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open()]
    assert lines[2]["loss"] is None


def test_a_loss_of_infinity_without_gradient_is_seen():
    from dataclasses import dataclass

    from surgery.training.objectives import SFT as Objective
    from surgery.training.objectives import Loss

    @dataclass(frozen=True)
    class Infinite(Objective):
        def of_scores(self, scores, batch):
            return Loss(scores.log_probs.sum() * 0 + float("inf"))

    with pytest.raises(SurgeryError, match="the loss is not finite"):
        train(llama(), tokenizer(), **SFT | {"objective": Infinite()})


def test_no_step_no_moments():
    """A trainer that has not run has touched nothing."""
    model = llama()
    before = weights(model)
    trainer = Trainer(make(SFT), model, tokenizer())
    assert same(weights(model), before) and not trainer.moving.optimizers
