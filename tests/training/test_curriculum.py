"""Curricula: what comes next, what is learned from it, and what is remembered."""

import json
import math
from collections import Counter

import pytest
import torch

from surgery.errors import SurgeryError
from surgery.training.batch import Batch
from surgery.training.curriculum import CURRICULA, SEC, ByCategory, ByDifficulty, Shuffled
from surgery.training.data import ListRows, rows_of
from surgery.training.plan import plan
from surgery.training.recipe import make

ROWS = [{"prompt": f"{c}{i}", "category": c, "difficulty": i} for c in "abc" for i in range(4)]


def started(curriculum, rows=ROWS, seed=0):
    curriculum.start(ListRows(rows), seed)
    return curriculum


def told(advantages, column="category"):
    """A batch of one rollout for each (category, advantage)."""
    batch = Batch.of([[1]] * len(advantages), [[2, 3]] * len(advantages), rows=[{column: c} for c, _ in advantages])
    batch["advantage"] = torch.tensor([a for _, a in advantages])
    return batch


def prompts(rows):
    return [row["prompt"] for row in rows]


# ---- categories


def test_sec_moves_q_by_the_mean_size_of_advantages():
    sec = started(SEC(rate=0.25))
    sec.update(told([("a", 1.0), ("a", -3.0), ("b", 0.0)]))
    assert sec.values == {"a": 0.5, "b": 0.0, "c": 0.0}
    sec.update(told([("a", 1.0), ("c", 4.0)]))
    assert sec.values == {"a": 0.625, "b": 0.0, "c": 1.0}  # b was not in the batch


def test_a_stationary_reward_is_approached_geometrically():
    sec = started(SEC(rate=0.3))
    for n in range(1, 12):
        sec.update(told([("b", 2.0), ("b", -2.0)]))
        assert sec.values["b"] == pytest.approx(2.0 * (1 - 0.7**n), abs=1e-12)
    for _ in range(3):  # groups whose rewards are all equal: r = 0
        sec.update(told([("b", 0.0)]))
    assert sec.values["b"] == pytest.approx(2.0 * (1 - 0.7**11) * 0.7**3, abs=1e-12)


def test_advantages_of_tokens_count_as_their_mean_over_the_mask():
    sec = started(SEC(rate=1.0))
    batch = told([("a", 0.0)])
    batch["advantage"] = torch.tensor([[4.0, 100.0]])
    batch.mask = torch.tensor([[1.0, 0.0]])
    sec.update(batch)
    assert sec.values["a"] == 4.0


def test_sec_draws_by_softmax():
    sec = started(SEC(temperature=0.5))
    sec.values = {"a": 0.0, "b": 0.5, "c": 1.0}
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0).tolist()
    assert list(sec.probabilities().values()) == pytest.approx(expected)
    drawn = Counter(row["category"] for row in sec.next(4000))
    for name, chance in zip("abc", expected, strict=True):
        assert abs(drawn[name] / 4000 - chance) < 4 * math.sqrt(chance * (1 - chance) / 4000)


def test_sec_at_infinite_temperature_is_the_random_curriculum():
    sec, random = started(SEC(temperature=1e9)), started(ByCategory())
    sec.values = {"a": 0.0, "b": 5.0, "c": 100.0}
    assert prompts(sec.next(200)) == prompts(random.next(200))
    assert set(random.probabilities().values()) == {1 / 3}


def test_an_enormous_q_overflows_nothing():
    sec = started(SEC(temperature=1e-3))
    sec.values = {"a": 1e6, "b": 0.0, "c": 0.0}
    assert {row["category"] for row in sec.next(20)} == {"a"}


def test_an_exhausted_category_is_shuffled_again():
    only = started(ByCategory(), ROWS[:4])
    seen = prompts(only.next(12))
    epochs = [seen[:4], seen[4:8], seen[8:]]
    assert all(sorted(epoch) == ["a0", "a1", "a2", "a3"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_categories_of_generated_data():
    sec = SEC(categories={"short": {"task": "copy", "length": 3}, "long": {"task": "copy", "length": 8}})
    sec.start(rows_of("chain"), 0)
    rows = sec.next(60)
    assert all(len(row["answer"]) == {"short": 3, "long": 8}[row["category"]] for row in rows)
    assert len(set(prompts(rows))) > 55  # without end: nothing comes twice but by chance
    pool = ByCategory(pool=50)
    pool.start(rows_of({"task": "chain", "terms": [3, 4]}), 0)
    assert set(pool.items) == {"3 terms", "4 terms"} and sum(map(len, pool.items.values())) == 50


def test_another_column_names_the_categories():
    level = started(SEC(column="level", rate=1.0), [{"prompt": "p", "level": i % 2} for i in range(4)])
    level.update(told([("1", 1.0)], column="level"))
    assert level.values == {"0": 0.0, "1": 1.0} and level.next(1)[0]["level"] in ("0", "1")


# ---- by difficulty


def test_easy_rows_come_first_and_all_of_them_in_the_end():
    rows = [{"prompt": str(i), "difficulty": i} for i in range(100)][::-1]
    easy = started(ByDifficulty(begin=0.1, over=200), rows)
    drawn = [row["difficulty"] for row in easy.next(600)]
    assert max(drawn[:10]) < 15 and max(drawn[:100]) < 56 and max(drawn[:200]) > 56
    assert min(drawn[300:]) < 10 and max(drawn[300:]) > 90


# ---- all of them


@pytest.mark.parametrize("name", sorted(CURRICULA))
def test_the_state_is_json_and_enough(name):
    def fed(curriculum):
        found = []
        for i in range(6):
            rows = curriculum.next(5)
            found.append(prompts(rows))
            curriculum.update(told([(row["category"], (i + j) % 3 - 1.0) for j, row in enumerate(rows)]))
        return found

    one, other = started(CURRICULA[name](), seed=3), started(CURRICULA[name](), seed=3)
    fed(one)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert fed(one) == fed(other)


@pytest.mark.parametrize("name", sorted(set(CURRICULA) - {"in_order"}))
def test_the_choice_follows_from_the_seed_and_not_from_the_size_of_requests(name):
    whole = prompts(started(CURRICULA[name](), seed=5).next(24))
    pieces = started(CURRICULA[name](), seed=5)
    assert [p for n in (1, 7, 16) for p in prompts(pieces.next(n))] == whole
    assert prompts(started(CURRICULA[name](), seed=6).next(24)) != whole


def test_shuffled_has_every_row_once_an_epoch():
    seen = prompts(started(Shuffled()).next(36))
    assert all(sorted(seen[i : i + 12]) == sorted(prompts(ROWS)) for i in (0, 12, 24))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"curriculum": "sec", "data": [{"prompt": "a"}] * 4}, "no 'category'"),
        ({"curriculum": "by_difficulty", "data": [{"prompt": "a", "difficulty": "hard"}] * 4}, "'hard'"),
        ({"curriculum": {"sec": {"temperature": 0}}}, "temperature 0"),
        (
            {"curriculum": {"sec": {"categories": {"a": [{"prompt": "p"}]}}}, "source": "prefix"},
            "no column 'completion'",
        ),
        ({"curriculum": {"sec": {"tau": 1}}}, "no parameter 'tau'"),
        ({"curriculum": {"sec": {"categories": {"a": {"task": "chian"}}}}}, "chian"),
    ],
)
def test_refused_before_a_model_is_loaded(words, message):
    shared = {"model": "/nowhere", "data": ROWS, "objective": "grpo",
              "rollouts": {"prompts": 4, "group": 2}}  # fmt: skip
    with pytest.raises(SurgeryError) as error:
        plan(make({**shared, "reward": lambda completions, **_: [0.0], **words}))
    assert message in str(error.value)
