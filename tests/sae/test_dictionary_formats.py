"""Dictionaries in other packages' files: what comes back, what is folded, how it is written.

What is refused: test_dictionary_formats_refused.py. What the packages themselves write and compute:
test_dictionary_formats_peers.py.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import SurgeryError
from surgery.sae import formats
from surgery.sae.dictionary import Dictionary
from surgery.sae.formats import load, save
from surgery.sae.rules import BatchTopK, Gated, JumpRelu, Matryoshka, Standard, TopK

D, OUT, LATENTS, ROWS = 10, 7, 48, 64
LIKE = {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_post"}
TINY = 1e-6
"""Of the largest number, where tensors were rounded on their way into a file."""


def batch(width=D, rows=ROWS):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(5))


def dictionary(rule, d_in=D, **more):
    """Random numbers, decoder rows of norms that differ, thresholds above 0."""
    found, generator = Dictionary(d_in, LATENTS, rule, **more), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in found.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
            if name == "threshold":
                p.abs_()
        if isinstance(rule, BatchTopK):
            found.threshold.fill_(0.7)
    return found


def results(found, x):
    """Codes in units of the decoder's norms, which folding does not change, and what is rebuilt."""
    with torch.no_grad():
        return found.codes(x).dense() * found.norms(), found(x)


def same(one, other, x, tolerance):
    for a, b in zip(results(one, x), results(other, x), strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    assert torch.equal(results(one, x)[0] > 0, results(other, x)[0] > 0)


# name: format, dictionary, whether every number is kept
HELD = {
    "saelens-standard": ("saelens", lambda: dictionary(Standard()), True),
    "saelens-standard-uncentred": ("saelens", lambda: dictionary(Standard(), centered=False), True),
    "saelens-gated": ("saelens", lambda: dictionary(Gated()), True),
    "saelens-jumprelu": ("saelens", lambda: dictionary(JumpRelu()), True),
    "saelens-topk": ("saelens", lambda: dictionary(TopK(k=5, by_norm=False)), True),
    "saelens-topk-by-norm": ("saelens", lambda: dictionary(TopK(k=5)), False),
    "saelens-batchtopk": ("saelens", lambda: dictionary(BatchTopK(k=4.5, by_norm=False)), True),
    "saelens-batchtopk-by-norm": ("saelens", lambda: dictionary(BatchTopK(k=4.5)), False),
    "saelens-matryoshka": ("saelens", lambda: dictionary(Matryoshka(k=4.0, widths=(9, 20))), False),
    "saelens-transcoder": ("saelens", lambda: dictionary(Standard(), d_out=OUT, centered=False), True),
    "saelens-skip": ("saelens", lambda: dictionary(Standard(), d_out=OUT, centered=False, skip=True), True),
    "saelens-jumprelu-skip": ("saelens", lambda: dictionary(JumpRelu(), d_out=OUT, centered=False, skip=True), True),
    "saelens-batchtopk-transcoder": ("saelens", lambda: dictionary(BatchTopK(k=4.0), d_out=OUT, centered=False), False),
    "sparsify-topk": ("sparsify", lambda: dictionary(TopK(k=5, by_norm=False)), True),
    "sparsify-topk-by-norm": ("sparsify", lambda: dictionary(TopK(k=5)), False),
    "sparsify-transcoder": ("sparsify", lambda: dictionary(TopK(k=5, by_norm=False), centered=False), True),
    "sparsify-skip": ("sparsify", lambda: dictionary(TopK(k=5, by_norm=False), skip=True), True),
    "sparsify-skip-transcoder": (
        "sparsify",
        lambda: dictionary(TopK(k=5, by_norm=False), skip=True, centered=False),
        True,
    ),
    "dl-standard": ("dictionary_learning", lambda: dictionary(Standard()), True),
    "dl-standard-uncentred": ("dictionary_learning", lambda: dictionary(Standard(), centered=False), True),
    "dl-gated": ("dictionary_learning", lambda: dictionary(Gated()), True),
    "dl-gated-uncentred": ("dictionary_learning", lambda: dictionary(Gated(), centered=False), False),
    "dl-jumprelu": ("dictionary_learning", lambda: dictionary(JumpRelu(), centered=False), True),
    "dl-jumprelu-centred": ("dictionary_learning", lambda: dictionary(JumpRelu()), False),
    "dl-topk": ("dictionary_learning", lambda: dictionary(TopK(k=5, by_norm=False)), True),
    "dl-topk-by-norm": ("dictionary_learning", lambda: dictionary(TopK(k=5)), False),
    "dl-batchtopk": ("dictionary_learning", lambda: dictionary(BatchTopK(k=4.0)), False),
    "dl-matryoshka": ("dictionary_learning", lambda: dictionary(Matryoshka(k=4, widths=(9, 20), by_norm=False)), True),
    "crosscoder-l1": ("dictionary_learning", lambda: dictionary(Standard(), 2 * D, models=2, centered=False), True),
    "crosscoder-l1-centred": ("dictionary_learning", lambda: dictionary(Standard(), 3 * D, models=3), False),
    "crosscoder": ("dictionary_learning", lambda: dictionary(BatchTopK(k=4), 2 * D, models=2, centered=False), True),
    "crosscoder-by-value": (
        "dictionary_learning",
        lambda: dictionary(BatchTopK(k=4, by_norm=False), 2 * D, models=2, centered=False),
        True,
    ),
}


@pytest.mark.parametrize("name", HELD)
def test_what_is_saved_comes_back(tmp_path, name):
    """Max difference 0 where nothing is folded; else 1e-6 of the largest number, and the same latents in use."""
    to, make, exact = HELD[name]
    mine = make()
    before = {n: p.clone() for n, p in mine.state_dict().items()}
    save(mine, tmp_path / "x", to, metadata=LIKE, allow_pickle=True)
    assert all(torch.equal(p, before[n]) for n, p in mine.state_dict().items())
    found, metadata = load(tmp_path / "x", allow_pickle=True)
    assert metadata.items() >= LIKE.items()
    same(found, mine, batch(mine.d_in), 0 if exact else TINY)
    assert (found.d_in, found.d_out, found.models) == (mine.d_in, mine.d_out, mine.models)
    if exact and type(found.rule) is type(mine.rule):
        for key, value in mine.state_dict().items():
            close = {"rtol": 1e-7, "atol": 0} if key == "threshold" else {"rtol": 0, "atol": 0}  # a float32 there
            torch.testing.assert_close(found.state_dict()[key], value, **close)
        assert found.is_centered == mine.is_centered
    save(found, tmp_path / "y", to, metadata=metadata, allow_pickle=True)
    for file in (tmp_path / "x").iterdir():
        if file.suffix != ".pt":  # whose bytes name the file
            again = (tmp_path / "y" / file.name).read_bytes()
            assert again == file.read_bytes() or (file.name == "model.safetensors" and not exact)


def test_norms_are_folded_and_a_threshold_of_the_batch_stays_one_number(tmp_path):
    mine = dictionary(BatchTopK(k=4.0))
    save(mine, tmp_path / "x", "saelens")
    stored, norms = load_file(tmp_path / "x" / "sae_weights.safetensors"), mine.norms().detach()
    torch.testing.assert_close(stored["W_dec"].norm(dim=1), torch.ones(LATENTS), rtol=TINY, atol=0)
    torch.testing.assert_close(stored["W_enc"], (mine.encoder * norms[:, None]).T.detach(), rtol=TINY, atol=0)
    torch.testing.assert_close(stored["b_enc"], (mine.bias * norms).detach(), rtol=TINY, atol=0)
    assert torch.equal(stored["threshold"], torch.full((LATENTS,), 0.7))  # of h times norms, as it was
    config = json.loads((tmp_path / "x" / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    assert config["metadata"]["sae_lens_version"] == "6.0.0"  # without one the metadata are passed over there


def test_latents_without_a_direction_are_not_used_after_folding(tmp_path):
    mine = dictionary(TopK(k=40))
    with torch.no_grad():
        mine.decoder[3] = 0
    save(mine, tmp_path / "x", "saelens")
    found, _ = load(tmp_path / "x")
    assert not found.encoder[3].any() and not found.decoder.isnan().any()
    assert not found.codes(batch()).dense()[:, 3].any()
    with torch.no_grad():
        torch.testing.assert_close(found(batch()), mine(batch()), rtol=0, atol=1e-5)


def test_thresholds_below_zero_are_those_of_a_relu(tmp_path):
    """The packages take the ReLU first; a value below 0 never passes, whatever the threshold."""
    mine = dictionary(JumpRelu())
    save(mine, tmp_path / "x", "saelens")
    file = tmp_path / "x" / "sae_weights.safetensors"
    stored = load_file(file)
    stored["threshold"] = -stored["threshold"]
    stored["threshold"][5] = torch.inf
    save_file(stored, file)
    found, _ = load(tmp_path / "x")
    f = found.codes(batch()).dense()
    h = (batch() - mine.b_dec) @ mine.encoder.T + mine.bias
    h[:, 5] = 0
    torch.testing.assert_close(f, h.relu().detach())


def test_a_scale_of_activations_is_folded_into_everything_that_depends_on_it(tmp_path):
    """Of a checkpoint of a training: E, D, b_dec, the threshold (of values times norms). Upstream was wrong 3 times."""
    mine = dictionary(BatchTopK(k=4.0))
    tensors = {"W_enc": mine.encoder.T, "b_enc": mine.bias, "W_dec": mine.decoder, "b_dec": mine.b_dec}
    save(mine, tmp_path / "x", "saelens")
    stored = {n: t.detach().contiguous().clone() for n, t in tensors.items()} | {"topk_threshold": mine.threshold}
    save_file(stored, tmp_path / "x" / "sae_weights.safetensors")
    config = {"architecture": "batchtopk", "d_in": D, "d_sae": LATENTS, "k": 4.0, "topk_threshold_lr": 0.02,
              "rescale_acts_by_decoder_norm": True, "normalize_activations": "expected_average_only_in"}  # fmt: skip
    (tmp_path / "x" / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(SurgeryError, match="normalised"):
        load(tmp_path / "x")
    (tmp_path / "x" / "activation_scaler.json").write_text('{"scaling_factor": 2.5}')
    found, _ = load(tmp_path / "x")
    assert found.rule == BatchTopK(k=4.0, rate=0.02)
    with torch.no_grad():
        torch.testing.assert_close(found(batch()), mine(batch() * 2.5) / 2.5)
        assert torch.equal(found.codes(batch()).dense() > 0, mine.codes(batch() * 2.5).dense() > 0)


@pytest.mark.parametrize("weighed", ["CROSSCODER", "SAE", "MIXED", "NONE"])
def test_what_is_done_to_activations_beforehand_is_folded(tmp_path, weighed):
    """x - mean, times a scale for each model (here far apart), undone on the way out by scale + 1e-8, in float64."""
    mine = dictionary(BatchTopK(k=4), 2 * D, models=2, centered=False)
    save(mine, tmp_path / "x", "dictionary_learning")
    file = tmp_path / "x" / "model.safetensors"
    mean, scale = batch(2 * D, rows=1).view(2, D), torch.tensor([1e-4, 3.0])
    number = torch.tensor(["CROSSCODER", "SAE", "MIXED", "NONE"].index(weighed) + 1)
    stored = load_file(file) | {"activation_mean": mean, "activation_std": torch.ones(2, D)}
    stored |= {"activation_global_scale": scale, "code_normalization_id": number, "threshold": torch.tensor(1.5)}
    save_file(stored, file)
    found, _ = load(tmp_path / "x")
    x = mean + batch(2 * D).view(ROWS, 2, D) / scale[:, None]
    w = {name: value.double() for name, value in stored.items()}
    scale, each = w["activation_global_scale"][:, None], w["decoder.weight"].norm(dim=2).sum(0)
    whole = w["decoder.weight"].norm(dim=(0, 2))
    weights = {"CROSSCODER": each, "SAE": whole, "MIXED": whole + 0.1 * each, "NONE": torch.ones(LATENTS)}[weighed]
    h = torch.einsum("nld,ldf->nf", (x.double() - w["activation_mean"]) * scale, w["encoder.weight"])
    h = (h + w["encoder.bias"]).relu()
    f = h * (h * weights > 1.5)
    y = (torch.einsum("nf,lfd->nld", f, w["decoder.weight"]) + w["decoder.bias"]) / (scale + 1e-8) + mean
    with torch.no_grad():
        codes, output = found.codes(x.flatten(1)).dense(), found(x.flatten(1)).view(ROWS, 2, D)
    assert torch.equal(codes > 0, f > 0) and f.any() and (h > 0).sum() > (f > 0).sum()
    for model in range(2):  # each by its own scale
        assert (output - y)[:, model].abs().max() <= 1e-5 * y[:, model].abs().max()


def test_numbers_of_16_bits_become_float32_and_of_64_stay(tmp_path):
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
        mine = dictionary(TopK(k=5, by_norm=False)).to(dtype)
        out = save(mine, tmp_path / str(dtype), "sparsify")
        found, _ = load(out)
        assert found.encoder.dtype == wanted and torch.equal(found.encoder, mine.encoder.to(wanted))


def test_codes_can_be_trained_further(tmp_path):
    save(dictionary(TopK(k=5, by_norm=False)), tmp_path / "x", "sparsify")
    found, _ = load(tmp_path / "x")
    found.trained(batch()).output.square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in found.parameters())


def test_old_flat_configs_and_the_smallest_one(tmp_path):
    mine = dictionary(TopK(k=5, by_norm=False))
    save(mine, tmp_path / "x", "saelens")
    for config in (
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "hook_point": "blocks.1.hook_resid_post",
         "hook_point_layer": 1, "normalize_activations": False},
        {"architecture": "topk", "k": 5, "metadata": {"hook_name": "blocks.1.hook_resid_post"}},
    ):  # fmt: skip
        (tmp_path / "x" / "cfg.json").write_text(json.dumps(config))
        found, metadata = load(tmp_path / "x")
        assert metadata["hook_name"] == LIKE["hook_name"] and "k" not in metadata
        same(found, mine, batch(), 0)


# ---- writing


def test_nothing_is_overwritten_without_force_and_nothing_is_left_behind(tmp_path):
    mine = dictionary(TopK(k=5))
    save(mine, tmp_path / "x", "saelens")
    with pytest.raises(SurgeryError, match="exists already"):
        save(mine, tmp_path / "x", "sparsify")
    save(mine, tmp_path / "x", "sparsify", force=True)
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["cfg.json", "sae.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    mine = dictionary(TopK(k=5))
    save(mine, tmp_path / "x", "saelens")
    before = (tmp_path / "x" / "cfg.json").read_bytes()
    with pytest.raises(SurgeryError, match="metadata can't be written as JSON"):
        save(mine, tmp_path / "x", "saelens", metadata={"model": object()}, force=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats.files, "_write_tensors", full)
    with pytest.raises(SurgeryError, match="No space left"):
        save(mine, tmp_path / "x", "saelens", force=True)
    assert (tmp_path / "x" / "cfg.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
