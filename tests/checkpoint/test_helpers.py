"""The tiny checkpoints that other tests stand on are what they claim: the same model that transformers makes."""

from __future__ import annotations

import pytest
import torch
from helpers import load_state, real_llama, same_bits, tiny_checkpoint, tiny_family

from surgery.checkpoint import open_checkpoint


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_tiny_checkpoint_is_a_llama(tmp_path, tied, sharded):
    ours, theirs = tiny_checkpoint(tmp_path / "a", tied=tied, sharded=sharded), real_llama(tmp_path / "b", tied=tied)
    mine, their = open_checkpoint(ours).tensors, open_checkpoint(theirs).tensors
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in their.items()}


def test_same_seed_same_bits_and_family_is_near(tmp_path):
    base, (one, two) = tiny_family(tmp_path, dtype="bfloat16", delta=0.01)
    assert same_bits(load_state(base), load_state(tiny_checkpoint(tmp_path / "again", dtype="bfloat16")))
    assert not same_bits(load_state(one), load_state(two))
    for name, tensor in load_state(base).items():
        assert tensor.dtype == torch.bfloat16
        difference = load_state(one)[name].float() - tensor.float()
        assert 0 < difference.std() < 0.05
