"""Training steps against SAELens's own trainer, from the same weights on the same rows.

Stored by `make_sae_golden.py steps`, run with sae-lens 6.54.12: Adam at 3e-4, gradients clipped to 1.0, four steps;
`-dead` with an auxiliary loss for latents that two steps have not used. Live, in an environment of its own:

    SAE_PEERS_PYTHON=that/bin/python python -m pytest tests/sae/test_sae_parity.py
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from surgery.sae.dictionary import Dictionary
from surgery.sae.rules import BatchTopK, Gated, JumpRelu, Matryoshka, Rule, Standard, TopK, squared
from surgery.sae.train import Entry, Settings, fit

SCRIPT = Path(__file__).parent / "make_sae_golden.py"
GOLDEN = SCRIPT.parent / "golden" / "steps.safetensors"
PYTHON = os.environ.get("SAE_PEERS_PYTHON")
CASES = {
    "topk": TopK(k=4),
    "topk-plain": TopK(k=4, by_norm=False),
    "topk-dead": TopK(k=1, aux=0.5),
    "batchtopk": BatchTopK(k=3.0),
    "batchtopk-dead": BatchTopK(k=0.5),
    "matryoshka": Matryoshka(k=3.0, widths=(5, 11)),
    "standard": Standard(l1=0.3),
    "gated": Gated(l1=0.3),
    "jumprelu": JumpRelu(l0=0.05, threshold=0.1, bandwidth=0.2),
}
NAMES = {"W_dec": "decoder", "b_enc": "bias", "b_gate": "bias", "topk_threshold": "threshold"}
CLOSE = 1e-5
"""Of the largest number, of gradients and losses; weights after four steps are closer than a hundredth of a step."""


def theirs(stored, name, what):
    """Their tensors under our names."""
    found = {}
    for key, tensor in stored.items():
        if key.startswith(f"{name}/{what}/"):
            key = key.rsplit("/", 1)[1]
            found |= {"encoder": tensor.T} if key == "W_enc" else {NAMES.get(key, key): tensor}
    return found


def begun(stored, name):
    begin = theirs(stored, name, "begin")
    latents, d = begin["decoder"].shape
    mine = Dictionary(d, latents, CASES[name])
    mine.load_state_dict(begin)
    return mine


def assert_same(stored, name):
    rows = stored["rows"]
    # gradients of the first step, as the optimizer gets them
    mine = begun(stored, name)
    found = mine.trained(rows[0])
    (squared(found.output - rows[0]) + sum(found.terms.values())).backward()
    assert nn.utils.clip_grad_norm_(mine.parameters(), 1.0) > 1
    for key, gradient in theirs(stored, name, "gradient").items():
        assert (mine.get_parameter(key).grad - gradient).abs().max() <= CLOSE * gradient.abs().max(), key
    # weights after the first step, and after all of them
    for steps, when in ((1, "first"), (len(rows), "last")):
        settings = Settings(
            lr=3e-4, clip=1.0, normalise=False, dead_after=2 * len(rows[0]) if name.endswith("dead") else 10_000
        )
        entry = Entry("a", begun(stored, name), settings)
        with pytest.MonkeyPatch.context() as patch:  # they leave the running mean as it is
            patch.setattr(BatchTopK, "finish", Rule.finish)
            fit({"it": entry}, [{"a": each} for each in rows], steps=steps)
        state = entry.dictionary.state_dict()
        expected = theirs(stored, name, when)
        assert state.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(state[key], tensor, rtol=0, atol=3e-6, msg=lambda m, k=key: f"{k}: {m}")
    losses = torch.tensor([line["loss"] for line in entry.log])
    torch.testing.assert_close(losses, stored[f"{name}/losses"], rtol=CLOSE, atol=0)
    return entry


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_saelens(name):
    entry = assert_same(load_file(GOLDEN), name)
    assert ("aux" in entry.log[-1]) == name.endswith("dead") and "aux" not in entry.log[0]


def test_every_step_is_stored():
    stored = load_file(GOLDEN)
    assert {key.split("/")[0] for key in stored} == {"rows", *CASES} and GOLDEN.stat().st_size < 200_000


@pytest.mark.peers
@pytest.mark.skipif(not PYTHON, reason="needs SAE_PEERS_PYTHON, an environment with sae-lens")
def test_live_steps_are_those_of_saelens(tmp_path):
    done = subprocess.run([PYTHON, SCRIPT, "steps", tmp_path / "steps.safetensors"], capture_output=True, text=True,
                          env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    stored = load_file(tmp_path / "steps.safetensors")
    for name in CASES:
        assert_same(stored, name)
