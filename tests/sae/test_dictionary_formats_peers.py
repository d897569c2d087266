"""Our dictionaries against the packages whose files they are in: what those wrote and computed, and, live, what they
make of what we write.

Stored: `make_sae_golden.py`, run with sae-lens 6.54.12, eai-sparsify 1.3.3, dictionary-learning 0.1.0 and the fork with
crosscoders. Live, in an environment of their own, since their pins and ours exclude each other:

    SAE_PEERS_PYTHON=that/bin/python SAE_PEERS_FORK=checkout python -m pytest tests/sae/test_dictionary_formats_peers.py
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dictionary_formats import HELD, LIKE, batch, results

from surgery.sae.formats import load, save
from surgery.sae.rules import BatchTopK, Gated, JumpRelu, Matryoshka, Standard, TopK

SCRIPT = Path(__file__).parent / "make_sae_golden.py"
GOLDEN = SCRIPT.parent / "golden"
CASES = sorted(str(p.relative_to(GOLDEN)) for p in GOLDEN.glob("*/*"))
CLOSE = 1e-6
"""Of the largest number: sums are taken in another order, and some tensors were rounded when they were folded."""
RULES = {"standard": Standard, "gated": Gated, "jumprelu": JumpRelu, "topk": TopK, "batchtopk-trained": JumpRelu,
         "matryoshka-trained": JumpRelu, "batchtopk-checkpoint": BatchTopK, "matryoshka-checkpoint": Matryoshka,
         "transcoder": Standard, "skip_transcoder": Standard, "jumprelu_skip_transcoder": JumpRelu,
         "flat": TopK, "minimal": TopK}  # fmt: skip


def close(ours, theirs):
    """Whether all is the same to rounding, and the same latents are in use."""
    theirs = theirs.reshape(ours.shape)
    assert (ours - theirs).abs().max() <= CLOSE * theirs.abs().max()
    assert torch.equal(ours > 0, theirs > 0)


def test_every_package_is_there():
    assert len(CASES) == 40 and {case.split("/")[0] for case in CASES} == {
        "saelens", "sparsify", "dictionary_learning", "crosscoder"}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_they_wrote_computes_what_they_computed(case):
    family, name = case.split("/")
    expected = load_file(GOLDEN / case / "expected.safetensors")
    found, metadata = load(GOLDEN / case, allow_pickle=family == "dictionary_learning")
    x = expected["x"].reshape(len(expected["x"]), -1)
    with torch.no_grad():
        codes, output = found.codes(x).dense(), found(x)
        if getattr(found.rule, "by_norm", False) and family == "saelens":  # whose codes are times the norms
            codes = codes * found.norms()
    if family == "crosscoder" and found.models > 1 and not getattr(found.rule, "by_norm", True):
        # folded into the codes: theirs are times the weights by which they are chosen, which are 1 now
        expected["f"] = expected["f"] * (codes / expected["f"]).nanmedian(dim=0).values.nan_to_num(1)
    close(codes, expected["f"])
    close(output, expected["y"])
    assert codes.any() and (codes == 0).any()
    if family == "saelens":
        assert metadata["hook_name"] == LIKE["hook_name"] and isinstance(found.rule, RULES.get(name, object))
    if family == "dictionary_learning":
        assert metadata["lm_name"] == "tiny" and metadata["buffer"] == {"ctx_len": 8}


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("sparsify/")])
def test_sums_in_the_same_order_are_the_same_numbers(case):
    """Sparsify's pre-activations are one product with the matrix as it lies in the file, like ours."""
    expected = load_file(GOLDEN / case / "expected.safetensors")
    found, _ = load(GOLDEN / case)
    with torch.no_grad():
        h = found.pre(expected["x"])
        assert torch.equal(found.codes(expected["x"]).dense(), torch.where(expected["f"] > 0, h, 0))


@pytest.mark.parametrize("case", CASES)
def test_what_they_wrote_can_be_written_again(tmp_path, case):
    """Their files, read and written: the same tensors, where the kind is one that we write."""
    family, name = case.split("/")
    to = "dictionary_learning" if family == "crosscoder" else family
    pickled = family == "dictionary_learning" or name == "sae-normalised"
    first, metadata = load(GOLDEN / case, allow_pickle=pickled)
    save(first, tmp_path / "x", to, metadata=metadata, allow_pickle=pickled)
    second, again = load(tmp_path / "x", allow_pickle=pickled)
    assert {k: v for k, v in metadata.items() if k in again} == {k: again[k] for k in metadata if k in again}
    x = load_file(GOLDEN / case / "expected.safetensors")["x"].flatten(1)
    for a, b in zip(results(second, x), results(first, x), strict=True):
        close(a, b)
    folded = "by-norm" in name or "checkpoint" in name or "normalised" in name or name == "topk-trained"
    if not folded:
        for file in [f for f in (tmp_path / "x").iterdir() if f.suffix in (".safetensors", ".pt")]:
            read = load_file if file.suffix == ".safetensors" else lambda f: torch.load(f, weights_only=True)
            mine, theirs = read(file), read(GOLDEN / case / file.name)
            unknown = {"target_rms"} | ({"threshold"} if name == "topk" else set())  # of no use to what is computed
            if name in ("batchtopk-sae", "batchtopk-mixed"):
                continue
            assert mine.keys() == theirs.keys()
            for key in mine.keys() - unknown:
                torch.testing.assert_close(mine[key], theirs[key], rtol=0, atol=0, equal_nan=True)


# ---- live

PYTHON, FORK = os.environ.get("SAE_PEERS_PYTHON"), os.environ.get("SAE_PEERS_FORK")


def run(family, folders):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": FORK if family == "crosscoder" else ""}
    done = subprocess.run([PYTHON, SCRIPT, "run", family, *folders], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.peers
@pytest.mark.parametrize("family", ["saelens", "sparsify", "dictionary_learning", "crosscoder"])
@pytest.mark.skipif(not PYTHON, reason="needs SAE_PEERS_PYTHON, an environment with the three packages")
def test_they_compute_the_same_of_what_we_write(tmp_path, family):
    if family == "crosscoder" and not FORK:
        pytest.skip("needs SAE_PEERS_FORK, a checkout of the fork")
    written = {}
    for name, (to, make, _) in HELD.items():
        if ("crosscoder" if name.startswith("crosscoder") else to) == family:
            mine, folder = make(), tmp_path / name
            save(mine, folder, to, metadata=LIKE, allow_pickle=True)
            x = batch(mine.d_in)
            shaped = x.view(len(x), mine.models, -1) if mine.models > 1 else x
            save_file({"x": shaped}, folder / "x.safetensors")
            written[folder] = mine
    out = run(family, written)
    for folder, mine in written.items():
        theirs, x = load_file(folder / "peer.safetensors"), batch(mine.d_in)
        found, _ = load(folder, allow_pickle=True)
        with torch.no_grad():
            close(found.codes(x).dense(), theirs["f"])
            close(mine(x), theirs["y"])
    if family == "saelens":
        kinds = [json.loads((folder / "cfg.json").read_text())["architecture"] for folder in written]
        assert out.split() == [word for kind in kinds for word in (kind, LIKE["hook_name"])]
