"""The patching benchmark: its floor is exact and our sweeps stay near it, and every section runs on a toy."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import analysis.patching.cells
from analysis.metrics import logit_diff
from analysis.patching import patch

torch.set_num_threads(1)
BENCHMARKS = Path(__file__).parents[1] / "experiments" / "benchmarks"
GPT2 = {"n_layer": 4, "n_embd": 32, "n_head": 4, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def module(monkeypatch):
    """A file of the benchmark by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__


def model_of(module, family):
    peers = module("patching_peers")
    return peers.gpt2(**GPT2) if family == "gpt2" else peers.llama(**LLAMA)


def counted(work):
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_trunk_is_counted_as_torch_counts_it(family, module):
    model, length, rows = model_of(module, family), 7, 3
    work = module("patching_floor").Work.of(model.config)
    model.set_attn_implementation("eager")
    trunk = model.transformer if family == "gpt2" else model.model
    found = counted(lambda: trunk(torch.ones(rows, length, dtype=torch.long), use_cache=False))
    # eager attention multiplies with the keys that a token may not see, too
    unseen = work.layers * 2 * work.heads * work.d_head * length * (length - 1) // 2
    rotary = 0 if family == "gpt2" else length * work.d_head // 2  # angles: a product of positions and frequencies
    assert found - rows * unseen - rows * work.trunk(length) in (0, rotary, rows * rotary)


def test_least_work_of_a_residual_sweep_by_hand(module):
    floor = module("patching_floor")
    work = floor.Work(layers=2, heads=2, kv_heads=1, d_head=3, d_model=5, mlp=100)
    clean, corrupt = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 9, 3]])
    q, kv = 5 * 6, 2 * 5 * 3
    pairs = 2 * 2 * 3  # of a token with one that it sees: a score, and what is mixed

    def whole(tokens, seen):
        return tokens * (2 * q + kv + 100) + pairs * seen

    def last(tokens):
        return tokens * kv + 2 * q + 100 + pairs * 3

    runs = 2 * (whole(3, 1 + 2 + 3) + last(3) + 10)
    cells = whole(2, 2 + 3) + last(2) + 10  # layer 0 at position 1: there alone do the tokens differ
    cells += last(2) + 10 + last(1) + 10  # layer 1 at positions 1 and 2
    assert floor.least(work, clean, corrupt, "resid_pre") == runs + cells
    assert floor.least(work, clean, clean, "resid_pre") == runs
    # a head: from the middle of block 0 on positions 1 and 2, and in block 1 at the last position alone
    heads = 2 * (2 * (3 * 5 + 100) + last(2) + 10 + 3 * 5 + 100 + 10)
    assert floor.least(work, clean, corrupt, "z") == runs + heads
    query = 2 * 2 * 3 * (2 + 3 + 3)  # its attention, in block 0 for two tokens, in block 1 for one; both heads
    assert floor.least(work, clean, corrupt, "q") == runs + heads + query
    group = 2 * (6 * 5 + 100) + last(2) + 10 + 6 * 5 + 100 + 10 + 2 * 6 * (2 + 3 + 3)  # one key-value head for two
    assert floor.least(work, clean, corrupt, "k") == runs + group


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("first", [5, 0])
def test_sweeps_multiply_little_more_than_they_must(family, first, module, monkeypatch):
    monkeypatch.setattr(analysis.patching.cells, "CALL", 0)  # on a toy it is cheaper to multiply more and to call less
    model, floor = model_of(module, family), module("patching_floor")

    class Weights(floor.Work):  # torch does not count the products of its fused attention
        def attention(self, *_, **__):
            return 0

    work = Weights.of(model.config)
    clean, corrupt, answers = module("patching_peers").pairs(50, first_difference=first)
    for site in ("resid_pre", "z", "q", "k", "v"):
        found = counted(partial(patch, model, clean, corrupt, logit_diff(answers), site))
        # both runs are recorded with a whole last block; k and v of a toy of four heads are few cells beside that
        assert 1 <= found / floor.least(work, clean, corrupt, site) < (1.06 if site == "resid_pre" else 1.2)


def test_cells_are_spread_and_aims_are_those_of_the_larger_models(module, monkeypatch):
    pytest.importorskip("transformer_lens")
    pytest.importorskip("nnsight")
    patching = module("patching")
    cells = patching.spread((12, 24), 5, 4)
    assert len(cells) == 4 and len({layer for layer, _ in cells}) == 4 and cells[0] == (0, 5)
    assert all(layer < 12 and 5 <= column < 24 for layer, column in cells)
    assert len(patching.spread((3, 2), 0, 6)) <= 6
    assert patching.Case("Llama 8x512", "resid_pre").aim == 8.5
    assert patching.Case("Llama 8x512", "resid_pre", 0).aim == 5.5
    assert patching.Case("GPT-2 small", "k").aim == 3.5
    assert patching.Case("toy GPT-2", "resid_pre").aim == 7 and patching.Case("toy GPT-2", "resid_pre", 0).aim is None


@pytest.mark.peers
def test_sections_on_a_toy(module, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformer_lens")
    pytest.importorskip("nnsight")
    patching, tables = module("patching"), module("patching_tables")
    monkeypatch.setitem(patching.MODELS, "toy", partial(model_of, module, "llama"))
    monkeypatch.setitem(patching.AIMS, "toy", 7.0)
    monkeypatch.setattr(patching, "TOKENS", 48)
    subject = patching.Subject("toy")
    whole = patching.sweep_row(subject, patching.Case("toy", "resid_pre"), 1, None)
    some = patching.sweep_row(subject, patching.Case("toy", "v"), 1, 2)
    for row, cells, measured in ((whole, 4 * 24, 4 * 24), (some, 4 * 2, 2)):
        assert (row["cells"], row["measured"]) == (cells, measured)
        assert max(row["apart"].values()) < 5e-6 and row["scale"] > 0.01  # float32; the bridge has eager attention
        assert row["seconds"]["floor"] == pytest.approx(row["multiply_adds"] / row["rate"])
        assert row["share_of_floor"] == pytest.approx(row["seconds"]["floor"] / row["seconds"]["ours"])
        assert row["times_faster"]["hooks"] == pytest.approx(row["seconds"]["hooks"] / row["seconds"]["ours"])
        assert row["met"]["bridge"] == (row["times_faster"]["bridge"] >= row["aim"])
    precise, padded = patching.precision([subject]), patching.padded([subject])
    assert all(row["apart"]["float64"] < 1e-12 and row["apart"]["float32"] < 5e-6 for row in precise)
    assert all(0 < row["apart"]["bfloat16"] < 2e-2 for row in precise)
    assert all(row["apart"] < 1e-5 and row["scale"] > 1e-3 for row in padded)
    assert max(row["scale"] for row in padded) > 0.01
    path = tmp_path / "patching.json"
    results = {"sweeps": [whole, some], "precision": precise, "padded": padded}
    path.write_text(json.dumps(results))
    patching.main(["--tables", "--output", str(path)])
    assert capsys.readouterr().out.strip() == tables.markdown(results)
    assert f"{some['times_faster']['hooks']:.1f}" in tables.sweeps([some])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_costs_of_paths_edges_and_masks(family, module):
    costs = module("patching_costs")
    rows = {row["what"]: row for row in costs.costs({"toy": model_of(module, family)})}
    assert all(0 < row["forwards"] < row["loop_forwards"] for row in rows.values())
    mask = next(row for what, row in rows.items() if what.startswith("DCM"))
    assert mask["apart"] < 1e-5  # the loss of every step: float32, logits of order one
    assert mask["loop_run"] and mask["loop_forwards"] > 2 * costs.EPOCHS
    steps = {row["forwards"] for what, row in rows.items() if what.startswith("EAP")}
    assert max(steps) / min(steps) > 2
    assert len(module("patching_tables").costs(list(rows.values())).splitlines()) == len(rows) + 4


def test_memory_of_a_toy(module):
    memory = module("patching_memory")
    sizes = {"size": (4, 32), "n_layer": 4, "n_embd": 64, "n_head": 4}
    one, every = (memory.capture_case(f"ours, {what}", **sizes) for what in ("one layer", "all layers"))
    assert one["held"] == 4 * 32 * 64 * 4 / memory.MB and every["held"] == 4 * one["held"]
    assert math.isfinite(memory.sweep_case("z", 4, **sizes)["peak"])
    done = subprocess.run([sys.executable, str(BENCHMARKS / "patching_memory.py"), "capture"], capture_output=True)
    assert done.returncode != 0
    row = {"site": "z", "budget": 64, "peak": 65.0, "usual": 90.0}
    text = module("patching_tables").memory({"capture": [{"arm": "ours", **one}], "budget": [row]})
    assert "| z | 64 | 65 | missed | 90 |" in text
