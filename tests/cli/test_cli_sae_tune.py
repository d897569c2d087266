"""`surgery sae tune`: what would run, a small comparison whole, and what is refused before anything is loaded."""

import json

import pytest
import torch

from surgery.cli import main

SMALL = [f"--set={change}" for change in (
    "arms=[source,sft,unchanged]", "seeds=[0]", "sweep.seeds=[]", "site=resid_post.1", "tuning.lr=1e-3",
    "tuning.steps=1", "dictionary.steps=3", "dictionary.rows=64", "dictionary.buffer=128", "dictionary.latents=64",
    "evaluate.n=4", "evaluate.max_new_tokens=4",
)]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_plan_says_what_would_run(capsys, tmp_path):
    assert main(["--json", "sae", "tune", "sums", "--plan", "-o", str(tmp_path / "x"), *SMALL]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["target"], told["source"]) == ("tiny-sums-sft", "tiny-sums-grpo") and told["sites"] == ["resid_post.1"]
    assert not (tmp_path / "x").exists()


def test_a_small_comparison(capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["--json", "sae", "tune", "sums", "-o", str(out), *SMALL]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        set(told["arms"]) == {"source", "sft", "unchanged"} and told["arms"]["unchanged"]["accuracy"] == told["target"]
    )
    assert (out / "result.json").is_file() and (out / "adapters" / "source").is_dir()
    assert main(["sae", "tune", "sums", "-o", str(out), *SMALL]) == 2
    assert "is finished" in capsys.readouterr().err
    assert main(["sae", "tune", "sums", "-o", str(out), *SMALL, "--set", "tuning.steps=2"]) == 2
    assert "tuning.steps was 1 and is 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data={file: missing.txt}", "no data file missing.txt"),
        ("site=resid_post.9", "has no 'resid_post.9'"),
        ("arms=[sauce]", "'source'"),
        ("source=tiny-small-base", "are of one family"),
        ("seeds=[100]", "is chosen by and reported"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_there(change, said, capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["sae", "tune", "sums", "-o", str(out), "--set", change]) == 2
    assert said in capsys.readouterr().err and not out.exists()
