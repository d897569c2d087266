"""DPO, with and without rationales, and ORPO: held against their equations."""

import math

import pytest
import torch
from small import Desk, batch_of, llama, moved, prepared
from torch.nn.functional import logsigmoid

from surgery.training import data
from surgery.training.objectives import DPO, ORPO
from surgery.training.policy import Policy


def value(objective, policy, batch):
    return float(objective.loss(policy, batch).value.detach())


def test_dpo_is_ln_2_at_the_reference():
    policy, batch = Policy(llama()), batch_of("pairs")
    DPO().prepare(batch, Desk(policy, policy.snapshot()))
    assert value(DPO(), policy, batch) == math.log(2)
    total, count = DPO().loss(policy, batch).metrics["margin"]
    assert float(total) == 0.0 and count == 8.0


def test_dpo_is_its_equation():
    objective = DPO(beta=0.3)
    policy, batch, _ = prepared(objective)
    gain = ((policy(batch).log_probs - batch["ref_log_probs"]) * batch.mask).sum(1).detach()
    expected = -logsigmoid(0.3 * (gain[::2] - gain[1::2])).mean()
    assert value(objective, policy, batch) == pytest.approx(float(expected), abs=1e-12)
    metrics = {k: float(t) / n for k, (t, n) in objective.loss(policy, batch).metrics.items()}
    assert metrics["margin"] == pytest.approx(0.3 * (metrics["chosen_log_ratio"] - metrics["rejected_log_ratio"]))


def test_dpo_raises_the_chosen_above_the_rejected():
    objective = DPO()
    policy, batch = Policy(llama()), batch_of("pairs")
    objective.prepare(batch, Desk(policy, policy.snapshot()))
    optimizer = torch.optim.Adam(policy.parameters(), 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        loss = objective.loss(policy, batch)
        loss.value.backward()
        optimizer.step()
    assert float(loss.value.detach()) < 0.3
    assert float(loss.metrics["pair_accuracy"][0]) == 8.0


TEMPLATE = "{prompt}a{chosen}b{rejected}c"


def test_rationales_add_their_mean_log_likelihood_given_both_completions():
    plain, told = DPO(), DPO(rationale=1.5, template=TEMPLATE)
    policy, batch, _ = prepared(told)
    rows = [
        {"prompt": TEMPLATE.format(**row), "completion": row["rationale"]}
        for row in batch.rows[::2]
    ]  # fmt: skip
    shown = data.demonstrations(rows, Desk(policy).tokenizer)
    nll = -(policy(shown).log_probs.detach() * shown.mask).sum(1) / shown.mask.sum(1)
    expected = value(plain, policy, batch) + 1.5 * float(nll.mean())
    assert value(told, policy, batch) == pytest.approx(expected, abs=1e-12)
    total, count = told.loss(policy, batch).metrics["rationale_nll"]
    assert count == float(shown.mask.sum())


def test_a_rationale_weight_of_zero_needs_no_rationales():
    batch = batch_of("pairs")
    for row in batch.rows:
        del row["rationale"]
    policy, batch, _ = prepared(DPO(rationale=0.0), batch=batch)
    assert math.isfinite(value(DPO(), policy, batch))


def test_rationales_of_chats_go_into_the_last_message():
    row = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    row |= {"chosen": "x", "rejected": "y", "rationale": "z"}
    assert DPO(template=TEMPLATE)._told(row) == {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "uaxbyc"}],
        "completion": "z",
    }
    assert row["prompt"][1]["content"] == "u"


def test_orpo_is_its_equation():
    policy, batch, _ = prepared(ORPO(lam=0.4))
    mean = ((policy(batch).log_probs * batch.mask).sum(1) / batch.mask.sum(1)).detach()
    odds = mean.exp() / (1 - mean.exp())
    expected = -mean[::2] - 0.4 * logsigmoid((odds[::2] / odds[1::2]).log())
    assert value(ORPO(lam=0.4), policy, batch) == pytest.approx(float(expected.mean()), abs=1e-12)
    assert not ORPO().uses_reference


@pytest.mark.parametrize("log_prob", [0.0, -1e-9, -50.0])
def test_orpo_survives_certainty(log_prob):
    batch = batch_of("pairs", rows=1)
    scores = torch.full(batch.mask.shape, log_prob, requires_grad=True)
    loss = ORPO().of_scores(type("Scores", (), {"log_probs": scores})(), batch)
    loss.value.backward()
    assert loss.value.isfinite() and scores.grad.isfinite().all()


def test_pairs_stay_together_in_micro_batches():
    for objective in (DPO(), ORPO()):
        assert objective.whole_groups
        policy, batch, _ = prepared(objective)
        for micro in batch.chunks(4):
            assert micro.group == 2 and torch.equal(micro.prompt_ids[::2], micro.prompt_ids[1::2])
        moved(policy, 0.1, 5)
        parts = sum(value(objective, policy, micro) for micro in batch.chunks(4))
        assert parts == pytest.approx(value(objective, policy, batch), abs=1e-12)
