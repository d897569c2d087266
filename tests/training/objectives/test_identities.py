"""What must reduce to what, and how objectives add up."""

import pytest
import torch
from small import batch_of, gradient, llama, prepared

from surgery.errors import SurgeryError
from surgery.training.objectives import (
    DAPO,
    DPO,
    GRPO,
    OBJECTIVES,
    PPO,
    RLOO,
    SFT,
    DrGRPO,
    MaskedThought,
    Objective,
    Sum,
    name_of,
    parse,
)
from surgery.training.policy import Policy
from surgery.training.schedules import Linear


def both(one, other, **batch):
    """Value and gradient of two objectives on the same policy and batch, prepared for each."""
    found = []
    for objective in (one, other):
        policy, rows, _ = prepared(objective, batch=batch_of(objective.kind, **batch))
        found.append((float(objective.loss(policy, rows).value.detach()), gradient(objective, policy, rows)))
    return found


def same(one, other, factor=1.0, **batch):
    (a, ga), (b, gb) = both(one, other, **batch)
    assert ga.abs().max() > 1e-3
    assert a == pytest.approx(factor * b, abs=1e-7)  # advantages are float32
    torch.testing.assert_close(ga, factor * gb, rtol=1e-6, atol=1e-7)


def test_masked_thought_at_rate_0_is_sft():
    for options in ({}, {"token": "random"}, {"drop_attention": True}, {"per_row": True}):
        one, other = MaskedThought(mask_rate=0.0, **options), SFT(per_row=options.get("per_row", False))
        (a, ga), (b, gb) = both(one, other)
        assert a == b and torch.equal(ga, gb)
    scheduled = MaskedThought(mask_rate=Linear(0.0, 0.4))
    policy, batch, _ = prepared(scheduled, step=0)
    assert torch.equal(gradient(scheduled, policy, batch), gradient(SFT(), policy, batch))


def test_dapo_with_equal_lengths_is_grpo():
    same(DAPO(clip_high=0.2), GRPO(beta=0.0), equal=4)
    (_, ga), (_, gb) = both(DAPO(clip_high=0.2), GRPO(beta=0.0))
    assert (ga - gb).abs().max() > 1e-3  # and with unequal lengths it isn't


def test_dr_grpo_is_grpo_times_the_deviation_when_all_deviations_are_equal():
    def batch():
        found = batch_of(equal=6)
        found["reward"] = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 1], dtype=torch.float64)
        return found

    found = []
    for objective in (DrGRPO(), GRPO(beta=0.0)):
        policy, rows, _ = prepared(objective, batch=batch())
        found.append(gradient(objective, policy, rows))
    torch.testing.assert_close(found[0], found[1] * ((1 / 3) ** 0.5 + 1e-4), rtol=1e-5, atol=1e-8)


def test_rloo_is_centred_reinforce_times_g_over_g_minus_1():
    same(RLOO(), RLOO(advantage="group_centred"), factor=4 / 3)


def test_dapo_without_groups_of_tokens_is_dr_grpo_up_to_its_constant():
    """8 rows of 6 tokens, constant 6: both divide by 48."""
    same(DAPO(clip_high=0.2, advantage="group_centred"), DrGRPO(), equal=6)


# ---- a reference is made only where it is used


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_kl_weight_no_reference(name):
    fields = OBJECTIVES[name].__dataclass_fields__
    for key in ("beta", "kl_coef"):
        if key in fields and name != "dpo":
            objective = OBJECTIVES[name](**{key: 0.0})
            assert not objective.uses_reference and not (0.5 * objective + SFT()).uses_reference
            assert OBJECTIVES[name](**{key: 0.1}).uses_reference
            prepared(objective)  # with no reference at hand
    assert DPO().uses_reference and not SFT().uses_reference


def test_the_reference_is_asked_once_a_batch():
    for objective in (GRPO(beta=0.1), DPO()):
        policy, batch, desk = prepared(objective)
        before = desk.passes
        objective.loss(policy, batch)
        objective.loss(policy, batch)
        assert desk.passes == before


def test_an_edited_models_reference_is_the_edited_model():
    """Not what its name would load."""
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 1.0
    model.config._name_or_path = "somewhere/else"
    policy, batch = Policy(model), batch_of()
    with torch.no_grad():
        edited = policy(batch).log_probs
        reference = policy.snapshot()
        model.lm_head.weight *= 2
        assert torch.equal(reference(batch).log_probs, edited)
        assert not torch.equal(policy(batch).log_probs, edited)
    assert not any(p.requires_grad for p in reference.parameters())


# ---- sums


def test_a_sum_of_one_is_itself():
    for name in OBJECTIVES:
        objective = OBJECTIVES[name]()
        policy, batch, _ = prepared(objective)
        assert torch.equal(gradient(Sum(((1.0, objective),)), policy, batch), gradient(objective, policy, batch))


def test_parts_are_weighted_by_numbers_and_schedules():
    one, other = GRPO(beta=0.1), DrGRPO()  # whose advantages differ
    both_ways = 0.7 * one + other * Linear(0.0, 0.6)
    policy, batch, _ = prepared(both_ways, step=50)
    losses = []
    for part in (one, other):
        _, rows, _ = prepared(part)
        losses.append(float(part.loss(policy, rows).value.detach()))
    found = float(both_ways.loss(policy, batch).value.detach())
    assert found == pytest.approx(0.7 * losses[0] + 0.3 * losses[1], abs=1e-12)
    nested = 2.0 * (0.5 * both_ways)
    assert float(nested.loss(policy, batch).value.detach()) == pytest.approx(found)


class Counted:
    def __init__(self, policy):
        self.policy, self.asked = policy, []

    def __call__(self, batch, **asks):
        self.asked.append(asks)
        return self.policy(batch, **asks)


def test_parts_that_read_the_same_batch_share_a_pass():
    objective = 0.5 * GRPO() + 0.3 * DrGRPO(entropy=0.1) + 0.2 * PPO()
    policy, batch, _ = prepared(objective)
    counted = Counted(policy)
    loss = objective.loss(counted, batch)
    assert counted.asked == [{"entropy": True, "values": True}]
    assert {"kl", "value_loss", "policy_entropy", "dr_grpo/clipped", "ppo/clipped"} <= set(loss.metrics)


def test_masked_thought_beside_sft_leaves_its_inputs_alone():
    objective = 0.5 * MaskedThought(mask_rate=1.0) + 0.5 * SFT()
    policy, batch, _ = prepared(objective)
    expected = 0.5 * float(SFT().loss(policy, batch).value)
    expected += 0.5 * float(MaskedThought(mask_rate=1.0).loss(policy, batch).value)
    assert float(objective.loss(policy, batch).value) == pytest.approx(expected, abs=1e-12)


def test_a_part_that_asks_for_more_than_it_said_gets_it():
    class Curious(Objective):
        @property
        def kind(self):
            return "demonstrations"

        def loss(self, policy, batch):
            assert policy(batch, hidden=True).hidden is not None
            return SFT().loss(policy, batch)

    objective = SFT() + Curious()
    policy, batch, _ = prepared(SFT())
    assert float(objective.loss(policy, batch).value) == pytest.approx(2 * float(SFT().loss(policy, batch).value))


def test_parts_read_the_batches_of_their_kind():
    objective = 0.7 * GRPO(beta=0.0) + 0.3 * SFT()
    assert objective.kind == "rollouts+demonstrations" and not objective.whole_groups
    assert (SFT() + DPO()).whole_groups and (SFT() + DPO()).uses_reference
    policy, batch, _ = prepared(SFT())
    assert float(objective.loss(policy, batch).value) == pytest.approx(0.3 * float(SFT().loss(policy, batch).value))


# ---- as a recipe writes them


def test_recipes_words_are_parsed_as_their_annotations_say():
    assert parse("grpo") == GRPO() and parse({"grpo": None}) == GRPO() and parse(GRPO()) == GRPO()
    assert parse({"gspo": {"clip_low": "3e-4"}}).clip_low == 3e-4  # YAML reads 3e-4 as a text
    scheduled = parse({"grpo": {"beta": {"linear": {"start": 0.1, "end": 0}}}})
    assert scheduled.beta == Linear(0.1, 0) and scheduled.uses_reference
    mixed = parse([{"dapo": {}, "weight": {"linear": {"end": 0.5}}}, "sft"])
    assert [name_of(term) for _, term in mixed.terms()] == ["dapo", "sft"]
    assert parse({"masked_thought": {"token": 3, "mask_rate": 0.2}}) == MaskedThought(token=3, mask_rate=0.2)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("gppo", "no objective 'gppo'"),
        ({"grpo": {"bta": 1}}, "no parameter 'bta'"),
        ({"grpo": {"beta": "much"}}, "`beta` is 'much'"),
        ({"grpo": {"ratio": "row"}}, "`ratio` is 'row'"),
        ({"grpo": {"beta": {"lin": {}}}}, "no schedule 'lin'"),
        ({"dr_grpo": {"length": 1.5}}, "`length` is 1.5"),
        ({"grpo": {}, "sft": {}}, "a name"),
        ([], "empty list"),
        (7, "a name"),
    ],
)
def test_wrong_words_are_refused_in_a_sentence(written, said):
    with pytest.raises(SurgeryError, match=said):
        parse(written)


@pytest.mark.parametrize(
    ("objective", "settings", "said"),
    [
        (GRPO(), {"group": 1}, "group of 1"),
        (0.5 * SFT() + GRPO(), {"group": 1}, "group of 1"),
        (GRPO(advantage="best"), {"group": 4}, "no advantage 'best'"),
        (DPO(rationale=1.0), {"group": 1, "columns": {"prompt", "chosen", "rejected"}}, "column 'rationale'"),
        (MaskedThought(token="blank"), {}, "`token` is 'blank'"),
        (PPO(lam=1.5), {"group": 1}, "`lam` is 1.5"),
    ],
)
def test_impossible_combinations_are_refused(objective, settings, said):
    with pytest.raises(SurgeryError, match=said):
        objective.check(settings)


def test_possible_ones_are_not():
    GRPO(advantage="plain").check({"group": 1})
    PPO().check({"group": 1})
    DPO(rationale=1.0).check({"columns": None})
