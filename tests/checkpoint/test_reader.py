"""`open_checkpoint`: folders that are whole, read lazily; folders that are not, refused with a sentence."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import load_state, raw_safetensors, read_json, same_bits, save_checkpoint, tiny_checkpoint, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import SurgeryError

INDEX = "model.safetensors.index.json"


def refuses(spec, says, **options):
    with pytest.raises(SurgeryError, match=says):
        open_checkpoint(spec, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("sharded", [False, True])
def test_reads_what_the_library_reads(tmp_path, dtype, sharded):
    folder = tiny_checkpoint(tmp_path / "m", dtype=dtype, sharded=sharded)
    source, want = open_checkpoint(folder), load_state(folder)
    assert same_bits({n: source.read(n) for n in source.tensors}, want)
    assert {n: (t.shape, t.numel) for n, t in source.tensors.items()} == {
        n: (tuple(t.shape), t.numel()) for n, t in want.items()
    }
    assert source.config["model_type"] == "llama"


def test_reads_a_file_and_a_folder_with_another_name(tmp_path):
    folder = save_checkpoint(tmp_path / "m", {"x": torch.arange(6).view(2, 3), "s": torch.tensor(2.5)})
    file = (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "training_args.bin").write_bytes(b"left behind by the trainer")
    for spec in (folder, file, str(file)):
        source = open_checkpoint(spec)
        assert source.read("x", 1).tolist() == [[3, 4, 5]] and source.read("s").item() == 2.5 and source.config == {}
        assert source.read("x", -1).tolist() == [[3, 4, 5]] and source.read("x", 1, 1).shape == (0, 3)
    with pytest.raises(SurgeryError, match="no tensor 'y'"):
        source.read("y")


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 6), max_size=3), start=st.integers(-7, 7), stop=st.none() | st.integers(-7, 7))
def test_slices_are_those_of_torch(tmp_path_factory, shape, start, stop):
    tensor = torch.arange(max(1, torch.Size(shape).numel()), dtype=torch.bfloat16)[: torch.Size(shape).numel()].view(
        shape
    )
    source = open_checkpoint(
        save_checkpoint(tmp_path_factory.mktemp("s"), {"pad": torch.ones(3, dtype=torch.int8), "x": tensor})
    )
    if shape:
        assert source.read("x", start, stop).equal(tensor[start:stop])
    else:
        assert source.read("x").equal(tensor)


def test_an_odd_header_length_is_no_obstacle(tmp_path):
    text = b'{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    for pad in range(8):
        path = raw_safetensors(tmp_path / "x.safetensors", text + b" " * pad, torch.arange(3.0).numpy().tobytes())
        rows = open_checkpoint(path).read("x", 1)
        assert rows.tolist() == [1.0, 2.0] and rows.data_ptr() % 4 == 0


def test_reading_never_writes(tmp_path):
    folder = save_checkpoint(tmp_path / "m", {"x": torch.zeros(4)})
    before = (folder / "model.safetensors").read_bytes()
    open_checkpoint(folder).read("x").fill_(7)  # which nobody should do
    assert (folder / "model.safetensors").read_bytes() == before
    assert open_checkpoint(folder).read("x").tolist() == [0] * 4


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files of this size are Linux's")
def test_a_file_larger_than_memory_can_be_read(tmp_path):
    rows, cols = 2**20, 2**18  # 512 GB of zeros that take no room
    header = {"x": {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [0, rows * cols * 2]}}
    path = raw_safetensors(tmp_path / "x.safetensors", header)
    try:
        os.truncate(path, path.stat().st_size + rows * cols * 2)
    except OSError:
        pytest.skip("the file system has no sparse files of this size")
    assert open_checkpoint(path).read("x", rows - 1).shape == (1, cols)


# What is not a checkpoint


@pytest.mark.parametrize(
    "spec", ["/no/such/folder", "./nothing", "nothing", "~nobody-of-that-name/x", "a" * 5000, "a\0b"]
)
def test_missing_folder(spec):
    refuses(spec, "There is no")


def test_hub_name_without_a_network(monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refuses("org/model", "can't be had from the hub")


def test_not_a_checkpoint(tmp_path):
    refuses(tmp_path, "not a checkpoint")
    (tmp_path / "notes.txt").write_text("hello")
    refuses(tmp_path / "notes.txt", "not a checkpoint")
    (tmp_path / "config.json").write_text("[")
    refuses(tmp_path, "not readable JSON")
    (tmp_path / "config.json").write_text("[1]")
    refuses(tmp_path, "must hold a JSON object")
    refuses(save_checkpoint(tmp_path / "empty", {}), "holds no tensors")
    for name in ("a", "b"):
        save_checkpoint(tmp_path / "two", {"x": torch.ones(1)})
        (tmp_path / "two/model.safetensors").rename(tmp_path / f"two/{name}.safetensors")
    refuses(tmp_path / "two", "not a checkpoint")


@pytest.mark.parametrize("lost", [1, 100, 10_000])
def test_truncated_file(tmp_path, lost):
    folder = tiny_checkpoint(tmp_path / "m", sharded=True)
    file = folder / "model-00002-of-00003.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: max(0, len(content) - lost)])
    refuses(folder, "model-00002-of-00003.safetensors.*(cut off|only)")


def test_index_that_lies(tmp_path):
    folder = tiny_checkpoint(tmp_path / "m", sharded=True)
    good = read_json(folder / INDEX)

    def lie(name, file):
        write_json(folder / INDEX, good | {"weight_map": good["weight_map"] | {name: file}})

    lie("ghost.weight", "model-00001-of-00003.safetensors")
    refuses(folder, "'ghost.weight' in model-00001-of-00003.safetensors, which does not hold it")
    lie("model.norm.weight", "model-00009-of-00009.safetensors")
    refuses(folder, "model-00009-of-00009.safetensors is missing")
    for odd in (None, 5, [], "", "a\0b", "x" * 5000):
        lie("model.norm.weight", odd)
        refuses(folder, "missing|can be no file")
    short = {n: f for n, f in good["weight_map"].items() if n != "model.norm.weight"}
    write_json(folder / INDEX, {"weight_map": short})
    refuses(folder, "'model.norm.weight', which model.safetensors.index.json does not list")
    for index in ({}, {"weight_map": []}, {"weight_map": None}):
        write_json(folder / INDEX, index)
        refuses(folder, "no weight_map")
    write_json(folder / INDEX, good)
    assert len(open_checkpoint(folder).tensors) == len(good["weight_map"])


def test_index_that_leads_out_of_the_folder(tmp_path):
    folder = tiny_checkpoint(tmp_path / "m", sharded=True)
    shard = "model-00001-of-00003.safetensors"
    outside = (folder / shard).rename(tmp_path / shard)
    good = read_json(folder / INDEX)["weight_map"]
    for path in (f"../{shard}", str(outside), f"sub/../../{shard}"):
        write_json(folder / INDEX, {"weight_map": {n: path if f == shard else f for n, f in good.items()}})
        refuses(folder, "outside the folder")
    write_json(folder / INDEX, {"weight_map": good})
    (folder / shard).symlink_to(outside)
    refuses(folder, "is a link to .*, outside the folder")
    (folder / shard).unlink()
    (folder / shard).symlink_to(shard)
    refuses(folder, "can be no file|is missing")
    (folder / shard).unlink()
    outside.rename(folder / "other-name")
    (folder / shard).symlink_to("other-name")  # within the folder: fine
    assert open_checkpoint(folder).read(next(iter(good))).numel()


def test_the_hub_cache_is_full_of_links_and_fine(tmp_path):
    folder = tiny_checkpoint(tmp_path / "m", sharded=True)
    home = tmp_path / "hub/models--org--m"
    snapshot = home / "snapshots/0123abc"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(home / f"blobs/{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert len(open_checkpoint(snapshot).tensors) == 21
    (tmp_path / "hub/models--evil--m").mkdir()
    link = snapshot / "model-00001-of-00003.safetensors"
    target = link.resolve().rename(tmp_path / "hub/models--evil--m/blob")
    link.unlink()
    link.symlink_to(target)
    refuses(snapshot, "outside the folder")


def test_quantised(tmp_path):
    folder = tiny_checkpoint(tmp_path / "m")
    config = read_json(folder / "config.json")
    for value, says in (({"quant_method": "gptq"}, "gptq"), ({"load_in_4bit": True}, "quantised"), ("awq", "awq")):
        write_json(folder / "config.json", config | {"quantization_config": value})
        refuses(folder, says)
    write_json(folder / "config.json", config)
    assert isinstance(open_checkpoint(folder), Checkpoint)
    refuses(save_checkpoint(tmp_path / "f8", {"x": torch.ones(2).to(torch.float8_e4m3fn)}), "'x' is F8_E4M3")


# Pickles


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "x.ckpt"])
def test_pickles_only_when_asked_for(tmp_path, name):
    folder = tmp_path / "m"
    folder.mkdir()
    tensors = {"x": torch.arange(6.0).view(2, 3).bfloat16(), "t": torch.arange(6.0).view(2, 3).T, "s": torch.tensor(1)}
    torch.save(tensors, folder / name)
    spec = folder if name.endswith(".bin") else folder / name
    refuses(spec, "can run code when loaded")
    source = open_checkpoint(spec, allow_pickle=True)
    assert same_bits({n: source.read(n) for n in source.tensors}, tensors)
    assert source.read("t", 1, 3).equal(tensors["t"][1:3]) and source.tensors["x"].dtype == "BF16"
    with pytest.raises(SurgeryError, match="no tensor 'y'"):
        source.read("y")


def test_hostile_pickles_do_nothing(tmp_path):
    trap = tmp_path / "trap"
    for i, payload in enumerate((Evil(trap), {"x": Evil(trap)}, {"x": torch.ones(1), "y": Evil(trap)})):
        torch.save(payload, tmp_path / f"{i}.bin")
        refuses(tmp_path / f"{i}.bin", "can't be read as plain tensors", allow_pickle=True)
    (tmp_path / "raw.bin").write_bytes(pickle.dumps(Evil(trap)))
    refuses(tmp_path / "raw.bin", "can't be read as plain tensors", allow_pickle=True)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Evil(trap)))  # the trap works
    assert trap.exists()


@pytest.mark.parametrize("payload", [[1], {"x": 1}, {}, {"x": torch.ones(2).to_sparse()}, torch.ones(2)])
def test_pickles_of_other_things(tmp_path, payload):
    torch.save(payload, tmp_path / "x.bin")
    refuses(tmp_path / "x.bin", "not a dictionary of tensors|plain numbers|no tensors", allow_pickle=True)


def test_reading_many_tensors_keeps_memory_small(tmp_path):
    """512 MB are read through in a process whose own (anonymous) memory grows by less than 64 MB."""
    rows = 2**19
    header = {
        f"t{i}": {"dtype": "F32", "shape": [rows, 64], "data_offsets": [i * rows * 256, (i + 1) * rows * 256]}
        for i in range(4)
    }
    path = raw_safetensors(tmp_path / "x.safetensors", header)
    os.truncate(path, path.stat().st_size + 4 * rows * 256)
    code = (
        "import sys, torch; from surgery.checkpoint import open_checkpoint\n"
        "def own(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))\n"
        f"source = open_checkpoint({str(path)!r}); torch.ones(9).sum(); before = own()\n"
        "assert sum(float(source.read(n).sum()) for n in source.tensors) == 0\n"
        "assert own() - before < 64_000, own() - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
