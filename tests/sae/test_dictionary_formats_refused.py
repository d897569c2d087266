"""Dictionaries in other packages' files: what a format can't hold, and what damaged, hostile and newer files do."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dictionary_formats import LATENTS, LIKE, OUT, TINY, D, batch, dictionary, same

from surgery.errors import SurgeryError
from surgery.sae.formats import load, save
from surgery.sae.rules import BatchTopK, Gated, Matryoshka, Standard, TopK


def test_a_transcoder_of_one_width_subtracts_nothing_whatever_its_config_leaves_out(tmp_path):
    mine = dictionary(Standard(), centered=False)
    save(mine, tmp_path / "x", "saelens", metadata=LIKE | {"hook_name_out": "blocks.1.hook_mlp_out"})
    config = json.loads((tmp_path / "x" / "cfg.json").read_text())
    assert config["architecture"] == "transcoder" and config["d_out"] == D
    changed(tmp_path / "x", apply_b_dec_to_input=None)
    same(load(tmp_path / "x")[0], mine, batch(), 0)


# ---- what a format can't hold


@pytest.mark.parametrize(
    ("make", "to", "told"),
    [
        (lambda: dictionary(BatchTopK(k=4), 2 * D, models=2), "saelens", "no crosscoders"),
        (lambda: dictionary(TopK(k=4), d_out=OUT, centered=False), "saelens", "no transcoders with TopK"),
        (lambda: dictionary(Gated(), centered=False, skip=True), "saelens", "no transcoders with Gated"),
        (lambda: dictionary(Standard(), skip=True), "saelens", "no autoencoders with a skip"),
        (lambda: dictionary(Standard()), "sparsify", "no dictionaries with Standard"),
        (lambda: dictionary(BatchTopK(k=4)), "sparsify", "no dictionaries with BatchTopK"),
        (lambda: dictionary(TopK(k=4), d_out=OUT, centered=False), "sparsify", "from a width of 10 to 7"),
        (lambda: dictionary(TopK(k=4), 2 * D, models=2), "sparsify", "no crosscoders"),
        (lambda: dictionary(Standard(), d_out=OUT, centered=False), "dictionary_learning", "no transcoders"),
        (lambda: dictionary(Standard(), skip=True), "dictionary_learning", "no skips"),
        (lambda: dictionary(BatchTopK(k=3.5)), "dictionary_learning", "no k of 3.5"),
        (lambda: dictionary(TopK(k=4), 2 * D, models=2), "dictionary_learning", "no crosscoders with TopK"),
        (lambda: dictionary(Standard()), "sae-lens", "no dictionary format 'sae-lens'"),
    ],
)
def test_what_a_format_cant_hold_is_refused(tmp_path, make, to, told):
    with pytest.raises(SurgeryError, match=told):
        save(make(), tmp_path / "x", to, allow_pickle=True)
    assert not list(tmp_path.iterdir())


def test_pickles_by_flag_alone(tmp_path):
    mine = dictionary(TopK(k=5, by_norm=False))
    with pytest.raises(SurgeryError, match="pickle"):
        save(mine, tmp_path / "x", "dictionary_learning")
    save(mine, tmp_path / "x", "dictionary_learning", allow_pickle=True)
    with pytest.raises(SurgeryError, match="pickled"):
        load(tmp_path / "x")


class Runs:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def test_a_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(dictionary(Standard()), tmp_path / "x", "dictionary_learning", allow_pickle=True)
    for write in (lambda f: torch.save({"bias": Runs()}, f), lambda f: f.write_bytes(pickle.dumps(Runs()))):
        write(tmp_path / "x" / "ae.pt")
        with pytest.raises(SurgeryError, match="can't be read as plain tensors"):
            load(tmp_path / "x", allow_pickle=True)
    assert not (tmp_path / "it-ran").exists()


def test_a_pickle_that_claims_more_than_it_has_is_refused_before_memory_is_taken(tmp_path):
    save(dictionary(Standard()), tmp_path / "x", "dictionary_learning", allow_pickle=True)
    huge = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save({"encoder.weight": huge}, tmp_path / "x" / "ae.pt")
    with pytest.raises(SurgeryError, match="claims 4,398,046,511,104 bytes"):
        load(tmp_path / "x", allow_pickle=True)


# ---- bad folders


def changed(folder, tensors=None, **config):
    """A SAELens folder with some tensors and settings replaced, or, where they are None, left out."""
    weights, settings = folder / "sae_weights.safetensors", folder / "cfg.json"
    for file, values, read, write in (
        (weights, tensors or {}, load_file, lambda v: save_file(v, weights)),
        (settings, config, lambda f: json.loads(f.read_text()), lambda v: settings.write_text(json.dumps(v))),
    ):
        merged = read(file) | values
        write({name: value for name, value in merged.items() if value is not None})


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        ({"b_enc": None}, {}, "no tensor 'b_enc'"),
        ({"b_enc": torch.zeros(LATENTS + 1)}, {}, r"'b_enc' is F32 \[49\]; numbers \[48\]"),
        ({"W_enc": torch.zeros(D, LATENTS, 1)}, {}, "2 dimensions"),
        ({"W_enc": torch.zeros(LATENTS, D)}, {}, "says d_in 10, and the tensors have 48"),
        ({"b_dec": torch.zeros(D, dtype=torch.int64)}, {}, "'b_dec' is I64"),
        ({"b_dec": torch.full((D,), torch.nan)}, {}, "not finite"),
        ({"W_enc": torch.full((D, LATENTS), torch.inf)}, {}, "not finite"),
        ({"log_sigma": torch.zeros(3)}, {}, "unknown here: log_sigma"),
        ({"scaling_factor": torch.full((LATENTS,), 2.0)}, {}, "scaling_factor"),
        ({}, {"d_sae": 10**12}, "says d_sae 1,000,000,000,000"),
        ({}, {"d_in": "10"}, "d_in is '10'; int was expected"),
        ({}, {"d_in": True}, "d_in is 'True'"),
        ({}, {"k": LATENTS + 1}, "can't use 49 of 48"),
        ({}, {"k": -3}, "can't use -3"),
        ({}, {"k": 2.5}, "k is '2.5'; int"),
        ({}, {"architecture": "temporal"}, "no dictionary of the kind 'temporal'"),
        ({}, {"architecture": ["topk"]}, "str was expected"),
        ({}, {"activation_fn": "tanh-relu"}, "its activation is 'tanh-relu'"),
        ({}, {"normalize_activations": "layer_norm"}, "normalised"),
        ({}, {"metadata": {"sae_lens_version": "7.1.0"}}, "written by SAELens 7.1.0; known are versions up to 6"),
        ({}, {"metadata": {"sae_lens_version": "x" * 500}}, "known are versions"),
        ({}, {"metadata": 3}, "dict was expected"),
        ({}, {"apply_b_dec_to_input": "yes"}, "bool was expected"),
        ({}, {"architecture": "gated"}, "no tensor 'b_gate'"),
        ({"threshold": torch.full((LATENTS,), torch.nan)}, {"architecture": "jumprelu"}, "not finite"),
        ({}, {"architecture": "batchtopk"}, "no tensor 'topk_threshold'"),
    ],
)
def test_damaged_folders_of_saelens(tmp_path, tensors, config, told):
    save(dictionary(TopK(k=5)), tmp_path / "x", "saelens")
    changed(tmp_path / "x", tensors, **config)
    with pytest.raises(SurgeryError, match=told):
        load(tmp_path / "x")


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"activation": "groupmax"}, "'groupmax' is unknown"),
        ({"signed": True}, "either sign"),
        ({"num_latents": 7}, "says num_latents 7"),
        ({"num_latents": 0, "expansion_factor": 32}, "expansion_factor"),
        ({"skip_connection": True}, "no tensor 'W_skip'"),
        ({"k": 0}, "can't use 0"),
    ],
)
def test_damaged_folders_of_sparsify(tmp_path, config, told):
    save(dictionary(TopK(k=5)), tmp_path / "x", "sparsify")
    file = tmp_path / "x" / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(SurgeryError, match=told):
        load(tmp_path / "x")


@pytest.mark.parametrize(
    ("make", "tensors", "config", "told"),
    [
        (lambda: BatchTopK(k=4), {"k": torch.tensor(5)}, {}, "says k 4, and the tensors have 5"),
        (lambda: BatchTopK(k=4), {"k": torch.tensor(torch.nan)}, {}, "'k' is not a number"),
        (lambda: BatchTopK(k=4), {"k": torch.tensor(2.5)}, {}, "whole number"),
        (lambda: BatchTopK(k=4), {"threshold": torch.zeros(3)}, {}, "one number was expected"),
        (lambda: BatchTopK(k=4), {"threshold": torch.tensor(torch.nan)}, {}, "not a number"),
        (lambda: BatchTopK(k=4), {}, {"dict_class": "Sparser"}, "of the class 'Sparser'"),
        (lambda: BatchTopK(k=4), {}, {"dict_class": None}, "of the class ''"),
        (lambda: BatchTopK(k=4), {}, {"dict_class": "AutoEncoder"}, "no tensor 'decoder.bias'"),
        (lambda: Matryoshka(k=4, widths=(9,)), {"group_sizes": torch.tensor([9, 9])}, {}, "group_sizes"),
        (lambda: Matryoshka(k=4, widths=(9,)), {"group_sizes": torch.tensor([60, -12])}, {}, "group_sizes"),
    ],
)
def test_damaged_folders_of_dictionary_learning(tmp_path, make, tensors, config, told):
    save(dictionary(make()), tmp_path / "x", "dictionary_learning", allow_pickle=True)
    file, weights = tmp_path / "x" / "config.json", tmp_path / "x" / "ae.pt"
    file.write_text(json.dumps({"trainer": json.loads(file.read_text())["trainer"] | config}))
    torch.save(torch.load(weights, weights_only=True) | tensors, weights)
    with pytest.raises(SurgeryError, match=told):
        load(tmp_path / "x", allow_pickle=True)


@pytest.mark.parametrize(
    ("tensors", "config", "told"),
    [
        ({"decoder.weight": torch.zeros(3, LATENTS, D)}, {}, "numbers"),
        ({"code_normalization_id": torch.tensor(5)}, {}, "for each model apart"),
        ({"code_normalization_id": torch.tensor(9)}, {}, "normalisation '9'"),
        ({}, {"encoder_layers": [1]}, "reads the layers"),
        ({"activation_mean": torch.zeros(2, D), "activation_std": torch.ones(2, D),
          "activation_global_scale": torch.tensor([1.0, 0.0])}, {}, "not above 0"),
    ],
)  # fmt: skip
def test_damaged_crosscoders(tmp_path, tensors, config, told):
    save(dictionary(BatchTopK(k=4), 2 * D, models=2), tmp_path / "x", "dictionary_learning")
    file, weights = tmp_path / "x" / "config.json", tmp_path / "x" / "model.safetensors"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    save_file(load_file(weights) | tensors, weights)
    with pytest.raises(SurgeryError, match=told):
        load(tmp_path / "x")


def test_folders_that_are_none(tmp_path):
    mine = dictionary(TopK(k=5))
    save(mine, tmp_path / "many" / "layers.1", "sparsify")
    for path, told in (
        (tmp_path / "nowhere", "is no folder"),
        (tmp_path / "many" / "layers.1" / "cfg.json", "Give the folder of the file"),
        (tmp_path / "many", r"It has some in layers.1: give one of them"),
        (tmp_path, "sae_weights.safetensors"),
    ):
        with pytest.raises(SurgeryError, match=told):
            load(path)
    save(mine, tmp_path / "two", "saelens")
    (tmp_path / "many" / "layers.1" / "sae.safetensors").rename(tmp_path / "two" / "sae.safetensors")
    with pytest.raises(SurgeryError, match="files of saelens and sparsify"):
        load(tmp_path / "two")
    same(load(tmp_path / "two", "saelens")[0], mine, batch(), TINY)
    with pytest.raises(SurgeryError, match="Did you mean 'saelens'"):
        load(tmp_path / "two", "sealens")
    (tmp_path / "two" / "cfg.json").unlink()
    with pytest.raises(SurgeryError, match=r"has no cfg.json"):
        load(tmp_path / "two", "saelens")


def test_files_that_are_cut_off_or_lead_elsewhere(tmp_path):
    save(dictionary(TopK(k=5)), tmp_path / "x", "saelens")
    file = tmp_path / "x" / "sae_weights.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(SurgeryError, match="cut off"):
        load(tmp_path / "x")
    (tmp_path / "elsewhere.safetensors").write_bytes(whole)
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(SurgeryError, match="outside the folder"):
        load(tmp_path / "x")
    (tmp_path / "x" / "cfg.json").write_text("{" * 2000)
    with pytest.raises(SurgeryError, match="not readable JSON"):
        load(tmp_path / "x")
