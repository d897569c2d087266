"""SAELens: `cfg.json` and `sae_weights.safetensors`; as of 6.54, and the flat configs before 6.

Keys: W_enc (d, D), W_dec (D, d_out), b_enc (D), b_dec (d_out); gated has b_gate, b_mag, r_mag for b_enc; JumpReLU has
threshold (D); skip transcoders W_skip (d_out, d). Checkpoints of trainings hold W_enc and W_dec before norms are
folded, and of BatchTopK one topk_threshold.

| ours | there | what is rounded |
|---|---|---|
| standard, gated, jumprelu | standard, gated, jumprelu | nothing |
| topk | topk | E, b and D where it goes by norms: these are folded |
| batchtopk, matryoshka | jumprelu, with the running threshold for all | the same, and the threshold |
| standard and jumprelu from one place to another, with and without skip | (jumprelu_)(skip_)transcoder | nothing |
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.checkpoint.header import dtype_code, torch_name
from surgery.errors import SurgeryError
from surgery.sae.formats.files import FORMATS, Config, Files, Format, Stored, refuse, thresholds
from surgery.sae.formats.parts import Parts
from surgery.sae.rules import BatchTopK, Gated, JumpRelu, Matryoshka, Rule, Standard, TopK

VERSION = 6
"""The latest major version whose files are known."""
FLAT = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}
"""How versions before 6 called it."""
SCALER = "activation_scaler.json"
RULES: dict[str, type[Rule]] = {
    "standard": Standard,
    "gated": Gated,
    "topk": TopK,
    "jumprelu": JumpRelu,
    "batchtopk": BatchTopK,
    "matryoshka_batchtopk": Matryoshka,
    "transcoder": Standard,
    "skip_transcoder": Standard,
    "jumprelu_transcoder": JumpRelu,
    "jumprelu_skip_transcoder": JumpRelu,
}
SETTINGS = {
    "l1": "l1_coefficient",
    "l0": "l0_coefficient",
    "bandwidth": "jumprelu_bandwidth",
    "threshold": "jumprelu_init_threshold",
    "aux": "aux_loss_coefficient",
    "rate": "topk_threshold_lr",
}
"""Settings of a training, in the config of its checkpoints."""


@FORMATS.register("saelens")
class SAELens(Format):
    """One folder, one dictionary: an autoencoder or a transcoder."""

    config: ClassVar[str] = "cfg.json"
    weights: ClassVar[tuple[str, ...]] = ("sae_weights.safetensors",)

    def read(self, folder: Path, *, allow_pickle: bool) -> tuple[Parts, dict[str, Any]]:
        config = Config.read(folder, self.config)
        config.rest = {FLAT.get(key, key): value for key, value in config.rest.items()}
        metadata = config.take("metadata", dict, {})
        _known_version(config, metadata)
        kind = _kind(config)
        transcoder = kind.endswith("transcoder")
        stored = Stored(folder, self.weights[0])
        (d_in, latents), (_, d_out) = stored.shape("W_enc", 2), stored.shape("W_dec", 2)
        config.size("d_in", d_in)
        config.size("d_sae", latents)
        config.size("d_out", d_out)
        if "scaling_factor" in stored and bool((stored.take("scaling_factor", latents) != 1).any()):
            raise refuse("place here for its scaling_factor of finetuned latents", "The dictionary")
        rule = _rule(config, kind, latents)
        parts = Parts(
            rule,
            stored.take("W_enc", d_in, latents).T,
            stored.take("b_gate" if isinstance(rule, Gated) else "b_enc", latents),
            stored.take("W_dec", latents, d_out),
            stored.take("b_dec", d_out),
            stored.take("W_skip", d_out, d_in) if "skip" in kind else None,
            config.take("apply_b_dec_to_input", bool, True) and not transcoder,
            extras=_extras(stored, rule, latents),
        )
        stored.finish()
        parts = _normalised(parts, config, folder)
        if config.rest.get("reshape_activations") == "none":
            del config.rest["reshape_activations"]
        for key in ("dtype", "device", "activation_fn", "activation_fn_kwargs", "finetuning_scaling_factor"):
            config.rest.pop(key, None)
        return parts, config.rest | metadata

    def write(self, parts: Parts, metadata: dict[str, Any], *, allow_pickle: bool) -> Files:
        if parts.models > 1:
            raise refuse("crosscoders", "SAELens", "Save it as 'dictionary_learning'.")
        by_threshold = isinstance(parts.rule, BatchTopK)
        if by_threshold:
            metadata = {"training_architecture": type(parts.rule).__name__.lower()} | metadata
        parts = parts.folded()
        kind = _name(parts, metadata)
        weights: dict[str, Tensor] = {"W_enc": parts.encoder.T, "W_dec": parts.decoder, "b_dec": parts.b_dec}
        weights["b_gate" if kind == "gated" else "b_enc"] = parts.bias
        if parts.skip is not None:
            weights["W_skip"] = parts.skip
        if by_threshold:
            weights["threshold"] = torch.full_like(parts.bias, float(parts.extras["threshold"]))
        else:
            weights |= parts.extras
        dtype = torch_name(dtype_code(str(parts.encoder.dtype)))
        # without a version of 6 or later the metadata are passed over there
        metadata = {"sae_lens_version": f"{VERSION}.0.0"} | metadata
        config: dict[str, Any] = {
            "architecture": kind, "d_in": parts.d_in, "d_sae": len(parts.encoder), "dtype": dtype, "device": "cpu",
            "apply_b_dec_to_input": parts.centered, "normalize_activations": "none",
            "reshape_activations": metadata.pop("reshape_activations", "none"), "metadata": metadata,
        }  # fmt: skip
        if kind == "topk" and isinstance(parts.rule, TopK):
            config |= {"k": parts.rule.k, "rescale_acts_by_decoder_norm": False}
        if kind.endswith("transcoder"):
            config["d_out"] = parts.d_out
        return {self.config: config, self.weights[0]: weights}


def _known_version(config: Config, metadata: dict[str, Any]) -> None:
    version = metadata.get("sae_lens_version") or config.rest.get("sae_lens_version") or "6"
    major = re.match(r"(\d{1,9})(\.|$)", str(version))
    if major is None or int(major[1]) > VERSION:
        raise SurgeryError(f"{config.where} was written by SAELens {str(version)[:40]}; known are versions up to "
                           f"{VERSION}.", hint="Save it again with an older SAELens.")  # fmt: skip


def _kind(config: Config) -> str:
    activation, more = config.rest.get("activation_fn") or "relu", config.rest.get("activation_fn_kwargs") or {}
    kind = config.take("architecture", str, "standard")
    if activation == "topk" and isinstance(more, dict):
        kind = "topk" if kind == "standard" else kind
        config.rest.setdefault("k", more.get("k"))
    elif activation != "relu":
        raise SurgeryError(f"{config.where}: its activation is {str(activation)[:40]!r}; known are relu and topk.")
    if kind not in RULES:
        raise SurgeryError(f"{config.where}: there is no dictionary of the kind '{kind[:80]}' here.",
                           hint="Known are " + ", ".join(RULES) + ".")  # fmt: skip
    return kind


def _rule(config: Config, kind: str, latents: int) -> Rule:
    rule = RULES[kind]
    names = {each.name for each in fields(rule)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name in SETTINGS.keys() & names:
        given = config.take(SETTINGS[name], float)
        values |= {} if given is None else {name: given}
    warmup = config.take("l0_warm_up_steps" if rule is JumpRelu else "l1_warm_up_steps", int)
    values |= {} if warmup is None or "warmup" not in names else {"warmup": warmup}
    if issubclass(rule, TopK):
        values["k"] = config.take("k", float if issubclass(rule, BatchTopK) else int, 100)
        # the default for inference; configs of trainings always say it
        values["by_norm"] = config.take("rescale_acts_by_decoder_norm", bool, False)
    if rule is Matryoshka:
        widths = config.take("matryoshka_widths", list, [])
        if not all(isinstance(width, int) for width in widths):
            raise SurgeryError(f"{config.where}: matryoshka_widths are no list of whole numbers.")
        values["widths"] = tuple(width for width in widths if width != latents)
    return rule(**values)


def _extras(stored: Stored, rule: Rule, latents: int) -> dict[str, Tensor]:
    if isinstance(rule, Gated):
        return {name: stored.take(name, latents) for name in ("r_mag", "b_mag")}
    if isinstance(rule, JumpRelu) and "log_threshold" in stored:
        return {"threshold": stored.take("log_threshold", latents).exp()}
    if isinstance(rule, JumpRelu):
        return {"threshold": thresholds(stored.take("threshold", latents, allow="inf"))}
    if isinstance(rule, BatchTopK):
        return {"threshold": thresholds(torch.tensor(stored.scalar("topk_threshold"), dtype=torch.float64))}
    return {}


def _normalised(parts: Parts, config: Config, folder: Path) -> Parts:
    """With what is done to activations beforehand put into the tensors."""
    how = config.rest.pop("normalize_activations", None) or "none"
    how = "expected_average_only_in" if how is True else how
    if how == "none":
        return parts
    if how == "expected_average_only_in" and (folder / SCALER).is_file() and parts.d_in == parts.d_out:
        scale = Config.read(folder, SCALER).take("scaling_factor", float)
        if scale is not None and scale > 0:
            return parts.scaled(torch.tensor(scale, dtype=parts.encoder.dtype))
    raise SurgeryError(
        f"{config.where}: it reads activations that are normalised ('{str(how)[:40]}'), and how is not in the folder.",
        hint="Save it with SAELens' save_inference_model, which puts the scale into the weights.",
    )


def _name(parts: Parts, metadata: dict[str, Any]) -> str:
    rule = parts.rule
    base = "jumprelu" if isinstance(rule, BatchTopK) else next(n for n, r in RULES.items() if r is type(rule))
    if parts.d_in == parts.d_out and parts.skip is None and (parts.centered or "hook_name_out" not in metadata):
        return base
    if base not in ("standard", "jumprelu"):
        raise refuse(f"transcoders with {type(rule).__name__}", "SAELens")
    if parts.centered:
        raise refuse("autoencoders with a skip", "SAELens", "Train it with centered=False, as a transcoder.")
    return ("jumprelu_" if base == "jumprelu" else "") + ("transcoder" if parts.skip is None else "skip_transcoder")
