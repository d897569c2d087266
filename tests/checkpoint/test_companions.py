"""What travels with the weights: a folder that transformers loads without a murmur, and a record to check it by."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import load_state, read_json, real_llama, same_bits, save_checkpoint, tiny_checkpoint, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.checkpoint import CheckpointWriter, TensorInfo, open_checkpoint
from surgery.checkpoint.companions import model_card, output_config, write_companions
from surgery.checkpoint.provenance import Provenance, checksums, fingerprint, header_hash, tensor_checksum
from surgery.errors import SurgeryError


def copy_out(source, out, *, dtype=None, shard_size="5GB", **companions):
    """Writes all of `source` (in `dtype`) with its companions."""
    infos = [TensorInfo(i.name, dtype or i.dtype, i.shape) for i in source.tensors.values()]
    with CheckpointWriter(out, infos, shard_size=shard_size) as writer:
        for info in infos:
            tensor = source.read(info.name)
            writer.write(info.name, tensor.to(torch.bfloat16) if dtype == "BF16" else tensor)
        write_companions(writer, source, **companions)
    return out


def record_of(source, name="org/base"):
    record = Provenance("merge", recipe="method: linear\n", parameters={"weight": [0.5, float("nan")]}, seed=3)
    record.add_input(name, "base", source, tensors=True)
    record.tensors = {n: {"action": "merged", "changed": 0.25, "numbers": i.numel} for n, i in source.tensors.items()}
    record.totals = {"tensors": len(source.tensors), "seconds": 1.5}
    return record


@pytest.mark.parametrize("make", [tiny_checkpoint, real_llama])
@pytest.mark.parametrize("tied", [False, True])
def test_loads_in_transformers_without_warnings_and_generates(tmp_path, make, tied, caplog, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as their_logging

    source = open_checkpoint(make(tmp_path / "base", tied=tied))
    record = record_of(source)
    card = model_card(record, "merged", source)
    out = copy_out(source, tmp_path / "merged", dtype="BF16", shard_size="6KB", card=card, provenance=record)
    assert len(list(out.glob("*.safetensors"))) > 1
    their_logging.enable_propagation()
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(out)
            tokens = tokenizer("w1 w2 w3", return_tensors="pt")
            text = model.generate(
                tokens["input_ids"], attention_mask=tokens["attention_mask"], max_new_tokens=4, do_sample=False
            )
    finally:
        their_logging.disable_propagation()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING], caplog.text
    assert "warn" not in capfd.readouterr().err.lower()
    assert not any(loading.values()), loading
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings is tied
    assert text.shape[1] > tokens["input_ids"].shape[1] and tokenizer.decode(text[0]).startswith("w1 w2 w3")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False).strip() == "w5"


def test_what_travels_and_what_does_not(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    settings = read_json(base / "tokenizer_config.json") | {"name_or_path": "/home/somebody/base"}
    write_json(base / "tokenizer_config.json", settings)
    (base / "LICENSE.txt").write_text("Do as you like.")
    (base / "modeling_evil.py").write_text("raise SystemExit")
    (base / "optimizer.pt").write_bytes(b"x")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    out = copy_out(open_checkpoint(base), tmp_path / "out", card="# Card\n", provenance=Provenance("apply"))
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "additional_chat_templates/tools.jinja", "LICENSE.txt", "README.md", "surgery.json", "model.safetensors",
    }  # fmt: skip
    assert read_json(out / "tokenizer_config.json") == {k: v for k, v in settings.items() if k != "name_or_path"}
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert same_bits(load_state(out), load_state(base))
    for path in out.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path


def test_tokenizer_and_template_from_elsewhere(tmp_path):
    source = open_checkpoint(tiny_checkpoint(tmp_path / "base"))
    other = tiny_checkpoint(tmp_path / "other", tokens=["<unk>", "b", "a"])
    write_json(other / "tokenizer_config.json", read_json(other / "tokenizer_config.json") | {"chat_template": "old"})
    changes = {"vocab_size": 3}
    out = copy_out(source, tmp_path / "out", tokenizer_from=other, chat_template="{{ new }}", config_changes=changes)
    assert (out / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    assert (out / "chat_template.jinja").read_text() == "{{ new }}"
    assert "chat_template" not in read_json(out / "tokenizer_config.json")
    assert read_json(out / "config.json")["vocab_size"] == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(SurgeryError, match="holds no tokenizer"):
        copy_out(source, tmp_path / "out2", tokenizer_from=tmp_path / "empty")
    assert not (tmp_path / "out2").exists()


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    base = tiny_checkpoint(tmp_path / "base")
    (tmp_path / "secret").write_text("{}")
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(SurgeryError, match="outside the folder"):
        copy_out(open_checkpoint(base), tmp_path / "out")


def test_config_says_dtype_everywhere(tmp_path):
    config = {
        "torch_dtype": "float32",
        "_name_or_path": "/home/somebody",
        "text_config": {"torch_dtype": "float32", "hidden_size": 4, "_name_or_path": "x"},
        "vision_config": {"hidden_size": 8},
        "rope_scaling": {"dtype": "odd"},
    }
    got = output_config(config, "BF16", {"text_config.vocab_size": 7, "tie_word_embeddings": False})
    assert got == {
        "dtype": "bfloat16",
        "text_config": {"hidden_size": 4, "dtype": "bfloat16", "vocab_size": 7},
        "vision_config": {"hidden_size": 8},
        "rope_scaling": {"dtype": "odd"},
        "tie_word_embeddings": False,
    }
    assert config["torch_dtype"] == "float32" and "vocab_size" not in config["text_config"]
    for given_dtype, want in ((None, "bfloat16"), ("float16", "float16")):
        source = open_checkpoint(tiny_checkpoint(tmp_path / f"b{want}"))
        out = copy_out(source, tmp_path / want, dtype="BF16", out_dtype=given_dtype)
        assert read_json(out / "config.json")["dtype"] == want


def test_record_comes_back_and_card_is_what_the_hub_expects(tmp_path):
    import yaml

    base = tiny_checkpoint(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\nlanguage: en\n---\n# Base\n")
    source = open_checkpoint(base)
    record = record_of(source)
    record.recipe = "a: '```'\n"
    record.add_input(str(base), "tuned", source)
    record.add_input("odd|name\nhere", "tokenizer")
    card = model_card(record, "merged", source)
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "base_model": ["org/base", "base"], "library_name": "transformers", "tags": ["merge", "model-surgery"],
        "license": "apache-2.0", "language": "en",
    }  # fmt: skip
    assert "````yaml\na: '```'\n````" in card and 'from_pretrained("merged")' in card
    assert "| model.layers.*.mlp.up_proj.weight | 2 | 0.25 | 512 |" in card and "odd\\|name here" in card
    out = copy_out(source, tmp_path / "out", card=card, provenance=record)
    again = Provenance.read(out)
    assert again.inputs == record.inputs and again.tensors == record.tensors and again.seed == 3
    assert again.parameters == {"weight": [0.5, "nan"]}
    assert again.inputs[0]["tensors"] == checksums(source) and again.inputs[0]["files"].keys() == {"model.safetensors"}
    assert set(again.versions) == {"surgery", "torch", "python"} and re.match(r"\d{4}-\d\d-\d\dT", again.created)
    with pytest.raises(SurgeryError, match="was not written by this toolkit"):
        Provenance.read(base)
    write_json(out / "surgery.json", {"schema": 99})
    with pytest.raises(SurgeryError, match="schema 99"):
        Provenance.read(out)


def test_fingerprint_knows_the_model_not_its_files(tmp_path):
    one = open_checkpoint(tiny_checkpoint(tmp_path / "one"))
    sharded = open_checkpoint(tiny_checkpoint(tmp_path / "sharded", sharded=True))
    other = open_checkpoint(tiny_checkpoint(tmp_path / "other", seed=1))
    assert header_hash(one) == header_hash(sharded) == header_hash(other)
    assert checksums(one) == checksums(sharded, threads=1)
    assert all(checksums(other)[name] != value for name, value in checksums(one).items())
    assert header_hash(open_checkpoint(tiny_checkpoint(tmp_path / "bf", dtype="bfloat16"))) != header_hash(one)
    assert "tensors" not in fingerprint(one) and fingerprint(sharded)["files"].keys() == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(0, 40), cols=st.integers(1, 5), cuts=st.lists(st.integers(0, 40), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)  # fmt: skip
def test_checksum_does_not_see_portions(rows, cols, cuts, dtype):
    import xxhash

    tensor = (torch.arange(rows * cols).view(rows, cols) % 7).to(dtype)
    edges = [0, *sorted(min(c, rows) for c in cuts), rows]
    whole = tensor_checksum(tensor)
    assert whole == tensor_checksum(tensor[i:j] for i, j in zip(edges, edges[1:], strict=False))
    assert whole == xxhash.xxh3_128(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def test_checksums_of_what_is_no_plain_checkpoint(tmp_path):
    base = open_checkpoint(save_checkpoint(tmp_path / "b", {"x": torch.randn(3, 4), "s": torch.tensor(2.0)}, {}))
    torch.save({"x": base.read("x").clone(), "s": base.read("s").clone()}, tmp_path / "b.bin")
    assert checksums(open_checkpoint(tmp_path / "b.bin", allow_pickle=True)) == checksums(base)


def test_record_can_be_bit_reproducible(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert Provenance("merge").to_json() == Provenance("merge").to_json()
    assert Provenance("merge").created == "2023-11-14T22:13:20+00:00"


def test_checkpoints_need_no_torch_until_a_tensor_is_read(tmp_path):
    folder = tiny_checkpoint(tmp_path / "m", sharded=True)
    code = (
        "import sys; from surgery.checkpoint import open_checkpoint; import surgery.checkpoint.adapter\n"
        "from surgery.checkpoint.companions import Provenance, fingerprint, model_card\n"
        f"source = open_checkpoint({str(folder)!r}); fingerprint(source)\n"
        "model_card(Provenance('merge'), 'x', source)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
