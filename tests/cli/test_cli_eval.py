"""`surgery eval`: what it prints, what it keeps, and what it refuses."""

import json

import pytest

from analysis.results import Result
from surgery.cli import main
from tests.cli.refusal import refused


def told(capsys, *words):
    assert main(["eval", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_accuracy_by_task_against_another_model(capsys, tmp_path):
    out, figure = tmp_path / "scores", tmp_path / "figure.png"
    words = ["tiny-chain", "--task", "chain", "--task", "copy", "--n", 40, "--against", "tiny-base"]
    found = told(capsys, *words, "-o", out, "--plot", figure)
    assert found["accuracy"]["mean"] >= 0.95 and found["accuracy"]["n"] == 80
    chain, copy = found["by"]["groups"]
    assert (chain["task"], copy["task"]) == ("chain", "copy") and chain["accuracy"]["n"] == 40
    difference = found["against"]["difference"]["accuracy"]
    expected = found["accuracy"]["mean"] - found["against"]["accuracy"]["mean"]
    assert difference["difference"] == pytest.approx(expected, abs=1e-5) and difference["p_value"] < 0.01
    assert figure.read_bytes()[:4] == b"\x89PNG" and str(figure) in found["written"]
    assert len(Result.load(out / "tiny-base" / "accuracy")) == 80


def test_samples_give_pass_at_k_and_majorities(capsys):
    words = ["tiny-chain", "--task", "chain", "--n", "20", "--pass-at", "1,4", "--temperature", "1.5", "--majority",
             "--likelihood", "--by", "difficulty"]  # fmt: skip
    found = told(capsys, *words)
    assert found["pass@1"]["mean"] == found["accuracy"]["mean"] < found["pass@4"]["mean"]
    assert found["accuracy"]["mean"] <= found["maj@4"]["mean"] <= found["pass@4"]["mean"]
    assert 1 < found["perplexity"] < 1.05
    assert [group["difficulty"] for group in found["by"]["groups"]] == [3, 4, 5, 6]
    assert found | {"seconds": 0} == told(capsys, *words) | {"seconds": 0}


def test_people_see_a_table_and_are_warned(capsys):
    assert main(["eval", "tiny-base", "--task", "chain", "--n", "10", "--max-new-tokens", "2", "--likelihood"]) == 0
    captured = capsys.readouterr()
    assert "perplexity" in captured.out and "95 % intervals" in captured.out and "Done in" in captured.out
    assert "cut off: raise --max-new-tokens" in captured.err


def test_examples_from_a_file(capsys, tmp_path):
    file = tmp_path / "sums.jsonl"
    file.write_text('{"q": "m 1+1=", "a": 2, "kind": "x"}\n{"q": "m 1+2=", "a": 4, "kind": "y"}\n')
    found = told(
        capsys, "tiny-base", "--data", file, "--prompt", "{q}", "--answer", "{a}", "--task", "facts", "--by", "kind"
    )
    assert [group["accuracy"]["mean"] for group in found["by"]["groups"]] == [1, 0]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["tiny-base"], "--task chain"),
        (["tiny-base", "--task", "chian"], "Did you mean 'chain'"),
        (["tiny-bse", "--task", "chain"], "tiny-bse"),
        (["tiny-base", "--task", "chain", "--against", "nosuch"], "nosuch"),
        (["tiny-base", "--task", "chain", "--chat"], "chat template"),
        (["tiny-base", "--task", "chain", "--pass-at", "4,x"], "--pass-at"),
        (["tiny-base", "--task", "chain", "--samples", "2", "--pass-at", "4"], "from 2 samples"),
        (["tiny-base", "--task", "chain", "--majority"], "--samples 16"),
        (["tiny-base", "--task", "facts", "--n", "999"], "about 200 prompts"),
        (["tiny-base", "--task", "chain", "--by", "colour"], "no column 'colour'"),
        (["tiny-base", "--task", "chain", "--prompt", "{q}"], "goes with --data"),
        (["tiny-base", "--data", "nosuch.jsonl", "--task", "facts"], "nosuch.jsonl"),
        (["tiny-base", "--data", "nosuch.jsonl", "--task", "facts", "--task", "copy"], "one task"),
        (["tiny-base", "--task", "chain", "--plot", "figure.xyz"], ".png"),
        (["tiny-base", "--task", "chain", "--max-new-tokens", "127"], "context of 128"),
    ],
)
def test_what_is_wrong_is_a_sentence(words, problem, capsys):
    assert problem in refused(["eval", *words], capsys)


def test_an_output_is_not_overwritten(capsys, tmp_path):
    words = ["eval", "tiny-base", "--task", "facts", "--n", "3", "-o", str(tmp_path)]
    assert "exists already" in refused(words, capsys)
    assert main([*words, "--force", "--quiet"]) == 0 and (tmp_path / "accuracy.json").is_file()


def test_a_lora_beside_its_base_is_that_model(capsys, tmp_path):
    vector, lora = str(tmp_path / "v.safetensors"), str(tmp_path / "lora")
    assert main(["vector", "extract", "tiny-base", "tiny-chain", "-o", vector, "--quiet"]) == 0
    assert main(["vector", "export-lora", vector, "tiny-base", "--rank", "64", "-o", lora, "--quiet"]) == 0
    capsys.readouterr()
    found = told(capsys, f"tiny-base+{lora}", "--task", "chain", "--n", 30)
    assert (
        found["accuracy"]["mean"] >= 0.95
        and told(capsys, "tiny-base", "--task", "chain", "--n", 30)["accuracy"]["mean"] < 0.5
    )
