"""Models with different vocabularies: every row of the output by its token's string, whatever its number was."""

from __future__ import annotations

import pytest
import torch
import yaml
from helpers import SPECIAL, load_state, read_json, same_bits, tiny_checkpoint, write_json
from test_plan import EMBEDDING, HEAD, recipe, with_tensors

from surgery.checkpoint.provenance import Provenance, checksums
from surgery.checkpoint.reader import open_checkpoint
from surgery.errors import SurgeryError
from surgery.weights import streams
from surgery.weights.merge import merge, merge_in_memory

OURS = [*SPECIAL, "a", "b", "c", "d"]
THEIRS = [*SPECIAL, "d", "x", "b", "y", "a", "z"]
"""Without "c", with three words of their own, the common ones elsewhere."""


@pytest.fixture
def pair(tmp_path):
    """A base, and a model of another vocabulary whose other weights are near it."""
    base = tiny_checkpoint(tmp_path / "base", tokens=OURS)
    other = tiny_checkpoint(tmp_path / "other", 1, tokens=THEIRS)
    near = {n: t + 0.01 for n, t in load_state(base).items() if n not in (EMBEDDING, HEAD)}
    return base, with_tensors(other, near)


def rows(folder, tensor, tokens):
    """token -> row."""
    return dict(zip(tokens, load_state(folder)[tensor], strict=True))


def tokens_of(folder):
    """The output's tokens in the order of their ids, as transformers reads them; and they tokenise."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.get_vocab()
    ordered = sorted(ids, key=ids.__getitem__)
    assert [ids[t] for t in ordered] == list(range(len(ids)))
    assert tokenizer.convert_ids_to_tokens(tokenizer("a d b")["input_ids"]) == ["a", "d", "b"]
    return ordered


EXPECTED = {"base": set(OURS), "union": {*OURS, *THEIRS}, "intersection": set(OURS) & set(THEIRS)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab", EXPECTED)
def test_rows_by_token(vocab, tied, pair, tmp_path):
    from transformers import AutoModelForCausalLM

    base, other = pair
    if tied:
        for folder in pair:
            with_tensors(folder, {HEAD: None})
            write_json(folder / "config.json", read_json(folder / "config.json") | {"tie_word_embeddings": True})
    merge(recipe("task_arithmetic", base, [other], {"weight": 0.25}, vocab=vocab), tmp_path / "out")
    tokens = tokens_of(tmp_path / "out")
    assert set(tokens) == EXPECTED[vocab]
    if vocab != "intersection":
        assert tokens[: len(OURS)] == OURS
    for tensor in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        ours, theirs, out = (rows(f, tensor, t) for f, t in ((base, OURS), (other, THEIRS), (tmp_path / "out", tokens)))
        for token in tokens:  # a row that one model lacks is the other's: the base's first
            b, f = ours.get(token, theirs.get(token)), theirs.get(token, ours.get(token))
            assert torch.allclose(out[token], b + 0.25 * (f - b), atol=1e-7), token
    assert read_json(tmp_path / "out/config.json")["vocab_size"] == len(tokens)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and model.get_input_embeddings().weight.shape[0] == len(tokens)


def test_special_ids_move_with_their_tokens(tmp_path):
    base = tiny_checkpoint(tmp_path / "base", tokens=[*"pq", *SPECIAL])
    other = tiny_checkpoint(tmp_path / "other", 1, tokens=[*SPECIAL, *"pr"])
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 5}
    for name in ("config.json", "generation_config.json"):
        write_json(base / name, read_json(base / name) | special)
    made = recipe("linear", None, [other, base], tokenizer={"source": str(base)})
    merge(made, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert {k: read_json(tmp_path / "out" / name)[k] for k in special} == special


def test_the_vocabulary_of_a_named_model(pair, tmp_path):
    base, other = pair
    text = yaml.safe_dump({
        "merge_method": "linear", "tokenizer_source": str(other), "dtype": "float32",
        "models": [{"model": str(m), "parameters": {"weight": w}} for m, w in ((base, 1.0), (other, 3.0))],
    })  # fmt: skip
    merge(text, tmp_path / "out")
    assert tokens_of(tmp_path / "out") == THEIRS
    ours, theirs = rows(base, EMBEDDING, OURS), rows(other, EMBEDDING, THEIRS)
    for token, row in rows(tmp_path / "out", EMBEDDING, THEIRS).items():
        assert torch.allclose(row, 0.25 * ours.get(token, theirs[token]) + 0.75 * theirs[token], atol=1e-7)


def test_rules_for_single_tokens(pair, tmp_path):
    base, other = pair
    rules = {
        "x": {"source": {"kind": "zero"}},
        "y": {"source": {"kind": "model_token", "model": str(base), "token": "c"}},
        "a": {"source": str(other), "force": True},
    }
    made = recipe("task_arithmetic", base, [other], {"weight": 0.5}, tokenizer={"source": "union", "tokens": rules})
    merge(made, tmp_path / "out")
    ours, theirs = rows(base, EMBEDDING, OURS), rows(other, EMBEDDING, THEIRS)
    out = rows(tmp_path / "out", EMBEDDING, tokens_of(tmp_path / "out"))
    assert torch.allclose(out["x"], theirs["x"] / 2, atol=1e-7)  # zero in the base, which lacks it
    assert torch.allclose(out["y"], (ours["c"] + theirs["y"]) / 2, atol=1e-7)
    assert torch.allclose(out["a"], theirs["a"], atol=1e-7)
    rules["a"] = {"source": {"kind": "model_token", "model": str(base), "token": "nowhere"}}
    with pytest.raises(SurgeryError, match="'nowhere'"):
        merge_in_memory(made)


def test_a_third_model_gets_the_mean(tmp_path):
    folders = [
        tiny_checkpoint(tmp_path / str(i), i, tokens=[*SPECIAL, *own]) for i, own in enumerate(("ap", "aq", "ap"))
    ]
    made = recipe("linear", None, folders, vocab="union")
    merge(made, tmp_path / "out")
    out = rows(tmp_path / "out", EMBEDDING, tokens_of_plain(tmp_path / "out"))
    p0, q1, p2 = (load_state(f)[EMBEDDING][5] for f in folders)
    assert torch.allclose(out["q"], q1, atol=1e-7) and torch.allclose(out["p"], (p0 + p2) / 2, atol=1e-7)


def tokens_of_plain(folder):
    vocab = read_json(folder / "tokenizer.json")
    ids = vocab["model"]["vocab"] | {t["content"]: t["id"] for t in vocab["added_tokens"]}
    return sorted(ids, key=ids.__getitem__)


def test_padded_rows_are_kept_and_merged(tmp_path):
    base, other = (tiny_checkpoint(tmp_path / n, i, tokens=OURS) for i, n in enumerate(("base", "other")))
    for folder, size in ((base, 16), (other, 12)):
        wide = {n: torch.cat([t, torch.full((size - 8, 16), 1.0)]) for n, t in load_state(folder).items()
                if n in (EMBEDDING, HEAD)}  # fmt: skip
        with_tensors(folder, wide)
        write_json(folder / "config.json", read_json(folder / "config.json") | {"vocab_size": size})
    merge(recipe("task_arithmetic", base, [other], {"weight": 0.5}, vocab="base"), tmp_path / "out")
    out = load_state(tmp_path / "out")
    assert out[EMBEDDING].shape == (16, 16) and torch.allclose(out[EMBEDDING][8:12], torch.ones(4, 16))
    expected = (load_state(base)[EMBEDDING][:8] + load_state(other)[EMBEDDING][:8]) / 2
    assert torch.allclose(out[EMBEDDING][:8], expected, atol=1e-7)


def test_threads_and_chunks_do_not_matter(pair, monkeypatch):
    base, other = pair
    made = recipe("ties", base, [other], {"density": 0.5}, vocab="union")
    whole = merge_in_memory(made, threads=1)
    monkeypatch.setattr(streams, "CHUNK", 32)
    assert same_bits(whole, merge_in_memory(made, threads=3))


def test_the_record_has_no_checksum_of_rows_that_are_in_no_file(pair, tmp_path):
    base, other = pair
    merge(recipe("task_arithmetic", base, [other], vocab="base"), tmp_path / "out")
    known = {i["name"]: i["tensors"] for i in Provenance.read(tmp_path / "out").inputs}
    assert known[str(base)] == checksums(open_checkpoint(base))
    full = checksums(open_checkpoint(other))
    assert known[str(other)] == {n: c for n, c in full.items() if n not in (EMBEDDING, HEAD)}


def test_nothing_to_align(pair, tmp_path):
    base, other = pair
    (other / "tokenizer.json").unlink()
    with pytest.raises(SurgeryError, match=f"{other} has no tokenizer.json"):
        merge(recipe("linear", None, [base, other], vocab="union"), tmp_path / "out")
    bare = with_tensors(tiny_checkpoint(tmp_path / "bare", tokens=THEIRS), {EMBEDDING: None, HEAD: None})
    with pytest.raises(SurgeryError, match=f"{bare} has no token embedding"):
        merge(recipe("linear", None, [base, bare], vocab="union"), tmp_path / "out")


@pytest.mark.peers
@pytest.mark.parametrize("source", ["union", "base"])
def test_mergekit_agrees(source, pair, tmp_path):
    pytest.importorskip("mergekit")
    from test_merge_parity import theirs

    base, other = pair
    models = [{"model": str(m), "parameters": {"weight": w}} for m, w in ((base, 0.25), (other, 0.75))]
    text = yaml.safe_dump({"merge_method": "linear", "base_model": str(base), "models": models, "dtype": "float32",
                           "tokenizer_source": source})  # fmt: skip
    expected = theirs(text, tmp_path / "theirs")
    merge(text, tmp_path / "out")
    merged = load_state(tmp_path / "out")
    own, known = (tokens_of_plain(tmp_path / f) for f in ("out", "theirs/out"))
    assert set(own) == set(known)
    order = [own.index(t) for t in known]
    for name, x in expected.items():
        y = merged[name][order] if name in (EMBEDDING, HEAD) else merged[name]
        assert (y - x[: len(y)]).abs().max() <= 1e-6 * x.abs().max(), name
