"""The claims about a crosscoder's artefacts run from end to end; the table of claims quotes their results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
RESULTS = EXPERIMENTS / "results"
CLAIMS = ["crosscoder_artefacts"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def script(monkeypatch):
    """The script as a module; it and its neighbours are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    modules = set(sys.modules)
    yield __import__(CLAIMS[0])
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXPERIMENTS)):
            del sys.modules[name]


def test_the_readme_quotes_the_stored_results(script):
    readme = (EXPERIMENTS / "README.md").read_text(encoding="utf-8").splitlines()
    report = json.loads((RESULTS / f"{CLAIMS[0]}.json").read_text())
    lines = [line for line in script.markdown(report["summary"]).splitlines() if line]
    assert len(lines) >= 28
    assert [line for line in lines if line not in readme] == []
    assert any(f"results/{CLAIMS[0]}.png" in line for line in readme)
    assert any(f"experiments/{CLAIMS[0]}.py" in line for line in readme)
    assert (RESULTS / f"{CLAIMS[0]}.json").stat().st_size < 100_000
    assert (RESULTS / f"{CLAIMS[0]}.png").stat().st_size < 100_000
    script.check(report)


def test_it_runs(script, tmp_path):
    command = [sys.executable, str(EXPERIMENTS / f"{CLAIMS[0]}.py"), "--fast", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SURGERY_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / f"{CLAIMS[0]}.json").read_text())
    stored = json.loads((RESULTS / f"{CLAIMS[0]}.json").read_text())
    assert report.keys() == stored.keys()
    assert script.markdown(report["summary"]) in run.stdout
    assert (tmp_path / f"{CLAIMS[0]}.png").read_bytes().startswith(b"\x89PNG")
    script.check(report)


def test_the_pair_is_what_it_says(script):
    pair = script.Pair(2)
    base, tuned = pair.directions()
    kinds = pair.kinds
    lengths, cosines = base.norm(dim=1), torch.cosine_similarity(base, tuned, dim=1)
    for i, kind in enumerate(kinds):
        assert float(tuned[i].norm()) == pytest.approx(0 if kind == "base only" else 1, abs=1e-5)
        if kind == "tuned only":
            assert lengths[i] == 0
        elif kind == "faint":
            assert 0.25 <= lengths[i] <= 0.4 and cosines[i] == pytest.approx(1, abs=1e-5)
        elif kind != "base only":
            expected = {"shared": 1.0, "turned": 0.6, "moved": 0.0}[kind]
            assert lengths[i] == pytest.approx(1, abs=1e-5) and cosines[i] == pytest.approx(expected, abs=1e-5)
    x, sizes = pair.rows(4000, 1)
    left = x - torch.cat([sizes @ base, sizes @ tuned], 1)
    assert float(left.std()) == pytest.approx(script.NOISE, rel=0.02)
    assert float((sizes > 0).double().mean()) == pytest.approx(script.RATE, rel=0.05)
    same = script.Pair(2, tuned=False).rows(4000, 1)[0]
    assert float((same[:, : script.D] - same[:, script.D :]).std()) == pytest.approx(2**0.5 * script.NOISE, rel=0.02)


def exact(script, pair):
    """A crosscoder whose latents are the features, but for one faint feature that it has shrunk."""
    base, tuned = pair.directions()
    made = script.Dictionary(2 * script.D, len(pair.kinds), script.Standard(l1=0.0), models=2)
    with torch.no_grad():
        made.decoder.copy_(torch.cat([base, tuned], 1))
        faint = pair.kinds.index("faint")
        made.decoder[faint, : script.D] = 0  # shrunk
        made.encoder.copy_(torch.linalg.pinv(torch.cat([base, tuned], 1).double()).T.float())
        made.bias.fill_(-0.3)
    return made


def test_scores_of_a_crosscoder_that_is_known(script, monkeypatch):
    monkeypatch.setattr(script, "NOISE", 0.0)
    pair = script.Pair(4)
    made = exact(script, pair)
    x, sizes = pair.test()
    found = script.owners(made.codes(x).dense(), sizes)
    assert float((found == torch.arange(len(sizes[0]))).double().mean()) > 0.9
    told = script.scored(made, pair)
    kinds = told["norm"]["kinds"]
    assert kinds["tuned only"] == 8 and kinds["faint"] == 1 and kinds["shared"] == kinds["base only"] == 0
    assert told["norm"]["recall"] == kinds["tuned only"] / 8
    assert told["norm"]["artefacts"] == told["norm"]["latents"] - kinds["tuned only"]
    shrunk = [one for one in told["latents"] if one[0] == "faint"]
    assert shrunk[0][2] > 0.2, "what the base has is left, and latent scaling sees it"
    assert told["scaling"]["kinds"]["faint"] == 0 and told["auroc"]["error"] > 0.8


def test_owners_and_auroc(script):
    sizes = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 0]])
    codes = torch.tensor([[0.0, 5, 1], [0, 9, 1], [3, 0, 1], [0, 0, 1]])
    assert script.owners(codes, sizes).tolist() == [1, 0, -1]
    assert script.auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == pytest.approx(0.875)
    assert script.auroc(torch.tensor([]), torch.tensor([1.0])) is None


def arm(recall=(0.95, 0.8), precision=(0.95, 0.8), auroc=(0.95, 0.8), n=5):
    return {"scaling": {"recall": dict(zip(("mean", "low"), recall, strict=True)),
                        "precision": dict(zip(("mean", "low"), precision, strict=True))},
            "auroc": {"both": {"mean": auroc[0], "low": auroc[1], "n": n}}}  # fmt: skip


@pytest.mark.parametrize("one, fewer, told", [
    (arm(), (1.0, 2.0), ("held", "held", "held")),
    (arm(recall=(0.7, 0.6)), (-0.1, 2.0), ("in part", "held", "no clear difference")),
    (arm(recall=(0.7, 0.6), precision=(0.9, 0.4)), (-2.0, -1.0), ("did not hold", "held", "the other way round")),
    (arm(auroc=(0.8, 0.6)), (None, None), ("held", "in part", "no clear difference")),
    (arm(auroc=(0.8, 0.4)), (1.0, 2.0), ("held", "did not hold", "held")),
    (arm(n=2), (1.0, 2.0), ("held", "no artefacts to tell", "held")),
])  # fmt: skip
def test_verdicts_follow_the_rule(script, one, fewer, told):
    found = script.verdicts({"L1": one}, {"low": fewer[0], "high": fewer[1]})
    assert tuple(found.values()) == told
