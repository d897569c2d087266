"""Safetensors headers from strangers: whatever the bytes, a checked header or a sentence, never anything else."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from helpers import raw_safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from surgery.checkpoint.header import (
    ITEM_BYTES,
    TensorInfo,
    dtype_code,
    encode_header,
    read_header,
    torch_dtype,
    torch_name,
)
from surgery.errors import SurgeryError


def entry(start, end, dtype="F32", shape=None):
    shape = [(end - start) // ITEM_BYTES.get(dtype, 4)] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ONE = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
GOOD = {"a": entry(0, 8), "b": entry(8, 12)}


def test_a_good_header(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "b": entry(8, 12), "none": entry(8, 8, shape=[0, 5]), "a": entry(0, 8)}
    found = read_header(raw_safetensors(tmp_path / "x", header, bytes(12)))
    assert list(found.tensors) == ["a", "none", "b"] and found.metadata == {"format": "pt"}
    assert found.tensors["a"] == TensorInfo("a", "F32", (2,)) and found.tensors["b"].nbytes == 4
    assert found.tensors["none"].rows == 0 and found.tensors["none"].cols == 5


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "'b' leaves a hole"),
        ({"a": entry(4, 12)}, 12, "'a' leaves a hole"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "'b' overlaps"),
        ({"a": entry(0, 8), "z": entry(4, 4, shape=[0])}, 8, "overlaps"),
        (GOOD, 11, "is cut off"),
        (GOOD, 0, "is cut off"),
        (GOOD, 13, "belong to no tensor"),
        ({"a": entry(0, 2**62, shape=[2**60])}, 8, "is cut off"),
        ({"a": entry(0, 8, shape=[2**62, 2**62])}, 8, "by its shape"),
        ({"a": entry(0, 8, shape=[3])}, 8, "12 bytes by its shape, 8 by its offsets"),
        ({"a": entry(8, 0, shape=[0])}, 8, "by its offsets"),
        ({"a": entry(0, 8, shape=[-2])}, 8, "shape"),
        ({"a": entry(0, 8, shape=[2.0])}, 8, "shape"),
        ({"a": entry(0, 8, shape=[True, 2])}, 8, "shape"),
        ({"a": entry(0, 8, shape="2")}, 8, "shape"),
        ({"a": entry(0, 8) | {"data_offsets": [0]}}, 8, "data_offsets"),
        ({"a": entry(0, 8) | {"data_offsets": [-8, 0]}}, 8, "data_offsets"),
        ({"a": entry(0, 8, dtype="F33", shape=[2])}, 8, "unknown type 'F33'"),
        ({"a": entry(0, 8) | {"dtype": ["F32"]}}, 8, "unknown type"),
        ({"a": entry(0, 8) | {"more": 1}}, 8, "needs exactly"),
        ({"a": [0, 8]}, 8, "needs exactly"),
        ({"__metadata__": {"format": 1}, "a": entry(0, 8)}, 8, "__metadata__"),
        ({"__metadata__": ["pt"], "a": entry(0, 8)}, 8, "__metadata__"),
        (b"[]", 0, "JSON object"),
        (b"{", 0, "broken header"),
        (b"", 0, "broken header"),
        (b"\xff\xfe\x00", 0, "broken header"),
        (b"[" * 100_000, 0, "broken header"),
        (b'{"a":' + b"9" * 5000 + b"}", 0, "broken header"),
        (b'{"a":' + ONE + b',"a":' + ONE + b"}", 4, "twice"),
        (b'{"\\ud800":' + ONE + b"}", 4, "no text"),
    ],
)  # fmt: skip
def test_wrong_headers_are_told(tmp_path, header, data, says):
    path = raw_safetensors(tmp_path / "x.safetensors", header, bytes(data))
    with pytest.raises(SurgeryError, match=says) as told:
        read_header(path)
    assert str(path) in told.value.problem


def test_lengths_are_checked_before_memory_is_taken(tmp_path):
    for length, says in [(2**63, "at most"), (100_000_001, "at most"), (99_999_999, "cut off"), (40, "cut off")]:
        with pytest.raises(SurgeryError, match=says):
            read_header(raw_safetensors(tmp_path / "x", b"{}", b"", length))
    for size in range(8):
        (tmp_path / "y").write_bytes(bytes(size))
        with pytest.raises(SurgeryError, match=f"only {size} bytes"):
            read_header(tmp_path / "y")
    with pytest.raises(SurgeryError, match="can't be read"):
        read_header(tmp_path / "nothing")
    with pytest.raises(SurgeryError, match="can't be read"):
        read_header(tmp_path)


def parsed(path):
    """The header, or None when it was refused; anything but a `SurgeryError` fails the test."""
    try:
        return read_header(path)
    except SurgeryError as error:
        assert error.problem
        return None


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200), length=st.none() | st.integers(0, 210))
@example(content=b"{}", length=2)
def test_fuzz_random_bytes(tmp_path_factory, content, length):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content if length is None else struct.pack("<Q", length) + content)
    parsed(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*ITEM_BYTES]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.text(max_size=3), entries | json_values, max_size=4), data=st.integers(0, 64))
def test_fuzz_structured_headers(tmp_path_factory, header, data):
    path = raw_safetensors(tmp_path_factory.getbasetemp() / "fuzz.safetensors", header, bytes(data))
    agrees_with_the_library(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_fuzz_mutated_files(tmp_path_factory, data):
    good = bytearray(save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(good) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "digit"])):
            case "set":
                good[at] = data.draw(st.integers(0, 255))
            case "cut":
                del good[at : at + data.draw(st.integers(1, 9))]
            case "insert":
                good[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "digit":
                digits = [i for i, byte in enumerate(good) if chr(byte).isdigit() and i > 8] or [0]
                good[data.draw(st.sampled_from(digits))] = ord(data.draw(st.sampled_from("0123456789")))
        if not good:
            break
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(bytes(good))
    agrees_with_the_library(path)


def agrees_with_the_library(path):
    """What we accept, the safetensors library accepts as well and reads as the same names and shapes."""
    ours = parsed(path)
    if ours is None:
        return
    odd = any(n > 2**40 for t in ours.tensors.values() for n in t.shape)  # sizes with a zero beside them: no bytes
    try:
        with safe_open(path, "pt") as theirs:
            assert set(theirs.keys()) == set(ours.tensors)
            for name, info in ours.tensors.items():
                assert tuple(theirs.get_slice(name).get_shape()) == info.shape
    except SafetensorError as error:
        assert odd, (error, ours)


texts = st.text(st.characters(codec="utf-8"), max_size=6)


@settings(max_examples=100, deadline=None)
@given(
    tensors=st.dictionaries(
        texts.filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from([*ITEM_BYTES]), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    ),
    metadata=st.dictionaries(texts, texts, max_size=2),
)
def test_encoded_headers_are_read_back(tmp_path_factory, tensors, metadata):
    infos = [TensorInfo(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    header, offsets = encode_header(infos, metadata)
    assert len(header) % 8 == 0
    path = tmp_path_factory.getbasetemp() / "encoded.safetensors"
    path.write_bytes(header + bytes(sum(i.nbytes for i in infos)))
    found = read_header(path)
    assert found.tensors == {i.name: i for i in infos} and found.metadata == {"format": "pt"} | metadata
    assert {n: t.offset for n, t in found.tensors.items()} == offsets


def test_types_by_all_their_names():
    for code, size in ITEM_BYTES.items():
        assert torch_dtype(code).itemsize == size
        assert dtype_code(str(torch_dtype(code))) == dtype_code(torch_name(code)) == dtype_code(code.lower()) == code
    assert [dtype_code(n) for n in ("bf16", "fp16", "half", "float", "torch.bfloat16")] == [
        "BF16",
        "F16",
        "F16",
        "F32",
        "BF16",
    ]
    with pytest.raises(SurgeryError, match="'int3' is not a type"):
        dtype_code("int3")


def test_metadata_survives_json(tmp_path):
    header, _ = encode_header([], {"recipe": json.dumps({"a": "é"})})
    (tmp_path / "x").write_bytes(header)
    assert json.loads(read_header(tmp_path / "x").metadata["recipe"]) == {"a": "é"}
