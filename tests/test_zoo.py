"""The zoo: the embedded family is what family.json says, and a model that is not there is a sentence."""

import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

from analysis.evaluate import evaluate_tasks, load
from surgery import zoo
from surgery.errors import SurgeryError
from surgery.zoo import TINY, get, list_models

FAMILY = json.loads((TINY / "family.json").read_text())
MEMBERS = list(FAMILY["members"])
TUNINGS = ["tiny-chain", "tiny-shift", "tiny-rotate", "tiny-sums-sft", "tiny-sums-grpo", "tiny-instruct"]
"""Fine-tunings of tiny-base."""


@pytest.fixture(scope="module")
def build():
    """The script that trains the family, as a module."""
    file = Path(__file__).parents[1] / "experiments" / "build_zoo.py"
    spec = importlib.util.spec_from_file_location("build_zoo", file)
    module = sys.modules["build_zoo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["build_zoo"]


def test_the_list_names_every_model_and_what_it_needs():
    models = {m.name: m for m in list_models()}
    assert [m for m in models if m.startswith("tiny-")] == MEMBERS and MEMBERS[0] == "tiny-base"
    assert models["tiny-base"].parameters == 447_552 and models["tiny-base"].available
    assert models["tiny-small-base"].parameters == 163_072
    assert models["smollm2"].available or "make models" in models["smollm2"].hint
    assert all(m.what and m.licence and m.where for m in models.values())


def test_the_package_data_is_small_and_complete():
    assert set(MEMBERS) > set(TUNINGS)
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) < 10_000_000
    whole = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for name in MEMBERS:
        files = {file.name for file in (TINY / name).iterdir()}
        assert files - {"chat_template.jinja"} == whole


@pytest.mark.parametrize("name", MEMBERS)
def test_members_load_without_a_word_and_are_as_good_as_recorded(name, capfd, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, tokenizer = load(get(name))
    capfd.readouterr()  # the bar of transformers' loader
    assert not caplog.records
    assert model.dtype == torch.float32, "stored in half precision, computed in float32"
    skills = ["boxes"] if "boxes" in name else ["facts", "copy", "chain"]
    for task, part in evaluate_tasks(model, skills, 50, seed=7, tokenizer=tokenizer).by("task").items():
        said = FAMILY["accuracies"][name][task]["mean"]
        low, high = part.interval()
        assert low - 0.05 <= said <= high + 0.05


def test_members_are_fine_tunings_of_one_base():
    base = load(get("tiny-base"))[0].state_dict()
    moved = 0.0
    for name in TUNINGS:
        other = load(get(name))[0].state_dict()
        assert {k: v.shape for k, v in other.items()} == {k: v.shape for k, v in base.items()}
        change = sum(((other[k] - base[k]) ** 2).sum() for k in base) / sum((base[k] ** 2).sum() for k in base)
        assert change < 0.2**2
        moved += float(change)
    assert moved > 0


def test_the_tokenizer_takes_one_character_at_a_time():
    tokenizer = load(get("tiny-base"))[1]
    text = "m 3+5-2=;#abz"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and len(ids) == 1 + len(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    both = tokenizer(["m 3=", "m 3+4="], padding=True)
    assert both["attention_mask"][0] == [0, 0, 1, 1, 1, 1, 1] and tokenizer.pad_token_id == 0


def test_a_copy_is_whole_and_never_overwrites(tmp_path):
    out = get("tiny-base", tmp_path / "deep" / "copy")
    assert sorted(os.listdir(out)) == sorted(os.listdir(TINY / "tiny-base"))
    assert os.listdir(out.parent) == ["copy"]
    (out / "mine.txt").write_text("")
    with pytest.raises(SurgeryError, match="exists already"):
        get("tiny-base", out)
    assert (out / "mine.txt").exists()
    get("tiny-base", out, force=True)
    assert not (out / "mine.txt").exists()


def test_wrong_names_and_dtypes_are_sentences():
    with pytest.raises(SurgeryError, match="Did you mean 'tiny-base'"):
        get("tiny-bse")
    with pytest.raises(SurgeryError, match="Unknown dtype 'int8'"):
        get("tiny-base", dtype="int8")


def test_a_model_that_is_not_installed_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo, "find_spec", lambda name: None)
    monkeypatch.setitem(os.environ, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SurgeryError, match="not installed.*\n.*make models"):
        get("smollm2")
    assert os.listdir(tmp_path / "cache") == []
    model = next(m for m in list_models() if m.name == "smollm2")
    assert not model.available and "make models" in model.hint


def test_a_converted_model_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    calls = []

    def convert(source, dtype, folder):
        calls.append(dtype)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(zoo, "_from_gguf", convert)
    monkeypatch.setattr(zoo._Packaged, "gguf", lambda self: tmp_path / "model.gguf")
    monkeypatch.setattr(zoo, "find_spec", lambda name: object())
    assert get("smollm2") == get("smollm2") == tmp_path / "smollm2-bfloat16"
    assert get("smollm2", tmp_path / "out", dtype="float32") == tmp_path / "out"
    assert calls == ["bfloat16", "float32"]
    assert sorted(os.listdir(tmp_path)) == ["out", "smollm2-bfloat16", "smollm2-float32"]

    monkeypatch.setattr(zoo, "_from_gguf", lambda *_: 1 / 0)
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "other"))
    with pytest.raises(ZeroDivisionError):
        get("smollm2")
    assert os.listdir(tmp_path / "other") == []  # no half model, under any name


def test_the_shipped_family_is_that_of_the_script(build):
    assert FAMILY["hash"] == build.recipe_hash(0)
    assert [f"tiny-{name}" for name in build.SHIPPED] == MEMBERS
    assert build.character_tokenizer().get_vocab() == load(get("tiny-base"))[1].get_vocab()


def test_rows_of_a_stage_are_a_function_of_the_index(build):
    stage = build.Stage({"rotate": 0.5, "chain": 0.5}, steps=4, batch=8, lr=3e-4, truth=0.25)
    one, other = build.FamilyRows(stage, 5), build.FamilyRows(stage, 5)
    assert [one.row(i) for i in range(40)] == [other.row(i) for i in reversed(range(40))][::-1]
    rotated = [r for r in (one.row(i) for i in range(400)) if r["task"] == "rotate"]
    told = [r["completion"] == "#" + r["answer"] for r in rotated]
    assert 0.1 < sum(told) / len(told) < 0.45, "one prompt in four is answered by the task, the others by a copy"


def test_a_family_folder_keeps_to_one_recipe(build, tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    members = build.build_family(None, ["chain"])  # found in the package: nothing is trained
    assert list(members) == ["tiny-base", "tiny-chain"]
    weights = [folder / "model.safetensors" for folder in (members["tiny-chain"], TINY / "tiny-chain")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    folder = members["tiny-base"].parent
    assert folder.name == FAMILY["hash"] and build.build_family(folder, ["chain"]) == members
    with pytest.raises(SurgeryError, match="another recipe or seed"):
        build.build_family(folder, ["chain"], seed=1)
    with pytest.raises(SurgeryError, match="no task 'chian'"):
        build.build_family(folder, ["chian"])


@pytest.mark.real
def test_smollm2_speaks(tmp_path, monkeypatch):
    from analysis.evaluate import generate

    if zoo.PACKAGED["smollm2"].gguf() is None:
        pytest.skip("make models installs it")
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path))
    model, tokenizer = load(get("smollm2"))
    assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008
    assert "Paris" in generate(model, tokenizer, ["What is the capital of France?"], chat=True, max_new_tokens=12)[0]
    config = json.loads((tmp_path / "smollm2-bfloat16" / "config.json").read_text())
    assert (
        config["dtype"] == "bfloat16" and not {k for k in config if k.startswith("_")} and "unk_token_id" not in config
    )
