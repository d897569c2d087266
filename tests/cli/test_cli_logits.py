"""`surgery generate` and `surgery eval` on formulas: what is said, shown, kept and refused; and Ctrl-C."""

import json

import pytest
import torch

from surgery.activations.scaling import scaled
from surgery.cli import main
from surgery.cli.completions import Told
from surgery.errors import SurgeryError
from surgery.logits import Ensemble, generate, member
from surgery.logits.generate import Composed
from surgery.models import Pair
from tests.cli.refusal import refused

CHAIN = "m 2-9+9="
"""Asked of a chain model: worked out step by step."""
NAMED = ["--model", "large=tiny-base", "--model", "tuned=tiny-small-chain", "--model", "small=tiny-small-base"]
FORMULA = "large + 1.0*(tuned - small)"
EFT = ["--expr", FORMULA, *NAMED]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def eft():
    large, tuned, small = (member(name) for name in ("tiny-base", "tiny-small-chain", "tiny-small-base"))
    return large + 1.0 * (tuned - small)


def told(capsys, *words):
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- generate ------------------------------------------------------------------------------------------------------


def test_a_formula_says_what_the_library_says(capsys, eft):
    found = told(capsys, "generate", *EFT, "-p", CHAIN, "-p", "c abc=", "--scores")
    expected = generate(eft, [CHAIN, "c abc="], members=True)
    assert [row["text"] for row in found["completions"]] == [one.text for one in expected]
    assert found["weights"] == {"large": 1, "tuned": 1, "small": -1} and found["expr"] == FORMULA
    first, one = found["completions"][0], expected[0]
    assert (
        first["token_ids"] == one.completion_ids and first["ended"] == "eos" and first["tokens"] == len(one.log_probs)
    )
    assert first["log_probs"] == pytest.approx(one.log_probs, abs=1e-5)
    assert list(first["members"]) == ["large", "tuned", "small"]
    assert first["members"]["small"] == pytest.approx(one.members["tiny-small-base"], abs=1e-5)
    assert "".join(first["token_texts"][:-1]) == first["text"]


def test_names_of_the_zoo_need_no_model(capsys):
    formula = "'tiny-base' + 1.0*('tiny-small-chain' - 'tiny-small-base')"
    bare, named = (told(capsys, "generate", *how, "-p", CHAIN) for how in ([formula], EFT))
    assert bare["completions"] == named["completions"]
    single = told(capsys, "generate", "tiny-chain", "-p", CHAIN)
    assert single["model"] == "tiny-chain" and single["completions"][0]["text"].endswith("#2")
    assert told(capsys, "generate", "t", "-m", "t=tiny-chain", "-p", CHAIN)["completions"] == single["completions"]


def test_draws_are_those_of_the_seed_in_every_way_to_show_them(capsys):
    words = ["generate", *EFT, "-p", "c", "-p", "s b", "--temperature", "2", "--max-new-tokens", "6"]
    once = told(capsys, *words, "--seed", 3)["completions"]
    streamed = told(capsys, *words, "--seed", 3, "--stream")["completions"]
    assert [row["text"] for row in once] == [row["text"] for row in streamed]
    assert [row["text"] for row in told(capsys, *words, "--seed", 4)["completions"]] != [row["text"] for row in once]
    several = told(capsys, *words, "--seed", 3, "--n", 3)["completions"]
    assert [row["text"] for row in told(capsys, *words, "--seed", 3, "--n", 3, "--stream")["completions"]] == [
        row["text"] for row in several
    ]
    assert [(row["prompt"], row["sample"]) for row in several] == [(p, i) for p in ("c", "s b") for i in range(3)]
    assert [several[0]["text"], several[3]["text"]] == [row["text"] for row in once]


def test_several_completions_are_streamed_one_after_the_other(capsys):
    words = ["generate", *EFT, "-p", "c", "-p", "s b", "--temperature", "2", "--max-new-tokens", "6", "--n", "2"]
    texts = [row["text"] for row in told(capsys, *words)["completions"]]
    assert main([*words, "--stream", "--scores"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("> c\n[1] {}\n[2] {}\n> s b\n[1] {}\n[2] {}\n".format(*texts))
    assert all(f"[{i}] > {prompt}" in out for i in (1, 2) for prompt in ("c", "s b"))


def test_drafts_are_streamed_round_by_round(capsys, monkeypatch):
    words = ["generate", *EFT, "-p", CHAIN, "-p", "c abc=", "--speculate", "tuned"]
    once = told(capsys, *words)
    streamed = told(capsys, *words, "--stream")
    assert once["completions"] == streamed["completions"] and streamed["speculation"]["rounds"] > 1
    shown = []
    monkeypatch.setattr(Told, "show", lambda self, place, piece: shown.append((place, piece.text)))
    assert main([*words, "--stream"]) == 0
    for place, row in enumerate(once["completions"]):
        assert "".join(text for at, text in shown if at == place) == row["text"]
    monkeypatch.undo()
    capsys.readouterr()
    assert main([*words, "--stream"]) == 0
    texts = [row["text"] for row in once["completions"]]
    out = capsys.readouterr().out
    assert out.startswith(f"> {CHAIN}\n{texts[0]}\n> c abc=\n{texts[1]}\n") and out.count(texts[0]) == 1


def test_beams_filters_and_drafts(capsys):
    beams = told(capsys, "generate", *EFT, "-p", "c abc=", "--beams", 3, "--n", 2)["completions"]
    assert len(beams) == 2 and beams[0]["text"] != beams[1]["text"]
    plain = told(capsys, "generate", *EFT, "-p", CHAIN)["completions"]
    drafted = told(capsys, "generate", *EFT, "-p", CHAIN, "--speculate", "tuned")
    assert drafted["completions"][0]["text"] == plain[0]["text"] and drafted["speculation"]["rounds"] > 0
    # Filtered to the large model's likeliest token, nothing of the small ones is left.
    alone = told(capsys, "generate", "tiny-base", "-p", CHAIN)["completions"][0]["text"]
    for rule in ("plausible=1@large", "top_k=1", "nucleus=0.0001@large"):
        masked = told(capsys, "generate", *EFT, "-p", CHAIN, "--filter", rule)["completions"][0]["text"]
        assert masked == alone != plain[0]["text"]
    kept = told(capsys, "generate", *EFT, "-p", CHAIN, "--filter", "nucleus=1@scores:zero_reward")
    assert kept["completions"][0]["text"] == plain[0]["text"]


def test_a_draft_need_not_be_in_the_formula(capsys):
    found = told(capsys, "generate", "tiny-base", "-p", "c abc=", "--speculate", "tiny-small-base")
    assert (
        found["completions"][0]["text"]
        == told(capsys, "generate", "tiny-base", "-p", "c abc=")["completions"][0]["text"]
    )
    assert set(found["speculation"]["calls"]) == {"tiny-base", "tiny-small-base"}


def test_what_fine_tuning_adds_can_be_scaled(capsys):
    words = ["generate", "--expr", "t", "--model", "t=tiny-chain", "-p", CHAIN, "--scores"]
    tuned = told(capsys, *words)["completions"][0]
    with scaled(Pair.load("tiny-base", "tiny-chain"), 0.3) as model:
        (expected,) = generate(member(model, member("tiny-base").tokenizer), [CHAIN])
    found = told(capsys, *words, "--scaled", "t=tiny-base:0.3")["completions"][0]
    assert found["text"] == expected.text and found["log_probs"] == pytest.approx(expected.log_probs, abs=1e-5)
    assert found["log_probs"] != pytest.approx(tuned["log_probs"], abs=1e-3)
    again = told(capsys, *words, "--scaled", "t=b:1", "--model", "b=tiny-base")["completions"][0]
    assert again["log_probs"] == tuned["log_probs"]
    half = told(capsys, "generate", "--expr", "t - 0.5*b", *words[3:], "-m", "b=tiny-base", "--scaled", "t=b:0.5")
    assert len(half["completions"][0]["members"]) == 2 and half["completions"][0]["log_probs"] != tuned["log_probs"]


def test_other_letters_are_read_back(capsys):
    found = told(capsys, "generate", "tiny-base", "-p", "c nop=", "--conjugate", "rot13")["completions"][0]
    plain = told(capsys, "generate", "tiny-base", "-p", "p abc=")["completions"][0]
    assert found["asked"] == "p abc=" and found["said"] == plain["text"]
    assert found["prompt"] == "c nop=" and found["text"] != found["said"]


def test_people_see_texts_and_tables(capsys):
    assert main(["generate", *EFT, "-p", CHAIN, "-p", "c abc=", "--scores"]) == 0
    shown = capsys.readouterr().out
    assert f"> {CHAIN}\n2-9=3" in shown and "together" in shown and "'<eos>'" in shown and "2 completions" in shown
    assert main(["generate", "tiny-base", "-p", "c abc="]) == 0
    assert capsys.readouterr().out.startswith("#abc\n\n1 completion, 5 tokens")
    assert main(["generate", *EFT, "-p", CHAIN, "--stream", "--scores", "--max-new-tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert (
        captured.out.startswith("2-9\n") and captured.out.count("2-9") == 1 and "1 completion cut off" in captured.err
    )
    assert main(["generate", "tiny-base", "-p", "c abc=", "--quiet"]) == 0 and capsys.readouterr().out == ""


def test_rows_of_files_in_and_out(capsys, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "said.jsonl"
    prompts.write_text(json.dumps({"prompt": CHAIN}) + "\n" + json.dumps({"prompt": "c abc="}) + "\n")
    words = ["generate", *EFT, "--prompts", str(prompts), "--out", str(out), "--scores"]
    found = told(capsys, *words)
    assert [json.loads(line) for line in out.read_text().splitlines()] == found["completions"]
    assert found["written"] == [str(out)]
    assert "exists already" in refused(words, capsys)
    assert main([*words, "--force", "--stop", ";", "--quiet"]) == 0
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert kept[0]["text"] == "2-9=3" and kept[0]["ended"] == "stop"


def test_stop_strings_can_be_new_lines(monkeypatch, capsys):
    from surgery import logits

    seen = []
    monkeypatch.setattr(logits, "generate", lambda *given, **how: seen.append(how["sampling"].stop) or [])
    assert main(["generate", "tiny-base", "-p", "x", "--stop", r"\n\n", "--stop", r"a\\n", "--quiet"]) == 0
    assert seen == [("\n\n", "a\\n")]


@pytest.mark.parametrize("streamed", [[], ["--stream"], ["--speculate", "tuned"], ["--speculate", "tuned", "--stream"]])
def test_ctrl_c_leaves_what_is_there(streamed, capsys, tmp_path, monkeypatch):
    whole = told(capsys, "generate", *EFT, "-p", CHAIN)["completions"][0]
    calls, out = [], tmp_path / "said.jsonl"
    which = "_scores" if "--speculate" in streamed else "read"
    read = getattr(Ensemble, which)

    def interrupted(self, *given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, *given)

    monkeypatch.setattr(Ensemble, which, interrupted)
    assert main(["generate", *EFT, "-p", CHAIN, "-p", "c abc=", "--scores", "--out", str(out), *streamed]) == 130
    captured = capsys.readouterr()
    row = json.loads(out.read_text().splitlines()[0])
    assert (
        0 < row["tokens"] < whole["tokens"] and whole["text"].startswith(row["text"]) and row["ended"] == "interrupted"
    )
    assert len(row["log_probs"]) == len(row["members"]["small"]) == row["tokens"]
    assert row["text"] in captured.out and "Stopped.\n0 of 2 completions were whole." in captured.err


@pytest.mark.parametrize(
    "how",
    [
        "--batch-size 1",
        "--batch-size 8",
        "--stream",
        "--speculate tuned",
        "--stream --speculate tuned",
        "--beams 2 --batch-size 2",
    ],
)
@pytest.mark.parametrize("kind", [SurgeryError, RuntimeError])
def test_an_error_leaves_what_was_done(how, kind, capsys, tmp_path, monkeypatch):
    """The second of two prompts fails: the first is told and kept, then the error."""
    words, out = ["generate", *EFT, "--scores", *how.split()], tmp_path / "said.jsonl"
    whole = told(capsys, *words, "-p", CHAIN)["completions"][0]
    rollout = Composed._rollout

    def failing(self, row, index, *given):
        if index == 1:
            raise kind("Prompt 1 is the end of it.")
        return rollout(self, row, index, *given)

    stream = Composed.stream
    monkeypatch.setattr(Composed, "_rollout", failing)
    monkeypatch.setattr(
        Composed,
        "stream",
        lambda self, prompt, *more: failing(self, 0, 1) if prompt == "c" else stream(self, prompt, *more),
    )
    # The longer prompt comes first, whose batch is the second one's too where there is room.
    code = main([*words, "-p", CHAIN, "-p", "c", "--out", str(out), "--force"])
    captured = capsys.readouterr()
    if kind is RuntimeError and "8" in how:  # no fault of one row: the whole batch is gone
        assert code == 1 and not out.exists() and "surgery: RuntimeError: Prompt 1" in captured.err
        return
    assert code == (2 if kind is SurgeryError else 1) and "Prompt 1 is the end of it." in captured.err
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["text"], row["token_ids"], row["ended"]) == (whole["text"], whole["token_ids"], whole["ended"])
    assert row["text"] in captured.out and "note: 1 of 2 completions were whole." in captured.err
    assert captured.err.index("note: 1 of 2") < captured.err.index("Prompt 1 is")


def test_an_error_before_all_leaves_nothing(capsys, tmp_path, monkeypatch):
    def failing(self, *given):
        raise SurgeryError("Nothing goes.")

    monkeypatch.setattr(Composed, "_rollout", failing)
    out = tmp_path / "said.jsonl"
    assert main(["generate", *EFT, "-p", CHAIN, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert not captured.out and not out.exists() and "surgery: Nothing goes." in captured.err


def test_a_stream_that_fails_keeps_what_came(capsys, tmp_path, monkeypatch):
    out, calls, read = tmp_path / "said.jsonl", [], Ensemble.read

    def failing(self, *given):
        calls.append(given)
        if len(calls) == 3:
            raise SurgeryError("No more.")
        return read(self, *given)

    monkeypatch.setattr(Ensemble, "read", failing)
    assert main(["generate", *EFT, "-p", CHAIN, "-p", "c", "--stream", "--out", str(out)]) == 2
    (row,) = map(json.loads, out.read_text().splitlines())
    captured = capsys.readouterr()
    assert row["tokens"] == 3 and row["ended"] == "interrupted" and row["text"] in captured.out
    assert "0 of 2 completions were whole.\nsurgery: No more." in captured.err


def test_chat_templates_by_model(capsys, tmp_path):
    from shutil import copytree

    from surgery.zoo import TINY

    chat = copytree(TINY / "tiny-base", tmp_path / "chat")
    (chat / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}c {{ m['content'] }}={% endfor %}")
    words = ["--model", f"chatty={chat}", "-p", "abc"]
    asked = told(capsys, "generate", "chatty", *words, "--chat", "--scores")["completions"][0]
    expected = told(capsys, "generate", "tiny-base", "-p", "c abc=", "--scores")["completions"][0]
    assert asked["text"] == "#abc" and asked["log_probs"] == pytest.approx(expected["log_probs"], abs=1e-4)
    both = ["generate", "--expr", "chatty + plain", "-m", "plain=tiny-base", *words]
    mixed = told(capsys, *both, "--chat-for", "chatty", "--scores")["completions"][0]
    given = told(capsys, "generate", "tiny-base", "-p", "abc", "--scores")["completions"][0]
    assert mixed["members"]["chatty"][0] == pytest.approx(asked["log_probs"][0], abs=1e-4)
    assert mixed["members"]["plain"][0] != pytest.approx(mixed["members"]["chatty"][0], abs=1e-2)
    assert given["token_ids"] != asked["token_ids"]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": [{"role": "user", "content": "abc"}]}) + "\n")
    read = told(capsys, *both[:-2], "--prompts", chats, "--scores")["completions"][0]
    assert read["members"] == mixed["members"]
    chats.write_text(json.dumps({"prompt": [{"role": "user", "content": "abc"}], "answer": "abc"}) + "\n")
    scored = told(capsys, "eval", "--expr", "chatty", *words[:2], "--data", chats, "--task", "copy")
    assert scored["accuracy"]["mean"] == 1
    assert main(["generate", "tiny-base", "--prompts", str(chats)]) == 0
    assert "tiny-base read the plain text" in capsys.readouterr().err
    assert "'plain' has no chat template" in refused([*both, "--chat"], capsys)
    assert "choose one" in refused(["generate", "chatty", *words, "--chat", "--chat-for", "chatty"], capsys)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["-p", "x"], "Name one model"),
        (["tiny-base", "--expr", "a", "-p", "x"], "name one of them"),
        (["tiny-base"], "nothing to complete"),
        (["tiny-base", "--prompts", "nosuch.txt"], "nosuch.txt"),
        (["nosuch", "-p", "x"], "no file or folder 'nosuch'"),
        (["--expr", "large + smal", *NAMED, "-p", "x"], "no model 'smal', at character 9"),
        (["large + smal", *NAMED, "-p", "x"], "Did you mean 'small'?"),
        (["tiny-base + large", *NAMED, "-p", "x"], "is quoted: 'tiny-base'"),
        (["--expr", "large/0", *NAMED, "-p", "x"], "division by zero, at character 7"),
        (["--expr", "large + 1", *NAMED, "-p", "x"], "A number can't be added to a model"),
        (["--expr", "1e999*large", *NAMED, "-p", "x"], "too large"),
        (["--expr", "large", *NAMED, "-p", "x"], "'tuned', which no formula uses"),
        (["--expr", "large - large", *NAMED[:2], "-p", "x"], "all weights are 0"),
        (["--expr", "a + 'nosuch/model'", "-m", "a=tiny-base", "-p", "x"], "nosuch/model"),
        (["--expr", "a", "-m", "a", "-p", "x"], "NAME=PATH"),
        (["--expr", "a", "-m", "a=x", "-m", "a=y", "-p", "x"], "given twice"),
        ([*EFT, "-p", "x" * 140], "128"),
        ([*EFT, "-p", "x", "--max-new-tokens", "200"], "128"),
        ([*EFT, "-p", "x", "--filter", "plausible"], "RULE=X@NAME"),
        ([*EFT, "-p", "x", "--filter", "plausible=x@large"], "RULE=X@NAME"),
        ([*EFT, "-p", "x", "--filter", "plausibl=0.1"], "no filter 'plausibl'"),
        ([*EFT, "-p", "x", "--filter", "plausible=0.1@larg"], "Did you mean 'large'?"),
        ([*EFT, "-p", "x", "--filter", "nucleus=2"], "at most 1"),
        ([*EFT, "-p", "x", "--scaled", "large"], "NAME=BASE:X"),
        ([*EFT, "-p", "x", "--scaled", "large=tiny-base:x"], "NAME=BASE:X"),
        ([*EFT, "-p", "x", "--scaled", "larg=tiny-base:1"], "Did you mean 'large'?"),
        ([*EFT, "-p", "x", "--scaled", "large=tiny-small-base:2"], "same architecture"),
        ([*EFT, "-p", "x", "--chat-for", "larg"], "Did you mean 'large'?"),
        ([*EFT, "-p", "x", "--speculate", "nosuch"], "nosuch"),
        ([*EFT, "-p", "x", "--conjugate", "rot14"], "Did you mean 'rot13'?"),
        (["tiny-base", "-p", "x", "--n", "2"], "the same 2 times"),
        (["tiny-base", "-p", "x", "--n", "4", "--beams", "2"], "at most 2"),
        (["tiny-base", "-p", "x", "--stream", "--beams", "2"], "of beams none is sure"),
        (["tiny-base", "-p", "x", "--stream", "--conjugate", "rot13"], "not with --stream"),
        (["tiny-base", "-p", "x", "--speculate", "y", "--beams", "2"], "--speculate gives"),
        (["tiny-base", "-p", "x", "--top-p", "0"], "top_p"),
        (["tiny-base", "-p", "x", "--out", "x.txt"], ".jsonl"),
        (["tiny-base", "-p", "x", "--out", "nosuch/x.jsonl"], "no folder"),
        (["tiny-base", "-p", "x", "--dtype", "float33"], "float33"),
    ],
)
def test_what_is_wrong_is_a_sentence(words, problem, capsys):
    assert problem in refused(["generate", *words], capsys)


def test_models_of_other_vocabularies_are_refused(capsys, tmp_path):
    from tests.helpers import tiny_checkpoint

    other = tiny_checkpoint(tmp_path / "other")
    words = ["generate", "--expr", f"'tiny-base' + '{other}'", "-p", "x"]
    assert "tiny-base" in refused(words, capsys)


# ---- eval ----------------------------------------------------------------------------------------------------------


def test_eval_takes_formulas(capsys, eft):
    from analysis.evaluate import evaluate
    from analysis.likelihood import answer_log_likelihood, perplexity
    from analysis.rows import task_rows

    found = told(capsys, "eval", *EFT, "--task", "chain", "--n", 25, "--against", "large", "--likelihood")
    rows = task_rows(["chain"], 25, 0)
    assert found["model"] == FORMULA and found["models"]["large"] == "tiny-base"
    assert found["accuracy"]["mean"] == evaluate(eft, rows, tokenizer=eft.tokenizer).mean >= 0.9
    asked = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    assert found["perplexity"] == pytest.approx(perplexity(answer_log_likelihood(eft, eft.tokenizer, *asked)), abs=1e-5)
    alone = told(capsys, "eval", "tiny-base", "--task", "chain", "--n", 25, "--likelihood")
    assert found["against"]["accuracy"] == alone["accuracy"] and alone["accuracy"]["mean"] < 0.5
    assert found["against"]["perplexity"] == alone["perplexity"]


def test_eval_draws_filters_and_scales(capsys, tmp_path):
    words = ["eval", FORMULA, *NAMED, "--task", "chain", "--n", 10, "--samples", 3, "--pass-at", "1,3"]
    drawn = told(capsys, *words, "--out", tmp_path / "kept")
    assert drawn["pass@3"]["mean"] >= drawn["pass@1"]["mean"] > 0.5
    never = ["eval", FORMULA, *NAMED, "--task", "chain", "--n", "5", "--filter", "top_k=1@large", "--likelihood"]
    assert main(never) == 0
    captured = capsys.readouterr()
    assert "inf" in captured.out and "forbids a token of some right answer" in captured.err
    # only the formula is filtered: to the large model's likeliest tokens
    words = ["eval", FORMULA, *NAMED, "--task", "chain", "--n", 20, "--filter", "top_k=1@large", "--against", FORMULA]
    filtered = told(capsys, *words, "--out", tmp_path / "both")
    alone = told(capsys, "eval", "tiny-base", "--task", "chain", "--n", 20)
    assert filtered["accuracy"] == alone["accuracy"] and filtered["against"]["accuracy"]["mean"] > 0.8
    assert len(list((tmp_path / "both").iterdir())) == 2
    words = ["eval", "t", "-m", "t=tiny-chain", "--task", "chain", "--n", 20, "--likelihood"]
    plain, half = told(capsys, *words), told(capsys, *words, "--scaled", "t=tiny-base:0.2")
    assert half["accuracy"]["mean"] <= plain["accuracy"]["mean"] and half["perplexity"] > plain["perplexity"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--task", "chain"], "Name one model"),
        (["tiny-base", "--expr", "a", "--task", "chain"], "name one of them"),
        (["--expr", "large +", *NAMED, "--task", "chain"], "at character 8"),
        (["tiny-base", "--task", "chain", "--against", "tiny-base + x"], "quoted"),
        ([*EFT, "--task", "chain", "--model", "x=tiny-base"], "'x', which no formula uses"),
        ([*EFT, "--task", "chain", "--filter", "plausible=0.1@x"], "--filter speaks of 'x'"),
        ([*EFT, "--task", "chain", "--chat"], "no chat template"),
        ([*EFT, "--task", "chain", "--max-new-tokens", "127"], "of 128"),
    ],
)
def test_what_is_wrong_for_eval_is_a_sentence(words, problem, capsys):
    assert problem in refused(["eval", *words], capsys)
