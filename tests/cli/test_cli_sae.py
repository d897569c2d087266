"""`surgery sae`: dictionaries trained, measured and converted at the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from surgery.cli import main
from surgery.sae.formats import load
from surgery.sae.rules import RULES

SMALL = ["--set", "steps=6", "--set", "rows=64", "--set", "buffer=256", "--set", "evaluate.sequences=4"]


def told(capsys, *words):
    """Exit code, what was printed as JSON (or None), and what was said."""
    code = main(["--json", *words])
    found = capsys.readouterr()
    return code, json.loads(found.out) if found.out.strip() else None, found.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("sae") / "run"
    assert main(["--quiet", "sae", "train", "crosscoder", "-o", str(out), *SMALL]) == 0
    return out


def test_train_says_what_the_dictionaries_are_worth(trained, capsys):
    capsys.readouterr()
    assert json.loads((trained / "recipe.json").read_text())["steps"] == 6
    code, found, _ = told(capsys, "sae", "measure", str(trained / "dictionaries" / "middle"), "--data", "chain",
                          "--sequences", "4")  # fmt: skip
    assert code == 0 and found["models"] == ["tiny-base", "tiny-shift"] and found["site"] == "resid_post.2"
    assert found["l0"] > 0 and len(found["with mean ablation"]) == 2
    assert main(["sae", "measure", str(trained / "dictionaries" / "middle"), "--data", "chain", "--context", "32",
                 "--sequences", "4"]) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "CE recovered" in shown and "On chain" in shown


def test_plan_runs_nothing(capsys, tmp_path):
    out = tmp_path / "run"
    code, found, _ = told(capsys, "sae", "train", "sweep", "-o", str(out), "--plan", "--model", "tiny-small-base")
    assert code == 0 and not out.exists() and set(found["dictionaries"]) == {"topk", "batchtopk", "matryoshka"}
    numbers = 3 * (512 * (2 * 64 + 1) + 64)
    assert found["memory"]["dictionaries"] == 16 * numbers and found["memory"]["buffer"] == 16_384 * 64 * 4
    assert main(["sae", "train", "sweep", "--plan"]) == 0
    assert "topk: resid_post.2, 512 latents" in capsys.readouterr().out
    code, found, _ = told(capsys, "sae", "train", "sweep", "-o", str(out), "--plan", "--resume")
    assert code == 0 and found["output"] == f"{out} (no checkpoint there: from the beginning)"
    (out / "checkpoint-000120").mkdir(parents=True)
    (out / "checkpoint-000120" / "state.json").touch()
    code, found, _ = told(capsys, "sae", "train", "sweep", "-o", str(out), "--plan", "--resume")
    assert code == 0 and found["output"] == f"{out} (going on from step 120)"


def test_later_processes_are_silent_also_when_they_refuse(capsys, monkeypatch, tmp_path):
    words = ["sae", "train", "sweep", "-o", str(tmp_path / "run"), "--set", "rows=999999"]
    assert main(words) == 2 and "`buffer` holds" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_a_run_shows_lines_and_a_table(capsys, tmp_path):
    assert main(["sae", "train", "dictionary", "-o", str(tmp_path / "run"), *SMALL]) == 0
    found = capsys.readouterr()
    assert "step 6/6" in found.err and "unexplained variance" in found.err
    assert "Trained 1 dictionary by dictionary: 6 steps" in found.out and "middle" in found.out
    assert main(["sae", "train", "dictionary", "-o", str(tmp_path / "run"), *SMALL]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    words = [sys.executable, "-m", "surgery.cli", "sae", "train", "dictionary", "-o", str(out), "--set", "steps=4000",
             "--set", "rows=32", "--set", "buffer=64", "--set", "evaluate.sequences=2"]  # fmt: skip
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text().count("\n") < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    (kept,) = out.glob("checkpoint-*")
    step = int(kept.name.rpartition("-")[2])
    assert process.returncode == 130 and f"Go on from step {step} with: surgery sae train dictionary" in said
    assert main(["--quiet", "sae", "train", "dictionary", "-o", str(out), "--set", f"steps={step + 2}", "--set",
                 "rows=32", "--set", "buffer=64", "--set", "evaluate.sequences=2", "--resume"]) == 0  # fmt: skip
    assert (out / "metrics.jsonl").read_text().count("\n") == step + 2


def test_convert_goes_to_other_packages_and_back(trained, tmp_path, capsys):
    mine = trained / "dictionaries" / "middle"
    assert main(["sae", "convert", str(mine), "-o", str(tmp_path / "x"), "--format", "saelens"]) == 2
    assert "crosscoder" in capsys.readouterr().err
    assert main(["--quiet", "sae", "train", "dictionary", "-o", str(tmp_path / "run"), *SMALL]) == 0
    mine = tmp_path / "run" / "dictionaries" / "middle"
    assert main(["sae", "convert", str(mine), "-o", str(tmp_path / "x"), "--format", "saelens"]) == 0
    config = json.loads((tmp_path / "x" / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
    x = torch.randn(50, 96)
    theirs, ours = load(tmp_path / "x")[0], load(mine)[0]
    torch.testing.assert_close(theirs(x), ours(x))
    assert main(["sae", "convert", str(mine), "-o", str(tmp_path / "x"), "--format", "saelens"]) == 2


def test_list_shows_rules_and_recipes(capsys):
    code, found, _ = told(capsys, "sae", "list")
    assert code == 0 and [rule["name"] for rule in found["rules"]] == list(RULES) and "crosscoder" in found["recipes"]
    assert main(["sae", "list", "batchtopk"]) == 0 and "k: 32.0" in capsys.readouterr().out
    assert main(["sae", "list", "crosscoder"]) == 0 and "model: [tiny-base, tiny-shift]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sae", "train", "dictionar"], "There is no recipe dictionar.*Did you mean 'dictionary'"),
        (["sae", "train", "dictionary", "--set", "dictionaries.middle.site=resid_post.7"], "there is no layer 7"),
        (["sae", "train", "dictionary", "--set", "dictionaries.middle.latents=4"], "can't use 8 of 4 latents"),
        (["sae", "train", "dictionary", "--model", "no-such"], "no-such"),
        (["sae", "train", "dictionary", "--set", "data=nothing.txt"], "no data file nothing.txt"),
        (["sae", "measure", "nowhere", "--data", "chain"], "no folder with a dictionary"),
        (["sae", "list", "topkk"], "no rule for a dictionary 'topkk'.*'topk'"),
        (["sae", "train", "crosscoder", "--model", "tiny-base"], "crosscoder reads 2 models, and --model names 1"),
        (["sae", "train", "dictionary", "-o", f"{__file__}/run"], "is a file, and a run needs a folder"),
        (
            ["sae", "train", "crosscoder", "--model", "tiny-base", "--model", "tiny-small-base", *SMALL],
            "widths of .*take a model and its fine-tuning",
        ),
    ],
    ids=range(10),
)
def test_what_is_wrong_is_a_sentence_and_2(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert re.search(said, error, re.S) and "Traceback" not in error and not list(tmp_path.iterdir())


def test_measure_asks_for_what_a_file_does_not_say(trained, capsys):
    assert main(["sae", "measure", str(trained / "dictionaries" / "middle")]) == 2
    assert "no text to measure it on" in capsys.readouterr().err
    for models, said in ((["tiny-base"], "reads 2 models, and --model names 1"),
                         (["tiny-small-base"] * 2, "reads activations of 192 numbers, found 128")):  # fmt: skip
        named = [word for model in models for word in ("--model", model)]
        assert main(["sae", "measure", str(trained / "dictionaries" / "middle"), *named, "--data", "chain"]) == 2
        assert said in capsys.readouterr().err
