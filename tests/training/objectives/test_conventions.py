"""The conventions that decide correctness, where an objective can break them."""

import math

import pytest
import torch
from small import EOS, batch_of, gradient, llama, prepared

from surgery.training.batch import Batch
from surgery.training.log import rollout_metrics
from surgery.training.objectives import DAPO, GRPO, OBJECTIVES, SFT, DrGRPO
from surgery.training.policy import Policy, without_dropout

ON_POLICY = [name for name, cls in OBJECTIVES.items() if cls().kind == "rollouts"]


# 3. Truncated completions: kept with their reward, or without loss while they stay in their group's mean.
def test_truncated_rows_lose_their_loss_and_keep_their_vote():
    kept, masked = GRPO(beta=0.0), GRPO(beta=0.0, truncated="mask")
    policy, batch, _ = prepared(kept)
    _, without, _ = prepared(masked)
    cut = batch["truncated"]
    assert 0 < int(cut.sum()) < len(batch)
    assert torch.equal(without["advantage"], batch["advantage"])
    assert not without.mask[cut].any() and torch.equal(without.mask[~cut], batch.mask[~cut])
    assert without.total_rows == len(batch)
    rest = without.select((~cut).nonzero().flatten())
    torch.testing.assert_close(gradient(masked, policy, without), gradient(kept, policy, rest))


def test_the_truncated_share_is_logged():
    batch = batch_of()
    batch["sampled_log_probs"] = torch.zeros(batch.mask.shape)
    assert rollout_metrics(batch)["truncated"] == pytest.approx(float(batch["truncated"].float().mean()))


# 4. An empty completion has one loss token, its end mark; rows and batches without loss tokens give 0, never 0/0.
@pytest.mark.parametrize("name", OBJECTIVES)
def test_rows_without_loss_tokens_give_zero(name):
    objective = OBJECTIVES[name]()
    policy, batch, _ = prepared(objective)
    pair = objective.kind == "pairs"
    some = batch.select(range(len(batch)))
    some.mask = batch.mask.clone()
    some.mask[:2] = 0
    assert gradient(objective, policy, some).isfinite().all()
    if not pair and name != "bnpo":  # the first two rows have no part in it (BNPO weighs by rows)
        rest = batch.select(range(2, len(batch)))
        rest.total_tokens = batch.total_tokens
        torch.testing.assert_close(gradient(objective, policy, some), gradient(objective, policy, rest))
    none = batch.select(range(len(batch)))
    none.mask = torch.zeros_like(batch.mask)
    loss = objective.loss(policy, none.with_totals())
    assert loss.value.isfinite() and (pair or float(loss.value.detach()) == 0.0)
    assert pair or not gradient(objective, policy, none.with_totals()).any()


def test_an_empty_completion_is_one_loss_token():
    policy = Policy(llama())
    batch = Batch.of([[0, 1], [2]], [[EOS], [3, EOS]], pad=EOS, kind="demonstrations")
    assert batch.mask.tolist() == [[1, 0], [1, 1]]  # though the padding is the end mark: lengths decide (convention 2)
    alone = float(policy(batch.select([0])).log_probs.detach())
    loss = SFT(per_row=True).loss(policy, batch.select([0]).with_totals())
    assert float(loss.value.detach()) == pytest.approx(-alone)


# 5. All-equal rewards: no gradient at all.
@pytest.mark.parametrize("name", [n for n in ON_POLICY if n != "ppo"])
def test_groups_without_variance_give_no_gradient(name):
    objective = OBJECTIVES[name](**({"beta": 0.0} if name == "grpo" else {}))
    batch = batch_of()
    batch["reward"] = torch.full((8,), 0.1, dtype=torch.float64)
    policy, batch, _ = prepared(objective, batch=batch)
    assert not gradient(objective, policy, batch).any()
    batch["sampled_log_probs"] = torch.zeros(batch.mask.shape)
    assert rollout_metrics(batch)["zero_variance"] == 1.0


# 6. A row that no function scored has no gradient.
@pytest.mark.parametrize("name", ON_POLICY)
def test_unscored_rows_have_no_gradient(name):
    objective = OBJECTIVES[name](**({"beta": 0.0} if name == "grpo" else {}))
    batch = batch_of()
    batch["reward"][[1, 6]] = math.nan
    policy, batch, _ = prepared(objective, batch=batch)
    assert not gradient(objective, policy, batch.select([1, 6])).any()
    assert gradient(objective, policy, batch).isfinite().all() and gradient(objective, policy, batch).any()


# 9. Log-probabilities, KL and entropy are those of softmax(logits / T).
def test_temperature_divides_logits_everywhere():
    model, batch = llama(), batch_of()
    batch.temperature = 0.7
    scores = Policy(model, share_prompts=False)(batch, entropy=True)
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], 1)
    mask = torch.cat([batch.prompt_mask, batch.attended], 1)
    logits = model(ids, attention_mask=mask.long()).logits[:, batch.prompt_ids.shape[1] - 1 : -1] / 0.7
    log = logits.log_softmax(-1)
    expected = log.gather(-1, batch.completion_ids[..., None])[..., 0] * batch.attended
    torch.testing.assert_close(scores.log_probs, expected)
    torch.testing.assert_close(scores.entropy, -(log.exp() * log).sum(-1) * batch.attended)


# 10. No dropout in the ratio: old and new log-probabilities come from the same mode.
def test_the_ratio_is_one_whatever_the_dropout():
    model = llama(attention_dropout=0.5)
    policy, batch = Policy(model), batch_of()
    model.train()
    noisy = policy(batch).log_probs
    assert not torch.equal(noisy, policy(batch).log_probs)
    with without_dropout(policy):
        assert torch.equal(policy(batch).log_probs, policy(batch).log_probs)
    assert model.model.layers[0].self_attn.attention_dropout == 0.5


# 11. On-policy: the ratio is 1, the loss -mean A, and the gradient that of -A log pi all the same.
@pytest.mark.parametrize("objective", [GRPO(beta=0.0), DAPO(), DrGRPO()], ids=lambda o: type(o).__name__)
def test_a_loss_of_zero_has_a_gradient(objective):
    policy, batch, _ = prepared(objective, batch=batch_of(equal=6))
    del batch.columns["old_log_probs"]
    loss = objective.loss(policy, batch)
    assert float(loss.value.detach()) == pytest.approx(0, abs=1e-7) and "clipped" not in loss.metrics
    found = gradient(objective, policy, batch)
    policy.zero_grad()
    (-(batch["advantage"][:, None] * policy(batch).log_probs * batch.mask).sum() / batch.mask.sum()).backward()
    by_hand = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(found, by_hand)
    assert found.norm() > 0.1
    with_old = batch.select(range(len(batch)))
    with_old["old_log_probs"] = policy(batch).log_probs.detach()
    torch.testing.assert_close(gradient(objective, policy, with_old), found)


def test_the_loss_of_an_on_policy_batch_is_minus_the_mean_advantage():
    objective = GRPO(beta=0.0)
    batch = batch_of()
    batch["advantage"] = torch.arange(8.0)  # a source may give them
    policy, batch, _ = prepared(objective, batch=batch)
    del batch.columns["old_log_probs"]
    assert float(objective.loss(policy, batch).value.detach()) == pytest.approx(-3.5)
    assert batch["advantage"].tolist() == list(range(8))
