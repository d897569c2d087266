"""Two processes (gloo, by way of accelerate) give what one gives, and only the gathered numbers are sent around."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sparse_script
import torch
from safetensors.torch import load_file

from surgery.errors import SurgeryError
from surgery.tuning import without_reducer

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of what two processes made, and of what one made of the same batches."""
    folders = []
    paths = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    for start in (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], []):
        folder = tmp_path_factory.mktemp("processes")
        command = [sys.executable, *start, str(HERE / "sparse_script.py"), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        folders.append(folder)
    return folders


def facts(folder, rank=0):
    return json.loads((folder / f"facts-{rank}.json").read_text())


@pytest.mark.parametrize("name", sparse_script.RUNS)
def test_two_processes_give_the_result_of_one(runs, name):
    """To 1e-6, after four steps that move numbers by up to 4e-2; both processes bit for bit."""
    two, one = runs
    found, other = (load_file(two / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(w, other[n]) for n, w in found.items())
    expected = load_file(one / f"{name}-0.safetensors")
    start = sparse_script.llama().state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert max(float((w - start[n]).abs().max()) for n, w in expected.items()) > 1e-3


@pytest.mark.parametrize("name", ["reducer", "rests", "accumulated_rests", "slices"])
def test_numbers_that_are_not_chosen_keep_their_bits(runs, name):
    model = sparse_script.llama()
    masks = sparse_script.chosen(model, sparse_script.RUNS[name]["method"]).masks()
    found = load_file(runs[0] / f"{name}-1.safetensors")
    for n, p in model.named_parameters():
        outside = ~masks[n] if n in masks else torch.ones_like(p, dtype=torch.bool)
        assert torch.equal(found[n][outside], p.detach()[outside])


@pytest.mark.parametrize("name", sparse_script.RUNS)
def test_what_is_reduced_are_the_gathered_numbers_once_a_step(runs, name):
    """Four bytes for each chosen number, once a step whatever the micro-batches."""
    for rank in (0, 1):
        told = facts(runs[0], rank)[name]
        assert told["reduced"] == [4 * told["count"]] * (2 * sparse_script.STEPS)
    assert facts(runs[1])[name]["reduced"] == []  # nobody to share with


def test_ddps_own_reducer_moves_dense_zeros_unless_it_rests(runs):
    """With its reducer every chosen parameter is sent once a step as a dense gradient of zeros; without, nothing is."""
    told, model = facts(runs[0]), sparse_script.llama()
    touched = sum(model.get_parameter(n).numel() for n in sparse_script.chosen(model, "lift"))
    assert told["reducer"]["wrapped"] and told["reducer"]["dense"] == touched > 15 * told["reducer"]["count"]
    for name in ("reducer", "accumulated"):
        assert sum(told[name]["sent"]) == 4 * touched * 2 * sparse_script.STEPS
    for name in ("rests", "accumulated_rests", "half", "reselected"):
        assert told[name]["wrapped"] and told[name]["sent"] == [] and told[name]["dense"] == 0
    assert told["slices"]["dense"] == 0


def test_fsdp2_is_refused_in_a_sentence(runs):
    for rank in (0, 1):
        optimizer, selection, whole = facts(runs[0], rank)["sharded"]
        for told in (optimizer, selection):
            assert "is cut up over processes (FSDP2): it has no entries to name." in told
        assert "Use DDP" in optimizer and "Select before sharding" in selection
        assert whole == ""  # parameters that move as a whole have no entries to be named


def test_only_a_ddp_model_has_a_reducer_that_could_rest():
    with pytest.raises(SurgeryError, match="LlamaForCausalLM is not wrapped by DistributedDataParallel"):
        without_reducer(sparse_script.llama())
