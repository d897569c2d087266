"""A merge that is interrupted, and what is told of one that is not: record, rounding, warnings, chat template."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import load_state, tiny_checkpoint, tiny_family
from safetensors.torch import save_file
from test_merge import EMBEDDING, Q0, adapter, recipe

from surgery.checkpoint import provenance
from surgery.checkpoint.reader import open_checkpoint
from surgery.weights import engine
from surgery.weights.merge import merge, merge_in_memory


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return tiny_family(tmp_path_factory.mktemp("family"), 3, dtype="bfloat16", sharded=True, tied=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_family(tmp_path_factory.mktemp("plain"), 3)


# ---- interruption ---------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from surgery.weights.engine import Engine
from surgery.weights.merge import merge
work = Engine._merge
Engine._merge = lambda *given: (time.sleep(0.05), work(*given))[1]
merge(sys.argv[1], sys.argv[2], threads=2)
"""


def test_killed_half_way_and_taken_up(family, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    path, out = tmp_path / "recipe.yml", tmp_path / "here/out"
    path.write_text(yaml.safe_dump(recipe("ties", *family, shard_size="3KB")))
    out.parent.mkdir()
    journal = out.parent / ".out.partial/journal.jsonl"
    root = str(Path(engine.__file__).parents[2])
    run = subprocess.Popen([sys.executable, "-c", SLOW, str(path), str(out)], env=os.environ | {"PYTHONPATH": root})
    until = time.monotonic() + 60
    while not (journal.exists() and len(journal.read_text().splitlines()) > 5):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not out.exists()
    taken = len(journal.read_text().splitlines()) - 2  # the job's own line, and perhaps a torn one
    result = merge(path, out, threads=2)
    assert taken <= result.resumed < len(result.tensors)
    clean = merge(path, tmp_path / "clean/out", threads=1)
    assert clean.resumed == 0 and clean.tensors == result.tensors
    files = {p.relative_to(out.parent): p.read_bytes() for p in out.rglob("*")}
    assert files == {p.relative_to(tmp_path / "clean"): p.read_bytes() for p in (tmp_path / "clean/out").rglob("*")}


def interrupted(made, out):
    """Starts a merge and stops it as Ctrl-C would, after some tensors."""

    def stop(name, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(made, out, threads=1, progress=stop)
    assert not out.exists()


def test_what_was_changed_is_not_taken_up(plain, tmp_path):
    base, _ = plain
    adapter(tmp_path / "lora", base)
    made = recipe("task_arithmetic", base, [f"{base}+{tmp_path / 'lora'}"], {"weight": 0.5})
    out = tmp_path / "out"
    for changed in (made | {"parameters": {"weight": 0.6}}, made | {"nonfinite": "base"}, made | {"seed": 1}):
        interrupted(made, out)
        assert merge(changed, out, force=True).resumed == 0
        shutil.rmtree(out)
    interrupted(made, out)
    update = adapter(tmp_path / "lora", base, seed=7)
    assert merge(made, out).resumed == 0
    assert torch.allclose(load_state(out)[Q0], load_state(base)[Q0] + 0.5 * update, atol=1e-6)


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_the_record(family, tmp_path):
    base, tuned = family
    made = recipe("slerp", base, tuned, seed=3)
    result = merge(made, tmp_path / "out")
    record = provenance.Provenance.read(tmp_path / "out")
    assert record.operation == "merge" and record.recipe == made and record.seed == 3
    assert {i["name"]: i["role"] for i in record.inputs} == {str(base): "base", str(tuned[0]): "tuned"}
    for known, folder in zip(record.inputs, (base, tuned[0]), strict=True):
        source = open_checkpoint(folder)
        assert known["tensors"] == provenance.checksums(source)
        assert known["header"] == provenance.header_hash(source)
    assert record.versions.keys() >= {"surgery", "torch", "python"}
    assert record.tensors.keys() == load_state(base).keys()
    report = record.tensors[Q0]
    assert report["branch"] == "spherical" and report.keys() >= {"cosine", "update", "rounding_loss"}
    assert record.totals["rounding_loss"] == pytest.approx(result.rounding_loss)


def test_the_report_of_rounding_is_the_plain_formula(tmp_path):
    base, tuned = tiny_family(tmp_path, 2, dtype="bfloat16", delta=1e-4)
    made = recipe("task_arithmetic", base, tuned, {"weight": 0.5})
    result = merge(made, tmp_path / "out")
    exact, b = merge_in_memory(made | {"out_dtype": "float32"}), load_state(base)
    lost = moved = 0.0
    for name, x in exact.items():
        loss, update = (x.bfloat16().float() - x).norm(), (x - b[name].float()).norm()
        assert result.tensors[name]["update"] == pytest.approx(float(update), rel=1e-5, abs=1e-12)
        if update > 0:
            assert result.tensors[name]["rounding_loss"] == pytest.approx(float(loss / update), rel=1e-5)
        lost, moved = lost + float(loss) ** 2, moved + float(update) ** 2
    assert result.rounding_loss == pytest.approx((lost / moved) ** 0.5, rel=1e-5) and result.rounding_loss > 0.2
    assert any("Rounding" in note for note in result.notes)


def test_stochastic_rounding_is_unbiased_and_seeded(tmp_path):
    base, tuned = tiny_family(tmp_path, 1, dtype="bfloat16", vocab=600, hidden=64)
    for folder, value in ((base, 1.0), (tuned[0], 1.0078125)):  # one step of bfloat16
        state = load_state(folder)
        state[EMBEDDING].fill_(value)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    def rounded(how, seed=0):
        made = recipe("task_arithmetic", base, tuned, {"weight": 0.125}, seed=seed)
        merge(made, tmp_path / "out", rounding=how, force=True, threads=2)
        return load_state(tmp_path / "out")[EMBEDDING].float()

    assert (rounded("nearest") == 1).all()
    first = rounded("stochastic")
    assert float(first.mean()) == pytest.approx(1 + 0.125 * 0.0078125, abs=6e-5)  # 4.5 standard errors
    assert torch.equal(first, rounded("stochastic")) and not torch.equal(first, rounded("stochastic", seed=1))


def test_progress_ends_at_everything(plain, tmp_path):
    told = []
    result = merge(recipe("linear", *plain), tmp_path / "out", threads=2, progress=lambda *said: told.append(said))
    assert {name for name, *_ in told} == result.tensors.keys()
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1] == told[-1][2] == sum(t.nbytes for t in load_state(tmp_path / "out").values())


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "slerp"])
def test_a_model_of_another_origin_is_told(method, plain, tmp_path):
    base, (near, *_) = plain
    far = tiny_checkpoint(tmp_path / "far", seed=99)
    models = [far] if method == "slerp" else [near, far]
    notes = " ".join(merge(recipe(method, base, models), tmp_path / "out").notes)
    assert notes.count("hardly stem from one model") == 1 and str(far) in notes and f"{near} and" not in notes
    fine = recipe(method, base, [near] if method == "slerp" else list(plain[1]))
    assert "hardly" not in " ".join(merge(fine, tmp_path / "out", force=True).notes)


@pytest.mark.parametrize("kind", ["auto", "chatml", "{{ messages[0]['content'] }} and no more"])
def test_chat_templates(kind, tmp_path):
    from surgery.checkpoint.chat_templates import TEMPLATES

    base, tuned = tiny_family(tmp_path, 2)
    for folder in tuned:
        (folder / "chat_template.jinja").write_text("{{ 'theirs' }}\n")
    merge(recipe("linear", base, [base, *tuned], chat_template=kind), tmp_path / "out")
    expected = {"auto": "{{ 'theirs' }}", "chatml": TEMPLATES["chatml"]}.get(kind, kind)
    assert (tmp_path / "out/chat_template.jinja").read_text() == expected
