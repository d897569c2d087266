"""Every arm of SAE-tuning in one recipe: what each is made of, how choices are made, and that a stopped run goes on."""

import copy
import json

import pytest
import torch
from helpers import SPECIAL, tiny_checkpoint

from surgery.cli import sae_tune
from surgery.cli.frame import new_app
from surgery.errors import SurgeryError
from surgery.models import load
from surgery.sae.dictionary import Dictionary
from surgery.sae.formats import load as load_dictionary
from surgery.sae.rules import BatchTopK, TopK
from surgery.sae.stand_in import Noise
from surgery.sae.tune_arms import ARMS, Bench, shuffled_source, untrained
from surgery.sae.tune_files import Runs
from surgery.sae.tune_recipe import PACKAGED, answer_only, make
from surgery.sae.tune_recipe import load as load_recipe
from surgery.sae.tune_run import Apart, Lab, Outcome, apart, held_out, run
from surgery.training.data import ListRows, rows_of

torch.set_num_threads(1)
WORDS = {
    "target": "tiny-sums-sft", "source": "tiny-sums-grpo", "data": {"task": "direct"}, "site": "resid_post.2",
    "dictionary": {"latents": 64, "rule": {"topk": {"k": 8}}, "steps": 2, "rows": 32, "buffer": 64},
    "reading": {"packing": False, "positions": "completion", "batch": 8, "context": 40},
    "tuning": {"rank": 2, "alpha": 8.0, "lr": [1e-4, 1e-2], "steps": 1, "rows": 4},
    "arms": ["source", "noise", "sft", "unchanged"], "seeds": [0, 1], "sweep": {"seeds": [9], "n": 5},
    "evaluate": {"data": {"task": "chain"}, "n": 6},
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    (target, tokenizer), (source, _) = load("tiny-sums-sft"), load("tiny-sums-grpo")
    return target, source, tokenizer


class Scored:
    """Stands for an evaluation: a number a row that depends on the model alone; what was asked is kept."""

    def __init__(self, stop=0):
        self.calls, self.stop = [], stop

    def __call__(self, model, tokenizer, rows):
        if self.stop and len(self.calls) >= self.stop:
            raise KeyboardInterrupt
        self.calls.append([row["prompt"] for row in rows])
        weight = model.model.layers[3].mlp.down_proj.weight.detach()
        return [float((weight.double() * (i + 1)).sin().sum()) for i in range(len(rows))]


# ---- arms


def test_arms_are_what_the_table_says(models):
    asked = []

    def dictionary(whose):
        asked.append(whose)
        return Dictionary(8, 20, TopK(k=2), seed=len(whose))

    bench = Bench(models[1], 3, dictionary)
    made = {}
    for name, arm in ARMS.items():
        asked.clear()
        made[name] = arm.make(bench)
        stands = made[name] is not None and made[name].dictionary is not None
        assert stands == arm.site == bool(asked) and arm.what
        assert asked in ([], [{"own": "target", "shuffled": "shuffled"}.get(name, "source")])
    assert made["unchanged"] is None and isinstance(made["noise"].dictionary, Noise)
    assert {n for n, s in made.items() if s and s.teacher is models[1]} == {"source_teacher", "distillation"}
    assert {n for n, s in made.items() if s and s.labels == 1} == {"labels", "sft"}
    assert not torch.equal(made["random"].dictionary.decoder, made["source"].dictionary.decoder)


def test_an_untrained_dictionary_keeps_all_but_the_directions():
    before = Dictionary(8, 200, BatchTopK(k=2.0))
    with torch.no_grad():
        before.decoder.mul_(torch.rand(200, 1) + 0.5)
        before.encoder.mul_(torch.rand(200, 1) + 0.5)
        before.bias.normal_()
    before.threshold.fill_(0.3)
    found = untrained(before, seed=1)
    for name in ("decoder", "encoder"):
        a, b = getattr(before, name), getattr(found, name)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1))
        assert torch.cosine_similarity(a, b, dim=1).abs().mean() < 0.5
    assert torch.equal(found.bias, before.bias) and torch.equal(found.threshold, before.threshold)
    assert torch.equal(untrained(before, 1).decoder, found.decoder)


def test_a_shuffled_source_changes_as_much_in_other_places(models):
    target, source, _ = models
    found = shuffled_source(target, source, seed=0)
    changes = []
    for name, p in target.named_parameters():
        wanted = (source.get_parameter(name) - p).flatten()
        change = (found.get_parameter(name) - p).flatten()
        torch.testing.assert_close(change.sort().values, wanted.sort().values, rtol=1e-3, atol=2e-7)
        changes.append(torch.cosine_similarity(change, wanted, dim=0))
    assert torch.stack(changes).abs().mean() < 0.2
    small = load("tiny-small-base")[0]
    with pytest.raises(SurgeryError, match="can't be shuffled"):
        shuffled_source(target, small, seed=0)


# ---- rows


def test_what_is_asked_is_in_no_text(models):
    recipe = make(WORDS)
    test, validation = held_out(recipe)
    prompts = [row["prompt"] for row in test + validation]
    assert len(test) == 6 and len(validation) == 5 and len(set(prompts)) == 11
    source = rows_of({"task": "direct"}, 7)
    asked = {source.row(i)["prompt"] for i in (0, 3)}
    found = apart(source, asked)
    assert isinstance(found, Apart) and found.row(1) == source.row(1) and found.row(0)["prompt"] not in asked
    few = apart(ListRows([{"prompt": "a"}, {"prompt": "b"}]), {"a"})
    assert few.size == 1 and few.row(0)["prompt"] == "b"
    with pytest.raises(SurgeryError, match="11 rows with different prompts are asked for, and there are 1"):
        held_out(make(WORDS | {"evaluate": {"data": [{"prompt": "a", "answer": "1"}], "n": 6}}))
    with pytest.raises(SurgeryError, match="have a prompt and an answer"):
        held_out(make(WORDS | {"evaluate": {"data": [{"text": "a"}], "n": 6}}))


def test_arms_meet_the_same_texts(models):
    target, source, tokenizer = models
    lab = Lab(make(WORDS), Runs(None), target, source, tokenizer, {"test": []}, Scored())
    first = [next(iter(lab.text({"task": "direct"}, seed, batch=4))).ids for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_thinking_is_the_answer_alone():
    row = answer_only("What is 1+1?", "2")
    assert row["completion"] == " <think> 2 </think>\n<answer> Answer: 2</answer>"
    assert row["prompt"].endswith("User:\n What is 1+1?\n\nAssistant:\n") and "<think>" in row["prompt"]


# ---- the comparison


def test_all_arms_are_trained_and_the_best_choice_is_reported(models, tmp_path):
    before, score = copy.deepcopy(models[0].state_dict()), Scored()
    done = []
    found = run(make(WORDS), score, out=tmp_path / "run", models=models, on_run=lambda *at: done.append(at))
    assert done[0] == (1, 14, "source, choosing") and done[-1] == (14, 14, "unchanged, seed 1")
    assert [len(rows) for rows in score.calls] == [6, 6] + [5] * 6 + [6] * 8
    assert not set(score.calls[0]) & set(score.calls[2])
    for arm in ("source", "noise", "sft"):
        tried = {one["lr"]: one["accuracy"] for one in found.sweep[arm]}
        assert found.chosen[arm]["lr"] == max(tried, key=tried.get) and len(tried) == 2
        assert found.arms[arm][0] != found.arms[arm][1] and found.arms[arm][0] != found.target
    assert found.arms["unchanged"] == {0: found.target, 1: found.target} and found.chosen["sft"]["site"] is None
    assert all(torch.equal(t, before[n]) for n, t in models[0].state_dict().items())
    assert set(found.dictionaries) == {"source, resid_post.2"} and found.dictionaries["source, resid_post.2"]["l0"] <= 8
    kept = json.loads((tmp_path / "run" / "result.json").read_text())
    assert kept == json.loads(json.dumps(found.to_dict()))
    adapter = load(f"tiny-sums-sft+{tmp_path / 'run' / 'adapters' / 'sft' / 'seed-1'}")[0]
    torch.testing.assert_close(torch.tensor(Scored()(adapter, None, range_rows(6))), torch.tensor(found.arms["sft"][1]),
                               rtol=1e-4, atol=1e-3)  # fmt: skip
    dictionary, _ = load_dictionary(tmp_path / "run" / "dictionaries" / "seed-0" / "source" / "resid_post.2")
    assert dictionary.latents == 64 and dictionary.rule == TopK(k=8)


def range_rows(n):
    return [{"prompt": str(i)} for i in range(n)]


def test_a_stopped_run_goes_on_and_comes_to_the_same(models, tmp_path):
    whole = run(make(WORDS), Scored(), models=models)
    out, first = tmp_path / "run", Scored(stop=10)
    with pytest.raises(KeyboardInterrupt):
        run(make(WORDS), first, out=out, models=models)
    assert not (out / "result.json").exists() and len(list((out / "runs").glob("*.json"))) == 8
    again = Scored()
    found = run(make(WORDS), again, out=out, models=models)
    assert found.to_dict() == whole.to_dict() and len(again.calls) == 2 + 14 - 8
    with pytest.raises(SurgeryError, match="is finished"):
        run(make(WORDS), Scored(), out=out, models=models)
    run(make(WORDS | {"arms": ["unchanged"]}), Scored(), out=out, models=models, force=True)
    assert list(json.loads((out / "result.json").read_text())["arms"]) == ["unchanged"]


def test_other_folders_are_refused(models, tmp_path):
    with pytest.raises(SurgeryError, match="is no folder of such runs"):
        run(make(WORDS), Scored(), out=tmp_path, models=models, force=True)
    with pytest.raises(KeyboardInterrupt):
        run(make(WORDS), Scored(stop=3), out=tmp_path / "run", models=models)
    with pytest.raises(SurgeryError, match=r"began with another recipe: seeds was \[0, 1\] and is "):
        run(make(WORDS | {"seeds": [0, 2]}), Scored(), out=tmp_path / "run", models=models)


def test_a_dictionary_that_is_there_can_be_the_start(models, tmp_path):
    from surgery.sae.formats import save

    save(Dictionary(96, 32, TopK(k=4), seed=5), tmp_path / "start", "surgery")
    words = WORDS | {"dictionary": {"start": "start", "steps": 0, "latents": 32, "rule": {"topk": {"k": 4}}}}
    lab = Lab(make(words, tmp_path), Runs(None), *models, {"test": []}, Scored())
    found = lab.dictionaries("source", 0)["resid_post.2"]
    assert torch.equal(found.decoder, Dictionary(96, 32, TopK(k=4), seed=5).decoder)
    trained = Lab(make(words | {"dictionary": words["dictionary"] | {"steps": 1, "rows": 16, "buffer": 16}}, tmp_path),
                  Runs(None), *models, {"test": []}, Scored()).dictionaries("source", 0)["resid_post.2"]  # fmt: skip
    assert 0 < float((trained.decoder - found.decoder).abs().max()) < 0.01


def test_dictionaries_read_the_tokens_that_count(models, monkeypatch):
    seen = []

    def fit(entries, rows, steps):
        seen.append(next(iter(rows.stream))["resid_post.2"])

    monkeypatch.setattr("surgery.sae.tune_run.fit", fit)
    for positions in ("all", "completion"):
        words = WORDS | {"dictionary": WORDS["dictionary"] | {"positions": positions}}
        lab = Lab(make(words), Runs(None), *models, {"test": []}, Scored())
        lab.dictionaries("target", 0)
        batch = next(iter(lab.text({"task": "direct"}, 0, positions=positions)))
        assert len(seen[-1]) == int(batch.counts.sum())
    assert len(seen[1]) < len(seen[0])


def test_texts_are_looked_at_before_anything_runs(models, tmp_path):
    (tmp_path / "plain.jsonl").write_text('{"text": "1+1=2"}\n' * 30)
    own = WORDS["dictionary"] | {"positions": "completion"}
    for words, told in (
        ({"dictionary": own, "trigger": {"file": "plain.jsonl"}}, "needs data with prompts and completions"),
        ({"dictionary": own, "data": {"file": "plain.jsonl"}, "reading": {"positions": "all"}}, "needs data with"),
        ({"dictionary": own | {"positions": "last"}, "reading": {"packing": True}}, "read one by one"),
        ({"trigger": {"file": "nothere.jsonl"}}, "nothere.jsonl"),
    ):
        with pytest.raises(SurgeryError, match=told):
            run(make(WORDS | words, tmp_path), Scored(), out=tmp_path / "run", models=models)
        assert not (tmp_path / "run").exists()


def test_what_is_recovered():
    found = Outcome([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], {"a": {0: [1, 1, 0, 0], 1: [0, 0, 0, 0]}}, {})
    assert found.accuracy("a") == [0.5, 0.0] and found.recovered("a") == [0.5, -0.5]
    with pytest.raises(SurgeryError, match="nothing to recover"):
        Outcome([1.0], [1.0], {"a": {0: [1.0]}}, {}).recovered("a")


@pytest.mark.parametrize(("words", "told"), [
    ({"target": None}, "no target"),
    ({"data": None}, "no data"),
    ({"arms": ["sourse"]}, "no arm 'sourse'"),
    ({"arms": []}, "Arms are different ones, at least one"),
    ({"site": ["resid_post.1", "resid_post.1"]}, "Sites are different ones"),
    ({"seeds": [9]}, "Seed 9 is chosen by and reported"),
    ({"sweep": {"seeds": []}}, "no seeds to choose them by"),
    ({"dictionary": {"steps": 0}}, "need a start"),
    ({"dictionary": {"latents": 4, "rule": {"topk": {"k": 8}}}}, "use 8 of 4"),
    ({"tuning": {"gradient": "thru"}}, "no gradient 'thru'"),
    ({"tuning": {"learning_rate": 1}}, "no key 'tuning.learning_rate'"),
    ({"dictionary": {"rows": 9, "buffer": 8}}, "dictionary.buffer"),
])  # fmt: skip
def test_recipes_that_are_wrong(words, told):
    with pytest.raises(SurgeryError, match=told):
        make(WORDS | words)


def test_models_that_do_not_fit_are_refused(tmp_path, models):
    other = tiny_checkpoint(tmp_path / "other", tokens=[*SPECIAL, *"abcdefgh"])
    with pytest.raises(SurgeryError, match="has other tokens than"):
        run(make(WORDS | {"source": str(other)}), Scored())
    small = load("tiny-small-base")[0]
    with pytest.raises(SurgeryError, match="can't be shuffled"):
        run(make(WORDS | {"arms": ["shuffled"]}), Scored(), models=(models[0], small, models[2]), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_packaged_recipes_are_whole():
    assert [file.stem for file in PACKAGED.glob("*.yaml")] == ["sums"]
    assert load_recipe("sums", ["tuning.lr=1e-4"]).tuning.rates == [1e-4]


# ---- the command


@pytest.fixture
def command(monkeypatch):
    """`surgery sae tune` by itself."""
    from surgery import cli

    app = new_app()
    sae_tune.register(app)
    app.callback()(lambda: None)
    monkeypatch.setattr("surgery.cli.app.app", app)
    return lambda *words: cli.main([str(word) for word in words])


@pytest.fixture
def written(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(WORDS | {"arms": ["source", "unchanged"], "seeds": [0]}))
    return file


def test_the_command_plans_runs_and_refuses(command, written, tmp_path, capsys):
    assert command("tune", written, "--plan", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["runs"] == {"to choose": 2, "reported": 2} and plan["lora"] == 14592 and not (tmp_path / "out").exists()
    assert command("tune", written, "-o", tmp_path / "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["arms"]["unchanged"]["recovered"]["mean"] == 0 and found["source"] > found["target"]
    assert command("tune", written, "-o", tmp_path / "out") == 2
    assert "is finished" in capsys.readouterr().err
    assert command("tune", written, "-o", tmp_path / "out", "--force") == 0
    shown = capsys.readouterr().out
    assert "source" in shown and "recovered" in shown and "result.json" in shown
    for words, told in (("site=resid_post.7", "no 'resid_post.7'"), ("source=tiny-small-base", "of width 64"),
                        ("arms=[sorce]", "Did you mean 'source'")):  # fmt: skip
        assert command("tune", written, "--set", words) == 2
        assert told in capsys.readouterr().err
