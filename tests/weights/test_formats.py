"""Every storage form: saved, loaded, read in any range, applied; what is lost, and files that are wrong."""

import json
import struct

import numpy as np
import pytest
import torch
from helpers import load_state, save_checkpoint, tiny_checkpoint, tiny_config, tiny_family
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from surgery.checkpoint import read_header
from surgery.errors import SurgeryError
from surgery.weights.formats import BLOCK
from surgery.weights.sources import Anchor
from surgery.weights.vector import TaskVector

NAME = "model.layers.0.mlp.up_proj.weight"
FORMS = {
    "float32": {}, "bfloat16": {}, "lossless": {}, "topk": {"density": 0.2}, "low_rank": {"rank": 3}, "sign": {},
    "int8": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return tiny_family(tmp_path_factory.mktemp("family"), 2)


@pytest.fixture(scope="module")
def vector(family):
    return TaskVector.between(family[0], family[1][0])


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """One matrix of several blocks and some odd shapes; 12 % of the numbers differ."""
    folder = tmp_path_factory.mktemp("big")
    g = torch.Generator().manual_seed(0)
    shapes = {"w": (301, 1003), "v": (70001,), "s": (), "same": (9, 9), "three": (3, 50, 70), "none": (0, 4)}
    base = {n: torch.randn(s, generator=g).bfloat16() for n, s in shapes.items()}
    moved = {n: torch.rand(s, generator=g) < 0.12 for n, s in shapes.items()}
    tuned = {n: torch.where(moved[n], t * 1.5, t) for n, t in base.items()} | {"same": base["same"]}
    return save_checkpoint(folder / "base", base, {}), save_checkpoint(folder / "tuned", tuned, {})


@pytest.mark.parametrize("form", FORMS)
def test_what_is_saved_comes_back(tmp_path, family, vector, form):
    saved = vector.save(tmp_path / "v.safetensors", form, **FORMS[form])
    loaded = TaskVector.load(tmp_path / "v.safetensors", base=family[0])
    assert saved.nbytes == (tmp_path / "v.safetensors").stat().st_size
    assert loaded.shapes == vector.shapes and str(loaded) == str(vector)
    for name in vector.names:
        exact, found = vector.tensor(name), loaded.tensor(name)
        assert found.dtype == torch.float32 and found.shape == exact.shape
        if form in ("float32", "lossless"):
            assert found.equal(exact), name
        elif form != "sign" or exact.ndim == 1:
            slack = {"bfloat16": 2**-8, "int8": 1 / 127}.get(form, 1.0 if exact.ndim > 1 else 2**-8 + 0.01)
            if form == "topk" and exact.ndim == 1:
                slack = 1.0
            assert (found - exact).abs().max() <= slack * exact.abs().max() + 1e-12, name
    loaded.apply(family[0], tmp_path / "out", scale=0.5)


@pytest.mark.parametrize("form", FORMS)
def test_any_range_of_a_larger_tensor(tmp_path, big, form):
    TaskVector.between(*big).save(tmp_path / "v.safetensors", form, **FORMS[form])
    loaded = TaskVector.load(tmp_path / "v.safetensors", base=big[0])
    for name, numel in (("w", 301 * 1003), ("v", 70001)):
        whole = loaded.expression.flat(name, 0, numel)
        rng = np.random.default_rng(1)
        for _ in range(12):
            start, stop = sorted(rng.integers(0, numel + 1, 2).tolist())
            assert loaded.expression.flat(name, start, stop).equal(whole[start:stop]), (name, start, stop)
        edges = [(BLOCK - 1, BLOCK + 1), (BLOCK, BLOCK), (numel - 1, numel), (0, 1)]
        assert all(loaded.expression.flat(name, a, b).equal(whole[a:b]) for a, b in edges)
    assert loaded.tensor("s").shape == () and loaded.tensor("none").shape == (0, 4)


def test_lossless_is_small_and_exact(tmp_path, big):
    saved = TaskVector.between(*big).save(tmp_path / "v.safetensors", "lossless")
    assert saved.bytes_per_number < 1 / 8 + 2 * 0.13 + 0.02
    stored = read_header(tmp_path / "v.safetensors").tensors
    assert not any(name.startswith("same") for name in stored)
    TaskVector.load(tmp_path / "v.safetensors").apply(big[0], tmp_path / "out")
    out, tuned = load_state(tmp_path / "out"), load_state(big[1])
    assert all(out[n].view(-1).view(torch.int16).equal(tuned[n].view(-1).view(torch.int16)) for n in tuned)


@pytest.mark.parametrize("use", ["read", "tensor", "norm", "again", "lora"])
def test_a_lossless_vector_beside_a_wrong_base_gives_no_numbers(tmp_path, family, vector, use):
    vector.save(tmp_path / "v.safetensors", "lossless")
    state = load_state(family[0])
    state[NAME][0, 0] += 1
    wrong = save_checkpoint(tmp_path / "wrong", state, tiny_config())
    loaded = TaskVector.load(tmp_path / "v.safetensors", base=wrong)  # the same names and shapes: not seen yet
    other = next(name for name in loaded.names if name != NAME)
    assert loaded.tensor(other).equal(vector.tensor(other))
    uses = {
        "read": lambda: loaded.read(NAME, 1, 2),
        "tensor": lambda: loaded.tensor(NAME),
        "norm": lambda: loaded.norm(),
        "again": lambda: loaded.save(tmp_path / "again.safetensors", "lossless"),
        "lora": lambda: (2 * loaded).export_lora(tmp_path / "lora", rank=2),
    }
    for _ in range(2):
        with pytest.raises(SurgeryError, match=f"not the base.*'{NAME}' has other numbers") as told:
            uses[use]()
    assert "Name the base" in told.value.hint
    loaded.bound(family[0]).norm()


@pytest.mark.parametrize("form", ["lossless", "float32"])
def test_a_base_of_other_tensors_is_refused_at_once(tmp_path, family, vector, form):
    vector.save(tmp_path / "v.safetensors", form)
    state = load_state(family[0])
    cut = save_checkpoint(tmp_path / "cut", state | {NAME: state[NAME][:-1].clone()}, tiny_config())
    with pytest.raises(SurgeryError, match=f"not the base.*'{NAME}' is"):
        TaskVector.load(tmp_path / "v.safetensors", base=cut)
    half = save_checkpoint(tmp_path / "half", {n: t.half() for n, t in state.items()}, tiny_config())
    with pytest.raises(SurgeryError, match="not the base.*types"):
        TaskVector.load(tmp_path / "v.safetensors").bound(half)


def test_the_base_is_compared_once_and_by_apply_only_on_its_way(tmp_path, family, vector, monkeypatch):
    vector.save(tmp_path / "v.safetensors", "lossless")
    made = []
    plain = Anchor.checksum
    monkeypatch.setattr(Anchor, "checksum", lambda self, name: made.append(self.known is None) or plain(self, name))
    loaded = TaskVector.load(tmp_path / "v.safetensors", base=family[0])
    for _ in range(3):
        loaded.read(NAME, 0, 1)
    assert sum(made) == 1
    TaskVector.load(tmp_path / "v.safetensors").apply(family[0], tmp_path / "out", scale=0.5)
    assert sum(made) == 1


def test_lossless_with_a_head_of_its_own_on_a_tied_base(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", tied=True)
    state = load_state(base)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    tuned = save_checkpoint(tmp_path / "tuned", state, tiny_config(tied=False))
    vector = TaskVector.between(base, tuned)
    vector.save(tmp_path / "v.safetensors", "lossless")
    loaded = TaskVector.load(tmp_path / "v.safetensors", base=base)
    assert loaded.tensor("lm_head.weight").equal(vector.tensor("lm_head.weight"))


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALVES = st.lists(st.integers(0, 0xFFFF).map(lambda b: b & 0xFBFF), min_size=40, max_size=40)
"""Bits of finite float16 numbers: zeros of both signs, the smallest and the largest among them."""


@settings(max_examples=60, deadline=None)
@given(HALVES, HALVES, st.integers(1, 40), st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_base_and_difference_make_the_tuned_model_bit_for_bit(tmp_path_factory, one, two, size, mine, theirs):
    folder = tmp_path_factory.mktemp("bits")
    before, after = (torch.tensor(b[:size]).to(torch.uint16).view(torch.float16) for b in (one, two))
    base = save_checkpoint(folder / "base", {"w": before.to(mine)}, {})
    tuned = {"w": after.to(theirs)}
    vector = TaskVector.between(base, save_checkpoint(folder / "tuned", tuned, {}))
    vector.save(folder / "v.safetensors", "lossless")
    TaskVector.load(folder / "v.safetensors").apply(base, folder / "out")
    found = load_state(folder / "out")["w"]
    assert found.dtype == theirs and found.view(torch.uint8).equal(tuned["w"].view(torch.uint8))


def test_equal_models_make_an_empty_vector(tmp_path, family):
    copy = save_checkpoint(tmp_path / "copy", load_state(family[0]), tiny_config())
    vector = TaskVector.between(family[0], copy)
    for form in ("lossless", "topk"):
        vector.save(tmp_path / f"{form}.safetensors", form)
        loaded = TaskVector.load(tmp_path / f"{form}.safetensors", base=family[0])
        assert loaded.tensor(NAME).count_nonzero() == 0
        loaded.apply(family[0], tmp_path / f"out_{form}")


def test_lossless_is_for_plain_differences_and_needs_its_base(tmp_path, family, vector):
    with pytest.raises(SurgeryError, match="plain difference"):
        (2 * vector).save(tmp_path / "x.safetensors", "lossless")
    assert list(tmp_path.iterdir()) == []
    vector.only("mlp").save(tmp_path / "mlp.safetensors", "lossless")
    loaded = TaskVector.load(tmp_path / "mlp.safetensors")
    with pytest.raises(SurgeryError, match="base is needed"):
        loaded.tensor(NAME)
    assert loaded.bound(family[0]).tensor(NAME).equal(vector.tensor(NAME))
    (2 * loaded).apply(family[0], tmp_path / "twice")
    expected = load_state(family[0])[NAME] + 2 * vector.tensor(NAME)
    torch.testing.assert_close(load_state(tmp_path / "twice")[NAME], expected, rtol=0, atol=1e-6)
    again = loaded.bound(family[0])
    again.save(tmp_path / "again.safetensors", "lossless")
    assert TaskVector.load(tmp_path / "again.safetensors", family[0]).tensor(NAME).equal(vector.tensor(NAME))


@pytest.mark.parametrize("density", [0.01, 0.03, 0.2, 1.0, 0.0])
def test_topk_keeps_the_largest(tmp_path, big, density):
    vector = TaskVector.between(*big)
    vector.save(tmp_path / "v.safetensors", "topk", density=density, dtype="float32")
    found = TaskVector.load(tmp_path / "v.safetensors").tensor("w").view(-1)
    exact = vector.tensor("w").view(-1)
    order = torch.sort(exact.abs(), descending=True, stable=True).indices[: int(density * exact.numel())]
    expected = torch.zeros_like(exact).index_copy_(0, order, exact[order])
    assert found.equal(expected)
    stored = read_header(tmp_path / "v.safetensors").tensors
    assert ("w:places" in stored) == (0 < density < 1 / 16)


def test_sign_is_signs_times_the_mean(tmp_path, vector):
    vector.save(tmp_path / "v.safetensors", "sign")
    exact = vector.tensor(NAME)
    expected = torch.where(exact >= 0, 1.0, -1.0) * exact.abs().mean()
    torch.testing.assert_close(TaskVector.load(tmp_path / "v.safetensors").tensor(NAME), expected, rtol=1e-6, atol=0)


def test_sign_counts_zero_as_plus(tmp_path):
    base = save_checkpoint(tmp_path / "base", {"w": torch.zeros(2, 4)}, {})
    tuned = save_checkpoint(tmp_path / "tuned", {"w": torch.tensor([[0.0, -0.0, 1, -1], [0, 2, -2, 2]])}, {})
    TaskVector.between(base, tuned).save(tmp_path / "v.safetensors", "sign")
    found = TaskVector.load(tmp_path / "v.safetensors").tensor("w")
    assert found.tolist() == [[1, 1, 1, -1], [1, 1, -1, 1]]


@pytest.mark.parametrize("block", [64, 256])
def test_int8_is_within_half_a_step(tmp_path, big, block):
    vector = TaskVector.between(*big)
    vector.save(tmp_path / "v.safetensors", "int8", block=block)
    exact = vector.tensor("w").view(-1)
    found = TaskVector.load(tmp_path / "v.safetensors").tensor("w").view(-1)
    padded = torch.nn.functional.pad(exact, (0, -exact.numel() % block)).view(-1, block)
    step = (padded.abs().amax(1) / 127).repeat_interleave(block)[: exact.numel()]
    assert ((found - exact).abs() <= 0.501 * step).all()


def test_sizes_are_those_of_the_table(tmp_path, big):
    expected = {"float32": 4, "bfloat16": 2, "sign": 1 / 8, "int8": 1 + 4 / 128}
    only = TaskVector.between(*big).only("^w$")
    for form, size in expected.items():
        saved = only.save(tmp_path / f"{form}.safetensors", form)
        assert saved.bytes_per_number == pytest.approx(size, abs=0.01), form


def test_sharded_folders(tmp_path, vector, family):
    vector.save(tmp_path / "v", "float32", shard_size="20KB")
    assert len(list((tmp_path / "v").glob("*.safetensors"))) > 1
    assert TaskVector.load(tmp_path / "v").tensor(NAME).equal(vector.tensor(NAME))


def test_wrong_words_and_wrong_files_are_told(tmp_path, family, vector):
    with pytest.raises(SurgeryError, match="lossles"):
        vector.save(tmp_path / "x.safetensors", "lossles")
    with pytest.raises(SurgeryError, match="options"):
        vector.save(tmp_path / "x.safetensors", "sign", density=0.5)
    with pytest.raises(SurgeryError, match="density"):
        vector.save(tmp_path / "x.safetensors", "topk", density=1.5)
    with pytest.raises(SurgeryError, match="not a stored task vector"):
        TaskVector.load(family[0])
    with pytest.raises(SurgeryError):
        TaskVector.load(tmp_path / "nowhere.safetensors")
    vector.save(tmp_path / "v.safetensors")
    with pytest.raises(SurgeryError, match="exists already"):
        vector.save(tmp_path / "v.safetensors")
    vector.save(tmp_path / "v.safetensors", force=True)


@pytest.mark.parametrize("form", ["lossless", "topk", "sign", "int8", "low_rank"])
@pytest.mark.parametrize("harm", ["drop", "shape", "version", "form", "note", "no_json"])
def test_a_damaged_file_is_refused(tmp_path, family, vector, form, harm):
    path = tmp_path / "v.safetensors"
    vector.save(path, form, **FORMS[form])
    tensors, metadata = load_file(path), read_header(path).metadata
    part = sorted(n for n in tensors if ":" in n)[0]
    if harm == "drop":
        tensors.pop(part)
    elif harm == "shape":
        tensors[part] = torch.cat([tensors[part], tensors[part]])
    elif harm == "version":
        metadata["format_version"] = "99"
    elif harm == "form":
        metadata["form"] = "zip"
    elif harm == "note":
        metadata["tensors"] = json.dumps({"w": {"shape": "many"}})
    else:
        metadata["tensors"] = "{"
    save_file(tensors, path, metadata)
    with pytest.raises(SurgeryError):
        TaskVector.load(path)


@pytest.mark.parametrize("form", ["lossless", "topk"])
def test_a_table_of_contents_that_lies_is_refused(tmp_path, big, form):
    path = tmp_path / "v.safetensors"
    TaskVector.between(*big).save(path, form, **({"density": 0.02} if form == "topk" else {}))
    tensors, metadata = load_file(path), read_header(path).metadata
    for wrong in (-5, 2**40):
        tensors["w:starts"][1] = wrong
        save_file(tensors, path, metadata)
        with pytest.raises(SurgeryError, match="damaged"):
            TaskVector.load(path, base=big[0]).expression.flat("w", BLOCK, 2 * BLOCK)


def test_a_cut_file_is_refused(tmp_path, vector):
    path = tmp_path / "v.safetensors"
    vector.save(path, "lossless")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for end in (4, 8 + length // 2, len(data) - 3):
        path.write_bytes(data[:end])
        with pytest.raises(SurgeryError):
            TaskVector.load(path)


def test_what_another_form_can_be_made_of(tmp_path, family, vector):
    """A stored vector is a vector: it can be saved again in another form, base at hand or not."""
    vector.save(tmp_path / "a.safetensors", "float32")
    TaskVector.load(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors", "int8")
    again = TaskVector.load(tmp_path / "b.safetensors")
    again.apply(family[0], tmp_path / "out")
    other = tiny_checkpoint(tmp_path / "other", seed=3)
    with pytest.raises(SurgeryError, match="not the base"):
        again.apply(other, tmp_path / "out2")
