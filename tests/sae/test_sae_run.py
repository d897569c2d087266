"""Runs of dictionaries: what they leave, that they go on bit for bit, and what they refuse."""

import json
import os
import re
import subprocess
import sys
import warnings
from itertools import islice

import pytest
import torch

from surgery.errors import SurgeryError
from surgery.models import load as load_model
from surgery.sae import checkpoints as kept
from surgery.sae import formats
from surgery.sae.formats import load
from surgery.sae.recipe import load as load_recipe
from surgery.sae.recipe import make, packaged, settings_of
from surgery.sae.run import train
from surgery.sae.source import Source, opened
from surgery.sae.text import Text
from surgery.training.distributed import World

ONE = {
    "model": "tiny-base", "data": "chain", "steps": 12, "rows": 64, "buffer": 256,
    "dictionaries": {"one": {"site": "resid_post.1", "latents": 160, "rule": {"batchtopk": {"k": 6}},
                             "dead_after": 200}},
    "reading": {"context": 32, "batch": 4}, "optimizer": {"lr": 1e-3, "shape": "linear", "warmup": 0.2},
    "evaluate": {"sequences": 4},
}  # fmt: skip
SEVERAL = ONE | {
    "model": ["tiny-base", "tiny-chain"],
    "dictionaries": ONE["dictionaries"] | {
        "two": {"site": "mlp_in.2", "target": "mlp_out.2", "latents": 96, "rule": {"topk": {"k": 4}}, "skip": True}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def run(words, out=None, **more):
    return train(make(words), out=out, **more)


def weights(found):
    return {f"{name}.{key}": value for name, d in found.dictionaries.items() for key, value in d.state_dict().items()}


def same(found, expected):
    mine, theirs = weights(found), weights(expected)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def lines(metrics):
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in metrics]


def stopped(words, out, at, **more):
    def on_step(step, metrics):
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(words, out, on_step=on_step, **more)


def test_of_mixed_files_nothing_that_is_held_out_is_trained_on(tmp_path):
    for name in "ab":
        rows = [{"text": f"{name} {i} " + chr(97 + i) * 6} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ONE | {"data": [{"file": "a.jsonl"}, {"file": "b.jsonl"}],
                   "reading": {"packing": False, "batch": 8, "held_out": 4}}  # fmt: skip
    models, tokenizer = opened(["tiny-base"])
    source = Source(make(words, tmp_path), models, tokenizer, World())

    def rows_of(batches):
        return {tuple(ids[mask].tolist()) for batch in batches for ids, mask in zip(batch.ids, batch.mask, strict=True)}

    trained, held = rows_of(islice(source.text, 100)), rows_of(source.held_out())
    assert len(trained) == 30 and held and not trained & held


def test_a_run_leaves_its_dictionaries_and_what_they_are_worth(tmp_path, monkeypatch):
    usual, calls = Text.held_out, []
    monkeypatch.setattr(Text, "held_out", lambda *words: calls.append(1) or usual(*words))
    found = run(SEVERAL, tmp_path / "run")
    assert len(calls) == 1, "held-out text is read once, for all dictionaries"
    there = {p.name for p in (tmp_path / "run").iterdir()}
    assert there == {"recipe.json", "metrics.jsonl", "curves.png", "density.png", "density.safetensors", "quality.json",
                     "dictionaries"}  # fmt: skip
    assert len(found.metrics) == 12 and {"fvu/one", "l0/two", "dead/one"} <= found.metrics[0].keys()
    assert found.metrics[-1]["fvu/one"] < found.metrics[0]["fvu/one"]
    for name, mine in found.dictionaries.items():
        stored, about = load(tmp_path / "run" / "dictionaries" / name)
        assert stored.rule == mine.rule and stored.models == 2
        assert all(torch.equal(v, stored.state_dict()[k]) for k, v in mine.state_dict().items())
        assert about["models"] == ["tiny-base", "tiny-chain"]
    numbers = json.loads((tmp_path / "run" / "quality.json").read_text())
    assert numbers["one"]["l0"] == pytest.approx(found.quality["one"].quality.l0)
    for measured in found.quality.values():
        zero, mean = measured.losses["zero"], measured.losses["mean"]
        assert len(zero) == len(mean) == 2 and zero[0].ce == mean[0].ce
        assert zero[0].ce_dictionary == pytest.approx(mean[0].ce_dictionary, rel=1e-6)
    assert found.to_dataframe().shape[0] == 12 and found.plot().axes


@pytest.mark.parametrize("at", [1, 7], ids=["before the scale's batches are used up", "behind them"])
@pytest.mark.parametrize("words", [ONE, SEVERAL | {"steps": 24}], ids=["one", "several"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(words, at, tmp_path):
    at += 12 * (words is not ONE)
    expected = run(words, tmp_path / "straight")
    stopped(words, tmp_path / "stopped", at)
    assert [p.name for p in (tmp_path / "stopped").glob("checkpoint-*")] == [f"checkpoint-{at:06d}"]
    found = run(words, tmp_path / "stopped", resume=True)
    assert same(found, expected) and lines(found.metrics) == lines(expected.metrics)
    assert not list((tmp_path / "stopped").glob("checkpoint-*"))


def test_a_cached_run_goes_on_bit_for_bit_and_reads_no_model_twice(tmp_path):
    words = ONE | {"cache": str(tmp_path / "cache"), "cache_rows": 300}
    expected = run(words, tmp_path / "straight")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    stopped(words, tmp_path / "stopped", 9)
    assert same(run(words, tmp_path / "stopped", resume=True), expected)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()} == before
    with pytest.raises(SurgeryError, match="other weights"):
        run(words | {"model": "tiny-chain"}, tmp_path / "other")
    assert not (tmp_path / "other").exists(), "nothing was begun"
    with pytest.raises(SurgeryError, match="was written with another `reading`"):
        run(words | {"reading": {"context": 24, "batch": 4}}, tmp_path / "else")
    with pytest.raises(SurgeryError, match="holds resid_post.1, and not 'resid_post.2'"):
        run(words | {"dictionaries": {"one": {"site": "resid_post.2", "latents": 99}}}, tmp_path / "another")


def test_checkpoints_come_as_often_as_asked_and_a_full_disk_costs_one(tmp_path, monkeypatch):
    usual, calls = kept.renamed, []

    def full(temporary, folder):
        calls.append(folder.name)
        if folder.name == "checkpoint-000008":
            raise OSError(28, "No space left on device")
        usual(temporary, folder)

    monkeypatch.setattr(kept, "renamed", full)
    words = ONE | {"checkpoint": {"every": 4, "keep": 2}}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        stopped(words, tmp_path / "run", 9)
    assert calls == ["checkpoint-000004", "checkpoint-000008", "checkpoint-000009"]
    assert any("No checkpoint at step 8 (No space left on device)" in str(w.message) for w in told)
    assert sorted(p.name for p in (tmp_path / "run").glob("*check*")) == ["checkpoint-000004", "checkpoint-000009"]
    assert same(run(words, tmp_path / "run", resume=True), run(words))


def test_a_disk_that_is_full_at_the_end_costs_what_came_after_the_last_checkpoint(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    words = ONE | {"checkpoint": {"every": 5}}
    with monkeypatch.context() as patch:
        patch.setattr(formats, "save", full)
        with pytest.raises(SurgeryError, match=r"could not be written to .* \(No space left on device\)") as error:
            run(words, tmp_path / "run")
    assert error.value.hint == "checkpoint-000012 is kept: make room and run again with --resume."
    found = run(words, tmp_path / "run", resume=True)
    assert same(found, run(words)) and len(found.metrics) == 12
    assert not list((tmp_path / "run").glob(".*"))


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (1_000_000, 999_000, 20):
        (tmp_path / f"checkpoint-{step:06d}").mkdir()
        (tmp_path / f"checkpoint-{step:06d}" / "state.json").touch()
    found = kept.Checkpoints(tmp_path, make(ONE), kept.World())
    assert [p.name for p in found._found()] == ["checkpoint-000020", "checkpoint-999000", "checkpoint-1000000"]


def test_what_cannot_go_on_is_told(tmp_path):
    out = tmp_path / "run"
    stopped(ONE, out, 3)
    with pytest.raises(SurgeryError, match="holds a run already"):
        run(ONE, out)
    with pytest.raises(SurgeryError, match="began with another recipe: rows was 64 and is 32"):
        run(ONE | {"rows": 32}, out, resume=True)
    with pytest.raises(SurgeryError, match="is at step 3, and 3 are asked for"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(ONE | {"steps": 3}, out, resume=True)
    state = out / "checkpoint-000003" / "state.json"
    words = json.loads(state.read_text())
    state.write_text(json.dumps(words | {"version": 99}))
    with pytest.raises(SurgeryError, match="is of version 99; this program reads 1"):
        run(ONE, out, resume=True)
    state.write_text("{")
    with pytest.raises(SurgeryError, match=r"checkpoint-000003 can't be read"):
        run(ONE, out, resume=True)
    state.write_text(json.dumps(words))
    weights_, half = out / "checkpoint-000003" / "one.safetensors", out / "half"
    weights_.rename(half)
    weights_.write_bytes(half.read_bytes()[:999])
    with pytest.raises(SurgeryError, match=r"checkpoint-000003 can't be read"):
        run(ONE, out, resume=True)
    half.replace(weights_)
    run(ONE, out, resume=True)
    with pytest.raises(SurgeryError, match="is finished"):
        run(ONE, out, resume=True)


def test_a_text_too_short_to_evaluate_on_is_told_before_anything_is_trained(tmp_path):
    (tmp_path / "few.txt").write_text("one two three\n")
    steps = []
    words = ONE | {"data": {"file": str(tmp_path / "few.txt")}}
    with pytest.raises(SurgeryError, match="none is left to evaluate on"):
        run(words, tmp_path / "run", on_step=lambda step, metrics: steps.append(step))
    assert not steps and not (tmp_path / "run").exists()
    assert len(run(words | {"steps": 2, "evaluate": {"sequences": 0}}).metrics) == 2


def test_a_folder_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(kept.Path, "mkdir", refused)
    with pytest.raises(SurgeryError, match=r"run can't be made \(Permission denied\)"):
        run(ONE, tmp_path / "run")


class Second(kept.World):
    """The second of two processes, when the first has failed."""

    def wait(self):
        pass

    def together(self, work):
        work()
        raise SurgeryError("The first one's problem.")


def test_what_the_first_process_cannot_claim_is_told_by_all(tmp_path):
    with pytest.raises(SurgeryError, match="The first one's problem"):
        kept.Checkpoints(tmp_path / "run", make(ONE), Second(1, 2)).begin(False, None, None)
    assert not (tmp_path / "run").exists()


def test_differences_and_models_in_memory():
    base, tokenizer = load_model("tiny-base")
    tuned, _ = load_model("tiny-chain")
    before = {k: v.clone() for k, v in tuned.state_dict().items()}
    found = run(SEVERAL | {"difference": True, "dictionaries": ONE["dictionaries"]},
                models=[base, tuned], tokenizer=tokenizer)  # fmt: skip
    assert found.dictionaries["one"].d_in == 96 and found.dictionaries["one"].models == 1
    (loss,) = found.quality["one"].losses["zero"]
    assert loss.kl_dictionary < loss.kl_ablated
    assert all(torch.equal(v, before[k]) for k, v in tuned.state_dict().items())
    assert not any(m._forward_hooks for m in tuned.modules())


def test_two_processes_are_as_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, json\nfrom surgery.sae.recipe import make\nfrom surgery.sae.run import train\n"
        "train(make(json.loads(sys.argv[1])), out=sys.argv[2])\n"
    )
    expected = run(SEVERAL, tmp_path / "one")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29871", str(script),
         json.dumps(SEVERAL), str(tmp_path / "two")], check=True, env=environment, timeout=300, capture_output=True,
    )  # fmt: skip
    for name, mine in expected.dictionaries.items():
        other, _ = load(tmp_path / "two" / "dictionaries" / name)
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in mine.state_dict().items())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dictionaries": {}}, "trains no dictionary"),
        ({"data": None}, "has no data"),
        ({"buffer": 32}, "holds 32 activations, and a step takes 64"),
        ({"difference": True}, "is of two models"),
        ({"dictionaries": {"a/b": {"site": "resid_post.1", "latents": 9}}}, "'a/b' is no name"),
        ({"dictionaries": {"a": {"site": "resid_post", "latents": 9}}}, "all layers at once"),
        ({"dictionaries": {"a": {"site": "pattern.1", "latents": 9}}}, "one row a token"),
        ({"dictionaries": {"a": {"site": "resid_pst.1", "latents": 9}}}, "no site 'resid_pst.1'.*resid_post"),
        ({"dictionaries": {"a": {"site": "resid_post.9", "latents": 99}}}, "resid_post.9"),
        ({"dictionaries": {"a": {"site": "resid_post.1", "latents": 9, "rule": "topkk"}}}, "no rule .* 'topkk'"),
        ({"dictionaries": {"a": {"site": "resid_post.1", "latents": 9, "rule": {"topk": {"kk": 1}}}}}, "setting 'kk'"),
        ({"dictionaries": {"a": {"site": "resid_post.1", "latents": 9, "rule": {"topk": {"k": "x"}}}}}, "topk', k: "),
        ({"dictionaries": {"a": {"site": "resid_post.1", "latents": 9}}}, "can't use 32 of 9 latents.*at most 9"),
        ({"dictionaries": {"a": {"site": "resid_post.1", "latent": 9}}}, "no key 'dictionaries.a.latent'.*latents"),
        ({"dictionaries": {"a": {"site": "resid_post.1", "latents": 40, "skip": True}}}, "only a transcoder"),
        ({"reading": {"positions": "last"}}, "read one by one"),
        ({"reading": {"context": 4, "skip": 4, "batch": 2}}, "No token of the first texts counts"),
        ({"model": None}, "names no model"),
        ({"steps": 0}, "Recipe, steps: "),
        ({"optimzer": {}}, "no key 'optimzer'.*optimizer"),
        ({"dictionaries": {"buffer": {"site": "resid_post.1", "latents": 40}}}, "'buffer' is what checkpoints call"),
    ],
    ids=range(21),
)
def test_what_is_wrong_is_a_sentence(change, told):
    with pytest.raises(SurgeryError) as error:
        run(ONE | change)
    assert re.search(told, f"{error.value.problem} {error.value.hint or ''}")


def test_latents_are_dead_after_a_tenth_of_a_run_without_use():
    one = {"site": "resid_post.1", "latents": 40}
    for words, rows in (
        ({}, 76),
        ({"steps": 10**9}, 10_000_000),
        ({"dictionaries": {"one": one | {"dead_after": 5}}}, 5),
    ):
        recipe = make(ONE | {"dictionaries": {"one": one}} | words)
        assert settings_of(recipe, recipe.dictionaries["one"]).dead_after == rows


def test_packaged_recipes_are_recipes(tmp_path):
    found = packaged()
    assert {"dictionary", "crosscoder", "sweep"} <= found.keys()
    for name in found:
        small = load_recipe(name, ["steps=2", "evaluate.sequences=0", "buffer=600"])
        assert set(train(small).dictionaries) == set(small.dictionaries)


@pytest.mark.real
def test_a_real_model_in_bfloat16(tmp_path):
    (tmp_path / "plays.txt").write_text("\n".join(f"Speak, citizen {i}. Hear me speak of bread." for i in range(400)))
    words = {"model": "smollm2", "data": {"file": "plays.txt"}, "steps": 4, "rows": 64, "buffer": 128,
             "precision": "bfloat16", "reading": {"context": 64, "batch": 2}, "evaluate": {"sequences": 2},
             "dictionaries": {"a": {"site": "resid_post.3", "latents": 640, "rule": {"topk": {"k": 16}}}}}  # fmt: skip
    found = train(make(words, tmp_path), out=tmp_path / "run")
    loss = found.quality["a"].losses["zero"][0]
    assert found.dictionaries["a"].d_in == 576 and loss.tokens > 60 and loss.ce < loss.ce_ablated
