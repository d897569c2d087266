"""Sources that draw rollouts: dynamic sampling, the pass-rate band, prefixes, ReLIFT's buffer, several at once."""

import json

import pytest
import torch
from scripted import Scripted, draw, right, rows, shape, trainer
from tiny_runs import tokenizer

from surgery.errors import SurgeryError
from surgery.training.batch import Batch
from surgery.training.data import completion_ids
from surgery.training.plan import plan
from surgery.training.recipe import make
from surgery.training.sources import Prefix, joined
from surgery.training.sources.prefix import uncertain

ROLLOUTS = {"prompts": 4, "group": 2, "max_new_tokens": 8}


def answer(prompt):
    return f"#{prompt[2]}{prompt[2]}"


def half(prompt, g):
    """Right in the first of each group only."""
    return answer(prompt) if g == 0 else "#x"


def never(prompt, g):
    return "#x"


def sometimes(prompt, g):
    """Groups of a, c, e, ... differ; those of b, d, ... are all right."""
    return half(prompt, g) if prompt[2] in "acegik" else answer(prompt)


# ---- joined


def test_joined_batches_are_one_batch_of_all_rows():
    parts = [([[5], [6, 7]], [[1, 2, 3], [4]]), ([[8, 9, 10], [11]], [[1], [2, 3]])]
    made = [Batch.of(p, c, rows=[{"i": len(x)} for x in p], group=2) for p, c in parts]
    for batch in made:
        batch["reward"] = torch.arange(2.0)
        batch["sampled_log_probs"] = -batch.mask
    whole = joined(made)
    expected = Batch.of(*([x for part in parts for x in part[i]] for i in range(2)), group=2)
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "lengths", "mask"):
        assert torch.equal(getattr(whole, name), getattr(expected, name)), name
    assert (whole.total_rows, whole.total_tokens) == (4, expected.total_tokens)
    assert whole["reward"].tolist() == [0, 1, 0, 1] and torch.equal(whole["sampled_log_probs"], -whole.mask)
    assert [row["i"] for row in whole.rows] == [1, 2, 3, 1]


# ---- dynamic sampling


def test_dynamic_draws_until_enough_groups_differ():
    engine = trainer(Scripted(sometimes), objective="dapo", source={"dynamic": {"metric": "right"}})
    (update,) = draw(engine)
    batch = update.batches["rollouts"]
    assert len(batch) == 8 and batch.group == 2
    assert batch["reward"].tolist() == [1, 0] * 4
    assert [row["prompt"][2] for row in batch.rows[::2]] == list("aceg")
    assert engine.context.noted == {"dynamic/draws": 2, "dynamic/shortfall": 0}


def test_dynamic_is_on_policy_when_all_groups_differ():
    drawn = [trainer(objective="dapo", source=s, reward=lambda completions, **_: [len(c) + i / 9 for i, c in
             enumerate(completions)]) for s in ("dynamic", "on_policy")]  # fmt: skip
    one, other = (draw(engine)[0].batches["rollouts"] for engine in drawn)
    assert torch.equal(one.completion_ids, other.completion_ids) and torch.equal(one["reward"], other["reward"])


def test_dynamic_stops_at_the_cap_and_tells_the_shortfall():
    engine = trainer(Scripted(sometimes), objective="dapo", source={"dynamic": {"metric": "right", "max_draws": 1}})
    batch = draw(engine)[0].batches["rollouts"]
    assert len(batch) == 4 and engine.context.noted == {"dynamic/draws": 1, "dynamic/shortfall": 2}


@pytest.mark.parametrize("say", [never, lambda prompt, g: answer(prompt)])
def test_dynamic_with_nothing_to_learn_gives_advantages_of_zero(say):
    generator = Scripted(say)
    engine = trainer(generator, objective="dapo", source={"dynamic": {"max_draws": 3}})
    batch = draw(engine)[0].batches["rollouts"]
    assert len(generator.asked) == 3 * 4 and len(batch) == 8 and not batch["advantage"].any()


def test_dynamic_looks_at_the_metric_and_not_at_other_rewards():
    reward = {"right": {"reward": right}, "noise": {"reward": lambda completions, **_: [len(c) for c in completions]}}

    def wrong_in_many_lengths(prompt, g):
        return "#x" + "y" * g

    engine = trainer(
        Scripted(wrong_in_many_lengths), objective="dapo", reward=reward, source={"dynamic": {"metric": "right"}}
    )
    assert not draw(engine)[0].batches["rollouts"]["advantage"].any()
    engine = trainer(Scripted(wrong_in_many_lengths), objective="dapo", reward=reward, source="dynamic")
    assert "advantage" not in draw(engine)[0].batches["rollouts"]  # no accuracy here: the sum differs


# ---- pass-rate band


def test_the_band_keeps_what_the_first_model_solves_sometimes():
    engine = trainer(Scripted(sometimes), objective="grpo", source={"pass_rate_band": {"pool": 8}})
    seen = [row["prompt"][2] for _ in range(4) for row in draw(engine)[0].batches["rollouts"].rows[::2]]
    assert sorted(seen[:4]) == list("aceg") == sorted(seen[4:8])  # every one once an epoch
    assert engine.context.noted["band/kept"] == 0.5


def test_an_empty_band_keeps_everything_and_says_so():
    engine = trainer(Scripted(never), objective="grpo", source={"pass_rate_band": {"pool": 4}})
    with pytest.warns(UserWarning, match="None of 4 prompts has a pass rate within"):
        assert len(draw(engine)[0].batches["rollouts"]) == 8


# ---- prefixes

LONG = [{"prompt": f"c {c}=", "completion": "#" + c * 9, "answer": "#" + c * 9} for c in "abcdefgh"]
HYBRID = {"objective": "dr_grpo", "data": LONG, "rollouts": {"prompts": 4, "group": 3, "max_new_tokens": 12}}


def test_the_last_of_each_group_begins_with_the_demonstration():
    engine = trainer(source={"prefix": {"low": 0.5, "high": 0.5}}, **HYBRID)
    batch = draw(engine)[0].batches["rollouts"]
    assert batch.group == 3 and torch.equal(batch.prompt_ids[0::3], batch.prompt_ids[2::3])
    for i in range(2, 12, 3):
        demonstration = completion_ids(tokenizer(), batch.rows[i]["completion"])
        assert batch.completion_ids[i, :5].tolist() == demonstration[:5]  # floor(0.5 * 10)
        assert 6 <= int(batch.lengths[i]) <= 12
        assert batch.rows[i]["completion_text"].startswith(batch.rows[i]["completion"][:5])
        assert batch.mask[i, :5].tolist().count(1.0) == 1  # ceil(0.2 * 5)
        assert batch.mask[i, 5 : int(batch.lengths[i])].all()
    assert (batch.mask[0::3].sum(1) == batch.lengths[0::3]).all()
    assert batch.total_tokens == batch.mask.sum()


def test_prefix_tokens_have_the_log_probs_of_the_policy_and_the_uncertain_ones_a_gradient():
    engine = trainer(source={"prefix": {"low": 0.8, "high": 0.8}}, **HYBRID)
    batch = draw(engine)[0].batches["rollouts"]
    scores = engine.context.scores(batch, entropy=True)
    assert torch.allclose(batch["sampled_log_probs"], scores["log_probs"], atol=1e-4)
    for i in range(2, 12, 3):
        kept = batch.mask[i, :8].bool()
        entropy = scores["entropy"][i, :8]
        assert kept.sum() == 2 and entropy[kept].min() >= entropy[~kept].max()


@pytest.mark.parametrize(("share", "kept"), [(0.0, 0), (1.0, 8)])
def test_the_share_of_prefix_tokens_with_gradient(share, kept):
    engine = trainer(source={"prefix": {"low": 0.8, "high": 0.8, "share": share}}, **HYBRID)
    assert (draw(engine)[0].batches["rollouts"].mask[2::3, :8].sum(1) == kept).all()


def test_without_a_prefix_it_is_on_policy():
    none = trainer(source={"prefix": {"low": 0.0, "high": 0.0}}, **HYBRID)
    plain = trainer(source="on_policy", **HYBRID)
    one, other = (draw(engine)[0].batches["rollouts"] for engine in (none, plain))
    assert torch.equal(one.completion_ids, other.completion_ids) and torch.equal(one.mask, other.mask)
    assert torch.equal(one["reward"], other["reward"])


def test_rows_without_a_demonstration_have_no_prefix_and_long_ones_leave_room():
    data = [{**row, "completion": None} if i % 2 else {**row, "completion": "#" + "ab" * 20} for i, row in
            enumerate(LONG)]  # fmt: skip
    engine = trainer(source={"prefix": {"low": 0.95, "high": 0.95}}, **{**HYBRID, "data": data})
    batch = draw(engine)[0].batches["rollouts"]
    assert batch.lengths[2::3].tolist()[::2] == [12, 12]  # 11 tokens of prefix, one sampled
    assert (batch.mask[[5, 11]].sum(1) == batch.lengths[[5, 11]]).all()


def test_the_shortest_prefix_falls_along_a_cosine():
    low = Prefix().low
    assert [round(low.at(step, 100), 3) for step in (0, 50, 100)] == [0.95, 0.5, 0.05]


def test_uncertain_takes_the_first_of_equals_and_nothing_beyond_the_prefix():
    entropy = torch.tensor([[1.0, 3.0, 3.0, 9.0], [1.0, 1.0, 1.0, 1.0], [5.0, 6.0, 7.0, 8.0]])
    found = uncertain(entropy, torch.tensor([3, 4, 0]), 0.25)
    assert found.int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


# ---- ReLIFT

LIFT = {"objective": ["dr_grpo", "sft"]}


def test_relift_learns_demonstrations_of_what_all_failed():
    def some_fail(prompt, g):
        return never(prompt, g) if prompt[2] in "bdf" else half(prompt, g)

    engine = trainer(Scripted(some_fail), source={"relift": {"size": 3}}, **LIFT)
    assert [set(u.batches) for u in draw(engine)] == [{"rollouts"}]
    assert [row["prompt"][2] for row in engine.parts.source.buffer] == ["d", "b"]  # newest first
    rollouts, imitation = draw(engine)
    assert (rollouts.optimizer, imitation.optimizer) == ("policy", "imitation")
    batch = imitation.batches["demonstrations"]
    assert [row["prompt"][2] for row in batch.rows] == ["f", "d", "b"]
    assert batch.completion_ids[0, : batch.lengths[0]].tolist() == completion_ids(tokenizer(), "#ff")
    assert engine.parts.source.buffer == []


def test_relift_leaves_the_rest_in_the_buffer():
    engine = trainer(Scripted(never), source={"relift": {"size": 3}}, **LIFT)
    assert len(draw(engine)) == 2
    assert [row["prompt"][2] for row in engine.parts.source.buffer] == ["a"]


def test_relift_needs_a_demonstration_and_counts_wrong_forms_apart():
    data = [{**row, "completion": ""} if row["prompt"][2] == "a" else row for row in rows()]
    reward = {"right": {"reward": right}, "shape": {"reward": shape, "weight": 0.5}}

    def say(prompt, g):
        return "x" if prompt[2] == "b" else "#x"

    engine = trainer(
        Scripted(say), data=data, reward=reward, source={"relift": {"metric": "right", "format": "shape"}}, **LIFT
    )
    draw(engine)
    assert [row["prompt"][2] for row in engine.parts.source.buffer] == ["d", "c"]
    assert engine.context.noted["relift/formless"] == 0.25 and engine.context.noted["relift/failed"] == 0.75


def test_relift_has_two_optimizers():
    engine = trainer(Scripted(never), source={"relift": {"size": 4}}, **{**LIFT, "steps": 2})
    engine.run()
    assert set(engine.moving.optimizers) == {"policy", "imitation"}
    moved = {name: [s["step"].item() for s in o.state.values()] for name, o in engine.moving.optimizers.items()}
    assert set(moved["policy"]) == {1.0} == set(moved["imitation"])


def test_relifts_two_optimizers_each_move_what_was_chosen():
    """Both step over the same chosen numbers, each by gradients of its own: of all projections, not of norms alone."""
    engine = trainer(
        Scripted(never), source={"relift": {"size": 4}}, tuning={"lift": {"density": 0.2, "rank": 2}},
        **{**LIFT, "steps": 2},
    )  # fmt: skip
    engine.run()
    for name in ("policy", "imitation"):
        sparse = engine.moving.optimizers[name]
        (state,) = sparse.state.values()
        reached = [bank.name for bank in sparse.banks if bool(state["exp_avg"][bank.start : bank.stop].any())]
        assert state["step"].item() == 1.0
        assert len(reached) == (
            len(sparse.banks) if name == "imitation" else 0
        )  # rewards were all 0: no policy gradient


# ---- several, and what they remember


def test_a_mixture_has_both_kinds_in_every_update():
    engine = trainer(Scripted(half), objective=[{"grpo": {"beta": 0.0}, "weight": 0.7}, {"sft": {}, "weight": 0.3}])
    (update,) = draw(engine)
    assert set(update.batches) == {"rollouts", "demonstrations"}


REMEMBERING = {
    "relift": {"objective": ["dr_grpo", "sft"], "source": {"relift": {"size": 3}}},
    "pass_rate_band": {"objective": "grpo", "source": {"pass_rate_band": {"pool": 8, "low": 0.2, "high": 0.9}}},
    "dynamic": {"objective": "dapo", "source": {"dynamic": {"metric": "right", "max_draws": 2}}},
    "prefix": {"objective": "dr_grpo", "source": "prefix"},
    "mixture": {"objective": [{"grpo": {"beta": 0.0}}, "sft"]},
}


def say(prompt, g):
    return never(prompt, g) if prompt[2] in "bd" else half(prompt, g)


@pytest.mark.parametrize("name", REMEMBERING)
def test_what_a_source_remembers_is_json_and_enough(name):
    def told(updates):
        return [
            (u.optimizer, kind, [row["prompt"] for row in b.rows], b.mask.tolist(), b.completion_ids.tolist())
            for u in updates
            for kind, b in u.batches.items()
        ]

    engine, other = (trainer(Scripted(say), **REMEMBERING[name]) for _ in range(2))
    draw(engine)
    other.context.iteration = 1
    other.parts.source.load_state_dict(json.loads(json.dumps(engine.parts.source.state_dict())))
    other.context.curricula["main"].load_state_dict(
        json.loads(json.dumps(engine.context.curricula["main"].state_dict()))
    )
    for _ in range(3):
        assert told(draw(engine)) == told(draw(other))


# ---- refused before a model is loaded


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"objective": "dapo", "source": "dynamic", "rollouts": {**ROLLOUTS, "group": 1}}, "group of 1"),
        ({"objective": "ppo", "source": "dynamic", "rollouts": {**ROLLOUTS, "group": 1}}, "never differs"),
        ({"objective": "ppo", "source": "prefix", "rollouts": {**ROLLOUTS, "group": 1}}, "groups of 2"),
        ({"objective": "dapo", "source": {"dynamic": {"metric": "rihgt"}}}, "no reward 'rihgt'"),
        ({"objective": "dapo", "source": {"dynamic": {"max_draw": 3}}}, "no parameter 'max_draw'"),
        ({"objective": "dapo", "source": {"dynamic": {"max_draws": 0}}}, "max_draws is 0"),
        ({"objective": "dapo", "source": "dynamik"}, "no source 'dynamik'"),
        ({"objective": "dr_grpo", "source": "prefix", "data": [{"prompt": "a", "answer": "b"}] * 4}, "'completion'"),
        ({"objective": ["dr_grpo", "sft"], "source": "relift", "data": [{"prompt": "a", "answer": "b"}] * 4},
         "'completion', which the source 'relift' reads"),
        ({"objective": "dr_grpo", "source": "relift"}, "gives demonstrations"),
        ({"objective": ["dr_grpo", "sft"], "source": {"relift": {"size": 0}}}, "size is 0"),
        ({"objective": ["dr_grpo", "sft"], "source": {"relift": {"format": "tags"}}}, "no reward 'tags'"),
        ({"objective": "dr_grpo", "source": {"prefix": {"share": 2}}}, "share is 2"),
        ({"objective": "grpo", "source": {"pass_rate_band": {"low": 0.9, "high": 0.1}}}, "low <= high"),
        ({"objective": "grpo", "data": rows(3)}, "3 rows, and one batch takes 4"),
        ({"objective": "sft", "source": {"dataset": {"kind": "rollouts"}}}, "demonstrations or pairs"),
        ({"objective": "grpo", "reward": None}, "no reward"),
    ],
)  # fmt: skip
def test_refused_before_a_model_is_loaded(words, message):
    shared = {"model": "/nowhere", "data": rows(), "reward": {"right": {"reward": right}}, "rollouts": ROLLOUTS}
    with pytest.raises(SurgeryError) as error:
        plan(make({**shared, **words}))
    assert message in str(error.value)
