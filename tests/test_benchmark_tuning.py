"""The benchmark of sparse tuning: every section runs on a very small model and says what it measured."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from surgery.tuning import SparseAdamW

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
with_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


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
def fake(tmp_path):
    """A folder with an optimizer under the name of LIFT's, which multiplies the gradient by the mask."""
    folder = tmp_path / "clone" / "src"
    folder.mkdir(parents=True)
    (folder / "sparseAdam.py").write_text(
        "import torch\n"
        "class SparseAdamW(torch.optim.AdamW):\n"
        "    def __init__(self, groups, lr, betas, mask_type, no_deprecation_warning):\n"
        "        super().__init__([{'params': g['params']} for g in groups], lr=lr, betas=betas, weight_decay=0.0)\n"
        "    def step(self):\n"
        "        for p in self.param_groups[0]['params']:\n"
        "            mask = self.state[p].pop('mask')\n"
        "            p.grad *= mask\n"
        "            kept = getattr(self, 'kept', {})\n"
        "            self.kept = {**kept, p: mask}\n"
        "        super().step()\n"
        "        for p, mask in self.kept.items():\n"
        "            self.state[p]['mask'] = mask\n"
    )
    return folder.parent


def test_the_model_is_as_large_as_is_said(module):
    arms = module("tuning_arms")
    with torch.device("meta"):
        model = arms.Shape().model()
    linear = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert linear == 28_901_376 and sum(p.numel() for p in model.parameters()) == pytest.approx(29.7e6, rel=2e-3)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "proj" in n}
    chosen = sum(round(arms.DENSITY * a * b) for a, b in shapes.values())
    assert abs(chosen - 1_445_068) == 0


@with_peft
def test_the_arms_do_what_their_names_say(module, fake):
    arms, shape = module("tuning_arms"), module("tuning").SMALL
    ids, base = shape.ids(2, 16), shape.model()
    made = {name: arms.ARMS[name](shape, fake) for name in arms.at_hand(fake)}
    assert set(made) == set(arms.ARMS) and set(arms.at_hand(None)) == set(arms.ARMS) - {arms.LIFT}
    first = {name: float(arm.loss(ids).detach()) for name, arm in made.items()}
    assert max(first.values()) - min(first.values()) < 1e-4, "they all begin with one model (SHiRA's sums differ a bit)"
    for _ in range(3):
        for arm in made.values():
            arm.step(ids)
    count = arms.chosen_of(shape).count
    for name in ("masked AdamW", arms.LIFT, arms.OURS):
        moved = sum(int((p != q).sum()) for p, q in zip(made[name].model.parameters(), base.parameters(), strict=True))
        assert made[name].trained == count and 0.99 * count < moved <= count
    ours, masked = made[arms.OURS].model, made["masked AdamW"].model
    pairs = zip(ours.state_dict().values(), masked.state_dict().values(), strict=True)
    apart = max(float((p - q).abs().max()) for p, q in pairs)
    assert apart < 1e-6, "twice the same AdamW on the same mask"
    for name in (*arms.PEFTS, "ours, S2FT"):
        assert made[name].trained == pytest.approx(count, rel=0.05)
    for name, (state, index) in {arms.FULL: (8, 0), "SHiRA": (8, 8), "Super-Tuning": (8, 4), arms.LORA: (8, 0),
                                 arms.OURS: (8, 4), arms.HFT: (8, 0)}.items():  # fmt: skip
        assert made[name].bytes() == pytest.approx({"state": state, "index": index}), name
    assert made["masked AdamW"].bytes()["state"] == pytest.approx(8 / arms.DENSITY, rel=0.01)


def test_gathering_is_timed_and_hooks_can_be_deaf(module):
    arms, shape = module("tuning_arms"), module("tuning").SMALL
    arm, ids = arms.ARMS[arms.HOOKS](shape, None), shape.ids(1, 16)
    told = arms.parts(arm, ids)
    assert 0 < told["gathering"] < told["backward"] and min(told.values()) > 0
    before = copy.deepcopy(arm.model.state_dict())
    assert arms.deaf(arm, ids) > 0
    assert isinstance(arm.optimizer, SparseAdamW) and arm.optimizer.flat.grad is None
    assert all(p.grad is None for p in arm.model.parameters())
    arm.optimizer.step()
    assert all(torch.equal(before[n], t) for n, t in arm.model.state_dict().items())
    arm.step(ids)
    assert not all(torch.equal(before[n], t) for n, t in arm.model.state_dict().items()), "it hears again"


def test_bytes_to_move_are_those_of_lines(module):
    from surgery.tuning import Selection

    places = torch.tensor([0, 3, 15, 16, 47], dtype=torch.int32)  # lines 0, 1 and 2
    moved = module("tuning").to_move(Selection({"w": places}, {"w": (8, 8)}), None)
    assert moved["gradients' lines, read"] == 3 * 64 and moved["weights' lines, read and written"] == 6 * 64
    assert moved["moments, read and written"] == 80 and sum(moved.values()) == 9 * 64 + 32 * 5


def test_peaks_know_what_is_kept(module):
    """A model of 1.9 million numbers: AdamW keeps 8 bytes and a gradient of 4 for each, ours 20 times less."""
    memory, arms = module("tuning_memory"), module("tuning_arms")
    shape = arms.Shape(layers=2, width=256, inner=704, heads=4, vocabulary=100)
    numbers = sum(p.numel() for p in shape.model().parameters())
    full = memory.memory(shape, arms.FULL, 1, 8, None)
    ours = memory.memory(shape, arms.OURS, 1, 8, None)
    assert full["weights"] == ours["weights"] == 4 * numbers / 2**20
    assert full["peak"] == pytest.approx(12 * numbers / 2**20, abs=4)
    assert ours["peak"] < 0.4 * full["peak"]


@with_peft
def test_fast_run_and_the_section_that_it_makes(module, fake, capsys, tmp_path):
    tuning, tables = module("tuning"), module("tuning_tables")
    tuning.main(["--fast", "--lift", str(fake), "--json", str(tmp_path / "none.json")])
    printed = capsys.readouterr().out
    assert not (tmp_path / "none.json").exists() and "| ours, LIFT's mask |" in printed
    for label in ("optimizer phase, by hooks", "whole step, HFT", "times the floor", "bit for bit", "full SVD"):
        assert label in printed
    assert "NOT" not in printed
    results = tuning.run(["state", "mask", "delta"], True, None)
    (state,), (mask,), (delta,) = results["state"], results["mask"], results["delta"]
    assert "LIFT, published" not in state["arms"]
    moved = state["arms"]["ours, LIFT's mask, moved"]
    assert moved["state"] + moved["index"] <= 13.01
    assert mask["agree"] == 1.0 and mask["refresh"] < sum(mask["seconds"].values())
    assert delta["applied"] and delta["reverted"] and delta["numbers"] <= state["arms"]["ours, LIFT's mask"]["trained"]
    steps = tuning.steps(tuning.SMALL, tuning.SHORT, 2, None)
    each = steps["arms"]["ours, LIFT's mask"]
    assert each["phase of AdamW"]["range"][0] <= each["phase of AdamW"]["ratio"] <= each["phase of AdamW"]["range"][1]
    assert steps["arms"]["AdamW"]["whole of AdamW"] == {"ratio": 1.0, "range": [1.0, 1.0]}
    peaks = [{"tokens": tuning.SHORT, "peak": {"AdamW": 100.0, "LoRA": 8.0, "ours, LIFT's mask": 9.0}}]
    report = {"results": {"steps": [steps], "memory": peaks, **results}, "lift": False, "seconds": 60.0,
              "load_average": {"before": 0.1}}  # fmt: skip
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(report))
    capsys.readouterr()
    tuning.main(["--tables", "--json", str(path)])
    told = capsys.readouterr().out
    assert told.strip() == tables.section(report) and "not timed" in told and "0.090, met" in told
    assert "9.0 against 8.0 MiB, not met" in told
