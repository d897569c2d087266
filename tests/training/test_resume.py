"""A run that was killed goes on bit for bit; a full disk costs one checkpoint; another recipe is refused."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from tiny_runs import demonstrations, llama, many_letters, metrics, same, tokenizer, weights

from surgery.errors import SurgeryError
from surgery.training import checkpoints, train

FORK = multiprocessing.get_context("fork")
SFT = {"objective": "sft", "data": demonstrations(), "batch": {"rows": 5}, "steps": 8}
GRPO = {
    "objective": {"grpo": {"beta": 0.05}},
    "data": demonstrations(),
    "reward": many_letters,
    "batch": {"epochs": 2, "minibatches": 2, "micro_batch": 4},
    "rollouts": {"prompts": 3, "group": 4, "max_new_tokens": 6},
    "steps": 10,
}
RECIPES = {"sft": SFT, "grpo": GRPO}


def run(out, words, *, resume=False, model=None, **more):
    """One run of a small model that starts from the same weights always."""
    shared = {"optimizer": {"lr": 1e-2}, "checkpoint": {"every": 3}}
    model = model or llama()
    found = train(model, tokenizer(), out=out, resume=resume, **shared | words | more)
    return weights(found.model), metrics(out)


def killed(out, words, *, at=None, after=None, prepare=None, **more):
    """The same in a process of its own, which dies by SIGKILL: in a step, or some seconds after it began."""

    def body():
        if prepare:
            prepare()
        run(
            out, words, resume=True, on_step=lambda step, _: step == at and os.kill(os.getpid(), signal.SIGKILL), **more
        )

    child = FORK.Process(target=body)
    child.start()
    if after is not None:
        time.sleep(after)
        child.kill()
    child.join()
    return child.exitcode


@pytest.mark.parametrize("name", RECIPES)
def test_two_kills_change_nothing(name, tmp_path):
    expected, lines = run(tmp_path / "straight", RECIPES[name])
    assert len(lines) == RECIPES[name]["steps"]
    assert killed(tmp_path / "killed", RECIPES[name], at=4) == -signal.SIGKILL
    assert killed(tmp_path / "killed", RECIPES[name], at=7) == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "killed").glob("checkpoint-*"))[-1] == "checkpoint-000006"
    found, again = run(tmp_path / "killed", RECIPES[name], resume=True)
    assert same(found, expected)
    assert again == lines
    rollouts = [(tmp_path / which / "rollouts.jsonl") for which in ("straight", "killed")]
    assert [path.exists() for path in rollouts] == [name == "grpo"] * 2
    assert name == "sft" or rollouts[0].read_text() == rollouts[1].read_text()
    assert not list((tmp_path / "killed").glob("checkpoint-*"))


def test_half_used_rollouts_are_in_the_checkpoint(tmp_path):
    killed(tmp_path, GRPO, at=7)
    state = json.loads((tmp_path / "checkpoint-000006" / "state.json").read_text())
    assert len(state["pieces"]) == 2  # 2 epochs of 2 minibatches: steps 5 to 8 live on one batch
    assert state["drawn"][0]["batches"]["rollouts"]["group"] == 4


def test_a_kill_at_any_moment_changes_nothing(tmp_path):
    expected, lines = run(tmp_path / "straight", GRPO, checkpoint={"every": 1})
    moment = random.Random(os.getpid())
    for _ in range(4):
        killed(tmp_path / "killed", GRPO, after=moment.uniform(0.02, 0.25), checkpoint={"every": 1})
    if (tmp_path / "killed" / "model").exists():  # a machine so fast that it came to the end
        return
    found, again = run(tmp_path / "killed", GRPO, resume=True, checkpoint={"every": 1})
    assert same(found, expected)
    assert again == lines


@pytest.mark.parametrize("moment", ["_save", "_save_json", "renamed"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_kill_while_a_checkpoint_is_written_changes_nothing(moment, before, tmp_path):
    expected, lines = run(tmp_path / "straight", SFT)

    def prepare():
        usual, calls = getattr(checkpoints, moment), [0]

        def deadly(*args):
            calls[0] += 1
            last = calls[0] == (5 if moment == "_save" else 2)  # in the second checkpoint
            if last and before:
                os.kill(os.getpid(), signal.SIGKILL)
            usual(*args)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(checkpoints, moment, deadly)

    out = tmp_path / "killed"
    assert killed(out, SFT, prepare=prepare) == -signal.SIGKILL
    assert (out / "checkpoint-000003").exists()
    whole = moment == "renamed" and not before
    assert (out / "checkpoint-000006").exists() == whole
    assert bool(list(out.glob(".checkpoint.*"))) != whole
    found, again = run(out, SFT, resume=True)
    assert same(found, expected)
    assert again == lines
    assert not list(out.glob(".*"))


def noisy(prompts, completions, **columns):
    """Draws from every global generator."""
    return [random.random() + np.random.rand() + float(torch.rand(())) for _ in completions]


def test_global_generators_go_on_where_they_were(tmp_path):
    words = GRPO | {"reward": noisy, "batch": {}, "steps": 5, "checkpoint": {"every": 2}, "dropout": False}

    def seeded():
        random.seed(1)
        np.random.seed(1)

    seeded()
    expected, lines = run(tmp_path / "straight", words)
    killed(tmp_path / "killed", words, at=3, prepare=seeded)
    found, again = run(tmp_path / "killed", words, resume=True)
    assert same(found, expected)
    assert again == lines


def test_dropout_goes_on_where_it_was(tmp_path):
    words = SFT | {"dropout": True}
    expected, _ = run(tmp_path / "straight", words, model=llama(attention_dropout=0.3))
    killed(tmp_path / "killed", words, at=5, model=llama(attention_dropout=0.3))
    found, _ = run(tmp_path / "killed", words, resume=True, model=llama(attention_dropout=0.3))
    assert same(found, expected)
    without, _ = run(tmp_path / "without", SFT, model=llama(attention_dropout=0.3))
    assert not same(found, without)


def test_resuming_nothing_begins(tmp_path):
    expected, lines = run(tmp_path / "straight", SFT)
    assert killed(tmp_path / "killed", SFT, at=2) == -signal.SIGKILL  # no checkpoint yet, yet lines in the log
    found, again = run(tmp_path / "killed", SFT, resume=True)
    assert same(found, expected)
    assert again == lines


def test_a_folder_with_a_run_is_not_begun_again(tmp_path):
    run(tmp_path, SFT)
    with pytest.raises(SurgeryError, match="holds a run already"):
        run(tmp_path, SFT)
    with pytest.raises(SurgeryError, match="is finished"):
        run(tmp_path, SFT, resume=True)


# ---- another recipe, another model


def test_another_recipe_is_refused_by_what_differs(tmp_path):
    killed(tmp_path, SFT, at=4)
    with pytest.raises(SurgeryError, match=r"batch\.rows was 5 and is 6"):
        run(tmp_path, SFT, resume=True, batch={"rows": 6})
    with pytest.raises(SurgeryError, match=r"optimizer\.lr was 0\.01 and is 0\.1"):
        run(tmp_path, SFT, resume=True, optimizer={"lr": 0.1})
    run(tmp_path, SFT, resume=True, checkpoint={"every": 2}, evaluate={"every": 0})


def test_more_steps_are_allowed_and_told(tmp_path):
    flat = SFT | {"optimizer": {"lr": 1e-2, "shape": "constant"}}
    expected, lines = run(tmp_path / "straight", flat, steps=10)
    killed(tmp_path / "killed", flat, at=5)
    with pytest.warns(UserWarning, match="8 steps and goes on to 10"):
        found, again = run(tmp_path / "killed", flat, resume=True, steps=10)
    assert same(found, expected)
    assert again == lines


def test_another_model_is_refused(tmp_path):
    killed(tmp_path, SFT, at=4)
    with pytest.raises(SurgeryError, match=r"differ in the tensor 'model\.model\.layers\.2"):
        run(tmp_path, SFT, resume=True, model=llama(layers=3))
    with pytest.raises(SurgeryError, match=r"is \(45, 16\), the model's \(45, 32\)"):
        run(tmp_path, SFT, resume=True, model=llama(hidden=32))


# ---- a full disk


def test_a_full_disk_costs_one_checkpoint(tmp_path, monkeypatch):
    expected, lines = run(tmp_path / "straight", SFT, checkpoint={"every": 2})
    usual, calls = checkpoints._save, [0]

    def full(*args):
        calls[0] += 1
        if 4 <= calls[0] <= 5:  # in the checkpoints of steps 4 and 6
            raise OSError(28, "No space left on device")
        usual(*args)

    monkeypatch.setattr(checkpoints, "_save", full)
    there = []
    with pytest.warns(UserWarning, match="No checkpoint at step 4 .No space left on device.; the last good one stays"):
        found, again = run(
            tmp_path / "full",
            SFT,
            checkpoint={"every": 2},
            on_step=lambda step, _: there.append([p.name for p in (tmp_path / "full").iterdir() if "check" in p.name]),
        )
    assert there[5] == ["checkpoint-000002"] and there[7] == ["checkpoint-000002"]
    assert same(found, expected)
    assert again == lines


def limited(out, words, size):
    """A run in a process whose files can't grow beyond `size` bytes: what the disk says is real."""

    def body():
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            run(out, words, resume=True)
        except SurgeryError as error:
            (out / "told").write_text(str(error))
            os._exit(2)
        os._exit(0)

    child = FORK.Process(target=body)
    child.start()
    child.join()
    return child.exitcode


def test_no_room_for_the_result_loses_nothing(tmp_path):
    expected, lines = run(tmp_path / "straight", SFT)
    out = tmp_path / "full"
    assert killed(out, SFT, at=7) == -signal.SIGKILL
    assert limited(out, SFT, size=8_000) == 2
    told = (out / "told").read_text()
    assert "could not be written" in told and "checkpoint-000006" in told and "--resume" in told
    assert not (out / "model").exists() and not list(out.glob(".model*"))
    found, again = run(out, SFT, resume=True)
    assert same(found, expected)
    assert again == lines


def test_checkpoints_that_do_not_fit_end_no_run(tmp_path):
    out = tmp_path / "full"
    shutil.rmtree(out, ignore_errors=True)
    assert limited(out, SFT, size=8_000) == 2  # through all steps, to the model that does not fit either
    assert len(metrics(out)) == 8
    assert not list(out.glob("checkpoint-*")) and not list(out.glob(".checkpoint*"))
    assert "train again" in (out / "told").read_text()


def test_a_state_that_is_no_json_is_told(tmp_path):
    rows = [{**row, "when": {1, 2}} for row in demonstrations()]
    with pytest.raises(SurgeryError, match="can't be written as JSON"):
        run(tmp_path, GRPO | {"data": rows})
