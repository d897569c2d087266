"""Our own: `dictionary.json` and `dictionary.safetensors`. Bit for bit, with the rule and its settings for training.

    {"kind": "dictionary", "version": 1, "rule": {"batchtopk": {"k": 32.0, ...}}, "centered": true, "models": 1,
     "metadata": {...}}

Keys: encoder (D, d_in), bias (D), decoder (D, d_out), b_dec (d_out), skip (d_out, d_in), and those of the rule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from surgery.errors import SurgeryError
from surgery.sae.formats.files import FORMATS, Config, Files, Format, Stored
from surgery.sae.formats.parts import Parts
from surgery.sae.recipe import rule_of
from surgery.sae.rules import RULES

VERSION = 1


@FORMATS.register("surgery")
class Own(Format):
    """One folder, one dictionary."""

    config: ClassVar[str] = "dictionary.json"
    weights: ClassVar[tuple[str, ...]] = ("dictionary.safetensors",)

    def read(self, folder: Path, *, allow_pickle: bool) -> tuple[Parts, dict[str, Any]]:
        config = Config.read(folder, self.config)
        kind, version = config.take("kind", str, ""), config.take("version", int, 0)
        if kind != "dictionary" or version != VERSION:
            raise SurgeryError(f"{config.where} is version {version} of '{kind}'; this program reads version {VERSION} "
                               "of 'dictionary'.", hint="A newer model-surgery wrote it: update.")  # fmt: skip
        try:
            rule = rule_of(config.take("rule", dict, {}))
        except SurgeryError as error:
            raise SurgeryError(f"{config.where}: {error.problem}", hint=error.hint) from None
        stored = Stored(folder, self.weights[0])
        latents, d_in = stored.shape("encoder", 2)
        d_out = stored.shape("decoder", 2)[1]
        centered, models = config.take("centered", bool, True), config.take("models", int, 1)
        if models < 1:
            raise SurgeryError(f"{config.where}: models is {models}; a dictionary reads one or more.")
        if centered and d_in != d_out:
            raise SurgeryError(f"{stored.file}: the encoder reads {d_in:,} numbers and the decoder gives {d_out:,}.",
                               hint="The config says that it rebuilds what it reads: it is damaged.")  # fmt: skip
        extras = {}
        for name, value in rule.extras(1).items():
            shape = stored.shape(name, value.ndim)
            if shape not in ((), (latents,)):
                raise SurgeryError(f"{stored.file}: '{name}' is {list(shape)}, and there are {latents:,} latents.")
            extras[name] = stored.take(name, *shape, allow="inf")
        parts = Parts(
            rule,
            stored.take("encoder", latents, d_in),
            stored.take("bias", latents),
            stored.take("decoder", latents, d_out),
            stored.take("b_dec", d_out),
            stored.take("skip", d_out, d_in) if "skip" in stored else None,
            centered,
            models,
            extras,
        )
        stored.finish()
        return parts, config.take("metadata", dict, {})

    def write(self, parts: Parts, metadata: dict[str, Any], *, allow_pickle: bool) -> Files:
        name = next(name for name, kind in RULES.items() if kind is type(parts.rule))
        config = {"kind": "dictionary", "version": VERSION, "rule": {name: vars(parts.rule)},
                  "centered": parts.centered, "models": parts.models, "metadata": metadata}  # fmt: skip
        weights = {"encoder": parts.encoder, "bias": parts.bias, "decoder": parts.decoder, "b_dec": parts.b_dec}
        weights |= dict(parts.extras) | ({} if parts.skip is None else {"skip": parts.skip})
        return {self.config: config, self.weights[0]: weights}
