"""Two processes (gloo) give what one process gives: DDP and FSDP2, started by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import parallel_script
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_runs import demonstrations, llama, metrics, tokenizer

from surgery.errors import SurgeryError
from surgery.training import distributed, train
from surgery.training.distributed import World

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def runs(request, tmp_path_factory):
    """What two processes made, what one process made of the same, and the way in which the two shared."""
    two, one = tmp_path_factory.mktemp(request.param), tmp_path_factory.mktemp("alone")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(HERE / "parallel_script.py"), str(two), request.param]  # fmt: skip
    paths = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in parallel_script.RUNS[request.param]:
        parallel_script.run(name, request.param, one / name, alone=True)
    return two, one, request.param


def weights(folder):
    """The parameters of a run's result, tied ones once."""
    return load_file(folder / "model" / "model.safetensors")


def test_two_processes_give_the_result_of_one(runs):
    two, one, parallel = runs
    for name in parallel_script.RUNS[parallel]:
        # FSDP2 rounds norms to bfloat16 too, autocast does not: a tenth of what four steps of 3e-2 may move
        tolerance = {"rtol": 0, "atol": 1e-2} if name == "half" else {"rtol": 1e-5, "atol": 1e-6}
        found, expected = weights(two / name), weights(one / name)
        torch.testing.assert_close(found, expected, **tolerance)
        start = llama().state_dict()
        assert max((value - start[key]).abs().max() for key, value in expected.items()) > 1e-2  # it went somewhere
        for line, right in zip(metrics(two / name), metrics(one / name), strict=True):
            assert line == pytest.approx(right, rel=2e-2 if name == "half" else 1e-3, abs=1e-5), name


def test_rollouts_are_word_for_word_those_of_one_process(runs):
    two, one, parallel = runs
    for name, words in parallel_script.RUNS[parallel].items():
        if "rollouts" in words:
            found, expected = (
                [json.loads(line) for line in (folder / name / "rollouts.jsonl").read_text().splitlines()]
                for folder in (two, one)
            )
            assert [row["completion_ids"] for row in found] == [row["completion_ids"] for row in expected]
            assert [row["reward"] for row in found] == [row["reward"] for row in expected]


def test_an_error_on_one_process_is_told_by_all(runs):
    out, _, parallel = runs
    told = {(out / f"told-{rank}").read_text() for rank in (0, 1)}
    assert len(told) == 1
    assert ("the judge has gone" if parallel == "ddp" else "Selections are of whole parameters") in told.pop()


def test_several_processes_need_a_way_to_share(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SurgeryError, match="2 processes were started, and the recipe says `parallel: none`"):
        train(llama(), tokenizer(), objective="sft", data=demonstrations(), steps=1)


def test_rollouts_under_fsdp2_are_refused_before_a_model_is_loaded():
    with pytest.raises(SurgeryError, match="Rollouts under FSDP2"):
        train("no-such-model", objective="grpo", data="chain", reward="accuracy", parallel="fsdp2")


@given(st.integers(0, 40), st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_shares_are_whole_groups_in_order(groups, size, group):
    rows = list(range(groups * group))
    parts = [World(rank, size).share(rows, group) for rank in range(size)]
    assert [row for part in parts for row in part] == rows
    assert all(len(part) % group == 0 for part in parts)
    counts = [len(part) // group for part in parts]
    assert max(counts) - min(counts) <= 1


def test_layers_are_found_by_structure():
    from transformers import GPT2Config, GPT2LMHeadModel

    assert [type(layer).__name__ for layer in distributed.layers(llama(layers=3))] == ["LlamaDecoderLayer"] * 3
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11))
    assert [type(layer).__name__ for layer in distributed.layers(gpt)] == ["GPT2Block"] * 2


def test_a_bucket_holds_one_dtype_and_not_too_much(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 10)
    sizes = [(4, torch.float32), (6, torch.float32), (1, torch.float32), (20, torch.float32), (2, torch.float64)]
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=kind)) for n, kind in sizes]
    assert [[p.numel() for p in bucket] for bucket in distributed._buckets(parameters)] == [[4, 6], [1], [20], [2]]
