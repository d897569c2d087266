"""The benchmark of dictionaries: every section runs on very small ones and says what it measured."""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
README, STORED = EXPERIMENTS / "benchmarks" / "README.md", EXPERIMENTS / "benchmarks" / "results" / "sae.json"
PYTHON = os.environ.get("SAE_PEERS_PYTHON")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def module(monkeypatch):
    """A file of the benchmark by its name; afterwards it is forgotten."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS / "benchmarks"))
    modules = set(sys.modules)
    yield __import__
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXPERIMENTS)):
            del sys.modules[name]


@pytest.fixture
def rows(module, tmp_path):
    return load_file(module("sae").inputs(tmp_path, True))["rows"]


def test_rows_are_the_same_each_time(module, tmp_path, rows):
    (tmp_path / "again").mkdir()
    assert torch.equal(rows, load_file(module("sae").inputs(tmp_path / "again", True))["rows"])
    assert rows.shape == (4, 256, 32) and not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("rule", ["topk", "batchtopk"])
def test_the_dense_loop_trains_as_ours(module, rows, rule):
    """From the same weights: the same losses, step by step."""
    arms = module("sae_arms")
    one, other = (arms.ARMS[arm](rule, 32, 64, 4) for arm in (arms.OURS, arms.DENSE))
    losses = [(one(rows[i % 4]), other(rows[i % 4])) for i in range(40)]
    assert losses[-4][0] < 0.98 * losses[0][0]
    for ours, dense in losses:
        assert ours == pytest.approx(dense, rel=1e-4)


def test_a_worker_times_arms_in_another_process(module, tmp_path, rows):
    arms = module("sae_arms")
    worker = arms.Worker(sys.executable, tmp_path / "rows.safetensors", 4)
    for rule in ("topk", "batchtopk"):
        worker.make(arms.OURS, rule, 64)
        assert all(0 < worker.step(arms.OURS, i) < 10 for i in range(6))
    worker.close()
    assert worker.process.returncode == 0
    silent = arms.Worker.__new__(arms.Worker)
    with pytest.raises(SystemExit, match="run sae_arms.py by hand"):
        silent.__init__(sys.executable, tmp_path / "none.safetensors", 4)


def test_peaks_know_what_is_kept(module, tmp_path):
    """Two moments and a gradient for each number are there at the end of the backward pass; a dense batch is not."""
    from safetensors.torch import save_file

    arms, file = module("sae_arms"), tmp_path / "wide.safetensors"
    save_file({"rows": torch.randn(3, 2048, 64)}, file)
    peak = {arm: arms.memory(sys.executable, arm, "topk", 4096, file, 8) for arm in (arms.OURS, arms.DENSE)}
    weights = 2 * 4096 * 64 * 4 / 2**20
    assert 3 * weights < peak[arms.OURS] < 0.5 * peak[arms.DENSE]
    assert peak[arms.DENSE] > 2 * 2048 * 4096 * 4 / 2**20


def test_the_cut_model_is_the_model_up_to_there(module):
    from surgery.models import load
    from surgery.sae.activations import Stream

    stream, (model, _) = module("sae_stream"), load("tiny-base", dtype="float32")
    ids = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        hidden = stream.cut(model, 1)(input_ids=ids, use_cache=False).last_hidden_state[:, 1:]
    (rows,) = Stream(model, "resid_post.1", [ids])
    torch.testing.assert_close(rows["resid_post.1"], hidden.reshape(-1, hidden.shape[-1]))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    timed = stream.Timed([{"a": ids}] * 3)
    assert len(list(timed)) == 3 and timed.seconds >= 0


def test_fast_run_and_the_section_that_it_makes(module, capsys, tmp_path):
    sae, tables = module("sae"), module("sae_tables")
    results, versions = sae.run(list(tables.LINES), True, None)
    printed = capsys.readouterr().out
    assert "they are left out" in printed
    for label in ("| TopK, 64 | ours |", "times the floor", "peak above the weights", "reading, ms", "as the second"):
        assert label in printed
    (stream,) = results["stream"]
    assert versions == {} and stream["passes"] == {"one": 17, "two": 17, "alone": 0}
    assert {row["rule"] for row in results["shapes"]} == {"topk", "batchtopk"}

    def row(rule, latents, **slower):
        arms = {arm: {"seconds": 0.1 * x, "rows_per_s": 4096 / (0.1 * x),
                      "slower": {"ratio": x, "range": [x - 0.5, x + 0.5]}} for arm, x in slower.items()}  # fmt: skip
        floor = {"flops_per_s": 1e11, "seconds": 0.05, "times": 2.0}
        return {"rule": rule, "latents": latents, "rounds": 3, "arms": arms, "floor": floor}

    steps = [row("topk", 8192, ours=1.0, SAELens=5.0, sparsify=1.2), row("batchtopk", 2048, ours=1.0, SAELens=2.0)]
    memory = [{"rule": "topk", "latents": 8192, "peak": {"ours": 50.0, "SAELens": 200.0}},
              {"rule": "batchtopk", "latents": 8192, "peak": {"ours": 51.0, "SAELens": 200.0}}]  # fmt: skip
    report = {"results": results | {"steps": steps, "memory": memory}, "peers": {"SAELens": "6.54.12"},
              "seconds": 60.0, "load_average": {"before": 0.1}}  # fmt: skip
    path = tmp_path / "sae.json"
    sae.main(["--fast", "--only", "shapes", "--json", str(path)])
    assert not path.exists()
    path.write_text(json.dumps(report))
    capsys.readouterr()
    sae.main(["--tables", "--json", str(path)])
    told = capsys.readouterr().out
    assert told.strip() == tables.section(report)
    assert "5.0 (4.5 to 5.5) | at least 4: met" in told and "1.2 (0.7 to 1.7) | at least 1.3: not met" in told
    assert "2.0 (1.5 to 2.5) | at least 2: met" in told and "0.25, at most 0.25: met" in told
    assert (
        "0.26, at most 0.25: not met" in told and "Left out, since not at hand: sparsify, dictionary_learning" in told
    )
    assert "5.0 times as fast as SAELens" in told


def test_the_readme_shows_the_stored_run(module):
    if not STORED.exists():
        pytest.skip("no run is stored")
    section = module("sae_tables").section(json.loads(STORED.read_text()))
    assert section in README.read_text()


@pytest.mark.peers
@pytest.mark.skipif(not PYTHON, reason="needs SAE_PEERS_PYTHON, an environment with the three packages")
def test_the_peers_train_too(module, tmp_path, rows):
    arms = module("sae_arms")
    worker = arms.Worker(PYTHON, tmp_path / "rows.safetensors", 4)
    assert set(worker.versions) == set(arms.PACKAGES)
    for rule, names in arms.RULES.items():
        for arm in set(names) & set(worker.versions):
            worker.make(arm, rule, 64)
            assert all(0 < worker.step(arm, i) < 60 for i in range(3))
    worker.close()
    assert 0 < arms.memory(PYTHON, arms.SAELENS, "topk", 64, tmp_path / "rows.safetensors", 4) < 100
