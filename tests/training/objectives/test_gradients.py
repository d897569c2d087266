"""Every objective's gradient against finite differences; micro-batches, order and padding against the whole batch."""

import pytest
import torch
from small import batch_of, gradient, prepared

from surgery.training.objectives import OBJECTIVES, parse

VARIANTS = {
    **{name: {name: {}} for name in OBJECTIVES},
    "grpo unbiased": {"grpo": {"beta": 0.3, "kl_unbiased": True, "entropy": 0.1, "truncated": "mask"}},
    "grpo sequence": {"grpo": {"beta": 0.3, "ratio": "sequence", "kl_unbiased": True}},
    "reinforce": {"rloo": {"advantage": "plain"}},
    "masked thought": {"masked_thought": {"mask_rate": 0.5, "drop_attention": True, "token": "random"}},
    "dpo rationale": {"dpo": {"rationale": 1.5, "beta": 0.7, "template": "{prompt}a{chosen}b{rejected}"}},
    "orpo strong": {"orpo": {"lam": 3.0}},
    "sum": [{"grpo": {}, "weight": 0.7}, {"ppo": {}, "weight": 0.3}],
    "sft per row": {"sft": {"per_row": True}},
}


@pytest.mark.parametrize("written", VARIANTS.values(), ids=VARIANTS)
def test_gradient_is_that_of_finite_differences(written):
    objective = parse(written)
    policy, batch, _ = prepared(objective)
    found = gradient(objective, policy, batch)
    assert found.abs().max() > 1e-3
    parameters = list(policy.parameters())
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    for seed in range(3):
        direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed), dtype=start.dtype)
        direction /= direction.norm()
        sides = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(start + sign * 1e-5 * direction, parameters)
            with torch.no_grad():
                sides.append(float(objective.loss(policy, batch).value))
        assert (sides[0] - sides[1]) / 2e-5 == pytest.approx(float(found @ direction), abs=1e-8)


# convention 8: micro-batches of any size add up to the batch (BNPO by its definition does not)
@pytest.mark.parametrize("written", [v for k, v in VARIANTS.items() if k != "bnpo"], ids=lambda v: str(v)[:40])
def test_micro_batches_add_up_to_the_batch(written):
    objective = parse(written)
    policy, batch, _ = prepared(objective)
    whole = gradient(objective, policy, batch)
    for rows in (1, 3, 4) if not objective.whole_groups else (2, 6):
        assert (gradient(objective, policy, *batch.chunks(rows)) - whole).abs().max() < 1e-12


@pytest.mark.parametrize("name", OBJECTIVES)
def test_order_of_groups_changes_nothing(name):
    """And of rows in a group, where rows are not pairs."""
    objective = parse(name)
    batch = batch_of(objective.kind)
    policy, first, _ = prepared(objective, batch=batch)
    whole = gradient(objective, policy, first)
    order = torch.arange(len(batch)).view(-1, batch.group).flip(0)
    if batch.kind == "rollouts":
        assert not torch.equal(order, order.flip(1))
        order = order.flip(1)
    if name == "masked_thought":  # noise is a row's own, by its place in the draw
        first = first.select(order.flatten())
    else:
        shuffled = batch_of(objective.kind).select(order.flatten())
        shuffled.group = batch.group
        _, first, _ = prepared(objective, batch=shuffled)
    assert (gradient(objective, policy, first) - whole).abs().max() < 1e-12


# convention 1: padding on either side changes nothing
@pytest.mark.parametrize("written", VARIANTS.values(), ids=VARIANTS)
def test_padding_changes_nothing(written):
    objective = parse(written)
    policy, batch, _ = prepared(objective)
    pad = torch.nn.functional.pad
    wide = batch.select(range(len(batch)))
    wide.columns = {k: pad(v, (0, 2)) if v.dim() == 2 else v for k, v in batch.columns.items()}
    wide.prompt_ids, wide.prompt_mask = pad(batch.prompt_ids, (3, 0)), pad(batch.prompt_mask, (3, 0))
    wide.completion_ids, wide.mask = pad(batch.completion_ids, (0, 2)), pad(batch.mask, (0, 2))
    assert (gradient(objective, policy, wide) - gradient(objective, policy, batch)).abs().max() < 1e-12
