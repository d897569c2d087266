"""PPO: every quantity on the position that predicts; its losses by hand; a value that is known."""

import pytest
import torch
from small import Desk, batch_of, llama, prepared

from surgery.training.batch import Batch
from surgery.training.objectives import PPO
from surgery.training.objectives.ppo import ValueHead, explained_variance, terminal
from surgery.training.policy import Policy


def ready(objective, batch=None):
    policy = Policy(llama())
    policy.extras.update(objective.modules(policy))
    batch = batch_of() if batch is None else batch
    desk = Desk(policy, policy.snapshot() if objective.uses_reference else None)
    return policy, batch, desk


def test_a_value_knows_the_prompt_and_not_the_token_it_precedes():
    """The off-by-one that trains and looks fine: the value of position t may depend on tokens before t alone."""
    policy, _, _ = ready(PPO(kl_coef=0.0))
    torch.nn.init.normal_(policy.extras["value"].weight)
    one, other = (Batch.of([[0, 1]], [[2, token, 4]]) for token in (3, 5))
    a, b = policy(one, values=True).values[0], policy(other, values=True).values[0]
    assert torch.equal(a[:2], b[:2]) and a[2] != b[2]


def test_the_reward_is_on_the_last_token():
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]])
    found = terminal(torch.tensor([2.0, 3.0, 4.0, 5.0]), mask)
    assert found.tolist() == [[0, 0, 2], [3, 0, 0], [0, 4, 0], [0, 0, 0]]


def test_the_head_begins_at_zero_in_float32_and_stays_out_of_half_precision():
    head = PPO().modules(Policy(llama(dtype=torch.bfloat16)))["value"]
    assert head.weight.dtype == torch.float32 and not head.weight.any() and not head.bias.any()
    assert ValueHead(4)(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.ones(2, 16)).dtype == torch.float32
    policy, batch, desk = ready(PPO(kl_coef=0.0))
    assert not desk.scores(batch, values=True)["values"].any()


def test_kl_is_paid_by_every_token_and_the_reward_comes_last():
    objective = PPO(kl_coef=0.5, gamma=1.0, lam=1.0)
    policy, batch, desk = ready(objective)
    with torch.no_grad():
        policy.model.lm_head.weight *= 1.5  # away from the reference
    objective.prepare(batch, desk)
    kl = desk.scores(batch)["log_probs"] - desk.reference_log_probs(batch)
    for i, n in enumerate(batch.lengths.tolist()):
        for t in range(n):  # the value is 0: the return is what is still to come
            expected = float(batch["reward"][i]) - 0.5 * float(kl[i, t:n].sum())
            assert float(batch["returns"][i, t]) == pytest.approx(expected, abs=1e-6)
    assert desk.noted["kl"] == pytest.approx(float((kl * batch.mask).sum() / batch.mask.sum()))
    assert batch["advantage"] is batch["advantage/ppo"]


def test_without_kl_no_reference_is_made_nor_asked():
    objective = PPO(kl_coef=0.0)
    policy, batch, desk = ready(objective)
    assert not objective.uses_reference and desk.reference is None
    objective.prepare(batch, desk)
    assert desk.passes == 1  # old log-probabilities and values in one


def test_advantages_are_whitened_over_all_tokens():
    objective = PPO(kl_coef=0.0)
    policy, batch, desk = ready(objective)
    objective.prepare(batch, desk)
    there = batch["advantage"][batch.mask > 0]
    assert float(there.mean()) == pytest.approx(0, abs=1e-6) and float(there.std()) == pytest.approx(1, abs=1e-6)


def test_losses_are_their_equations():
    objective = PPO(kl_coef=0.0, clip=0.1, value_clip=0.05, alpha=3.0)
    policy, batch, _ = prepared(objective)
    with torch.no_grad():
        scores = policy(batch, values=True)
    policy_loss = value_loss = 0.0
    for i, n in enumerate(batch.lengths.tolist()):
        for t in range(n):
            a, ret, old = (float(batch[k][i, t]) for k in ("advantage/ppo", "returns", "old_values"))
            rho = float((scores.log_probs[i, t] - batch["old_log_probs"][i, t]).exp())
            v = float(scores.values[i, t])
            policy_loss += max(-a * rho, -a * min(max(rho, 0.9), 1.1)) / n / 8
            near = min(max(v, old - 0.05), old + 0.05)
            value_loss += 0.5 * max((v - ret) ** 2, (near - ret) ** 2) / n / 8
    loss = objective.loss(policy, batch)
    assert float(loss.value.detach()) == pytest.approx(policy_loss + 3.0 * value_loss, abs=1e-9)
    assert float(loss.metrics["policy_loss"][0]) == pytest.approx(policy_loss)
    assert 0 < float(loss.metrics["clipped"][0]) < loss.metrics["clipped"][1]


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2], [3, 9]]), torch.tensor([[1.0, 1], [1, 0]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((2, 2), 2.0), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(2, 2), mask) == 0.0


def test_values_learn_the_known_optimum_of_a_bandit():
    """The model stands still, the head learns. Token a is drawn with probability p and pays 1, then the end comes:
    V = p before the token, whatever it is, and 1 or 0 behind it."""
    objective = PPO(kl_coef=0.0, lam=1.0, value_clip=10.0)
    rows = [[0, 9]] * 6 + [[1, 9]] * 2  # a, a, a, a, a, a, b, b: p = 0.75
    policy = Policy(llama())
    policy.extras.update(objective.modules(policy))
    policy.model.requires_grad_(False)
    optimizer = torch.optim.Adam(policy.extras.parameters(), 0.05)
    desk = Desk(policy)
    for _ in range(150):
        batch = Batch.of([[2, 3]] * 8, rows)
        batch["reward"] = torch.tensor([1.0] * 6 + [0.0] * 2, dtype=torch.float64)
        objective.prepare(batch, desk)
        optimizer.zero_grad()
        objective.loss(policy, batch).value.backward()
        optimizer.step()
    values = policy(batch, values=True).values.detach()
    assert values[:, 0].tolist() == pytest.approx([0.75] * 8, abs=0.03)
    assert values[:, 1].tolist() == pytest.approx([1.0] * 6 + [0.0] * 2, abs=0.03)
    assert desk.noted["explained_variance"] == pytest.approx(0.5, abs=0.02)  # all behind the token, none before it
