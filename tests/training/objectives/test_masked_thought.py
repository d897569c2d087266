"""Masked thought: what is replaced, when, and that the noise is a row's own."""

from dataclasses import replace

import pytest
import torch
from small import EOS, PAD, VOCABULARY, Desk, batch_of, llama, prepared

from surgery.errors import SurgeryError
from surgery.training.objectives import SFT, MaskedThought
from surgery.training.policy import Policy
from surgery.training.schedules import Linear


class Seen:
    """The policy, which remembers the batch that it was given."""

    def __init__(self, policy):
        self.policy = policy

    def __call__(self, batch, **asks):
        self.batch = batch
        return self.policy(batch, **asks)


def inputs(objective, step=50, chunks=0):
    policy, batch, _ = prepared(objective, step=step)
    seen, found = Seen(policy), []
    for micro in batch.chunks(chunks) if chunks else [batch]:
        objective.loss(seen, micro)
        read = seen.batch.completion_ids if seen.batch.inputs is None else seen.batch.inputs
        found += [row[:n].tolist() for row, n in zip(read, micro.lengths.tolist(), strict=True)]
        assert torch.equal(seen.batch.prompt_ids, micro.prompt_ids)  # never the prompt
        assert torch.equal(seen.batch.completion_ids, micro.completion_ids)  # targets stay
        assert torch.equal(seen.batch.mask, micro.mask)
    return found, [row[:n].tolist() for row, n in zip(batch.completion_ids, batch.lengths.tolist(), strict=True)]


@pytest.mark.parametrize(("token", "stands"), [("pad", {PAD}), ("new", {VOCABULARY - 1}), (3, {3})])
def test_hidden_tokens_are_replaced(token, stands):
    found, real = inputs(MaskedThought(mask_rate=0.5, token=token))
    pairs = [(f, r) for row, was in zip(found, real, strict=True) for f, r in zip(row, was, strict=True)]
    changed = [f for f, r in pairs if f != r]
    assert set(changed) == stands and 0.2 < len(changed) / len(pairs) < 0.8
    assert set(sum(inputs(MaskedThought(mask_rate=1.0, token=token))[0], [])) == stands


def test_random_tokens_are_of_the_whole_vocabulary():
    found, _ = inputs(MaskedThought(mask_rate=1.0, token="random"))
    assert len(set(sum(found, []))) > 5 and max(sum(found, [])) < VOCABULARY


def test_noise_does_not_depend_on_how_a_batch_is_cut():
    objective = MaskedThought(mask_rate=0.5, token="random")
    assert inputs(objective)[0] == inputs(objective, chunks=3)[0] == inputs(objective, chunks=1)[0]


def test_noise_of_a_row_does_not_depend_on_the_others():
    """Not on their number, nor on the width of the batch."""
    objective = MaskedThought(mask_rate=0.5, token="random")
    desk, batch = Desk(Policy(llama())), batch_of("demonstrations")
    few = batch.select([0, 1])
    few.columns = {}
    for rows in (batch, few):
        objective.prepare(rows, desk)
    for name, values in few.columns.items():
        width = int(few.lengths.max())
        there = few.attended
        assert torch.equal(values[there], batch[name][:2, :width][there])


def test_the_rate_is_that_of_the_update_and_more_hides_what_less_hid():
    objective = MaskedThought(mask_rate=Linear(0.0, 1.0))
    policy, batch, _ = prepared(objective)
    hidden = []
    for step in (0, 30, 60, 100):
        micro = replace(batch, step=step, steps=100)
        total, count = objective.loss(policy, micro).metrics["masked"]
        hidden.append(float(total) / count)
    assert hidden[0] == 0 and hidden[-1] == 1 and hidden == sorted(hidden) and len(set(hidden)) == 4


def test_the_default_rate_rises_over_two_thirds_of_the_run():
    rate = MaskedThought().mask_rate
    assert [round(rate.at(step, 300), 3) for step in (0, 100, 200, 299)] == [0.0, 0.2, 0.4, 0.4]


def test_hiding_tokens_changes_the_loss_of_later_tokens_only():
    objective = MaskedThought(mask_rate=1.0)
    policy, batch, _ = prepared(objective)
    plain, seen = policy(batch).log_probs, Seen(policy)
    objective.loss(seen, batch)
    masked = policy(seen.batch).log_probs
    assert torch.equal(masked[:, 0], plain[:, 0])  # predicted from the prompt alone
    later = batch.attended[:, 1:]
    assert (masked - plain)[:, 1:][later].abs().min() > 0


def test_without_attention_to_them_hidden_tokens_do_not_matter():
    batch = batch_of("demonstrations")
    policy = Policy(llama())
    hidden = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found = []
    for token in (0, 5):
        ids = torch.where(hidden, token, batch.completion_ids)
        found.append(policy(replace(batch, inputs=ids, unseen=hidden)).log_probs)
    after_seen = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1).logical_not() & batch.attended
    assert (found[0] - found[1])[after_seen].abs().max() == 0.0  # a hidden token's own position still reads it
    nothing = policy(replace(batch, unseen=torch.zeros_like(hidden))).log_probs
    torch.testing.assert_close(nothing, policy(batch).log_probs)
    assert (found[0] - policy(batch).log_probs).abs().max() > 1e-3


def test_drop_attention_takes_hidden_tokens_out_of_attention():
    objective = MaskedThought(mask_rate=0.5, drop_attention=True)
    policy, batch, _ = prepared(objective)
    seen = Seen(policy)
    loss = objective.loss(seen, batch)
    assert torch.equal(seen.batch.unseen & batch.attended, (seen.batch.inputs == PAD) & batch.attended)
    with_attention = MaskedThought(mask_rate=0.5).loss(policy, batch)
    assert abs(float(loss.value.detach() - with_attention.value.detach())) > 1e-3


def test_a_token_beyond_the_embedding_is_refused():
    objective = MaskedThought(token="new")
    with pytest.raises(SurgeryError, match="embedding has 10 rows"):
        objective.prepare(batch_of("demonstrations"), Desk(Policy(llama(vocabulary=VOCABULARY - 1))))


def test_the_end_mark_may_be_hidden_and_is_still_learned():
    objective = MaskedThought(mask_rate=1.0)
    policy, batch, _ = prepared(objective)
    last = batch.completion_ids.gather(1, batch.lengths[:, None] - 1)
    assert (last == EOS).all()
    loss = objective.loss(policy, batch)
    assert loss.metrics["nll"][1] == float(batch.lengths.sum()) == SFT().loss(policy, batch).metrics["nll"][1]
