"""Defects of released code that ours must not have; behind each the test that holds it, here or in another file.

Gradients
* the fused encoder drops those of all but its choice, auxiliary losses train no encoder (sparsify):
  test_codes dead_latents_are_chosen_beside_and_have_gradients, test_dictionary dead_latents_learn_what_is_left
* no ReLU gate in the backward pass, biases learn from latents that are off (sparsify):
  what_is_off_learns_nothing, test_codes rows_whose_numbers_are_all_negative_have_no_codes_and_no_gradient
* sparse activations fail in the backward pass on CPU (SAELens), statistics of use build a second dense matrix each step
  (SAELens): the_sparse_path_is_never_dense, test_dictionary a_step_is_that_of_the_dense_form
* the gate's reconstruction trains the decoder, other than in the paper (SAELens):
  the_gates_reconstruction_can_leave_the_decoder_alone
* the auxiliary reconstruction adds the decoder's bias a second time (older SAELens, sparsify):
  the_auxiliary_loss_sees_only_what_is_left

Choice and use
* latents that a row chose with a value of 0 count as used (sparsify): only_what_is_on_counts_as_used
* dead latents are counted in steps, whatever the batch (SAELens): use_is_counted_in_rows
* k times rows is rounded down where k is a fraction (SAELens): fractions_of_k_are_rounded
* a threshold that was never set is -1 (dictionary_learning) or 0 (SAELens): a_threshold_that_was_never_set_is_a_relu,
  after_training_as_many_codes_as_in_it, test_dictionary_formats thresholds_below_zero_are_those_of_a_relu
* batches of two dimensions are silently taken for others (sparsify): batches_of_two_dimensions_are_theirs_or_refused

Training
* the trainer's own default of the last learning rate trips an assertion (SAELens):
  every_shape_of_the_learning_rate_trains_as_it_comes
* clipping to 1.0 cannot be changed (SAELens, dictionary_learning): clipping_is_a_setting

Scales and metrics
* folding of normalisation was wrong for the decoder's bias, for checkpoints, for the threshold (SAELens):
  test_fit the_scale_is_folded_exactly, test_dictionary_formats
  a_scale_of_activations_is_folded_into_everything_that_depends_on_it
* metrics compare scaled with unscaled activations (SAELens): metrics_after_folding_are_those_of_training
* FVU is a mean over batches (an older metric of SAELens, sparsify): test_quality
  a_mean_over_batches_would_be_another_number

Files and packages
* a loader insists on names of folders, and mislabels sites (SAELens, of sparsify's files): folders_may_have_any_name
* packages that cannot be imported beside torch for the CPU (all three): importing_needs_torch_alone
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.errors import SurgeryError
from surgery.sae import codes as sparse
from surgery.sae.dictionary import Dictionary
from surgery.sae.formats import load
from surgery.sae.metrics import Planted, measure
from surgery.sae.rules import BatchTopK, Gated, Matryoshka, TopK, squared
from surgery.sae.train import Entry, Settings, fit

PLANTED = Planted(d=16, n=24, rate=0.1, noise=0.02)
SPARSE = [TopK(k=3), BatchTopK(k=3.0), Matryoshka(k=3.0, widths=(10, 20))]


def rows(count=1, size=256, times=1.0):
    return [{"a": times * PLANTED.rows(size, seed)[0]} for seed in range(count)]


def trained(rule, batches, latents=40, **settings):
    entry = Entry("a", Dictionary(16, latents, rule, seed=1), Settings(**settings))
    fit({"it": entry}, batches, steps=len(batches))
    return entry


@pytest.mark.parametrize("rule", SPARSE, ids=str)
def test_what_is_off_learns_nothing(rule):
    """Encoder and decoder rows, and the biases, of latents that no row uses stay where they were."""
    dictionary = Dictionary(16, 40, rule, seed=1)
    with torch.no_grad():
        dictionary.bias[:15] = -100.0
    before = {name: p.detach().clone() for name, p in dictionary.named_parameters()}
    entry = Entry("a", dictionary, Settings(lr=0.01, normalise=False))
    fit({"it": entry}, rows(5), steps=5)
    for name in ("encoder", "bias", "decoder"):
        assert torch.equal(getattr(dictionary, name)[:15], before[name][:15])
        assert not torch.equal(getattr(dictionary, name)[15:], before[name][15:])


@pytest.mark.parametrize("rule", SPARSE, ids=str)
def test_only_what_is_on_counts_as_used(rule):
    """One latent of 40 can be above 0: the other two of each row's three are none."""
    dictionary = Dictionary(16, 40, rule, seed=1)
    with torch.no_grad():
        dictionary.bias.fill_(-100.0)
        dictionary.bias[7] = 100.0
    fired = dictionary.trained(rows()[0]["a"]).fired
    assert int(fired[7]) == 256 and int(fired.sum()) == 256
    entry = Entry("a", dictionary, Settings(lr=0.0, normalise=False, dead_after=600))
    fit({"it": entry}, rows(4), steps=4)
    assert entry.log[-1]["l0"] == 1.0 and entry.log[-1]["dead"] == pytest.approx(39 / 40)


@pytest.mark.parametrize("rule", SPARSE, ids=str)
def test_batches_of_two_dimensions_are_theirs_or_refused(rule):
    dictionary, x = Dictionary(16, 40, rule, seed=1), rows()[0]["a"]
    torch.testing.assert_close(dictionary(x.view(8, 32, 16)), dictionary(x).view(8, 32, 16))
    for call in (dictionary.codes, dictionary.trained):
        with pytest.raises(SurgeryError, match=r"found a shape of \(8, 32, 16\)"):
            call(x.view(8, 32, 16))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation gives."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor) and each.layout == torch.strided:
                self.found = max(self.found, each.numel())
        return out


@pytest.mark.parametrize("rule", SPARSE, ids=str)
@pytest.mark.parametrize("dead_after", [10_000, 1])
def test_the_sparse_path_is_never_dense(monkeypatch, rule, dead_after):
    """In whole steps - forward, auxiliary loss, backward, statistics, optimizer - on CPU."""
    size, latents = 512, 800
    monkeypatch.setattr(sparse, "BLOCK", 32 * latents)
    entry = Entry("a", Dictionary(16, latents, rule, seed=1), Settings(dead_after=dead_after, normalise=False))
    with Largest() as largest:
        fit({"it": entry}, rows(3, size), steps=3)
    assert ("aux" in entry.log[-1]) == (dead_after == 1)
    # a block of 32 rows with all latents, or what belongs to codes: never 512 rows with all latents
    assert 32 * latents <= largest.found < size * latents / 8
    with Largest() as control:
        entry.dictionary.pre(rows(1, size)[0]["a"])
    assert control.found == size * latents


@pytest.mark.parametrize("times", [0.0, 0.1, 10.0])
def test_rows_at_the_beginning_may_foretell_nothing(monkeypatch, times):
    """Codes are the batch's largest, and no more of them are held on the way than a few times those, and a block."""
    monkeypatch.setattr(sparse, "BLOCK", 32 * 800)
    dictionary, x = Dictionary(16, 800, BatchTopK(k=3.0, by_norm=False), seed=1), rows(1, 2048)[0]["a"]
    x[:100] *= times
    with Largest() as largest, torch.no_grad():
        found = dictionary.trained(x)
    assert int(found.fired.sum()) == 3 * 2048 and largest.found <= 8 * 3 * 2048
    h = dictionary.pre(x).relu()
    f = h * (h >= h.flatten().topk(3 * 2048).values[-1])
    torch.testing.assert_close(found.output, f @ dictionary.decoder + dictionary.b_dec)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_every_shape_of_the_learning_rate_trains_as_it_comes(shape, final):
    entry = trained(TopK(k=3), rows(40), shape=shape, final=final, lr=1e-3)
    last = entry.log[-1]["lr"]
    assert last == pytest.approx(1e-3 if shape == "constant" else 1e-3 * final, abs=1e-4) and entry.log[0]["lr"] == 1e-3
    assert Settings() == Settings(lr=3e-4, clip=1.0, shape="constant")
    assert len(trained(TopK(k=3), rows(20)).log) == 20


def test_clipping_is_a_setting():
    """Adam does not see the length of gradients, but for its eps: with tiny ones it stands still."""
    start = Dictionary(16, 40, TopK(k=3), seed=1).encoder.detach()
    moved = {}
    for clip in (0.0, 1.0, 1e-12):
        entry = trained(TopK(k=3), rows(1), clip=clip, normalise=False, lr=0.1)
        moved[clip] = float((entry.dictionary.encoder.detach() - start).abs().max())
        assert entry.log[0]["grad_norm"] > 0.1, "the length is that before it was cut"
    assert moved[0.0] == pytest.approx(0.1, rel=1e-3) == moved[1.0] and moved[1e-12] < 1e-4


@pytest.mark.parametrize("rule", [*SPARSE, Gated(l1=0.1)], ids=str)
def test_metrics_after_folding_are_those_of_training(rule):
    """Trained on rows times 0.03; measured on the rows as they are."""
    batches = rows(60, times=37.0)
    entry = trained(rule, batches, lr=3e-3)
    last = entry.log[-1]["fvu"]
    again = fit({"it": Entry("a", entry.dictionary, Settings(lr=0.0, normalise=False))}, [batches[-1]], steps=1)
    assert again["it"].log[0]["fvu"] == pytest.approx(last, rel=0.05)
    if not isinstance(rule, BatchTopK):  # whose codes after training are chosen otherwise
        assert measure(entry.dictionary, [batches[-1]["a"]]).fvu == pytest.approx(again["it"].log[0]["fvu"], rel=1e-4)


def test_the_gates_reconstruction_can_leave_the_decoder_alone():
    x, gradients = rows()[0]["a"], {}
    for frozen in (False, True):
        dictionary = Dictionary(16, 40, Gated(l1=0.0, frozen=frozen), seed=1)
        term = dictionary.trained(x).terms["by the gate"]
        term.backward()
        gradients[frozen] = {name: p.grad for name, p in dictionary.named_parameters()}
    assert gradients[True]["decoder"] is None and gradients[False]["decoder"].abs().max() > 0
    torch.testing.assert_close(gradients[True]["encoder"], gradients[False]["encoder"])
    torch.testing.assert_close(gradients[True]["bias"], gradients[False]["bias"])
    # the centre of what is encoded is the decoder's bias, and learns from the gate either way
    assert not torch.equal(gradients[True]["b_dec"], gradients[False]["b_dec"])


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_a_threshold_that_was_never_set_is_a_relu(value):
    dictionary, x = Dictionary(16, 40, BatchTopK(k=3.0), seed=1), rows()[0]["a"]
    assert float(dictionary.threshold) == 0
    dictionary.threshold.fill_(value)
    torch.testing.assert_close(dictionary.codes(x).dense(), dictionary.pre(x).relu())


def test_after_training_as_many_codes_as_in_it():
    """Of a short run too: a running mean that begins at 0 would be far too low at its rate of 0.01."""
    for steps, within in ((20, 0.35), (600, 0.1)):
        entry = trained(BatchTopK(k=3.0), rows(steps), lr=1e-3)
        assert measure(entry.dictionary, [b["a"] for b in rows(20)]).l0 == pytest.approx(3.0, rel=within)


def test_use_is_counted_in_rows():
    """The same rows in batches of 64 or of 256: after 512 rows the same latents are dead."""
    dead = {}
    for size in (64, 256):
        dictionary = Dictionary(16, 40, TopK(k=3, aux=0.0), seed=1)
        with torch.no_grad():
            dictionary.bias[:9] = -100.0
        entry = Entry("a", dictionary, Settings(lr=0.0, normalise=False, dead_after=512))
        fit({"it": entry}, rows(1024 // size, size), steps=1024 // size)
        dead[size] = {line["step"] * size: round(line["dead"] * 40) for line in entry.log}
    assert dead[64][512 + 64] == dead[256][512 + 256] == 9 and dead[64][512] == dead[256][512] == 0


@pytest.mark.parametrize("name", ["anything", "layers.3.mlp", "a b"])
def test_folders_may_have_any_name(tmp_path, name):
    shutil.copytree(Path(__file__).parent / "golden" / "sparsify" / "topk", tmp_path / name)
    found, metadata = load(tmp_path / name)
    assert isinstance(found.rule, TopK) and not any("resid" in str(value) for value in metadata.values())


def test_fractions_of_k_are_rounded():
    """2.3 x 50 is 114.99999999999999 in floating point, and means 115."""
    assert int(2.3 * 50) == 114
    found = Dictionary(16, 40, BatchTopK(k=2.3), seed=1).trained(rows(1, 50)[0]["a"])
    assert int(found.fired.sum()) == 115


def test_the_auxiliary_loss_sees_only_what_is_left():
    """Its reconstruction has no bias of the decoder, which what is left is already without."""
    dictionary, x = Dictionary(16, 40, TopK(k=3), seed=1), rows()[0]["a"]
    with torch.no_grad():
        dictionary.b_dec.fill_(5.0)
        dictionary.bias[:20] = -100.0
        dictionary.decoder[:20] = 0.0
    dead = torch.arange(40) < 20
    found = dictionary.trained(x, dead=dead)
    torch.testing.assert_close(found.terms["aux"], squared(x - found.output))


def test_importing_needs_torch_alone():
    code = "import sys, surgery.sae.train, surgery.sae.formats, surgery.sae.activations; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {
        "transformers",
        "torchvision",
        "transformer_lens",
        "sae_lens",
        "sparsify",
        "nnsight",
        "datasets",
    }
