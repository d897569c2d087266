"""`surgery explore`: what it finds is what the library finds; what it shows, keeps and refuses; and Ctrl-C."""

import json

import pytest
import torch

from surgery.cli import main
from surgery.logits import Ensemble
from surgery.logits.explore import Exploration, explore
from tests.cli.refusal import refused

WORDS = ["explore", "tiny-base", "tiny-shift", "--start", "n ab", "--ends", "--length", "12"]
"""Short texts behind the prompt of the task that tiny-shift learned."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def told(capsys, *words):
    assert main([*WORDS, *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_draws_what_the_library_draws(capsys, tmp_path):
    more = {"n": 4, "beams": 1, "alpha": 0.05, "gamma": 0.5, "seed": 3, "temperature": 1.5}
    out, page, figure = tmp_path / "new.json", tmp_path / "new.html", tmp_path / "new.png"
    words = [f"--{word}={value}" for word, value in more.items()]
    found = told(capsys, *words, "-o", out, "--html", page, "--plot", figure, "--prompt", "n ab=", "--top", 3)
    expected = explore("tiny-base", "tiny-shift", start="n ab", ends=True, length=12, **more)
    best = sorted(expected.texts, key=lambda one: -one.novelty)
    assert [row["text"] for row in found["texts"]] == [one.text for one in best]
    assert [row["contrast"] for row in found["texts"]] == pytest.approx([one.novelty for one in best], abs=1e-5)
    assert len({row["text"] for row in found["texts"]}) > 1
    assert Exploration.load(out).texts == expected.texts and found["written"] == list(map(str, (out, page, figure)))
    assert best[0].tokens[0] in page.read_text() and figure.read_bytes()[:4] == b"\x89PNG"
    assert len(found["tokens"]) == 3 and found["tokens"][0]["sum"] == max(row["sum"] for row in found["tokens"])
    assert found["settings"]["gamma"] == 0.5 and found["settings"]["tuned"] == "tiny-shift"
    likeliest = max(found["next"]["n ab="], key=lambda token: token["tuned"])
    assert likeliest["token"] == "#" and 0 < found["distinct-2"] <= 1


def test_a_base_that_learns_finds_the_same_thing_less_new(capsys):
    still = told(capsys, "--n", 4)["texts"]
    learning = told(capsys, "--n", 4, "--iterative", "--lr", 1e-3)["texts"]
    assert len({row["text"] for row in still}) < 4 and all(row["loss"] is None for row in still)
    losses = {row["text"]: row["loss"] for row in learning}
    assert all(loss is not None for loss in losses.values())
    assert len(losses) > len({row["text"] for row in still})


def test_people_see_tables_and_a_page_can_be_the_output(capsys, tmp_path):
    page = tmp_path / "new.html"
    assert main([*WORDS, "--n", "3", "-o", str(page), "-p", "n ab="]) == 0
    shown = capsys.readouterr().out
    for words in (
        "Texts by contrast",
        "times",
        "Tokens with most contrast",
        "Next tokens behind",
        "3 texts in",
        "Written",
    ):
        assert words in shown
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert "exists already" in refused([*WORDS, "-o", page], capsys)


@pytest.mark.parametrize("when", [3, 12, 15])  # while the first texts are drawn, while they are scored, and later
def test_ctrl_c_leaves_the_texts_that_are_there(when, capsys, tmp_path, monkeypatch):
    read, calls, out = Ensemble.read, [], tmp_path / "new.json"

    def interrupted(self, *given):
        calls.append(given)
        if len(calls) == when:
            raise KeyboardInterrupt
        return read(self, *given)

    monkeypatch.setattr(Ensemble, "read", interrupted)
    assert main([*WORDS, "--n", "9", "--batch-size", "4", "-o", str(out)]) == 130
    captured = capsys.readouterr()
    kept = Exploration.load(out)
    assert kept.interrupted and 0 < len(kept.texts) < 9
    assert f"Stopped.\n{len(kept.texts)} of 9 texts were drawn." in captured.err and "Texts by contrast" in captured.out


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["tiny-base", "tiny-base"], "are the same"),
        (["tiny-base", "nosuch"], "nosuch"),
        (["tiny-base", "tiny-shift", "--alpha", "0"], "impossible decide"),
        (["tiny-base", "tiny-shift", "--n", "2", "--temperature", "0"], "the same"),
        (["tiny-base", "tiny-shift", "--length", "128"], "context of 128"),
        (["tiny-base", "tiny-shift", "--top-p", "0"], "top_p"),
        (["tiny-base", "tiny-shift", "--iterative", "--lr", "0"], "lr"),
        (["tiny-base", "tiny-shift", "-o", "new.txt"], ".json"),
        (["tiny-base", "tiny-shift", "--html", "new.txt"], ".html"),
        (["tiny-base", "tiny-shift", "--plot", "new.txt"], ".png"),
    ],
)
def test_what_is_wrong_is_a_sentence(words, problem, capsys):
    assert problem in refused(["explore", *words], capsys)
