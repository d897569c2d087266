"""Wrong input to a merge: a sentence that names the thing, and nothing left under the final name or beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
import torch
import yaml
from helpers import (
    load_state,
    raw_safetensors,
    read_json,
    tiny_checkpoint,
    tiny_family,
    tiny_tokenizer,
    words,
    write_json,
)
from safetensors.torch import save_file
from test_plan import EMBEDDING, HEAD, recipe, with_tensors

from surgery.errors import SurgeryError
from surgery.weights.merge import merge, merge_in_memory

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def family(tmp_path):
    return tiny_family(tmp_path / "models", 2)


def refused(made, tmp_path, pattern, **how):
    """Merging `made` is refused in words that match `pattern`, one line a problem, and leaves nothing behind."""
    home = tmp_path / "results"
    home.mkdir(exist_ok=True)
    with pytest.raises(SurgeryError, match=pattern) as told:
        merge(made, home / "out", threads=2, **how)
    assert not list(home.iterdir())
    assert "Traceback" not in str(told.value) and "torch." not in str(told.value)
    return str(told.value)


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ties", "linear", "slerp", "arcee_fusion", "task_arithmetic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number(method, value, family, tmp_path):
    base, (a, b) = family
    rotten = load_state(a)[DOWN]
    rotten[3, 5] = rotten[9, 1] = value
    with_tensors(a, {DOWN: rotten})
    models = [a] if method in ("slerp", "arcee_fusion") else [b, a]
    parameters = {"t": 0.5} if method == "slerp" else {}
    refused(
        recipe(method, base, models, parameters), tmp_path, f"{a}: tensor '{DOWN}' has 2 values that are NaN or inf"
    )
    made = recipe(method, base, models, parameters, nonfinite="base")
    if method == "linear":
        refused(made, tmp_path, f"tensor '{DOWN}' has")
        return
    result = merge(made, tmp_path / "mended")
    assert all(t.isfinite().all() for t in load_state(tmp_path / "mended").values())
    assert any("2 values that were NaN or infinite" in n for n in result.notes)
    if method == "task_arithmetic":
        x, y = load_state(base)[DOWN][3, 5], load_state(b)[DOWN][3, 5]
        assert load_state(tmp_path / "mended")[DOWN][3, 5] == x + (y - x)


def test_a_rotten_base(family, tmp_path):
    base, tuned = family
    with_tensors(base, {DOWN: load_state(base)[DOWN].fill_(float("nan"))})
    for option in ("error", "base"):
        refused(recipe("ties", base, tuned, nonfinite=option), tmp_path, f"{base}: tensor '{DOWN}' has 512 values")


@pytest.mark.parametrize("density", [1.5, -0.1, "half", None, float("nan")])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare_ties", "della"])
def test_densities_that_are_none(method, density, family, tmp_path):
    told = refused(recipe(method, *family, {"density": density}), tmp_path, "density")
    assert density is None or str(density) in told


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties", "dare_ties", "dare_linear", "della"])
def test_densities_of_nothing_and_everything(method, family):
    base, tuned = family
    b, states = load_state(base), [load_state(t) for t in tuned]
    none = merge_in_memory(recipe(method, base, tuned, {"density": 0}))
    assert all(torch.equal(none[n], b[n]) for n in b)
    every = merge_in_memory(recipe(method, base, tuned[:1], {"density": 1, "weight": 1.0}))
    assert all(torch.allclose(every[n], states[0][n], atol=1e-7) for n in b)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"weight": [{"filter": "mlp", "value": 0.0}, {"value": 1.0}]}),
        ("multislerp", {"weight": 0}),
        ("linear", {"weight": 0.0}),
    ],
)
def test_weights_that_sum_to_nothing(method, parameters, family, tmp_path):
    refused(recipe(method, *family, parameters), tmp_path, "sum to 0")


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "breadcrumbs_ties"])
def test_differences_of_no_weight_leave_the_base(method, family):
    base, tuned = family
    merged, b = merge_in_memory(recipe(method, base, tuned, {"weight": 0})), load_state(base)
    assert all(torch.equal(merged[n], b[n]) for n in b)


def test_weights_that_cancel_somewhere_between_the_layers(tmp_path):
    tuned = tiny_family(tmp_path / "models", 2, layers=4)[1]
    models = [{"model": str(t), "parameters": {"weight": w}} for t, w in zip(tuned, (1.0, [-3.0, 3.0]), strict=True)]
    refused({"method": "linear", "models": models}, tmp_path, r"weights \[1.0, -1.0\] sum to 0")


def test_whole_numbers_that_differ(family, tmp_path):
    base, (a, b) = family
    for folder, last in ((base, 3), (a, 3), (b, 4)):
        with_tensors(folder, {"model.position_ids": torch.tensor([1, 2, last])})
    told = refused(recipe("linear", None, [a, b]), tmp_path, "'model.position_ids' holds whole numbers that differ")
    assert str(a) in told and str(b) in told
    with_tensors(b, {"model.position_ids": torch.tensor([1.0, 2.0, 3.0])})
    refused(recipe("linear", None, [a, b]), tmp_path, "model.position_ids: whole numbers in one model")
    with_tensors(b, {"model.position_ids": torch.tensor([1, 2, 3], dtype=torch.int32)})
    assert merge_in_memory(recipe("linear", None, [a, b]))["model.position_ids"].tolist() == [1, 2, 3]


# ---- models that don't fit ------------------------------------------------------------------------------------------


def test_all_shapes_at_once(family, tmp_path):
    base, _ = family
    other = tiny_checkpoint(tmp_path / "models/wide", hidden=32)
    told = refused(recipe("linear", None, [base, other]), tmp_path, f"{EMBEDDING}: .*{base} .40, 16., {other} .40, 32.")
    assert told.count("shapes or types differ") == 12 and "... and 9 more" in told


def test_nothing_shared(family, tmp_path):
    base, _ = family
    (tmp_path / "models/x").mkdir()
    save_file({"x": torch.ones(2)}, tmp_path / "models/x/model.safetensors")
    refused(recipe("linear", None, [base, tmp_path / "models/x"]), tmp_path, "share no tensor: .*base, .*x")


def test_vocabularies_of_other_sizes_or_tokens(family, tmp_path):
    base, (a, b) = family
    longer = tiny_checkpoint(tmp_path / "models/longer", vocab=44)
    told = refused(recipe("linear", None, [a, longer]), tmp_path, "vocabularies differ in size")
    assert f"{a} 40, {longer} 44 rows" in told
    tokens = words(40)
    tokens[20], tokens[21] = tokens[21], tokens[20]
    tiny_tokenizer(b, tokens)
    told = refused(recipe("linear", None, [a, b]), tmp_path, f"{a} and {b} have different vocabularies")
    assert "w16" in told


def test_quantised(family, tmp_path):
    base, (a, b) = family
    config = read_json(a / "config.json")
    write_json(a / "config.json", config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    refused(recipe("ties", base, [a, b]), tmp_path, f"{a} is quantised .gptq.")
    write_json(a / "config.json", config)
    with_tensors(a, {DOWN: load_state(a)[DOWN].to(torch.float8_e4m3fn)})
    refused(recipe("ties", base, [a, b]), tmp_path, f"{a}: tensor '{DOWN}' is F8_E4M3")


def test_pickles(family, tmp_path):
    base, (a, b) = family
    torch.save(load_state(a), a / "pytorch_model.bin")
    (a / "model.safetensors").unlink()
    made = recipe("linear", None, [a, b])
    refused(made, tmp_path, f"{a}.* pickled weights, which can run code")
    merge(made, tmp_path / "out", allow_pickle=True)
    assert (tmp_path / "out/model.safetensors").exists()


def test_damaged_and_absent(family, tmp_path):
    base, (a, b) = family
    made = recipe("linear", None, [a, b])
    file = a / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refused(made, tmp_path, str(file))
    raw_safetensors(file, b"{", length=1 << 40)
    refused(made, tmp_path, str(file))
    file.unlink()
    refused(made, tmp_path, str(a))
    shutil.rmtree(a)
    refused(made, tmp_path, str(a))


def test_an_index_that_points_outside(family, tmp_path):
    base, (a, b) = family
    names = list(load_state(a))
    shutil.move(a / "model.safetensors", tmp_path / "models/stolen.safetensors")
    write_json(a / "model.safetensors.index.json", {"weight_map": dict.fromkeys(names, "../stolen.safetensors")})
    refused(recipe("linear", None, [a, b]), tmp_path, "stolen.safetensors")


# ---- folders --------------------------------------------------------------------------------------------------------


def test_the_same_folder_twice(family, tmp_path):
    base, (a, b) = family
    link = tmp_path / "models/link"
    link.symlink_to(a)
    for other in (a, f"{a}/", f"{a.parent}/../models/{a.name}", link):
        refused(recipe("ties", base, [a, other]), tmp_path, "is the same model as")


def test_the_output_is_an_input_or_in_one(family, tmp_path):
    base, (a, b) = family
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "models")
    for out in (a, base, b / "deep/out", tmp_path / "models", link, link / "tuned0", f"{a}/../{a.name}"):
        for force in (False, True):
            with pytest.raises(SurgeryError, match="The output .* is the input"):
                merge(recipe("ties", base, [a, b]), out, force=force)
    link.unlink()
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_output_that_exists(kind, family, tmp_path):
    base, tuned = family
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "precious").write_text("x")
    elif kind == "file":
        out.write_text("x")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(SurgeryError, match=f"{out} exists already"):
        merge(recipe("linear", None, tuned), out)
    assert os.path.lexists(out) and not (out / "model.safetensors").exists()
    merge(recipe("linear", None, tuned), out, force=True)
    assert {p.name for p in tmp_path.iterdir()} == {"models", "out"} and (out / "model.safetensors").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs with some options; skips where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not permitted here")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_too_small(family, tmp_path, small_disk):
    disk = small_disk("size=16k")
    with pytest.raises(SurgeryError, match="needs 0.00 GB, and only"):
        merge(recipe("linear", None, family[1]), disk / "out")
    assert not list(disk.iterdir())


def test_a_disk_that_fills_up(tmp_path, small_disk):
    tuned = tiny_family(tmp_path / "models", 2, hidden=64, vocab=400)[1]
    disk = small_disk("size=1m")

    def others(name, done, total):  # somebody else writes meanwhile
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "other").write_bytes(bytes(free))

    with pytest.raises(SurgeryError, match="disk filled up.*removed"):
        merge(recipe("linear", None, tuned), disk / "out", threads=1, progress=others)
    assert [p.name for p in disk.iterdir()] == ["other"]


def test_a_read_only_disk(family, small_disk):
    disk = small_disk("size=1m,ro")
    with pytest.raises(SurgeryError, match="can't be written"):
        merge(recipe("linear", None, family[1]), disk / "out")


def test_a_parent_that_is_a_file(family, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SurgeryError, match="can't be written"):
        merge(recipe("linear", None, family[1]), tmp_path / "file/out")


# ---- recipes --------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (BOMB, "more than 50000 values"),
        ("method: !!python/object/apply:os.system ['true']\nmodels: [a]\n", "line 1: the tag .* is not allowed"),
        ("method: !custom ties\nmodels: [a]\n", "the tag '!custom' is not allowed"),
        ("method: linear\nmethod: ties\n", "line 2: the key 'method' is written twice"),
        ("method: linear\nmodels: [a, b\n", "not YAML"),
        ("method: linearr\nmodels: [a, b]\n", "linearr"),
        ("method: ties\nbase: x\nmodels: [a, b]\nparameters: {densty: 0.2}\n", "densty"),
        ("method: ties\nmodels: [a, b]\n", "has no 'base'"),
        ("[" * 60 + "]" * 60 + "\n", "deeper than 40"),
        ("- just\n- a list\n", "mapping"),
        ("method: slerp\nbase: a\nmodels: [a, b, c]\nparameters: {t: 0.5}\n", "takes 1"),
        ("method: slerp\nbase: a\nmodels: [a, b]\n", "has no 't'"),
        ("\n\n", "is empty"),
    ],
)
def test_recipes(text, pattern, tmp_path):
    refused(text, tmp_path, pattern)
    (tmp_path / "recipe.yml").write_text(text)
    refused(tmp_path / "recipe.yml", tmp_path, pattern)


def test_a_stage_that_fails_leaves_nothing(family, tmp_path):
    base, tuned = family
    first = recipe("linear", None, tuned, name="soup")
    second = recipe("linear", None, ["soup", tmp_path / "absent"])
    refused("---\n".join(json.dumps(r) + "\n" for r in (first, second)), tmp_path, "absent")
    with_tensors(base, {HEAD: load_state(base)[HEAD].fill_(float("nan"))})
    refused(yaml.safe_dump_all([first, recipe("ties", base, ["soup"])]), tmp_path, "NaN or infinite")


def test_a_head_of_other_layers(family, tmp_path):
    base, (a, _) = family
    slices = [{"inputs": [{"model": str(a), "layers": [0, 9]}]}]
    refused({"method": "passthrough", "slices": slices}, tmp_path, f"{a} has 2 layers; a slice takes .0, 9.")
