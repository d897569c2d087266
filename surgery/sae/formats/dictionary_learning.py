"""dictionary_learning (0.1) and its fork for crosscoders: `config.json` and `ae.pt` or `model.safetensors`.

`ae.pt` is a pickle: read, and written, by flag alone, and read as plain tensors. Beware: decoder.weight of autoencoders
is (d, D), of crosscoders (L, D, d), their encoder.weight (D, d) and (L, d, D); W_enc and W_dec are (d, D) and (D, d).

| ours | there | what is rounded |
|---|---|---|
| standard | AutoEncoder, or AutoEncoderNew where it is not centred | nothing |
| gated | GatedAutoEncoder (centred) | nothing; b where it was not centred |
| jumprelu | JumpReluAutoEncoder (not centred) | nothing; b where it was centred |
| topk, batchtopk | AutoEncoderTopK, BatchTopKSAE (centred) | E, b, D: norms are folded; threshold |
| matryoshka | MatryoshkaBatchTopKSAE (centred) | the same |
| standard and batchtopk of several models | CrossCoder, BatchTopKCrossCoder (not centred) | b where it was centred |

A threshold of -1 says there that none was found yet, and lets every positive number pass, as 0 does here. What the fork
does to activations beforehand (x - mean, times a scale for each model) is put into the tensors: such a dictionary reads
activations as they are, and norms of its decoder are those of activations as they are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.sae.formats.files import FORMATS, Config, Files, Format, Stored, refuse, thresholds
from surgery.sae.formats.parts import Parts
from surgery.sae.rules import BatchTopK, Gated, JumpRelu, Matryoshka, Rule, Standard, TopK

PACKAGE = "dictionary_learning"
PICKLE, SAFE, NOTES = "ae.pt", "model.safetensors", "metadata.json"
MEAN, STD, SCALE = "activation_mean", "activation_std", "activation_global_scale"
CODE_NORMS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
"""How a crosscoder of the fork weighs codes for the choice; stored as their numbers from 1 on."""
TINY = 1e-8
"""What the fork adds to a scale before it divides by it."""


@FORMATS.register("dictionary_learning")
class DictionaryLearning(Format):
    """One folder, one dictionary; its class is named in the config."""

    config: ClassVar[str] = "config.json"
    weights: ClassVar[tuple[str, ...]] = (PICKLE, SAFE)

    def finds(self, folder: Path) -> bool:
        return super().finds(folder) and (folder / self.config).is_file()

    def read(self, folder: Path, *, allow_pickle: bool) -> tuple[Parts, dict[str, Any]]:
        config = Config.read(folder, self.config)
        trainer = Config(config.take("trainer", dict, {}), config.where)
        config.rest = trainer.rest | config.rest
        name = SAFE if (folder / SAFE).is_file() else PICKLE
        stored = Stored(folder, name, allow_pickle=allow_pickle)
        kind = config.take("dict_class", str) or _class(stored)
        if kind not in READ:
            raise SurgeryError(f"{config.where}: there is no dictionary of the class '{kind[:80]}' here.",
                               hint="Known are " + ", ".join(READ) + ".")  # fmt: skip
        parts = READ[kind](stored, config)
        parts = _normalised(parts, stored)
        stored.finish()
        config.size("activation_dim", parts.d_in // parts.models)
        config.size("dict_size", len(parts.encoder))
        config.size("num_layers", parts.models)
        notes = Config.read(folder, NOTES).rest if (folder / NOTES).is_file() else {}
        return parts, {key: value for key, value in config.rest.items() if value is not None} | notes

    def write(self, parts: Parts, metadata: dict[str, Any], *, allow_pickle: bool) -> Files:
        if parts.d_in != parts.d_out or parts.skip is not None:
            raise refuse("transcoders" if parts.skip is None else "skips", PACKAGE)
        if parts.models > 1:
            return _crosscoder_files(parts, metadata)
        if not allow_pickle:
            raise SurgeryError(
                f"{PACKAGE} keeps autoencoders as a pickle ({PICKLE}).",
                hint="Pass allow_pickle=True to write one, or save it as 'saelens', which is safetensors.",
            )
        kind, weights = _weights(parts.folded())
        buffer = {"buffer": metadata.pop("buffer")} if "buffer" in metadata else {}
        trainer = metadata | {"dict_class": kind, "activation_dim": parts.d_in, "dict_size": len(parts.encoder)}
        if isinstance(parts.rule, TopK):
            trainer["k"] = int(parts.rule.k)
        return {self.config: {"trainer": trainer} | buffer, PICKLE: weights}


# ---- reading


def _class(stored: Stored) -> str:
    """The class of a folder of the fork, whose config does not name it; "" where it can't be told."""
    encoder = stored.source.tensors.get(stored.names.get("encoder.weight", ""))
    if encoder is not None and len(encoder.shape) == 3:
        return "BatchTopKCrossCoder" if "k" in stored else "CrossCoder"
    return "BatchTopKSAE" if "k" in stored and MEAN in stored else ""


def _linear(stored: Stored, config: Config) -> Parts:
    """AutoEncoder, and AutoEncoderNew, whose decoder has a bias of its own."""
    latents, d = stored.shape("encoder.weight", 2)
    centered = "bias" in stored
    return Parts(
        Standard(),
        stored.take("encoder.weight", latents, d),
        stored.take("encoder.bias", latents),
        stored.take("decoder.weight", d, latents).T,
        stored.take("bias" if centered else "decoder.bias", d),
        centered=centered,
    )


def _gated(stored: Stored, config: Config) -> Parts:
    latents, d = stored.shape("encoder.weight", 2)
    return Parts(
        Gated(),
        stored.take("encoder.weight", latents, d),
        stored.take("gate_bias", latents),
        stored.take("decoder.weight", d, latents).T,
        stored.take("decoder_bias", d),
        extras={"r_mag": stored.take("r_mag", latents), "b_mag": stored.take("mag_bias", latents)},
    )


def _jumprelu(stored: Stored, config: Config) -> Parts:
    threshold = thresholds(stored.take("threshold", stored.shape("W_enc", 2)[1], allow="inf"))
    return replace(_plain(stored, JumpRelu()), centered=False, extras={"threshold": threshold})


def _matryoshka(stored: Stored, config: Config) -> Parts:
    (groups,) = stored.shape("group_sizes", 1)
    sizes = stored.integers("group_sizes", groups)
    config.rest.pop("group_sizes", None)
    widths = tuple(int(width) for width in sizes.cumsum(0))
    latents = stored.shape("W_enc", 2)[1]
    if widths[-1] != latents or int(sizes.min()) < 1:
        raise SurgeryError(f"{stored.file}: group_sizes {sizes.tolist()[:20]} are not those of {latents:,} latents.")
    rule = Matryoshka(k=_k(stored, config), by_norm=False, widths=widths[:-1])
    return replace(_plain(stored, rule), extras=_threshold(stored))


def _plain(stored: Stored, rule: Rule) -> Parts:
    d, latents = stored.shape("W_enc", 2)
    return Parts(
        rule,
        stored.take("W_enc", d, latents).T,
        stored.take("b_enc", latents),
        stored.take("W_dec", latents, d),
        stored.take("b_dec", d),
    )


def _top_k(stored: Stored, config: Config) -> Parts:
    """AutoEncoderTopK, whose threshold is not used unless it is asked for."""
    if "threshold" in stored:
        stored.scalar("threshold")
    return _by_k(stored, TopK(k=_k(stored, config), by_norm=False))


def _batch_top_k(stored: Stored, config: Config) -> Parts:
    return replace(_by_k(stored, BatchTopK(k=_k(stored, config), by_norm=False)), extras=_threshold(stored))


def _by_k(stored: Stored, rule: Rule) -> Parts:
    latents, d = stored.shape("encoder.weight", 2)
    return Parts(
        rule,
        stored.take("encoder.weight", latents, d),
        stored.take("encoder.bias", latents),
        stored.take("decoder.weight", d, latents).T,
        stored.take("b_dec", d),
    )


def _crosscoder(stored: Stored, config: Config) -> Parts:
    """CrossCoder and BatchTopKCrossCoder: activations side by side, model after model."""
    models, d, latents = stored.shape("encoder.weight", 3)
    layers = config.take("encoder_layers", list)
    if layers not in (None, list(range(models))):
        raise SurgeryError(f"{config.where}: its encoder reads the layers {str(layers)[:80]} alone; all are needed.")
    parts = Parts(
        Standard(),
        stored.take("encoder.weight", models, d, latents).permute(2, 0, 1).reshape(latents, models * d),
        stored.take("encoder.bias", latents),
        stored.take("decoder.weight", models, latents, d).permute(1, 0, 2).reshape(latents, models * d),
        stored.take("decoder.bias", models, d).reshape(-1),
        centered=False,
        models=models,
    )
    how = _code_norm(stored, config)
    sae, both = (config.take(f"code_normalization_alpha_{which}", float) for which in ("sae", "cc"))
    if "k" not in stored:
        return parts
    rule = BatchTopK(k=_k(stored, config), by_norm=how == "CROSSCODER")
    if how == "DECOUPLED":
        raise SurgeryError(f"{stored.file}: latents that are chosen for each model apart are unknown here.")
    if how in ("SAE", "MIXED"):
        weights = torch.linalg.vector_norm(parts.decoder, dim=1)
        if how == "MIXED":
            weights = (1.0 if sae is None else sae) * weights + (0.1 if both is None else both) * parts.norms()
        if bool((weights < 0).any()):
            raise SurgeryError(f"{config.where}: its weights of codes are below 0.")
        parts = parts.weighed(weights)
    return replace(parts, rule=rule, extras=_threshold(stored))


def _code_norm(stored: Stored, config: Config) -> str:
    named = config.take("code_normalization", str, CODE_NORMS[0]).upper()
    if "code_normalization_id" in stored:
        number = stored.whole("code_normalization_id")
        named = CODE_NORMS[number - 1] if 0 < number <= len(CODE_NORMS) else str(number)
    if named not in CODE_NORMS:
        raise SurgeryError(f"{config.where}: the code normalisation '{named[:40]}' is unknown here.")
    return named


def _k(stored: Stored, config: Config) -> int:
    k = stored.whole("k") if "k" in stored else config.take("k", int, 0)
    config.size("k", k)
    return k


def _threshold(stored: Stored) -> dict[str, Tensor]:
    return {"threshold": thresholds(torch.tensor(stored.scalar("threshold"), dtype=torch.float64))}


def _normalised(parts: Parts, stored: Stored) -> Parts:
    """With x - mean, times a scale, put into the tensors, where the file has them (and they are not NaN)."""
    if "target_rms" in stored:
        stored.left.discard("target_rms")  # the scale was made of it
    if MEAN not in stored:
        return parts
    each = (parts.models,) if parts.models > 1 else ()
    shape = (*each, parts.d_in // parts.models)
    mean, std = (stored.take(name, *shape, allow="nan") for name in (MEAN, STD))
    scale = stored.take(SCALE, *each, allow="nan")
    if mean.isnan().any() or std.isnan().any():
        return parts
    if not bool((scale > 0).all()):
        raise SurgeryError(f"{stored.file}: {SCALE} is not above 0.")
    return parts.scaled(scale, mean.reshape(-1), tiny=TINY)


READ = {
    "AutoEncoder": _linear,
    "AutoEncoderNew": _linear,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "CrossCoder": _crosscoder,
    "BatchTopKCrossCoder": _crosscoder,
}

# ---- writing


def _weights(parts: Parts) -> tuple[str, dict[str, Tensor]]:
    """The class there, and its tensors."""
    rule = parts.rule
    if isinstance(rule, Standard) and not parts.centered:
        return "AutoEncoderNew", _names(parts, "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    if isinstance(rule, Standard):
        return "AutoEncoder", _names(parts, "encoder.weight", "encoder.bias", "decoder.weight", "bias")
    if isinstance(rule, JumpRelu):
        return "JumpReluAutoEncoder", _names(parts.recentered(False)) | dict(parts.extras)
    parts = parts.recentered(True)
    if isinstance(rule, Gated):
        extras = {"r_mag": parts.extras["r_mag"], "mag_bias": parts.extras["b_mag"]}
        return "GatedAutoEncoder", extras | _names(
            parts, "encoder.weight", "gate_bias", "decoder.weight", "decoder_bias"
        )
    if isinstance(rule, Matryoshka):
        edges = torch.tensor([0, *rule.widths, len(parts.encoder)])
        return "MatryoshkaBatchTopKSAE", _names(parts) | _chosen(parts) | {"group_sizes": edges.diff()}
    names = _names(parts, "encoder.weight", "encoder.bias", "decoder.weight", "b_dec")
    return "BatchTopKSAE" if isinstance(rule, BatchTopK) else "AutoEncoderTopK", names | _chosen(parts)


def _names(parts: Parts, encoder: str = "W_enc", bias: str = "b_enc", decoder: str = "W_dec", b_dec: str = "b_dec"
           ) -> dict[str, Tensor]:  # fmt: skip
    """Both matrices lie the other way round by their two ways of being called."""
    plain = encoder == "W_enc"
    return {encoder: parts.encoder.T if plain else parts.encoder, bias: parts.bias,
            decoder: parts.decoder if plain else parts.decoder.T, b_dec: parts.b_dec}  # fmt: skip


def _chosen(parts: Parts) -> dict[str, Tensor]:
    rule = parts.rule
    assert isinstance(rule, TopK)
    if rule.k != int(rule.k):
        raise refuse(f"k of {rule.k:g}: it is a whole number there", PACKAGE)
    threshold = float(parts.extras["threshold"]) if "threshold" in parts.extras else 0.0
    return {"k": torch.tensor(int(rule.k), dtype=torch.int32), "threshold": torch.tensor(threshold or -1.0)}


def _crosscoder_files(parts: Parts, metadata: dict[str, Any]) -> Files:
    rule, models, latents = parts.rule, parts.models, len(parts.encoder)
    if type(rule) not in (Standard, BatchTopK):
        raise refuse(f"crosscoders with {type(rule).__name__}: Standard and BatchTopK alone", PACKAGE)
    parts, d = parts.recentered(False), parts.d_in // models
    by_norm = isinstance(rule, Standard) or (isinstance(rule, BatchTopK) and rule.by_norm)
    norm = "CROSSCODER" if by_norm else "NONE"
    nothing = torch.full((models, d), torch.nan)
    weights = {
        "encoder.weight": parts.encoder.view(latents, models, d).permute(1, 2, 0),
        "encoder.bias": parts.bias,
        "decoder.weight": parts.decoder.view(latents, models, d).permute(1, 0, 2),
        "decoder.bias": parts.b_dec.view(models, d),
        "code_normalization_id": torch.tensor(CODE_NORMS.index(norm) + 1),
        "target_rms": torch.tensor(1.0), MEAN: nothing, STD: nothing, SCALE: torch.ones(models),
    }  # fmt: skip
    config: dict[str, Any] = {
        "activation_dim": d,
        "dict_size": latents,
        "num_layers": models,
        "code_normalization": norm,
    }
    if isinstance(rule, BatchTopK):
        weights |= _chosen(parts)
        config["k"] = int(rule.k)
    # the fork hands all that is in the config to the class, so that metadata need a file of their own
    files: Files = {"config.json": config, SAFE: weights}
    return files | ({NOTES: metadata} if metadata else {})
