"""The estimate of memory against the tensors of a run."""

import json

import pytest
import torch
from tiny_runs import demonstrations, llama, many_letters, pairs, tokenizer

from surgery.training import Trainer, memory
from surgery.training.batch import Batch
from surgery.training.memory import estimate
from surgery.training.plan import plan
from surgery.training.policy import Policy
from surgery.training.recipe import make

SFT = {"objective": "sft", "data": demonstrations(), "steps": 1}


def size(tensors):
    """Bytes of different tensors."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


@pytest.mark.parametrize("trainable", [None, ["*mlp*", "*norm*"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_and_moments_are_exact(trainable, dtype, monkeypatch):
    model = llama().to(dtype)
    trainer = Trainer(make(SFT | {"trainable": trainable}), model, tokenizer())
    found, usual = {}, Trainer._step

    def step(self, optimizer):
        found["gradients"] = size(p.grad for p in model.parameters() if p.grad is not None)
        usual(self, optimizer)
        found["moments"] = size(v for state in optimizer.state.values() for v in state.values())

    monkeypatch.setattr(Trainer, "_step", step)
    trainer.run()
    assert trainer.memory.weights == size((*model.parameters(), *model.buffers()))
    assert trainer.memory.gradients == found["gradients"] > 0
    assert trainer.memory.moments == found["moments"]
    assert trainer.memory.reference == trainer.memory.cache == 0


def test_a_reference_is_as_large_as_the_model(tmp_path):
    rollouts = {"prompts": 3, "group": 4, "max_new_tokens": 10, "batch_size": 6}
    grpo = {"objective": {"grpo": {"beta": 0.1}}, "reward": many_letters, "rollouts": rollouts}
    recipe = make(SFT | grpo)
    trainer = Trainer(recipe, llama(), tokenizer(), out=tmp_path)
    assert trainer.memory.reference == trainer.memory.weights
    prompt = max(len(tokenizer()(row["prompt"])["input_ids"]) for row in demonstrations())
    # 6 rows, 2 layers, keys and values, 2 heads of 8, 4 bytes
    assert trainer.memory.cache == 6 * (prompt + 10) * 2 * 2 * 2 * 8 * 4
    trainer.run()
    assert json.loads((tmp_path / "memory.json").read_text())["peak"] == trainer.memory.peak


@pytest.mark.parametrize(("hidden", "layers"), [(32, 2), (64, 4)])
def test_activations_are_what_a_pass_keeps(hidden, layers):
    model = llama(hidden=hidden, layers=layers, intermediate_size=3 * hidden).train()
    stored = {p.untyped_storage().data_ptr() for p in model.parameters()}
    batch, policy, kept = Batch.of([[5] * 20] * 8, [[6] * 30] * 8), Policy(model), {}
    policy(batch)

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in stored:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        policy(batch)
    found = sum(nbytes for nbytes, _ in kept.values())
    expected = estimate(make(SFT | {"batch": {"rows": 8}}), model, prompt=20, completion=30)
    assert found == pytest.approx(expected.activations + expected.logits / 3, rel=0.25)


def test_settings_that_save_memory_do():
    model = llama(hidden=64, layers=6)
    base = estimate(make(SFT), model)
    assert estimate(make(SFT | {"gradient_checkpointing": True}), model).activations < base.activations / 3
    assert estimate(make(SFT | {"batch": {"rows": 8, "micro_batch": 2}}), model).activations * 4 == base.activations
    halved = estimate(make(SFT | {"parallel": "fsdp2"}), model, processes=2)
    assert halved.weights * 2 == base.weights and halved.activations * 2 == base.activations
    both = estimate(make(SFT | {"objective": "dpo", "data": pairs()}), model)
    assert both.activations == 2 * base.activations and both.reference == base.weights


def test_a_model_that_is_not_loaded_takes_the_same():
    recipe = make(SFT)
    with torch.device("meta"):
        empty = llama()
    expected = estimate(recipe, llama())
    assert estimate(recipe, empty) == expected
    assert expected.render().startswith("about ") and f"weights {expected.weights / 1000:.3g} kB" in expected.render()
    assert memory.lengths(recipe, plan(recipe), tokenizer()) == (6, 10)
