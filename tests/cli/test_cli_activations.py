"""`surgery patch`, `tuco`, `diff` and `circuit`: what they print, what they keep, and what they refuse."""

import json

import pytest

from analysis.results import Result
from surgery.cli import main
from tests.cli.refusal import refused

BOXES = ["tiny-boxes", "--task", "boxes", "--suffix", "#", "--n", "6", "--threads", "1"]


def told(capsys, *words):
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def sums(tmp_path):
    file = tmp_path / "sums.txt"
    file.write_text("m 3+5-2+4=\nm 1+2+3+4=\n\nm 9-5+2=\n")
    return file


@pytest.fixture
def words(tmp_path):
    file = tmp_path / "words.jsonl"
    file.write_text('{"prompt": "c abcd="}\n{"text": "r hgfe="}\n{"prompt": "s dcba="}\n')
    return file


def test_patch_tells_the_best_cells_and_keeps_every_one(capsys, tmp_path):
    figure = tmp_path / "map.png"
    found = told(capsys, "patch", *BOXES, "--site", "z", "-o", tmp_path / "heads", "--plot", figure)
    best = found["top"][0]
    assert best["low"] <= best["mean"] <= best["high"] and found["clean"] > 0 > found["corrupt"]
    assert best["mean"] == pytest.approx(found["mean"][best["layer"]][best["head"]])
    kept = Result.load(tmp_path / "heads")
    assert kept.values.shape == (6, 4, 4) and kept.normalized().mean[0, 0] == pytest.approx(found["mean"][0][0])
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_patch_reads_two_files_and_asks_the_model_where_there_are_no_answers(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("b a in q;where a=#\n")
    (tmp_path / "b.txt").write_text("b a in r;where a=#\n")
    words = ["patch", "tiny-boxes", "--clean", tmp_path / "a.txt", "--corrupt", tmp_path / "b.txt", "--threads", "1"]
    assert main([*map(str, words), "--noising", "--top", "2"]) == 0
    captured = capsys.readouterr()
    assert "damage" in captured.out and "the model's own likeliest tokens" in captured.err


def test_tuco_of_two_files_and_their_auc(capsys, tmp_path, sums, words):
    page = tmp_path / "tuco.html"
    found = told(capsys, "tuco", "tiny-base", "tiny-chain", "--prompts", sums, "--prompts", words, "--html", page,
                 "-o", tmp_path / "kept", "--plot", tmp_path / "t.png", "--threads", 1)  # fmt: skip
    assert found["sets"]["sums"]["mean"] > found["sets"]["words"]["mean"]
    assert found["auc"]["words"]["value"] == 1 and len(found["written"]) == 2 * 6 + 2
    assert Result.load(tmp_path / "kept" / "sums" / "beta").values.shape == (3, 4)
    assert "<script" not in page.read_text() and "example 0" in page.read_text()


def test_diff_tells_every_measure(capsys, tmp_path, sums):
    found = told(capsys, "diff", "tiny-base", "tiny-chain", "--texts", sums, "--lens", 2, "-o", tmp_path / "kept",
                 "--threads", 1)  # fmt: skip
    measures = {row["measure"] for row in found["measures"]}
    assert {"kl", "agreement", "cka", "procrustes"} <= measures and len(found["lens"]) == 2
    assert (tmp_path / "kept" / "diff.png").is_file()
    same = told(capsys, "diff", "tiny-base", "tiny-base", "--texts", sums, "--measure", "kl", "--threads", 1)
    assert same["measures"][0]["mean"] == pytest.approx(0, abs=1e-9)


def test_a_circuit_is_found_kept_and_tested(capsys, tmp_path):
    file = tmp_path / "c.json"
    found = told(capsys, "circuit", "find", *BOXES, "--step", "A:3", "--step", "B:2:A:v:all", "-o", file,
                 "--plot", tmp_path / "c.png")  # fmt: skip
    assert set(found["groups"]) == {"A", "B"} and found["groups"]["A"]
    tested = told(capsys, "circuit", "test", "tiny-boxes", file, *BOXES[1:], "--draws", 2, "--complete")
    assert [row["run"] for row in tested["runs"]] == ["model", "circuit", "random"]
    assert tested["runs"][0]["faithfulness"] == 1 and "A" in tested["completeness"]


def test_a_circuit_of_edges(capsys, tmp_path):
    file = tmp_path / "e.json"
    found = told(capsys, "circuit", "find", *BOXES, "--edges", 80, "--metric", "logit_diff", "-o", file)
    assert 0 < len(found["edges"]) <= 80
    runs = told(capsys, "circuit", "test", "tiny-boxes", file, *BOXES[1:], "--draws", 2)["runs"]
    assert runs[1]["faithfulness"] > runs[2]["faithfulness"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["patch", "tiny-boxes"], "Nothing to compare"),
        (["patch", "tiny-boxes", "--task", "chain"], "makes no corrupt prompts"),
        (["patch", *BOXES, "--site", "resid_prae"], "no site 'resid_prae'"),
        (["patch", *BOXES, "--plot", "map.txt"], "--plot writes"),
        (["patch", "tiny-boxes", "--clean", "no.txt", "--corrupt", "no.txt"], "no file no.txt"),
        (["tuco", "tiny-base", "tiny-small-chain", "--prompts", "{sums}"], "same architecture"),
        (["tuco", "tiny-base", "tiny-chain", "--prompts", "no.txt"], "no file no.txt"),
        (["diff", "tiny-base", "tiny-chain", "--texts", "{sums}", "--measure", "kll"], "kll"),
        (["circuit", "find", *BOXES, "--step", "A"], "--step 'A' is not understood"),
        (["circuit", "find", *BOXES, "--step", "A:2", "--edges", "3"], "two ways"),
        (["circuit", "test", "tiny-boxes", "no.json", "--task", "boxes"], "no circuit at no.json"),
    ],
)
def test_what_is_wrong_is_a_sentence(words, problem, capsys, sums):
    assert problem in refused([w.format(sums=sums) for w in words], capsys)


def test_pairs_of_unequal_length_are_named(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("b a in q;where a=#\n")
    (tmp_path / "b.txt").write_text("b a in r;c in s;where a=#\n")
    words = ["patch", "tiny-boxes", "--clean", str(tmp_path / "a.txt"), "--corrupt", str(tmp_path / "b.txt")]
    assert "Pair 0: the clean prompt is" in refused(words, capsys)


def test_an_output_is_not_overwritten(capsys, tmp_path, sums):
    (tmp_path / "kept").mkdir()
    words = ["tuco", "tiny-base", "tiny-chain", "--prompts", str(sums), "-o", str(tmp_path / "kept")]
    assert "exists already" in refused(words, capsys)
