"""Sweeps leave out cells that change nothing, run small columns together, and keep the order that is asked for."""

import numpy as np
import pytest
import torch
from activations.families import build, prompts

import analysis.patching.cells
from analysis.metrics import logit_diff
from analysis.patching import patch

torch.set_num_threads(1)
CLEAN, CORRUPT, ANSWERS = prompts()


def effects(model, site, **options):
    return patch(model, CLEAN, CORRUPT, logit_diff(ANSWERS), site, **options).values


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gpt_neox"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "v"])
def test_columns_run_together_are_the_same_cells(name, site, monkeypatch):
    model = build(name)
    alone, calls = {}, []
    measured = analysis.patching.cells._measured
    monkeypatch.setattr(analysis.patching.cells, "_measured", lambda *given: calls.append(0) or measured(*given))
    for cost in (0, analysis.patching.cells.CALL):
        monkeypatch.setattr(analysis.patching.cells, "CALL", cost)
        calls.clear()
        alone[cost] = effects(model, site, by="position"), len(calls)
    (one, many), (other, few) = alone.values()
    assert few < many
    slow = effects(model, site, by="position", reuse=False)
    assert np.abs(one - slow).max() < 5e-6 and np.abs(other - slow).max() < 5e-6  # float32, logits of std 1 to 4


@pytest.mark.parametrize("site", ["resid_pre", "z"])
def test_layers_and_positions_come_in_the_order_asked_for(site):
    model = build("llama_gqa")
    where = {"layers": [2, 0], "positions": [-1, 3, 8, -3]}
    found = effects(model, site, by="position", **where)
    slow = effects(model, site, by="position", reuse=False, **where)
    assert np.abs(slow[:, 0] - slow[:, 1]).max() > 0.01
    assert np.abs(found - slow).max() < 5e-6


def test_cells_that_write_what_is_there_are_exactly_zero_and_cost_nothing(monkeypatch):
    model, rows = build("gpt2"), []
    finish = analysis.patching.cells.finish
    monkeypatch.setattr(analysis.patching.cells, "finish", lambda *a, **k: rows.append(finish(*a, **k)) or rows[-1])
    found = effects(model, "resid_pre")
    same = (CLEAN == CORRUPT).all(0)
    first = int((~same).int().argmax())
    assert (found[:, 0, same] == 0).all() and (found[:, :, :first] == 0).all()
    assert np.abs(found[:, 0, ~same]).max() > 0.01
    run = int((~same).sum()) + 2 * (CLEAN.shape[1] - first)  # layer 0 where tokens differ, layers 1 and 2 behind
    assert sum(len(part) for part in rows) == run * len(CLEAN)
