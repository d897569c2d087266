"""`surgery train`, `recipes` and `rollouts`: what is refused and when, what is said, Ctrl-C and going on, processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from surgery.cli import main
from tests.cli.refusal import refused

SFT = {
    "name": "small", "about": "A few steps.", "paper": "arXiv:0000.00000", "model": "tiny-base",
    "data": {"task": "chain"}, "objective": "sft", "batch": {"rows": 4}, "optimizer": {"lr": 3e-4}, "steps": 3,
    "evaluate": {"every": 3, "n": 4, "max_new_tokens": 8},
}  # fmt: skip
GRPO = {**SFT, "objective": {"grpo": {"beta": 0.02}}, "reward": {"accuracy": 1, "format": 0.2},
        "rollouts": {"prompts": 4, "group": 4, "max_new_tokens": 12}}  # fmt: skip
HEAVY = """
import sys
from surgery.cli import main
code = main(sys.argv[1:])
print("heavy", code, *sorted({"transformers", "accelerate", "matplotlib", "pandas"} & sys.modules.keys()),
      file=sys.stderr)
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe, and gives its path."""

    def write(words, **changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**words, **changes}))
        return str(path)

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished GRPO run: its folder and what --json said."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(GRPO))
    argv = ["train", str(folder / "recipe.yaml"), "-o", str(folder / "out"), "--json"]
    done = subprocess.run([sys.executable, "-m", "surgery.cli", *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "out", json.loads(done.stdout), done.stderr


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optimiser": {"lr": 1}}, "no key 'optimiser'. Did you mean 'optimizer'"),
        ({"objective": "grp"}, "Did you mean 'grpo'"),
        ({"rollouts": {"group": 1}}, "group of 1"),
        ({"reward": None}, "no reward"),
        ({"parallel": "fsdp2"}, "FSDP2"),
        ({"trackers": ["wandbb"]}, "Did you mean 'wandb'"),
        ({"data": [{"question": "2+2", "answer": "4"}]}, "no column 'prompt'"),
        ({"frozen": ["*"]}, "No parameter"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all"),
        ({"model": None}, "names no model"),
        ({"steps": 0}, "greater than or equal to 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_that_can_not_work_is_refused_in_a_sentence(recipe, tmp_path, changes, told, capsys):
    said = refused(["train", recipe(GRPO, **changes), "-o", tmp_path / "out"], capsys)
    assert told in said and len(said.splitlines()) <= 2
    assert not (tmp_path / "out").exists()


def test_what_is_refused_is_refused_without_transformers(recipe, tmp_path):
    for argv, code in (
        (["train", recipe(GRPO), "--set", "rollouts.group=1"], 2),
        (["train", recipe(GRPO, frozen=["*"])], 2),
        (["train", "no_such_recipe"], 2),
    ):
        done = subprocess.run([sys.executable, "-c", HEAVY, *argv], capture_output=True, text=True, timeout=60)
        assert done.stderr.splitlines()[-1] == f"heavy {code}", done.stderr


def test_a_folder_with_a_run_is_neither_written_over_nor_begun_again(recipe, finished, capsys):
    out, _, _ = finished
    before = (out / "metrics.jsonl").read_text()
    assert "--resume" in refused(["train", recipe(SFT), "-o", out], capsys)
    assert "finished" in refused(["train", recipe(SFT), "-o", out, "--resume"], capsys)
    assert (out / "metrics.jsonl").read_text() == before


# ---- what is said --------------------------------------------------------------------------------------------------


def test_the_plan_says_what_would_run(recipe, tmp_path, capsys):
    argv = ["train", recipe(GRPO), "--set", "frozen=['model.layers.*']", "--set", "batch.epochs=2"]
    assert main([*argv, "-o", str(tmp_path / "out"), "--plan"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in ("grpo (", "beta 0.02", "on_policy", "chain", "accuracy + 0.2 * format", "tiny-base", "3 steps",
                  "4 prompts x 4 completions of at most 12 tokens", "2 updates", "every 3 steps",
                  "weights "):  # fmt: skip
        assert words in said, words
    assert main([*argv, "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    moving, _, whole, *_ = told["trainable"].replace(",", "").split()
    assert 0 < int(moving) < int(whole)
    assert told["memory"]["weights"] >= 4 * int(whole) > told["memory"]["gradients"] > 0
    assert told["output"] == "runs/small"
    assert not (tmp_path / "out").exists()


def test_a_run_says_what_was_done_and_where_it_is(recipe, tmp_path, capsys):
    assert main(["train", recipe(SFT), "-o", str(tmp_path / "out"), "--set", "steps=2"]) == 0
    captured = capsys.readouterr()
    assert "Trained tiny-base by small: 2 steps in" in captured.out
    assert "accuracy: " in captured.out and " before, " in captured.out
    for name in ("model", "metrics.jsonl", "curves.png"):
        assert str(tmp_path / "out" / name) in captured.out and (tmp_path / "out" / name).exists()
    assert "sft" in captured.err and "trainable" in captured.err  # what will run, before it does
    assert "step 2/2 · loss" in captured.err and "Loading weights" not in captured.err


def test_json_is_the_whole_result(finished):
    out, told, err = finished
    assert told["steps"] == 3 and told["model"] == "tiny-base" and told["output"] == str(out)
    assert set(told["files"]) == {"model", "metrics", "rollouts", "curves"}
    assert told["before"]["step"] == 0 and told["after"]["step"] == 3
    assert told["last"]["grad_norm"] > 0
    assert "step 3/3" in err
    assert json.loads((out / "recipe.json").read_text())["reward"] == GRPO["reward"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_quiet_says_nothing(recipe, tmp_path, capfd):
    assert main(["train", recipe(SFT, steps=1), "-o", str(tmp_path / "out"), "--quiet"]) == 0
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_warnings_are_notes_and_in_the_result(recipe, tmp_path, capsys):
    short = {**GRPO["rollouts"], "max_new_tokens": 2}
    assert main(["train", recipe(GRPO, rollouts=short), "-o", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    warned = [text for text in json.loads(captured.out)["warnings"] if "max_new_tokens=2" in text]
    assert len(warned) == 1 and f"note: {warned[0]}" in captured.err


# ---- stopped, and going on -----------------------------------------------------------------------------------------


def test_ctrl_c_ends_after_the_step_and_resuming_gives_the_straight_run(recipe, tmp_path, capsys):
    words = recipe(GRPO, steps=12, evaluate={}, rollouts={**GRPO["rollouts"], "prompts": 8})
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "surgery.cli", "train", words, "-o", str(out)]
    going = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not ((out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n")):
        assert going.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    going.send_signal(signal.SIGINT)
    _, said = going.communicate(timeout=60)
    assert going.returncode == 130, said
    step = len((out / "metrics.jsonl").read_text().splitlines())
    assert 0 < step < 12 and (out / f"checkpoint-{step:06d}").is_dir()
    assert "Stopping after this step" in said and "Traceback" not in said
    assert f"Go on from step {step} with: surgery train {words} -o {out} --resume" in said

    assert main(["train", words, "-o", str(out), "--resume", "--quiet"]) == 0
    assert main(["train", words, "-o", str(tmp_path / "straight"), "--quiet"]) == 0
    one, other = ((folder / "model" / "model.safetensors").read_bytes() for folder in (out, tmp_path / "straight"))
    assert one == other


def test_a_run_goes_on_by_its_own_recipe_only_and_that_is_told_before_a_model_is_loaded(
    recipe, tmp_path, capsys, monkeypatch
):
    from surgery.training.recipe import load
    from surgery.training.run import train

    path, out = recipe(SFT, evaluate={}), tmp_path / "out"

    def stop(step, metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe=load(path), out=out, on_step=stop)
    capsys.readouterr()
    monkeypatch.setattr("surgery.training.run.open_model", pytest.fail)
    assert "optimizer.lr" in refused(["train", path, "-o", out, "--resume", "--set", "optimizer.lr=1e-5"], capsys)


def test_resuming_nothing_begins_and_says_so(recipe, tmp_path, capsys):
    argv = ["train", recipe(SFT, steps=1, evaluate={}), "-o", str(tmp_path / "out"), "--resume"]
    assert main(argv) == 0
    assert "no checkpoint: the run begins at its first step" in capsys.readouterr().err


def test_of_two_processes_the_first_speaks(recipe, tmp_path):
    argv = ["--nproc_per_node", "2", "--master_port", str(20_000 + os.getpid() % 20_000), "-m", "surgery.cli", "train"]
    words = recipe(SFT, steps=2, parallel="ddp", evaluate={})
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *argv, words, "-o", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained tiny-base") == 1 and done.stderr.count("step 2/2") == 1


def test_later_processes_are_silent_also_when_they_refuse(recipe, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["train", recipe(GRPO, reward=None)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


# ---- recipes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A folder of packaged recipes."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# by hand\n" + yaml.safe_dump({**GRPO, "source": {"dynamic": {}}}))
    (folder / "plain.yaml").write_text(yaml.safe_dump(SFT))
    monkeypatch.setattr("surgery.training.recipe.PACKAGED", folder)
    return folder


def test_recipes_are_listed_and_shown(library, capsys):
    assert main(["recipes", "list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["mine", "plain"]
    assert rows[0] == {"name": "mine", "objective": "grpo", "source": "dynamic", "paper": "arXiv:0000.00000",
                       "about": "A few steps."}  # fmt: skip
    assert main(["recipes", "list"]) == 0
    assert "arXiv:0000.00000" in capsys.readouterr().out
    assert main(["recipes", "show", "mine"]) == 0
    assert capsys.readouterr().out == (library / "mine.yaml").read_text()


def test_a_full_recipe_has_every_key_and_is_a_recipe_again(library, tmp_path, capsys):
    from surgery.training.recipe import Recipe, as_words, load

    assert main(["recipes", "show", "plain", "--full"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    again = load(tmp_path / "again.yaml")
    assert as_words(again) == as_words(load("plain"))
    assert set(yaml.safe_load((tmp_path / "again.yaml").read_text())) == set(Recipe.model_fields) - {"folder"}


def test_a_mistyped_recipe_is_answered_with_the_nearest(library, capsys):
    assert "Did you mean 'mine'" in refused(["recipes", "show", "mime"], capsys)
    assert "Did you mean 'mine'" in refused(["train", "mime"], capsys)


def test_every_packaged_recipe_can_be_listed(capsys):
    assert main(["recipes", "list", "--json"]) == 0
    assert all(row["objective"] and row["about"] for row in json.loads(capsys.readouterr().out))


# ---- rollouts ------------------------------------------------------------------------------------------------------


def test_rollouts_are_shown_by_reward_and_step(finished, tmp_path, capsys):
    out, _, _ = finished
    assert main(["rollouts", "inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert all(
        f"{name}: {which}" in said for name in ("accuracy", "format", "total") for which in ("highest", "lowest")
    )
    assert "Correlations" in said and "constant groups" in said and "48 completions in 12 groups" in said
    argv = ["rollouts", "inspect", str(out), "--step", "2", "--by", "accuracy", "--top", "1", "--bottom", "0"]
    assert main([*argv, "--plot", str(tmp_path / "plots" / "r.png")]) == 0
    said = capsys.readouterr().out
    assert "accuracy: highest" in said and "lowest" not in said and "format: highest" not in said
    assert "16 completions in 4 groups" in said and (tmp_path / "plots" / "r.png").is_file()
    assert main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["step"] == 2 and len(told["components"]["accuracy"]["top"]) == 1
    assert "length" in told["components"]["accuracy"]["correlations"]


def test_the_same_text_is_shown_once(tmp_path, capsys):
    lines = [{"step": 1, "group": 0, "prompt": "p", "completion": "same" if i else "odd", "length": 1,
              "reward": 1.0, "rewards": {"a": 1.0}, "completion_ids": [1]} for i in range(30)]  # fmt: skip
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["rollouts", "inspect", str(tmp_path), "--json"]) == 0
    top = json.loads(capsys.readouterr().out)["components"]["a"]["top"]
    assert sorted(line["completion"] for line in top) == ["odd", "same"]


def test_what_a_run_has_not_is_a_sentence(finished, tmp_path, capsys):
    out, _, _ = finished
    assert "steps 1 to 3" in refused(["rollouts", "inspect", out, "--step", "9"], capsys)
    assert "'accuracy'" in refused(["rollouts", "inspect", out, "--by", "acuracy"], capsys)
    assert "no rollout log" in refused(["rollouts", "inspect", tmp_path], capsys)
