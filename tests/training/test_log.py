"""What a run writes: lines whole and strict JSON; trackers; and the warnings, each with its cause and told once."""

import json
import math

import pytest
import torch

from surgery.errors import SurgeryError
from surgery.training.batch import Batch
from surgery.training.distributed import World
from surgery.training.log import Log, TrainingWarning, check_trackers, read_metrics
from surgery.training.recipe import make
from surgery.training.signs import Watch, signs

RECIPE = make({"steps": 100, "rollouts": {"max_new_tokens": 40}})
CALM = {"truncated": 0.1, "zero_variance": 0.5, "reward": 0.4, "reward/accuracy": 0.4, "entropy": 0.6, "kl": 0.01,
        "skipped": 0.0}  # fmt: skip


def said(steps, recipe=RECIPE):
    """Everything that is said over a sequence of steps' metrics."""
    watch = Watch(recipe)
    return [text for i, metrics in enumerate(steps) for text in watch.see(i + 1, metrics)]


def batch(prompts=2, group=3):
    rows = [{"prompt": f"p{i // group}", "completion_text": f'c"{i}\n'} for i in range(prompts * group)]
    made = Batch.of([[1, 2]] * len(rows), [[3, 4, 5][: 1 + i % 3] for i in range(len(rows))], pad=0, rows=rows,
                    group=group)  # fmt: skip
    made["reward"] = torch.tensor([0.0, 1.0, math.nan] * prompts, dtype=torch.float64)
    made["reward/accuracy"] = made["reward"]
    made["truncated"] = torch.tensor([False, True, False] * prompts)
    made["advantage"] = torch.linspace(-1, 1, len(rows))
    return made


# ---- warnings ------------------------------------------------------------------------------------------------------


def test_a_healthy_run_is_not_warned_of():
    assert said([CALM] * 50) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"truncated": 0.6}, ["60%", "max_new_tokens=40", "Raise rollouts.max_new_tokens"]),
        ({"zero_variance": 0.95, "reward/accuracy": 0.01}, ["95%", "mean accuracy 0.01", "too hard"]),
        ({"zero_variance": 0.95, "reward/accuracy": 0.99}, ["mean accuracy 0.99", "too easy"]),
        ({"zero_variance": 0.95}, ["mean accuracy 0.40", "all right or all wrong"]),
        ({"reward/accuracy": math.nan}, ["'accuracy'", "None for every completion", "column"]),
        ({"entropy": 0.004}, ["is 0.004 nats", "optimizer.lr", "entropy bonus"]),
        ({"kl": 3.0}, ["KL", "3 nats a token", "beta"]),
        ({"skipped": 1.0}, ["Step 1 was skipped", "not finite"]),
    ],
    ids=["truncated", "hard", "easy", "blind", "none", "entropy", "kl", "skipped"],
)
def test_every_sign_is_told_once_with_its_cause(change, words):
    found = said([CALM | change] * 30)
    assert len(found) == 1
    assert all(word in found[0] for word in words)


@pytest.mark.parametrize(
    "change",
    [{"truncated": 0.49}, {"zero_variance": 0.89}, {"kl": 0.9}, {"entropy": 0.02}],
    ids=lambda c: next(iter(c)),
)
def test_what_is_not_yet_a_sign_is_not_told(change):
    assert said([CALM | change] * 30) == []


def test_a_fall_of_entropy_is_told_with_where_it_fell_from():
    (text,) = said([CALM] * 5 + [CALM | {"entropy": 0.03}] * 10)
    assert "fell from 0.6 to 0.03" in text
    assert said([CALM] * 5 + [CALM | {"entropy": 0.1}] * 20) == []


def test_one_odd_step_is_no_sign_and_a_short_run_is_told_at_its_end():
    assert said([CALM, CALM, CALM | {"truncated": 1.0}, CALM, CALM, CALM]) == []
    assert said([CALM | {"truncated": 1.0}] * 2) == []
    assert len(said([CALM | {"truncated": 1.0}], make({"steps": 1}))) == 1


def test_without_accuracy_the_reward_itself_is_told():
    assert "mean reward 0.05" in signs({"zero_variance": 1.0, "reward": 0.05}, {}, RECIPE)["zero_variance"]


def test_steps_without_rollouts_say_nothing_about_them():
    assert said([CALM | {"truncated": 1.0}, {"loss": 1.0}, {"loss": 1.0}, {"loss": 1.0}]) == []


def test_only_the_first_process_warns(tmp_path):
    with pytest.warns(TrainingWarning, match="skipped"), Log(tmp_path, RECIPE, World()) as log:
        log.step(1, {"skipped": 1.0})


def test_warnings_of_other_processes_are_not_heard(recwarn):
    Log(None, RECIPE, World(rank=1, size=2)).step(1, {"skipped": 1.0})
    assert not recwarn.list


# ---- files ---------------------------------------------------------------------------------------------------------


def test_lines_are_strict_json_and_numbers_come_back(tmp_path):
    with Log(tmp_path, RECIPE, World()) as log:
        log.step(1, {"loss": 0.1, "kl": math.nan, "grad_norm": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": 0.1, "kl": None, "grad_norm": None}
    (line,) = read_metrics(tmp_path)
    assert line["loss"] == 0.1 and math.isnan(line["kl"])


def test_a_line_that_a_kill_left_half_written_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    with pytest.raises(SurgeryError, match="no folder of a run"):
        read_metrics(tmp_path / "elsewhere")


def test_rollouts_are_kept_whole_and_groups_are_counted_over_a_step(tmp_path):
    with Log(tmp_path, RECIPE, World()) as log:
        log.rollouts(1, batch())
        log.rollouts(1, batch())  # a second batch of the same step
        log.rollouts(2, batch())
        log.step(1, {})
        lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [line["group"] for line in lines] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [0] * 3 + [1] * 3
    assert lines[1] == {
        "step": 1, "group": 0, "prompt": "p0", "completion": 'c"1\n', "completion_ids": [3, 4], "reward": 1.0,
        "rewards": {"accuracy": 1.0}, "advantage": pytest.approx(-0.6), "truncated": True, "length": 2,
    }  # fmt: skip
    assert lines[2]["reward"] is None and lines[2]["rewards"] == {"accuracy": None}


def test_what_came_after_a_checkpoint_is_forgotten(tmp_path):
    with Log(tmp_path, RECIPE, World()) as log:
        log.rollouts(1, batch())
        log.step(1, {"loss": 1.0})
        position = log.position()
        log.rollouts(2, batch())
        log.step(2, {"loss": 2.0})
    with Log(tmp_path, RECIPE, World()) as log:
        log.truncate(position)
        log.step(2, {"loss": 3.0})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 3.0]
    assert len((tmp_path / "rollouts.jsonl").read_text().splitlines()) == 6


# ---- trackers ------------------------------------------------------------------------------------------------------


def test_trackers_that_can_not_work_are_refused_in_a_sentence(monkeypatch, tmp_path):
    with pytest.raises(SurgeryError, match="Did you mean 'wandb'"):
        check_trackers(["wandbb"], tmp_path)
    monkeypatch.setattr("surgery.training.log.find_spec", lambda name: None)
    with pytest.raises(SurgeryError, match="pip install wandb"):
        check_trackers(["wandb"], tmp_path)
    monkeypatch.setattr("surgery.training.log.find_spec", lambda name: name == "tensorboard")
    check_trackers(["tensorboard"], tmp_path)
    with pytest.raises(SurgeryError, match="folder"):
        check_trackers(["tensorboard"], None)


def test_trackers_get_the_recipe_flat_and_every_finite_number(tmp_path):
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    class Fake(GeneralTracker):
        name, requires_logging_directory = "fake", False
        config, lines, over = {}, [], False
        tracker = None

        def __init__(self):
            super().__init__()

        def store_init_configuration(self, values):
            self.config.update(values)

        def log(self, values, step=None, **_):
            self.lines.append((step, values))

        def finish(self):
            Fake.over = True

    fake = Fake()
    accelerator = Accelerator(cpu=True, log_with=[fake])
    recipe = RECIPE.model_copy(update={"trackers": ["fake"]})
    with Log(tmp_path, recipe, World(accelerator=accelerator)) as log:
        log.step(1, {"loss": 0.5, "kl": math.nan})
        assert not Fake.over
    assert fake.config["rollouts.max_new_tokens"] == 40
    assert all(isinstance(v, str | int | float | bool) for v in fake.config.values())
    assert fake.lines == [(1, {"loss": 0.5})] and Fake.over


def test_tensorboard_gets_its_events(tmp_path):
    pytest.importorskip("tensorboard")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_dir=tmp_path)
    recipe = RECIPE.model_copy(update={"trackers": ["tensorboard"]})
    with Log(tmp_path, recipe, World(accelerator=accelerator)) as log:
        log.step(1, {"loss": 0.5})
    assert sum(path.stat().st_size for path in tmp_path.rglob("events*")) > 0
