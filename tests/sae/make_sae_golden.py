"""What other packages write and compute, stored: dictionaries in their own files, inputs, codes and outputs.

    python tests/sae/make_sae_golden.py make saelens sparsify dictionary_learning
    PYTHONPATH=FORK python tests/sae/make_sae_golden.py make crosscoder
    python tests/sae/make_sae_golden.py run FAMILY FOLDER...     # what it computes of x.safetensors in each folder
    python tests/sae/make_sae_golden.py steps FILE               # steps of SAELens's trainer: golden/steps.safetensors

To be run where sae-lens 6.54.12, eai-sparsify 1.3.3 and dictionary-learning 0.1.0 are installed (their pins and ours
exclude each other), FORK being science-of-finetuning/dictionary_learning. nnsight need not be there.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
D, OUT, LATENTS, ROWS = 6, 5, 20, 12
LIKE = {"model_name": "tiny", "hook_name": "blocks.1.hook_resid_post"}
NOT_TRAINED = {"device": "cpu", "layer": 1, "lm_name": "tiny", "lr": 1e-4}


def filled(module: Any, seed: int) -> Any:
    """Random numbers everywhere; thresholds above 0; decoder rows of norms that differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            numbers = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * numbers.abs() if name == "threshold" else 0.5 * numbers)
    return module


def rows(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(9))


def without_nnsight() -> None:
    """Imported by dictionary_learning for models, which are not needed here."""
    try:
        import nnsight  # noqa: F401
    except ImportError:
        stub: Any = types.ModuleType("nnsight")
        stub.LanguageModel = object
        sys.modules["nnsight"] = stub


# ---- what they compute


def run_saelens(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    print(sae.cfg.architecture(), sae.cfg.metadata.hook_name)
    return sae.encode(x), sae(x)


def run_sparsify(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)
    values, index, _ = coder.encode(x)
    return torch.zeros(len(x), coder.num_latents).scatter(1, index, values), coder(x).sae_out


def run_dictionary_learning(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    without_nnsight()
    from dictionary_learning.dictionary import AutoEncoder
    from dictionary_learning.utils import load_dictionary

    found, config = load_dictionary(str(folder), "cpu")
    if config["trainer"]["dict_class"] == "AutoEncoder":  # as it is stored
        found = AutoEncoder.from_pretrained(str(folder / "ae.pt"), normalize_decoder=False)
    return found.encode(x), found(x)


def run_crosscoder(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    without_nnsight()
    from dictionary_learning import BatchTopKCrossCoder, BatchTopKSAE, CrossCoder

    config = json.loads((folder / "config.json").read_text())
    kind = (BatchTopKCrossCoder if "k" in config else CrossCoder) if "num_layers" in config else BatchTopKSAE
    found = kind.from_pretrained(str(folder), from_hub=True)
    return found.encode(x), found(x)


RUN = {"saelens": run_saelens, "sparsify": run_sparsify, "dictionary_learning": run_dictionary_learning,
       "crosscoder": run_crosscoder}  # fmt: skip

# ---- what they write


def make_saelens() -> dict[str, Any]:
    import sae_lens as s
    from sae_lens.saes.sae import SAEMetadata

    size = {"d_in": D, "d_sae": LATENTS}
    out = {**size, "d_out": OUT, "apply_b_dec_to_input": False}

    def plain(kind: Any, config: Any, **more: Any) -> Any:
        return filled(kind(config(**more, metadata=SAEMetadata(**LIKE))), 1).save_model

    def trained(kind: Any, config: Any, **more: Any) -> Any:
        found = filled(kind(config(**size, **more, metadata=SAEMetadata(**LIKE))), 1)
        if hasattr(found, "topk_threshold"):
            found.topk_threshold.fill_(0.7)
        return found

    def flat(folder: Path) -> None:
        """As versions before 6 had it."""
        plain(s.TopKSAE, s.TopKSAEConfig, **size, k=4)(folder)
        config = {**size, "dtype": "float32", "device": "cpu", "activation_fn_str": "topk",
                  "activation_fn_kwargs": {"k": 4}, "apply_b_dec_to_input": True, "normalize_activations": "none",
                  "hook_name": LIKE["hook_name"], "hook_layer": 1, "model_name": "tiny", "context_size": 128,
                  "sae_lens_training_version": "3.20.0", "finetuning_scaling_factor": False}  # fmt: skip
        (folder / "cfg.json").write_text(json.dumps(config))

    def minimal(folder: Path) -> None:
        plain(s.TopKSAE, s.TopKSAEConfig, **size, k=4)(folder)
        config = {"architecture": "topk", **size, "k": 4, "dtype": "float32", "device": "cpu",
                  "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
                  "rescale_acts_by_decoder_norm": False, "metadata": {"hook_name": LIKE["hook_name"]}}  # fmt: skip
        (folder / "cfg.json").write_text(json.dumps(config))

    def scaled(folder: Path) -> None:
        """A checkpoint of a training on scaled activations, and what SAELens itself makes of it at the end."""
        kind, config = s.BatchTopKTrainingSAE, s.BatchTopKTrainingSAEConfig
        found = trained(kind, config, k=3.0, normalize_activations="expected_average_only_in")
        found.save_model(folder)
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 1.7, "has_whitening": False}))
        found.fold_activation_norm_scaling_factor(1.7)
        found.save_inference_model(folder / "folded")

    topk = (s.TopKTrainingSAE, s.TopKTrainingSAEConfig)
    batch = (s.BatchTopKTrainingSAE, s.BatchTopKTrainingSAEConfig)
    nested = (s.MatryoshkaBatchTopKTrainingSAE, s.MatryoshkaBatchTopKTrainingSAEConfig)
    return {
        "standard": plain(s.StandardSAE, s.StandardSAEConfig, **size),
        "standard-uncentred": plain(s.StandardSAE, s.StandardSAEConfig, **size, apply_b_dec_to_input=False),
        "gated": plain(s.GatedSAE, s.GatedSAEConfig, **size),
        "topk": plain(s.TopKSAE, s.TopKSAEConfig, **size, k=4),
        "topk-by-norm": plain(s.TopKSAE, s.TopKSAEConfig, **size, k=4, rescale_acts_by_decoder_norm=True),
        "jumprelu": plain(s.JumpReLUSAE, s.JumpReLUSAEConfig, **size),
        "transcoder": plain(s.Transcoder, s.TranscoderConfig, **out),
        "skip_transcoder": plain(s.SkipTranscoder, s.SkipTranscoderConfig, **out),
        "jumprelu_transcoder": plain(s.JumpReLUTranscoder, s.JumpReLUTranscoderConfig, **out),
        "jumprelu_skip_transcoder": plain(s.JumpReLUSkipTranscoder, s.JumpReLUSkipTranscoderConfig, **out),
        "topk-trained": trained(*topk, k=4).save_inference_model,
        "topk-checkpoint": trained(*topk, k=4).save_model,
        "batchtopk-trained": trained(*batch, k=3.0).save_inference_model,
        "batchtopk-checkpoint": trained(*batch, k=3.0).save_model,
        "matryoshka-trained": trained(*nested, k=3.0, matryoshka_widths=[5, 11, LATENTS]).save_inference_model,
        "matryoshka-checkpoint": trained(*nested, k=3.0, matryoshka_widths=[5, 11, LATENTS]).save_model,
        "flat": flat,
        "minimal": minimal,
        "scaled-checkpoint": scaled,
    }


FROM = {"batchtopk-checkpoint": "batchtopk-trained", "matryoshka-checkpoint": "matryoshka-trained",
        "topk-checkpoint": "topk-trained", "scaled-checkpoint": "scaled-checkpoint/folded"}  # fmt: skip
"""Checkpoints of trainings are no models there: they compute what the model made of them computes."""


def make_sparsify() -> dict[str, Any]:
    from sparsify import SparseCoder, SparseCoderConfig

    def coder(**more: Any) -> Any:
        config = SparseCoderConfig(num_latents=LATENTS, k=4, normalize_decoder=False, **more)
        return filled(SparseCoder(D, config), 2).save_to_disk

    return {
        "topk": coder(),
        "transcoder": coder(transcode=True),
        "skip": coder(skip_connection=True),
        "skip_transcoder": coder(transcode=True, skip_connection=True),
    }


def make_dictionary_learning() -> dict[str, Any]:
    without_nnsight()
    from dictionary_learning import dictionary as d
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    def stored(found: Any, threshold: float | None = None, **more: Any) -> Any:
        filled(found, 3)
        if threshold is not None:
            found.threshold.fill_(threshold)

        def save(folder: Path) -> None:
            folder.mkdir(parents=True)
            trainer = {"dict_class": type(found).__name__, "activation_dim": D, "dict_size": LATENTS, **more}
            (folder / "config.json").write_text(
                json.dumps({"trainer": NOT_TRAINED | trainer, "buffer": {"ctx_len": 8}})
            )
            torch.save(found.state_dict(), folder / "ae.pt")

        return save

    return {
        "autoencoder": stored(d.AutoEncoder(D, LATENTS)),
        "autoencoder-new": stored(d.AutoEncoderNew(D, LATENTS)),
        "gated": stored(d.GatedAutoEncoder(D, LATENTS)),
        "jumprelu": stored(d.JumpReluAutoEncoder(D, LATENTS)),
        "topk": stored(AutoEncoderTopK(D, LATENTS, 4), 0.6, k=4),
        "batchtopk": stored(BatchTopKSAE(D, LATENTS, 4), 0.6, k=4),
        "batchtopk-unset": stored(BatchTopKSAE(D, LATENTS, 4), k=4),
        "matryoshka": stored(MatryoshkaBatchTopKSAE(D, LATENTS, 4, [5, 6, LATENTS - 11]), 0.6, k=4,
                             group_sizes=[5, 6, LATENTS - 11]),
    }  # fmt: skip


def make_crosscoder() -> dict[str, Any]:
    without_nnsight()
    from dictionary_learning import BatchTopKCrossCoder, BatchTopKSAE, CrossCoder

    generator = torch.Generator().manual_seed(4)

    def stored(kind: Any, *sizes: int, threshold: float | None = None, **more: Any) -> Any:
        found = filled(kind(D, LATENTS, *sizes, **more), 4)
        if threshold is not None:
            found.threshold.fill_(threshold)
        return found.save_pretrained

    def normal(*shape: int) -> dict[str, Tensor]:
        mean = torch.randn(*shape, generator=generator)
        return {"activation_mean": mean, "activation_std": 0.5 + torch.rand(*shape, generator=generator)}

    batch = BatchTopKCrossCoder
    return {
        "l1": stored(CrossCoder, 2),
        "batchtopk": stored(batch, 2, k=4, threshold=1.0),
        "batchtopk-three": stored(batch, 3, k=4, threshold=1.0),
        "batchtopk-none": stored(batch, 2, k=4, threshold=0.4, code_normalization="NONE"),
        "batchtopk-sae": stored(batch, 2, k=4, threshold=0.6, code_normalization="SAE"),
        "batchtopk-mixed": stored(batch, 2, k=4, threshold=0.8, code_normalization="MIXED"),
        "batchtopk-normalised": stored(batch, 2, k=4, threshold=1.0, target_rms=3.0, **normal(2, D)),
        "l1-normalised": stored(CrossCoder, 2, target_rms=3.0, **normal(2, D)),
        "sae-normalised": stored(BatchTopKSAE, k=4, threshold=0.5, target_rms=3.0, **normal(D)),
    }


MAKE = {"saelens": make_saelens, "sparsify": make_sparsify, "dictionary_learning": make_dictionary_learning,
        "crosscoder": make_crosscoder}  # fmt: skip


def make(family: str) -> None:
    cases = MAKE[family]()
    for name, write in cases.items():
        write(GOLDEN / family / name)
    for name in cases:
        folder = GOLDEN / family / name
        x = rows(D)
        if family == "crosscoder" and not name.startswith("sae"):
            x = rows(3 if name.endswith("three") else 2, D)
        f, y = RUN[family](GOLDEN / family / FROM.get(name, name), x) if family == "saelens" else RUN[family](folder, x)
        save_file({"x": x, "f": f.detach().contiguous(), "y": y.detach().contiguous()}, folder / "expected.safetensors")


# ---- how SAELens trains

STEPS, BATCH = 4, 48


def trainings() -> dict[str, Any]:
    import sae_lens as s

    size = {"d_in": D, "d_sae": LATENTS}
    topk, batch = (s.TopKTrainingSAE, s.TopKTrainingSAEConfig), (s.BatchTopKTrainingSAE, s.BatchTopKTrainingSAEConfig)
    nested = (s.MatryoshkaBatchTopKTrainingSAE, s.MatryoshkaBatchTopKTrainingSAEConfig)
    jump = {"jumprelu_init_threshold": 0.1, "jumprelu_bandwidth": 0.2, "l0_coefficient": 0.05}
    made: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "topk": (*topk, {"k": 4}),
        "topk-plain": (*topk, {"k": 4, "rescale_acts_by_decoder_norm": False}),
        "topk-dead": (*topk, {"k": 1, "aux_loss_coefficient": 0.5}),
        "batchtopk": (*batch, {"k": 3.0}),
        "batchtopk-dead": (*batch, {"k": 0.5}),
        "matryoshka": (*nested, {"k": 3.0, "matryoshka_widths": [5, 11, LATENTS]}),
        "standard": (s.StandardTrainingSAE, s.StandardTrainingSAEConfig, {"l1_coefficient": 0.3}),
        "gated": (s.GatedTrainingSAE, s.GatedTrainingSAEConfig, {"l1_coefficient": 0.3}),
        "jumprelu": (s.JumpReLUTrainingSAE, s.JumpReLUTrainingSAEConfig, jump),
    }
    return {name: kind(config(**size, **more)) for name, (kind, config, more) in made.items()}


def steps(file: Path) -> None:
    """Weights at the beginning, the first step's clipped gradients, weights after it and at the end, and losses."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    batches = torch.randn(STEPS, BATCH, D, generator=torch.Generator().manual_seed(7))
    found = {"rows": batches}
    for name, sae in trainings().items():
        filled(sae, 6)
        config = SAETrainerConfig(
            total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr=3e-4, lr_end=3e-4,
            dead_feature_window=1 if name.endswith("dead") else 1000,
        )  # fmt: skip
        trainer, losses = SAETrainer(config, sae, iter([])), []

        def keep(when: str, name: str = name, sae: Any = sae) -> None:
            for key, tensor in (sae.state_dict()).items():
                found[f"{name}/{when}/{key}"] = tensor.detach().clone()

        keep("begin")
        for step, rows in enumerate(batches):
            with torch.enable_grad():
                losses.append(trainer.step(rows).loss.detach())
            trainer.n_training_steps += 1
            if step == 0:
                keep("first")
                for key, parameter in sae.named_parameters():
                    found[f"{name}/gradient/{key}"] = trainer.optimizer.state[parameter]["exp_avg"] / 0.1
        keep("last")
        found[f"{name}/losses"] = torch.stack(losses)
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, file)


def main(what: str, *names: str) -> None:
    if what == "steps":
        steps(Path(names[0]))
        return
    if what == "make":
        for family in names:
            make(family)
        return
    family, *folders = names
    for folder in map(Path, folders):
        f, y = RUN[family](folder, load_file(folder / "x.safetensors")["x"])
        save_file({"f": f.detach().contiguous(), "y": y.detach().contiguous()}, folder / "peer.safetensors")


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
