"""`CheckpointWriter`: any order, any thread, whole or not there, and taken up again after a kill."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import load_state, read_json, same_bits, tiny_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.checkpoint import CheckpointWriter, TensorInfo, open_checkpoint, writer
from surgery.checkpoint.header import ITEM_BYTES, torch_dtype
from surgery.checkpoint.writer import parse_size, shard
from surgery.errors import SurgeryError


def infos_of(tensors):
    codes = {torch_dtype(code): code for code in ITEM_BYTES}
    return [TensorInfo(name, codes[t.dtype], tuple(t.shape)) for name, t in tensors.items()]


def write_all(out, tensors, **options):
    with CheckpointWriter(out, infos_of(tensors), **options) as w:
        for name, tensor in tensors.items():
            w.write(name, tensor)
    return out


X = {"x": torch.arange(12.0).view(4, 3)}


# What is written is what was given


@st.composite
def jobs(draw):
    """Tensors, and pieces of them (name, first row, last row) in some order."""
    tensors, pieces = {}, []
    for i in range(draw(st.integers(1, 5))):
        dtype = torch_dtype(draw(st.sampled_from(["F32", "BF16", "F16", "F64", "I64", "I32", "U8", "BOOL"])))
        shape = draw(st.lists(st.integers(0, 7), max_size=3))
        tensor = (torch.arange(torch.Size(shape).numel()) * (i + 3) % 101).to(dtype).view(shape)
        tensors[f"layer.{i}.é"] = tensor
        rows = tensor.shape[0] if shape and tensor.numel() else None
        cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=3))) if rows else []
        edges = [0, *cuts, rows]
        pieces += [(f"layer.{i}.é", a, b) for a, b in zip(edges, edges[1:], strict=False)]
    return tensors, draw(st.permutations(pieces))


@settings(max_examples=80, deadline=None)
@given(job=jobs(), shard_size=st.integers(1, 4000), threads=st.integers(1, 4))
def test_round_trip(tmp_path_factory, job, shard_size, threads):
    tensors, pieces = job
    out = tmp_path_factory.mktemp("round") / "out"

    def put(piece):
        name, start, stop = piece
        w.write(name, tensors[name] if stop is None else tensors[name][start:stop], start)

    with CheckpointWriter(out, infos_of(tensors), shard_size=shard_size) as w, ThreadPoolExecutor(threads) as pool:
        list(pool.map(put, pieces))
    assert same_bits(load_state(out), tensors)
    source = open_checkpoint(out)
    assert same_bits({n: source.read(n) for n in source.tensors}, tensors)
    files = sorted(out.glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) == w.nbytes
    largest = max(t.numel() * t.element_size() for t in tensors.values())
    if len(files) > 1:
        index = read_json(out / "model.safetensors.index.json")
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
        for file in files:
            assert sum(t.numel() * t.element_size() for t in load_state(file).values()) <= max(shard_size, largest)
    assert {p.name for p in out.iterdir()} - {f.name for f in files} <= {"model.safetensors.index.json"}
    assert not list(out.parent.glob(".*"))


def test_views_and_gradients_are_written_as_they_look(tmp_path):
    big = torch.arange(24.0).view(4, 6).requires_grad_()
    with CheckpointWriter(tmp_path / "out", [TensorInfo("t", "F32", (6, 4)), TensorInfo("r", "F32", (2, 3))]) as w:
        w.write("t", big.T)
        w.write("r", big[::2, ::2])
    assert load_state(tmp_path / "out")["t"].equal(big.detach().T)
    assert load_state(tmp_path / "out")["r"].equal(big.detach()[::2, ::2])


def test_sizes_and_shards():
    assert [parse_size(s) for s in ("5GB", "300 mb", "2GiB", "1.5k", 7, "7B")] == [
        5 * 10**9,
        3 * 10**8,
        2**31,
        1500,
        7,
        7,
    ]
    for wrong in ("", "GB", "-1", "0", "1XB", "five", "1e9"):
        with pytest.raises(SurgeryError, match="is not a size"):
            parse_size(wrong)
    infos = [TensorInfo(str(i), "U8", (n,)) for i, n in enumerate([3, 3, 9, 1, 0, 4])]
    assert [[i.name for i in part] for part in shard(infos, 6)] == [["0", "1"], ["2"], ["3", "4", "5"]]


# What the caller gets wrong is a ValueError, and leaves nothing behind


@pytest.mark.parametrize(
    ("tensor", "start", "says"),
    [
        (torch.zeros(4, 3).bfloat16(), 0, "F32 declared"),
        (torch.zeros(4, 3), 1, "rows 1:5 of 4"),
        (torch.zeros(5), 0, "not whole rows of 3"),
        (torch.zeros(2, 3), 0, "1 tensors were not written, the first is x"),
    ],
)
def test_wrong_use(tmp_path, tensor, start, says):
    with pytest.raises(ValueError, match=says), CheckpointWriter(tmp_path / "out", infos_of(X)) as w:
        w.write("x", tensor, start)
    assert not (tmp_path / "out").exists()


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "out", infos_of(X)) as w:
        w.write("x", X["x"])
        raise RuntimeError("something else went wrong")
    assert not list(tmp_path.iterdir())


# Targets


def test_an_existing_output_is_kept_without_force(tmp_path):
    write_all(tmp_path / "out", X)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("out", "file", "link"):
        with pytest.raises(SurgeryError, match="exists already"):
            write_all(tmp_path / name, {"x": torch.zeros(1)})
    assert same_bits(load_state(tmp_path / "out"), X) and (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_force_replaces_when_whole_and_not_before(tmp_path, kind):
    out, other = tmp_path / "out", write_all(tmp_path / "other", {"old": torch.ones(2)})
    if kind == "folder":
        shutil.copytree(other, out)
    elif kind == "file":
        out.write_text("old")
    else:
        out.symlink_to(other)
    with pytest.raises(RuntimeError), CheckpointWriter(out, infos_of(X), force=True):
        raise RuntimeError
    assert (out.read_text() == "old") if kind == "file" else ("old" in load_state(out))
    write_all(out, X, force=True)
    assert same_bits(load_state(out), X) and not out.is_symlink()
    assert "old" in load_state(other)  # what a link pointed to stays
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_an_output_that_appears_in_the_meantime_is_kept(tmp_path):
    with pytest.raises(SurgeryError, match="exists already"), CheckpointWriter(tmp_path / "out", infos_of(X)) as w:
        w.write("x", X["x"])
        (tmp_path / "out").mkdir()
        (tmp_path / "out/precious").write_text("kept")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


def test_targets_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file/out", tmp_path / "file/deep/out", tmp_path / ("n" * 300)):
        with pytest.raises(SurgeryError, match="can't be written"):
            write_all(out, X)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(SurgeryError, match="can't be written to"):
        write_all(tmp_path / "out", X)


def test_parents_are_made(tmp_path):
    assert same_bits(load_state(write_all(tmp_path / "a/b/out", X)), X)


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small tmpfs with some options; skips where that is not allowed."""
    made = []

    def mount(options):
        path = tmp_path / f"disk{len(made)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not permitted here")
        made.append(path)
        return path

    yield mount
    for path in made:
        subprocess.run(["umount", str(path)], check=True)


def test_a_read_only_disk(mounted):
    disk = mounted("size=1m,ro")
    with pytest.raises(SurgeryError, match="can't be written"):
        write_all(disk / "out", X)


def test_a_disk_that_is_too_small_is_seen_before(mounted):
    disk = mounted("size=256k")
    with pytest.raises(SurgeryError, match="needs 0.00 GB, and only 0.00 GB are free"):
        write_all(disk / "out", {"x": torch.zeros(100_000)})
    assert not list(disk.iterdir())


def test_a_disk_that_fills_up_under_way(mounted):
    disk = mounted("size=512k")
    tensors = {"a": torch.zeros(10_000), "b": torch.zeros(80_000)}
    with (
        pytest.raises(SurgeryError, match="disk filled up.*removed"),
        CheckpointWriter(disk / "out", infos_of(tensors), job="j") as w,
    ):
        w.write("a", tensors["a"])
        (disk / "other").write_bytes(bytes(200_000))
        w.write("b", tensors["b"])
    assert [p.name for p in disk.iterdir()] == ["other"]


def test_too_small_without_a_mount(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 47))
    with pytest.raises(SurgeryError, match="are free there"):
        write_all(tmp_path / "out", X)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_without_a_mount(tmp_path, monkeypatch):
    def full(fd, data, offset):
        raise OSError(28, "No space left on device")

    with pytest.raises(SurgeryError, match="disk filled up"), CheckpointWriter(tmp_path / "out", infos_of(X)) as w:
        monkeypatch.setattr(os, "pwrite", full)
        w.write("x", X["x"])
    assert not list(tmp_path.iterdir())


def test_a_limit_on_the_size_of_files(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(SurgeryError, match="can't be written: File too large"):
            write_all(tmp_path / "out", {"x": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
    assert same_bits(load_state(write_all(tmp_path / "out", X)), X)  # and nothing stays locked


# Two at once, and kills


def test_two_writers_at_once(tmp_path):
    with CheckpointWriter(tmp_path / "out", infos_of(X), job="j") as first:
        first.write("x", X["x"][:2])
        for job in ("j", "k", None):
            with pytest.raises(SurgeryError, match="Another run is writing"):
                CheckpointWriter(tmp_path / "out", infos_of(X), job=job).__enter__()
        first.write("x", X["x"][2:], 2)
    assert same_bits(load_state(tmp_path / "out"), X)


def run_job(out, job="j", die_at=None):
    """Writes six tensors in a process of its own, which kills itself half way through number `die_at`.

    Returns the process's exit code (minus the signal), and what the writer found done already.
    """
    seen, child = out.parent / "seen", os.fork()  # a fork: it need not import torch again
    if child == 0:
        try:
            infos = [TensorInfo(f"t{i}", "BF16", (8, 16)) for i in range(6)]
            with CheckpointWriter(out, infos, shard_size=600, job=job) as w:
                seen.write_text(json.dumps(w.done))
                for i, info in enumerate(infos):
                    if info.name in w.done:
                        continue
                    rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(i)).bfloat16()
                    w.write(info.name, rows[:4])
                    if i == die_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    w.write(info.name, rows[4:], 4)
                    w.finish(info.name, {"number": i})
                w.add_file("config.json", "{}")
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), read_json(seen)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_killed_and_taken_up_again(tmp_path):
    assert run_job(tmp_path / "clean") == (0, {})
    out, hidden = tmp_path / "out", tmp_path / ".out.partial"
    assert run_job(out, die_at=2) == (-signal.SIGKILL, {})
    assert not out.exists() and hidden.is_dir()
    assert run_job(out, die_at=4) == (-signal.SIGKILL, {"t0": {"number": 0}, "t1": {"number": 1}})
    with open(hidden / "journal.jsonl", "a") as journal:
        journal.write('{"tensor": "t4", "no')  # torn by the kill
    assert run_job(out) == (0, {f"t{i}": {"number": i} for i in range(4)})
    assert contents(out) == contents(tmp_path / "clean") and not hidden.exists()
    assert len(list(out.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("spoil", ["other job", "size", "journal", "headers", "no job"])
def test_what_is_not_the_same_job_starts_clean(tmp_path, spoil):
    run_job(tmp_path / "clean")
    out, hidden = tmp_path / "out", tmp_path / ".out.partial"
    run_job(out, die_at=2)
    journal = hidden / "journal.jsonl"
    if spoil == "size":
        os.truncate(hidden / "model-00002-of-00003.safetensors", 50)
    elif spoil == "journal":
        journal.write_bytes(b"\0" * 50 + b"\n{}\n")
    elif spoil == "headers":
        text = journal.read_text()
        journal.write_text(text.replace(text.split('"headers": "')[1][:8], "00000000", 1))
    elif spoil == "no job":
        journal.unlink()
    (hidden / "stray").write_text("from before")
    assert run_job(out, job="k" if spoil == "other job" else "j") == (0, {})
    assert contents(out) == contents(tmp_path / "clean")


def test_a_resumed_job_that_differs_in_its_tensors_starts_clean(tmp_path):
    """The same job name and file sizes, but tensors in another order: their old places would be wrong."""
    one, two = TensorInfo("a", "F32", (2,)), TensorInfo("b", "F32", (2,))
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", [one, two], job="j") as w:
        w.write("a", torch.tensor([1.0, 2.0]))
        w.finish("a")
        raise KeyboardInterrupt
    with CheckpointWriter(tmp_path / "out", [two, one], job="j") as w:
        assert not w.done
        w.write("a", torch.tensor([1.0, 2.0]))
        w.write("b", torch.tensor([3.0, 4.0]))
    assert load_state(tmp_path / "out")["a"].tolist() == [1.0, 2.0]


def test_an_interrupt_keeps_the_work_and_a_wrong_input_does_not(tmp_path):
    hidden = tmp_path / ".out.partial"
    for error, kept in ((KeyboardInterrupt(), True), (SurgeryError("NaN"), False)):
        with pytest.raises(type(error)), CheckpointWriter(tmp_path / "out", infos_of(X), job="j") as w:
            w.write("x", X["x"])
            w.finish("x", "note")
            raise error
        assert hidden.exists() is kept and not (tmp_path / "out").exists()
        if kept:
            with CheckpointWriter(tmp_path / "out", infos_of(X), job="j") as w:
                assert w.done == {"x": "note"}
            assert same_bits(load_state(tmp_path / "out"), X)
            shutil.rmtree(tmp_path / "out")


def test_files_are_added_as_text_bytes_or_copies(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    with CheckpointWriter(tmp_path / "out", infos_of(X)) as w:
        w.write("x", X["x"])
        w.add_file("a.txt", "é")
        w.add_file("sub/b.bin", b"\0")
        w.add_file("config.json", base / "config.json")
    assert (tmp_path / "out/a.txt").read_text(encoding="utf-8") == "é" and (
        tmp_path / "out/sub/b.bin"
    ).read_bytes() == b"\0"
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
