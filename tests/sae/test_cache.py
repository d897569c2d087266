"""Activations on disk: the same as read, gone on with after an interruption, refused when they are of others."""

import json

import pytest
import torch

from surgery.errors import SurgeryError
from surgery.models import encode, load
from surgery.sae.activations import Stream
from surgery.sae.cache import MANIFEST, Cached, write

TEXTS = ["m 6+9-9=", "r bad=", "c abcde=#abcde", "n bad=#cbe", "m 1+2+3=", "s dcba="]
SITES = ["resid_post.1", "z.0"]


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load("tiny-base", "float32")


def stream(model, batches=None, tokenizer=None):
    network, names = model
    return Stream(network, SITES, batches or [encode(names, [text]) for text in TEXTS], tokenizer=tokenizer or names)


def everything(cached):
    return cached.rows(torch.arange(len(cached)))


def test_what_is_read_is_what_was_written(model, tmp_path):
    expected = {name: torch.cat([rows[name] for rows in stream(model)]) for name in SITES}
    write(stream(model), tmp_path / "a", shard_rows=12)
    cached = Cached(tmp_path / "a", models=model[0], tokenizer=model[1])
    assert len(list((tmp_path / "a").glob("rows-*"))) > 2 and len(cached) == len(expected["z.0"])
    assert all(torch.equal(everything(cached)[name], expected[name]) for name in SITES)
    mixed = torch.tensor([30, 2, 17, 2])
    assert torch.equal(cached.rows(mixed, ["z.0"])["z.0"], expected["z.0"][mixed])
    assert {tuple(next(cached.batches(4, sites=s))) for s in (None, ["z.0"])} == {tuple(SITES), ("z.0",)}
    write(stream(model), tmp_path / "half", dtype="bfloat16")
    half = everything(Cached(tmp_path / "half"))
    assert all(torch.equal(half[name], expected[name].bfloat16().float()) for name in SITES)


def test_every_row_comes_once_an_epoch(model, tmp_path):
    write(stream(model), tmp_path / "a", shard_rows=12)
    cached = Cached(tmp_path / "a")
    cached._parts = {name: [t.clone() for t in parts] for name, parts in cached._parts.items()}
    count = 0
    for part in cached._parts["z.0"]:
        part[:, 0] = torch.arange(count, count + len(part))
        count += len(part)
    n = len(cached)
    found = torch.cat([rows["z.0"][:, 0] for rows in cached.batches(5, seed=1, epochs=5)]).long()
    assert len(found) == 5 * n // 5 * 5
    assert all(int((found == i).sum()) in (4, 5) for i in range(n))
    assert sorted(found[: n // 5 * 5].tolist()) != found[: n // 5 * 5].tolist()
    again = torch.cat([rows["z.0"][:, 0] for rows in cached.batches(5, seed=1, epochs=5)]).long()
    assert torch.equal(found, again)


def test_an_interrupted_run_goes_on_without_reading_again(model, tmp_path):
    write(stream(model), tmp_path / "whole", shard_rows=12)
    read = []

    def batches(stop=None):
        for i, text in enumerate(TEXTS):
            if i == stop:
                raise KeyboardInterrupt
            read.append(i)
            yield encode(model[1], [text])

    with pytest.raises(KeyboardInterrupt):
        write(stream(model, batches(4)), tmp_path / "a", shard_rows=12)
    assert not (tmp_path / "a").exists()
    ran = []
    handle = model[0].model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    write(stream(model, batches()), tmp_path / "a", shard_rows=12)
    handle.remove()
    assert 0 < len(ran) < len(TEXTS)  # what is in whole shards did not go through the model again
    one, other = Cached(tmp_path / "a"), Cached(tmp_path / "whole")
    assert all(torch.equal(everything(one)[n], everything(other)[n]) for n in SITES)
    assert not list(tmp_path.glob(".a*"))


def test_activations_of_others_are_refused(model, tmp_path):
    write(stream(model), tmp_path / "a")
    other, names = load("tiny-chain", "float32")
    with pytest.raises(SurgeryError, match="of other weights"):
        Cached(tmp_path / "a", models=other)
    from copy import deepcopy

    changed = deepcopy(names)
    changed.add_tokens(["<new>"])
    with pytest.raises(SurgeryError, match="another tokenizer"):
        Cached(tmp_path / "a", models=model[0], tokenizer=changed)
    (tmp_path / ".b.partial").mkdir()
    write(stream(model), tmp_path / "b")
    with pytest.raises(SurgeryError, match="b exists"):
        write(stream(model), tmp_path / "b")
    write(stream((other, names)), tmp_path / "b", force=True)
    Cached(tmp_path / "b", models=other)


def test_what_is_no_cache_is_told(model, tmp_path):
    with pytest.raises(SurgeryError, match="holds no activations"):
        Cached(tmp_path)
    with pytest.raises(SurgeryError, match="not kept in int8"):
        write(stream(model), tmp_path / "a", dtype="int8")
    with pytest.raises(SurgeryError, match="no rows to keep"):
        write(Stream(model[0], SITES, []), tmp_path / "a")
    write(stream(model), tmp_path / "c", force=True)
    words = json.loads((tmp_path / "c" / MANIFEST).read_text())
    for change, told in (
        ({"version": 2}, "version 2"),
        ({"shards": [{"rows": 3, "batches": 1}]}, "does not hold 3 rows"),
    ):
        (tmp_path / "c" / MANIFEST).write_text(json.dumps(words | change))
        with pytest.raises(SurgeryError, match=told):
            Cached(tmp_path / "c")
    (tmp_path / "c" / MANIFEST).write_text(json.dumps(words))
    with pytest.raises(SurgeryError, match="give no batch of 1,000"):
        next(Cached(tmp_path / "c").batches(1000))


def test_a_full_disk_is_told(model, tmp_path, monkeypatch):
    import safetensors.torch

    def full(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(SurgeryError, match="rows-00000.safetensors could not be written .*No space left"):
            write(stream(model), tmp_path / "a")
    write(stream(model), tmp_path / "a")
