"""`surgery sae features`: what it shows of crosscoders and of dictionaries of one model, and what it refuses."""

import json

import pytest
import torch

from surgery.cli import main
from surgery.sae.dictionary import Dictionary
from surgery.sae.formats import save
from surgery.sae.rules import TopK
from tests.cli.refusal import refused

READ = ["--task", "shift", "--n", "16", "--threads", "1"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("dictionaries")
    cross = Dictionary(192, 40, TopK(k=4), models=2, norm=1.0)
    with torch.no_grad():
        cross.decoder[:20, :96] *= 0.2  # the tuned model's
    places = {
        "cross": (cross, "surgery", {"models": ["tiny-base", "tiny-shift"], "site": "resid_post.3"}),
        "one": (Dictionary(96, 40, TopK(k=4)), "saelens",
                {"hook_name": "blocks.2.hook_resid_post", "model_name": "tiny-shift"}),
        "bare": (Dictionary(96, 40, TopK(k=4)), "saelens", {}),
        "difference": (Dictionary(96, 40, TopK(k=4)), "surgery", {"site": "resid_post.3", "difference": True}),
    }  # fmt: skip
    for name, (dictionary, format, about) in places.items():
        save(dictionary, root / name, format, metadata=about)
    return root


def told(capsys, *words):
    assert main(["sae", "features", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_crosscoder_knows_its_models_and_its_site(capsys, folders, tmp_path):
    page, figure = tmp_path / "f.html", tmp_path / "f.png"
    found = told(capsys, folders / "cross", *READ, "--top", 3, "-k", 2, "--random", 1, "--html", page, "--plot", figure)
    assert found["models"] == ["tiny-base", "tiny-shift"] and found["site"] == "resid_post.3" and found["texts"] == 16
    assert len(found["latents"]) == 3 and all(row["latent"] < 20 for row in found["latents"])
    row = found["latents"][0]
    assert row["relative norm"] == pytest.approx(0.9) and row["kind"] in ("mostly tuned", "tuned only")
    assert {e["kind"] for e in row["examples"]} == {"top", "random"} and row["promotes"] and row["suppresses"]
    assert "<script" not in page.read_text() and f'id="latent-{row["latent"]}"' in page.read_text()
    assert figure.read_bytes()[:4] == b"\x89PNG" and found["written"] == [str(page), str(figure)]


def test_people_see_coloured_text(capsys, folders):
    assert main(["sae", "features", str(folders / "cross"), *READ, "--latent", "3", "-l", "25", "-k", "2"]) == 0
    out = capsys.readouterr().out
    assert "latent 3" in out and "latent 25" in out and "«" in out and "promotes" in out and "shared" in out


def test_a_dictionary_of_one_model_alone_and_in_both(capsys, folders, tmp_path):
    alone = told(capsys, folders / "one", *READ, "--top", 2)
    assert alone["models"] == ["tiny-shift"] and alone["site"] == "resid_post.2" and alone["kinds"] == {}
    both = told(capsys, folders / "one", "--base", "tiny-base", *READ, "--top", 2, "--show", "used")
    assert both["models"] == ["tiny-base", "tiny-shift"] and sum(both["kinds"].values()) > 5
    assert {"fires base", "fires tuned", "fate"} <= set(both["latents"][0])
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "n abc=#bcd"}\n{"prompt": "n ab=", "completion": "#bc"}\n')
    named = told(capsys, folders / "bare", "--model", "tiny-base", "--site", "mlp_out.1", "--texts", texts, "--top", 1)
    assert named["texts"] == 2 and named["tokens"] == 18 and named["site"] == "mlp_out.1"


def test_the_seed_draws_examples_too(capsys, folders, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"n {a}{b}=#{b}{a}\n" for a in "abcd" for b in "abcd"))
    read = [folders / "one", "--texts", texts, "--threads", "1", "--latent", "3", "-l", "4", "--random", "1"]
    one, same, other = (told(capsys, *read, "--seed", seed)["latents"] for seed in (1, 1, 2))
    assert one == same and one != other


def test_differences(capsys, folders):
    found = told(capsys, folders / "difference", "--model", "tiny-shift", "--base", "tiny-base", *READ, "--top", 1)
    assert found["models"] == ["tiny-base", "tiny-shift"] and found["latents"][0]["fires"] > 0


def test_what_is_refused(capsys, folders, tmp_path):
    there = tmp_path / "there.html"
    there.write_text("mine")
    cases = [
        ([folders / "one"], "There is no text to read"),
        ([folders / "one", *READ, "--texts", "a.txt"], "two texts"),
        ([folders / "one", "--texts", tmp_path / "none.txt"], "no file"),
        ([folders / "bare", *READ], "does not say which model it reads"),
        ([folders / "bare", *READ, "--model", "tiny-base"], "does not say where it reads"),
        ([folders / "bare", *READ, "--model", "tiny-base", "--site", "mlp_post.1"], "activations of 96 numbers"),
        ([folders / "difference", *READ, "--model", "tiny-shift"], "Add --base"),
        ([folders / "cross", *READ, "--latent", "40"], "no latent 40"),
        ([folders / "one", *READ, "--show", "tuned"], "need a pair"),
        ([folders / "one", *READ, "--html", there], "exists already"),
        ([folders / "one", *READ, "--html", "page.pdf"], "writes .html"),
        ([tmp_path / "nothing", *READ], "no folder with a dictionary"),
    ]  # fmt: skip
    for words, said in cases:
        assert said in refused(["sae", "features", *words], capsys), words
    assert there.read_text() == "mine"
