"""Sparse deltas in the formats of peers: LT-SFT's pickle, and PEFT's SHiRA and Super-Tuning, live."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from helpers import load_state, read_json, real_llama, save_checkpoint, tiny_checkpoint
from safetensors.torch import load_file, save_file

from surgery.errors import SurgeryError
from surgery.weights.deltas.entries import Entry
from surgery.weights.deltas.file import SparseDelta
from surgery.weights.deltas.formats import PEERS, read, write
from surgery.weights.deltas.lt_sft import first_fastest, row_major

torch.set_num_threads(1)
UP, Q = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def sparse_copy(base, out, names, share=0.05, seed=0):
    """A fine-tuning of `base` in which `share` of the numbers of `names` moved."""
    g = torch.Generator().manual_seed(seed)
    state = load_state(base)
    for name in names:
        moved = torch.rand(state[name].shape, generator=g) < share
        state[name] = torch.where(moved, state[name] + 0.1, state[name])
    return save_checkpoint(out, state, read_json(base / "config.json"))


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    base = tiny_checkpoint(folder / "base")
    return base, sparse_copy(base, folder / "tuned", [UP, Q, NORM], share=0.2)


@pytest.fixture(scope="module")
def delta(family):
    return SparseDelta.between(*family, "add")


def same(a, b):
    """Whether two deltas move the same numbers by the same amounts."""
    return a.entries.keys() == b.entries.keys() and all(
        x.shape == y.shape and x.values.equal(y.values) and (x.places is y.places is None or x.places.equal(y.places))
        for x, y in ((a.entries[n], b.entries[n]) for n in a.entries)
    )


# ---- LT-SFT --------------------------------------------------------------------------------------------------------


def theirs(encoding):
    """What their reader makes of one tensor: steps summed up, the first dimension fastest; dense."""
    if isinstance(encoding, torch.Tensor):
        return encoding
    size = list(encoding["size"])
    flat = np.cumsum(encoding["index_steps"], dtype=np.int32)
    strides = np.concatenate([[1], np.cumprod(size)[:-1]]).astype(np.int32)
    where = (flat[None, :] // strides[:, None]) % np.array(size, dtype=np.int32)[:, None]
    return torch.sparse_coo_tensor(torch.from_numpy(where).long(), encoding["values"], size=size).to_dense()


def encoded(dense):
    """As their writer makes it: the first step is a NumPy number, which is why a plain reader refuses it."""
    sparse = dense.to_sparse().coalesce()
    strides = np.cumprod([1, *list(dense.shape)[:-1]], dtype=np.int64)
    flat = strides @ sparse.indices().numpy().astype(np.int64)
    order = np.argsort(flat, kind="stable")
    steps = [flat[order][0], *np.diff(flat[order]).tolist()] if len(flat) else []
    return {"size": dense.size(), "index_steps": steps, "values": sparse.values()[torch.from_numpy(order)]}


def test_their_reader_gets_our_numbers(tmp_path, delta):
    done = write(delta, tmp_path / "sft", "lt-sft")
    assert done.count == delta.count and sorted(p.name for p in done.out.iterdir()) == ["pytorch_diff.bin"]
    content = torch.load(tmp_path / "sft" / "pytorch_diff.bin", weights_only=True)
    assert content.keys() == {"diffs", "abs"} and content["diffs"].keys() == delta.entries.keys()
    for name, encoding in content["diffs"].items():
        assert theirs(encoding).equal(delta.vector().tensor(name)), name
    assert same(read(tmp_path / "sft", allow_pickle=True), delta)
    write(delta, tmp_path / "one.bin", "lt-sft")
    assert same(read(tmp_path / "one.bin", allow_pickle=True), delta) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2), (11,), (1, 6), (6, 1)])
@pytest.mark.parametrize("keys", [("diffs", "abs"), ("body", "head")])
def test_their_files_are_read(tmp_path, shape, keys):
    g = torch.Generator().manual_seed(1)
    dense = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < 0.4)
    content = {keys[0]: {"w": encoded(dense), "e": encoded(torch.zeros(shape))}, keys[1]: None}
    assert theirs(content[keys[0]]["w"]).equal(dense)
    torch.save(content, tmp_path / "pytorch_diff.bin")
    found = read(tmp_path, allow_pickle=True)
    assert found.vector().tensor("w").equal(dense) and found.entries["e"].count == 0
    assert found.mode == "add" and found.base is None and found.method == "lt-sft"


def test_numbers_of_an_older_numpy_are_read(tmp_path):
    """NumPy 1 calls the module of its numbers `numpy.core`; their published files are of that time."""
    dense = torch.eye(4)
    torch.save({"diffs": {"w": encoded(dense)}, "abs": {}}, tmp_path / "new.bin")
    with zipfile.ZipFile(tmp_path / "new.bin") as new, zipfile.ZipFile(tmp_path / "old.bin", "w") as old:
        for entry in new.infolist():
            data = new.read(entry)
            assert b"cnumpy._core." in data or not entry.filename.endswith("data.pkl")
            old.writestr(entry.filename, data.replace(b"cnumpy._core.", b"cnumpy.core."))
    assert read(tmp_path / "old.bin", allow_pickle=True).vector().tensor("w").equal(dense)


def test_positions_that_overflow_their_reader_are_right_in_ours(tmp_path):
    """Beyond 2**31 numbers their int32 sum wraps round."""
    m, n = 70_000, 40_000
    rows, columns = torch.tensor([3, 69_999, 1]), torch.tensor([0, 30_000, 39_999])
    places = rows + columns * m
    steps = torch.diff(places, prepend=torch.zeros(1, dtype=torch.int64)).tolist()
    content = {"diffs": {"w": {"size": torch.Size([m, n]), "index_steps": steps, "values": torch.ones(3)}}, "abs": {}}
    torch.save(content, tmp_path / "pytorch_diff.bin")
    entry = read(tmp_path, allow_pickle=True).entries["w"]
    assert entry.places.dtype == torch.int64
    assert entry.places.tolist() == sorted((rows * n + columns).tolist())
    with pytest.raises(SurgeryError, match="counts to 2"):
        write(read(tmp_path, allow_pickle=True), tmp_path / "out", "lt-sft")


def test_both_ways_of_counting():
    places = torch.arange(24)
    there = first_fastest(places, (2, 3, 4))
    wanted = np.ravel_multi_index(np.unravel_index(places.numpy(), (2, 3, 4)), (2, 3, 4), order="F")
    assert there.tolist() == wanted.tolist() and row_major(there, (2, 3, 4)).equal(places)


def test_whole_tensors_are_differences_beside_the_base(tmp_path, family):
    base = load_state(family[0])
    content = {"diffs": {Q: encoded(torch.eye(16))}, "abs": {NORM: base[NORM] + 1}}
    torch.save(content, tmp_path / "pytorch_diff.bin")
    with pytest.raises(SurgeryError, match=f"whole tensors \\({NORM}\\)"):
        read(tmp_path, allow_pickle=True)
    found = read(tmp_path, family[0], allow_pickle=True)
    torch.testing.assert_close(found.vector().tensor(NORM), torch.ones(16), rtol=0, atol=1e-6)
    found.apply(family[0], tmp_path / "out")
    assert load_state(tmp_path / "out")[Q].equal(base[Q] + torch.eye(16))


class Bomb:
    def __reduce__(self):
        return (open, ("hit", "w"))


def number(kind, raw):
    """A pickle that makes a NumPy number of `kind` from `raw`."""

    class Maker:
        def __reduce__(self):
            return np._core.multiarray.scalar, (kind, raw)

    return Maker()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"diffs": {"w": Bomb()}}, "can't be read as plain numbers"),
        ({"diffs": {"w": np.zeros(3)}}, "can't be read as plain numbers"),
        ({"diffs": {"w": number(np.dtype("f8"), b"\0" * 8)}}, "can't be read as plain numbers"),
        ({"else": {}}, "no 'diffs'"),
        ([1, 2], "no 'diffs'"),
        ({"diffs": [1]}, "map names"),
        ({"diffs": {}, "abs": [1]}, "map names"),
        ({"diffs": {}, "block_sparses": {"a": 1}}, "block-sparse"),
        ({"diffs": {"w": 3}}, "needs size"),
        ({"diffs": {"w": torch.zeros(3, dtype=torch.int64)}}, "no plain tensor"),
        ({"diffs": {}, "abs": {"w": "text"}}, "no plain tensor"),
    ],
)
def test_hostile_pickles_get_a_sentence_and_nothing_is_run(tmp_path, content, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "pytorch_diff.bin")
    with pytest.raises(SurgeryError, match="pickle.*run code"):
        read("pytorch_diff.bin")
    with pytest.raises(SurgeryError, match=told):
        read("pytorch_diff.bin", allow_pickle=True)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_diff.bin"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": [4, 5], "index_steps": [1, 0], "values": torch.ones(2)}, "stand still"),
        ({"size": [4, 5], "index_steps": [-1, 2], "values": torch.ones(2)}, "go back"),
        ({"size": [4, 5], "index_steps": [5, -2], "values": torch.ones(2)}, "go back"),
        ({"size": [4, 5], "index_steps": [15, 15], "values": torch.ones(2)}, "leave its 20"),
        ({"size": [4, 5], "index_steps": [2**62, 2**62], "values": torch.ones(2)}, "leave its 20"),
        ({"size": [2**20, 2**20], "index_steps": [2**62] * 3, "values": torch.ones(3)}, "go back"),
        ({"size": [4, 5], "index_steps": [1], "values": torch.ones(2)}, "do not fit"),
        ({"size": [4, -5], "index_steps": [], "values": torch.ones(0)}, "do not fit"),
        ({"size": [2**40, 2**40], "index_steps": [], "values": torch.ones(0)}, "do not fit"),
        ({"size": [1], "index_steps": [0, 1], "values": torch.ones(2)}, "do not fit"),
        ({"size": [4, 5], "index_steps": ["a"], "values": torch.ones(1)}, "no whole numbers"),
        ({"size": [4, 5], "index_steps": [2**70], "values": torch.ones(1)}, "no whole numbers"),
        ({"size": [4, 5], "index_steps": [1.5], "values": torch.ones(1)}, "no whole numbers"),
        ({"size": [4, 5], "index_steps": [1], "values": torch.tensor([float("nan")])}, "NaN"),
    ],
)
def test_broken_encodings_get_a_sentence(tmp_path, change, told):
    torch.save({"diffs": {"w": change}, "abs": {}}, tmp_path / "pytorch_diff.bin")
    with pytest.raises(SurgeryError, match=told):
        read(tmp_path, allow_pickle=True)


def test_what_is_no_pickle_at_all(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"not a pickle")
    with zipfile.ZipFile(tmp_path / "b.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    for name in ("a.bin", "b.bin"):
        with pytest.raises(SurgeryError, match="can't be read as plain numbers"):
            read(tmp_path / name, allow_pickle=True)


# ---- PEFT: files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["shira", "supertuning"])
def test_adapters_come_back_as_they_were(tmp_path, family, delta, to):
    done = write(delta, tmp_path / to, to)
    assert done.left_out == [NORM] and done.count == delta.count - delta.entries[NORM].count
    assert sorted(path.name for path in done.out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    found = read(tmp_path / to, family[0])
    assert same(found, delta.restricted([UP, Q])) and found.base["name"] == "base"
    config, stored = read_json(done.out / "adapter_config.json"), load_file(done.out / "adapter_model.safetensors")
    sizes = {
        "shira": lambda m, n: config["r"] * (m + n),
        "supertuning": lambda m, n: int(m * n * (1 - config["sparsity"])),
    }
    for name in (UP, Q):
        at = "base_model.model." + name.removesuffix(".weight")
        k = sizes[to](*delta.entries[name].shape)
        if to == "shira":
            assert stored[at + ".shira_indices"].shape == (2, k) and stored[at + ".shira_weight"].shape == (k,)
        else:
            assert stored[at + ".supertuning_indices"].shape == stored[at + ".supertuning_values"].shape == (k,)
    assert done.padded + done.count == sum(sizes[to](*delta.entries[n].shape) for n in (UP, Q)) and done.padded > 0


def test_a_delta_of_mode_set_is_made_differences_first(tmp_path, family, delta):
    path = SparseDelta.between(*family).save(tmp_path / "set.safetensors")
    with pytest.raises(SurgeryError, match="its base is needed"):
        write(read(path), tmp_path / "out", "shira")
    write(read(path), tmp_path / "out", "shira", family[0])
    assert same(read(tmp_path / "out", family[0]), delta.restricted([UP, Q]))


def test_a_sparsity_that_cuts_nobody(tmp_path):
    """int(numel (1 - sparsity)) can fall one short of K by rounding: 1 - K / numel is lowered until it does not."""
    from surgery.weights.deltas.peft import SuperTuning

    for numel in (49, 1000, 4096 * 11, 333):
        for k in range(1, min(numel, 200)):
            entries = {"a.weight": Entry((1, numel), torch.arange(k, dtype=torch.int32), torch.ones(k))}
            config, counts = SuperTuning().counts(entries)
            assert 0 <= config["sparsity"] < 1 and k <= counts["a.weight"] <= k + 1


def test_what_the_formats_have_no_place_for(tmp_path, family, delta):
    with pytest.raises(SurgeryError, match="No matrix of a linear layer"):
        write(delta.restricted([NORM]), tmp_path / "out", "shira")
    full = Entry((16, 16), None, torch.ones(256))
    crowded = SparseDelta({Q: full}, "add", None, {}, 256, "crowded")
    write(crowded, tmp_path / "r8", "shira")  # 8 (16 + 16) = 256: all of it
    dense = SparseDelta({Q: full, UP: Entry((32, 16), None, torch.ones(512))}, "add", None, {}, 768, "dense")
    with pytest.raises(SurgeryError, match="r = 11"):
        write(dense, tmp_path / "out", "shira")
    write(dense, tmp_path / "all", "supertuning")
    assert read(tmp_path / "all", family[0]).count == 768
    vast = SparseDelta({Q: Entry((2**40, 2), torch.tensor([5]), torch.ones(1))}, "add", None, {}, 2**41, "vast")
    for to in ("shira", "supertuning"):  # filling up would take terabytes
        with pytest.raises(SurgeryError, match="int32 does not reach"):
            write(vast, tmp_path / "out", to)
    with pytest.raises(SurgeryError, match="no format of sparse deltas 'lora'"):
        write(delta, tmp_path / "out", "lora")
    with pytest.raises(SurgeryError, match="exists"):
        write(delta, tmp_path / "all", "shira")
    with pytest.raises(SurgeryError, match="no sparse delta"):
        read(family[0])
    assert set(PEERS) == {"lt-sft", "shira", "supertuning"} and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda t, at: t.pop(at + ".shira_indices"), "lacks its shira_indices"),
        (lambda t, at: t.pop(at + ".shira_weight"), "lacks its shira_weight"),
        (lambda t, at: t.update({at + ".lora_A.weight": torch.zeros(2, 2)}), "no part of a plain SHIRA"),
        (lambda t, at: t[at + ".shira_indices"][1].fill_(16), "beyond the 16 columns"),
        (lambda t, at: t[at + ".shira_indices"][1].fill_(-1), "beyond the 16 columns"),
        (lambda t, at: t[at + ".shira_indices"][0].fill_(99), "outside of it"),
        (lambda t, at: t[at + ".shira_indices"][:, 1].copy_(t[at + ".shira_indices"][:, 0]), "a position twice"),
        (lambda t, at: t.update({at + ".shira_indices": torch.zeros(2, 3).int()}), "for a matrix"),
        (lambda t, at: t.update({at + ".shira_indices": t[at + ".shira_indices"] + 0.5}), "no whole numbers"),
        (lambda t, at: t[at + ".shira_weight"].fill_(float("inf")), "infinite"),
        (lambda t, at: t.update({"base_model.model.x.shira_weight": torch.zeros(3)}), "another base"),
    ],
)
def test_broken_adapters_get_a_sentence(tmp_path, family, delta, harm, told):
    write(delta.restricted([Q]), tmp_path / "a", "shira")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    windows = {n: t.float() if n.endswith("indices") else t for n, t in tensors.items()}
    save_file(windows, file)  # as PEFT does it on Windows
    assert same(read(tmp_path / "a", family[0]), delta.restricted([Q]))
    harm(tensors, "base_model.model." + Q.removesuffix(".weight"))
    save_file(tensors, file)
    with pytest.raises(SurgeryError, match=told):
        read(tmp_path / "a", family[0])


def test_an_adapter_says_no_shapes_so_its_base_is_asked_for(tmp_path, family, delta):
    write(delta, tmp_path / "a", "supertuning")
    with pytest.raises(SurgeryError, match="its base is needed") as told:
        read(tmp_path / "a")
    assert "--base" in told.value.hint
    other = tiny_checkpoint(tmp_path / "other", hidden=8)
    with pytest.raises(SurgeryError, match="outside of it"):
        read(tmp_path / "a", other)


# ---- PEFT, live ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A Llama that transformers made, with a head of its own, and a sparse fine-tuning of its linear layers."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("live")
    base = real_llama(folder / "base")
    names = [n for n, t in load_state(base).items() if t.ndim == 2 and "embed" not in n and "layers.0" not in n]
    return base, sparse_copy(base, folder / "tuned", names, share=0.07)


def merged(base, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return wrapped.merge_and_unload().state_dict()


@pytest.mark.peers
@pytest.mark.parametrize("to", ["shira", "supertuning"])
def test_what_we_write_peft_merges(tmp_path, live, to):
    base, tuned = live
    delta = SparseDelta.between(base, tuned, "add")
    done = write(delta, tmp_path / to, to)
    assert not done.left_out and done.padded
    delta.apply(base, tmp_path / "ours")
    ours, found = load_state(tmp_path / "ours"), merged(base, tmp_path / to)
    assert found.keys() == ours.keys() and all(found[n].equal(ours[n]) for n in ours)  # to the bit


@pytest.mark.peers
@pytest.mark.parametrize("to", ["shira", "supertuning"])
def test_what_peft_writes_we_merge(tmp_path, live, to):
    import peft
    from transformers import AutoModelForCausalLM

    base, _ = live
    torch.manual_seed(0)
    config = {
        "shira": lambda: peft.ShiraConfig(r=2, random_seed=4, target_modules=["q_proj", "down_proj"]),
        "supertuning": lambda: peft.SupertuningConfig(sparsity=0.9, target_modules=["q_proj", "down_proj"]),
    }[to]()
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    delta = read(tmp_path / "adapter", base)
    expected = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert delta.count == sum(expected.values()) and delta.method == to
    delta.apply(base, tmp_path / "ours")
    ours, found = load_state(tmp_path / "ours"), merged(base, tmp_path / "adapter")
    assert all(found[n].equal(ours[n]) for n in ours)  # to the bit
    wrapped = AutoModelForCausalLM.from_pretrained(base)
    with delta.applied(wrapped):
        assert all(found[n].equal(t) for n, t in wrapped.state_dict().items())


@pytest.mark.peers
@pytest.mark.parametrize(
    ("change", "told"), [({"r": 2}, "no part of a plain"), ({"save_precomputed_indices": False}, "lacks its")]
)
def test_super_tunings_other_kinds_are_refused(tmp_path, live, change, told):
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.SupertuningConfig(sparsity=0.9, target_modules=["q_proj"], **change)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(live[0]), config)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SurgeryError, match=told):
        read(tmp_path / "adapter", live[0])


def test_conv1d_models_have_no_place_in_pefts_sparse_adapters(tmp_path):
    base = save_checkpoint(tmp_path / "b", {"h.0.attn.c_attn.weight": torch.zeros(4, 12)}, {"model_type": "gpt2"})
    tuned = save_checkpoint(tmp_path / "t", {"h.0.attn.c_attn.weight": torch.eye(4, 12)}, {"model_type": "gpt2"})
    with pytest.raises(SurgeryError, match="No matrix of a linear layer"):
        write(SparseDelta.between(base, tuned, "add"), tmp_path / "out", "shira")


@pytest.mark.real
@pytest.mark.peers
def test_smollm2_through_every_format(tmp_path):
    from surgery import zoo

    base = zoo.get("smollm2")
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 29)]
    tuned = load_state(base)
    g = torch.Generator().manual_seed(0)
    for name in names:
        at = torch.randperm(tuned[name].numel(), generator=g)[:5000]
        tuned[name].view(-1)[at] *= 2
    folder = save_checkpoint(tmp_path / "tuned", tuned, read_json(base / "config.json"))
    delta = SparseDelta.between(base, folder, "add")
    for to in PEERS:
        write(delta, tmp_path / to, to)
        assert same(read(tmp_path / to, base, allow_pickle=True), delta), to
    write(delta, tmp_path / "d.safetensors", "delta")
    assert same(read(tmp_path / "d.safetensors"), delta)
