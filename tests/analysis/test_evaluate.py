"""Looking at a model: right numbers, whatever the batching, and the model is as it was."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analysis.evaluate import accuracy, answer_log_likelihood, evaluate_tasks, generate, load, perplexity, untouched
from surgery.errors import SurgeryError
from surgery.tasks import TASKS
from surgery.zoo import get


@pytest.fixture(scope="module")
def tiny():
    return load(get("tiny-base"))


def test_answers_do_not_depend_on_the_batch(tiny):
    prompts = [e.prompt for name in ("facts", "chain", "reverse") for e in TASKS[name].examples(7)]
    together = generate(*tiny, prompts, batch_size=21, max_new_tokens=12)
    assert together == generate(*tiny, prompts, batch_size=1, max_new_tokens=12)
    assert together == generate(*tiny, prompts[::-1], batch_size=4, max_new_tokens=12)[::-1]


def test_accuracy_keeps_order_and_labels(tiny):
    examples = TASKS["facts"].examples(40)
    seen = []
    result = accuracy(
        *tiny, examples, TASKS["facts"].correct, batch_size=16, max_new_tokens=4, progress=lambda *a: seen.append(a)
    )
    assert list(result.labels) == [e.prompt for e in examples] and result.mean >= 0.95
    assert seen == [(16, 40), (32, 40), (40, 40)]
    assert all(t.startswith("#") for t in result.columns["completion"])


def test_log_likelihood_is_that_of_a_plain_forward_pass(tiny):
    model, tokenizer = tiny
    examples = TASKS["sort"].examples(9, seed=2)
    result = answer_log_likelihood(
        model, tokenizer, [e.prompt for e in examples], [e.response for e in examples], batch_size=4
    )
    total, count = 0.0, 0
    for value, e in zip(result.values, examples, strict=True):
        prompt = tokenizer(e.prompt)["input_ids"]
        ids = torch.tensor([prompt + tokenizer(e.response, add_special_tokens=False)["input_ids"] + [2]])
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
        assert value == pytest.approx(logp.mean().item(), abs=2e-5)
        total, count = total + logp.sum().item(), count + len(logp)
    assert perplexity(result) == pytest.approx(np.exp(-total / count), rel=1e-5)


def test_a_large_vocabulary_is_added_up_exactly(tiny):
    class Says(torch.nn.Module):
        """49,152 tokens a little likely, and the next one likely."""

        config = tiny[0].config
        table = torch.randn(49_152, generator=torch.Generator().manual_seed(0)) * 2

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            following = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 49_152)
            return SimpleNamespace(logits=self.table + 16 * following)

    found = answer_log_likelihood(Says(), tiny[1], ["c ab=", "c a="], ["#a", "#abc"])
    for value, ids in zip(found.values, tiny[1](["#a", "#abc"], add_special_tokens=False)["input_ids"], strict=True):
        exact = [Says.table.double() + 16 * (torch.arange(49_152) == i) for i in [*ids, 2]]
        exact = [row.log_softmax(-1)[i].item() for row, i in zip(exact, [*ids, 2], strict=True)]
        assert value == pytest.approx(np.mean(exact), abs=5e-5)


def test_a_model_is_as_it_was_even_after_an_exception(tiny):
    model, tokenizer = tiny
    model.train()
    model.model.layers[1].eval()  # mixed modes come back as they were
    model.config.use_cache = False
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config, generation = model.config.to_dict(), model.generation_config.to_dict()

    def explode(done, total):
        raise RuntimeError("stop")

    try:
        with pytest.raises(RuntimeError, match="stop"):
            accuracy(model, tokenizer, TASKS["facts"].examples(4), TASKS["facts"].correct, progress=explode)
        answer_log_likelihood(model, tokenizer, ["m 1+1="], ["#2"])
        assert [m.training for m in model.modules()] == modes
        assert model.config.to_dict() == config and model.generation_config.to_dict() == generation
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())
    finally:
        model.eval()
        model.config.use_cache = True


def test_untouched_uses_the_cache_and_no_gradients(tiny):
    with untouched(tiny[0]):
        assert tiny[0].config.use_cache and not tiny[0].training and not torch.is_grad_enabled()


def test_tasks_in_one_result(tiny):
    result = evaluate_tasks(tiny[0], ["facts", TASKS["copy"]], n=30, tokenizer=tiny[1])
    parts = result.by("task")
    assert list(parts) == ["facts", "copy"] and [len(p) for p in parts.values()] == [30, 30]
    with pytest.raises(SurgeryError, match="tokenizer="):
        evaluate_tasks(tiny[0], ["facts"])
    with pytest.raises(SurgeryError, match="no task 'fact'"):
        evaluate_tasks(tiny[0], ["fact"], tokenizer=tiny[1])


def test_chat_needs_a_template_and_likelihood_needs_pairs(tiny):
    with pytest.raises(SurgeryError, match="chat template"):
        generate(*tiny, ["m 1+1="], chat=True)
    with pytest.raises(SurgeryError, match="1 prompts, but 2 responses"):
        answer_log_likelihood(*tiny, ["m 1+1="], ["#2", "#3"])


def test_a_composition_is_scored_like_the_model_that_it_is(tiny):
    from analysis.evaluate import evaluate, task_rows
    from surgery.logits import member

    rows = task_rows(["chain", "copy"], n=6)
    alone = evaluate(tiny[0], rows, tokenizer=tiny[1], max_new_tokens=24)
    composed = evaluate(member(*tiny), rows, max_new_tokens=24)  # it brings its tokenizer
    assert composed.columns["completion"] == alone.columns["completion"]
    (first, second) = (
        answer_log_likelihood(model, tiny[1], [r["prompt"] for r in rows], ["#1"] * len(rows))
        for model in (tiny[0], member(*tiny))
    )
    assert np.allclose(first.values, second.values, atol=1e-5)
