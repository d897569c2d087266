"""Expert iteration, rejection sampling and STaR: what is kept, when models begin again, and what is remembered."""

import json

import pytest
import torch
from scripted import Scripted, draw, right, rows, trainer
from tiny_runs import tokenizer, weights

from surgery.errors import SurgeryError
from surgery.training.plan import plan
from surgery.training.recipe import make
from surgery.training.sources.self_training import SIGNATURES

SFT = {"objective": "sft", "rollouts": {"prompts": 4, "group": 4, "max_new_tokens": 12}}


def answer(prompt):
    """Of `c a=`, and of the same with a hint before it."""
    letter = prompt[prompt.index("c ") + 2]
    return f"#{letter}{letter}"


def kept(engine):
    return [(row["prompt"], row["completion"]) for row in engine.parts.source.kept]


def loose(prompts, completions, answer, **columns):
    """Right with spaces and letters around it, too."""
    return [float(a in text) for text, a in zip(completions, answer, strict=True)]


# ---- what is kept


def test_right_completions_stay_once_each():
    def say(prompt, g):
        return ["#x", answer(prompt), answer(prompt) + " ", "#y"][g] if prompt[2] != "b" else "#z"

    engine = trainer(Scripted(say), source="expert_iteration", reward={"right": {"reward": loose}}, **SFT)
    updates = draw(engine)
    assert kept(engine) == [(f"c {c}=", f"#{c}{c}") for c in "acd"]
    assert engine.context.noted == {"kept": 3, "solved": 0.75}
    (batch,) = [u.batches["demonstrations"] for u in updates]
    texts = [tokenizer().decode(ids, skip_special_tokens=True) for ids in batch.completion_ids]
    assert sorted(texts) == ["#aa", "#cc", "#dd"]
    assert not any(u.fresh for u in updates)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"cap": 2}, ["#aa", "b#aa"]),
        ({"cap": 0}, ["#aa", "b#aa", "c#aa"]),
        ({"cap": 0, "dedupe": "none"}, ["#aa", "b#aa", "#aa", "c#aa"]),
        ({"cap": 0, "original": True}, ["#aa", "b#aa", "c#aa", "#aa"]),
    ],
)
def test_cap_dedupe_and_originals(words, expected):
    def say(prompt, g):
        return ["", "b", "", "c"][g] + answer(prompt)

    engine = trainer(
        Scripted(say), source={"expert_iteration": {"prompts": 1, **words}}, reward={"right": {"reward": loose}}, **SFT
    )
    draw(engine)
    assert [text for _, text in kept(engine)] == expected


def test_signatures():
    same = SIGNATURES["equations"]
    assert same("First 3 + 4 = 7, then 7*2=14. So 14") == same("3+4=7 and so 7 * 2 = 14") != same("7*2=14, 3+4=7")
    assert same("No Sums") == "no sums" == SIGNATURES["text"](" no   SUMS ")


def test_epochs_pass_over_all_that_is_kept():
    engine = trainer(
        Scripted(lambda prompt, g: answer(prompt)), **SFT, batch={"rows": 3},
        source={"expert_iteration": {"epochs": 2, "prompts": 8}},
    )  # fmt: skip
    prompts = [row["prompt"] for u in draw(engine) for row in u.batches["demonstrations"].rows]
    assert sorted(prompts) == sorted(2 * [row["prompt"] for row in rows()])
    assert sorted(prompts[:8]) == sorted(set(prompts)) and prompts[:8] != prompts[8:]


# ---- nothing right


def test_a_round_with_nothing_right_is_skipped_with_a_warning():
    def say(prompt, g):
        return answer(prompt) if prompt[2] in "efgh" else "#x"

    engine = trainer(Scripted(say), source="expert_iteration", **SFT)
    with pytest.warns(UserWarning, match="Round 1: no completion of 4 prompts reached"):
        updates = draw(engine)
    assert [row["prompt"][2] for row in engine.parts.source.kept] == list("efgh")
    assert all(len(u.batches["demonstrations"]) for u in updates)


@pytest.mark.filterwarnings("ignore:Round")
@pytest.mark.parametrize("source", ["expert_iteration", "rft", "star"])
def test_it_gives_up_after_some_rounds(source):
    generator = Scripted(lambda prompt, g: "#x")
    engine = trainer(generator, source={source: {"patience": 3}}, **SFT)
    with pytest.raises(SurgeryError, match="3 rounds in a row gave no completion"):
        draw(engine)
    assert len(generator.asked) == 3 * 4 * (2 if source == "star" else 1)


# ---- which model is asked, and which is tuned


def test_expert_iteration_asks_each_round_and_rft_only_once():
    for source, rounds in (("expert_iteration", 3), ("rft", 1)):
        generator = Scripted(lambda prompt, g: answer(prompt))
        engine = trainer(generator, source=source, **SFT)
        updates = [u for _ in range(3) for u in draw(engine)]
        assert len(generator.asked) == 4 * rounds
        assert not any(u.fresh for u in updates)


def test_rft_keeps_the_original_ones_and_goes_over_all_of_them_again_and_again():
    engine = trainer(Scripted(lambda prompt, g: "b" + answer(prompt)), source="rft", **SFT,
                     reward={"right": {"reward": loose}})  # fmt: skip
    orders = [[row["completion"] for u in draw(engine) for row in u.batches["demonstrations"].rows] for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted([f"{b}#{c}{c}" for b in ("", "b") for c in "abcd"])
    assert orders[0] != orders[1]


def test_star_asks_what_it_failed_with_a_hint_that_is_not_stored():
    def say(prompt, g):
        return answer(prompt) if prompt[2] == "a" or (prompt[0] == "#" and "d" not in prompt) else "#x"

    generator = Scripted(say)
    source = {"star": {"hint": "{answer};{prompt}", "first": 4}}
    engine = trainer(generator, source=source, **{**SFT, "rollouts": {"prompts": 4, "group": 1, "max_new_tokens": 9}})
    draw(engine)
    assert generator.asked == ["c a=", "c b=", "c c=", "c d=", "#bb;c b=", "#cc;c c=", "#dd;c d="]
    assert kept(engine) == [("c a=", "#aa"), ("c b=", "#bb"), ("c c=", "#cc")]
    assert engine.context.noted == {"kept": 3, "solved": 0.25, "rationalised": 0.5}


def test_star_without_a_hint_does_not_rationalise():
    generator = Scripted(lambda prompt, g: answer(prompt) if "a" in prompt else "#x")
    engine = trainer(generator, source={"star": {"hint": "", "first": 1}}, **SFT)
    draw(engine)
    assert len(generator.asked) == 4


def test_star_in_a_chat_hints_in_the_last_message():
    source = make({"source": {"star": {"hint": "{prompt} ({answer})"}}}).source
    star = plan(make({"data": rows(), "objective": "sft", "source": source, "reward": {"r": {"reward": right}}})).source
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    hinted = star._hinted({"prompt": messages, "answer": "7"})
    assert hinted == [messages[0], {"role": "user", "content": "q (7)"}] and messages[1]["content"] == "q"


def test_stars_rounds_grow_and_each_begins_again():
    engine = trainer(Scripted(lambda prompt, g: answer(prompt)), source={"star": {"first": 5}}, **SFT)
    rounds = [draw(engine) for _ in range(4)]
    assert [len(updates) for updates in rounds] == [5, 6, 7, 9]  # 5 * 1.2^r, rounded
    assert all([u.fresh for u in updates] == [True] + [False] * (len(updates) - 1) for updates in rounds)


def test_star_tunes_the_model_of_the_start():
    """Adam's steps are at most lr long: one step into the second round, no weight is further away than that."""
    lr, far = 1e-3, []
    engine = trainer(
        Scripted(lambda prompt, g: answer(prompt)), source={"star": {"first": 2, "growth": 1.0}}, **SFT, steps=4,
        optimizer={"lr": lr, "shape": "constant"},
    )  # fmt: skip
    start = weights(engine.model)
    engine.on_step = lambda step, _: far.append(
        max(float((p - start[name]).abs().max()) for name, p in weights(engine.model).items()) / lr
    )
    engine.run()
    assert far[0] <= 1.01 and far[1] > 1.5 and far[2] <= 1.01 and far[3] > 1.5


# ---- what is remembered


@pytest.mark.parametrize("name", ["expert_iteration", "rft", "star"])
def test_the_state_is_json_and_enough(name):
    def told(updates):
        return [(u.fresh, [(r["prompt"], r["completion"]) for r in u.batches["demonstrations"].rows]) for u in updates]

    def say(prompt, g):
        return "bcde"[g] + answer(prompt)

    source = {name: {"first": 2}} if name == "star" else name
    engine, other = (
        trainer(Scripted(say), source=source, reward={"right": {"reward": loose}}, **SFT) for _ in range(2)
    )
    draw(engine)
    other.context.iteration = 1
    other.parts.source.load_state_dict(json.loads(json.dumps(engine.parts.source.state_dict())))
    other.context.curricula["main"].load_state_dict(engine.context.curricula["main"].state_dict())
    for _ in range(2):
        assert told(draw(engine)) == told(draw(other))


class Killed(Exception):
    """Stands for whatever ends a run early."""


@pytest.mark.parametrize("name", ["expert_iteration", "rft", "star"])
def test_a_run_goes_on_bit_for_bit(name, tmp_path):
    source = {name: {"first": 3}} if name == "star" else name
    words = {**SFT, "source": source, "steps": 8, "batch": {"rows": 2}, "checkpoint": {"every": 4}}

    def engine(out):
        made = trainer(Scripted(lambda prompt, g: answer(prompt)), **words)
        made.out = made.log.folder = out
        return made

    def kill(step, _):
        if step == 6:
            raise Killed

    whole = engine(tmp_path / "whole")
    whole.run()
    first = engine(tmp_path / "parts")
    first.on_step = kill
    with pytest.raises(Killed):
        first.run()
    second = engine(tmp_path / "parts")
    second.run(resume=True)
    one, other = weights(whole.model), weights(second.model)
    assert all(torch.equal(one[key], other[key]) for key in one)


# ---- refused before a model is loaded


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"source": {"star": {"hint": "{prompt}"}}}, "doesn't hold {answer}"),
        ({"source": "star", "data": [{"prompt": "a"}] * 4}, "'answer', which the source 'star' reads"),
        ({"source": "rft", "data": [{"prompt": "a", "answer": "b"}] * 4}, "'completion', which the source 'rft'"),
        ({"source": {"expert_iteration": {"dedupe": "words"}}}, "no way to dedupe 'words'"),
        ({"source": {"expert_iteration": {"epochs": 0}}}, "epochs"),
        ({"source": {"star": {"first": 0}}}, "first must be at least 1"),
        ({"source": {"rft": {"metric": "left"}}}, "no reward 'left'"),
        ({"source": "expert_iteration", "objective": "grpo"}, "gives demonstrations"),
        ({"source": "expert_iteration", "reward": None}, "no reward"),
        ({"source": "expert_iteration", "data": rows(3)}, "3 rows, and one batch takes 4"),
    ],
)
def test_refused_before_a_model_is_loaded(words, message):
    shared = {"model": "/nowhere", "data": rows(), "reward": {"right": {"reward": right}}, **SFT}
    with pytest.raises(SurgeryError) as error:
        plan(make({**shared, **words}))
    assert message in str(error.value)
