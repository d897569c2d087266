"""eai-sparsify: `cfg.json` and `sae.safetensors`; as of 1.3. TopK autoencoders and transcoders of one width.

Keys: encoder.weight (D, d), encoder.bias (D), W_dec (D, d), b_dec (d), W_skip (d, d). A transcoder does not subtract
b_dec from what it reads. ReLU comes before the choice there and after it here: of positive numbers it is the same one.
Written are E, b and D as they are, or, where the choice goes by norms, with these folded (rounded once).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from surgery.errors import SurgeryError
from surgery.sae.formats.files import FORMATS, Config, Files, Format, Stored, refuse
from surgery.sae.formats.parts import Parts
from surgery.sae.rules import TopK


@FORMATS.register("sparsify")
class Sparsify(Format):
    """One folder, named after its place in the model, one dictionary."""

    config: ClassVar[str] = "cfg.json"
    weights: ClassVar[tuple[str, ...]] = ("sae.safetensors",)

    def read(self, folder: Path, *, allow_pickle: bool) -> tuple[Parts, dict[str, Any]]:
        config = Config.read(folder, self.config)
        activation = config.take("activation", str, "topk")
        if activation != "topk" or config.take("signed", bool, False):
            what = f"activation '{activation[:40]}'" if activation != "topk" else "latents of either sign"
            raise SurgeryError(f"{config.where}: {what} is unknown here; known is topk.")
        stored = Stored(folder, self.weights[0])
        latents, d = stored.shape("encoder.weight", 2)
        config.size("d_in", d)
        if config.rest.get("num_latents") == 0:
            del config.rest["num_latents"]
            config.size("expansion_factor", latents // d if latents % d == 0 else -1)
        config.size("num_latents", latents)
        transcoder, skip = config.take("transcode", bool, False), config.take("skip_connection", bool, False)
        parts = Parts(
            TopK(k=config.take("k", int, 32), by_norm=False),
            stored.take("encoder.weight", latents, d),
            stored.take("encoder.bias", latents),
            stored.take("W_dec", latents, d),
            stored.take("b_dec", d),
            stored.take("W_skip", d, d) if skip else None,
            not transcoder,
        )
        stored.finish()
        return parts, config.rest

    def write(self, parts: Parts, metadata: dict[str, Any], *, allow_pickle: bool) -> Files:
        rule = parts.rule
        if type(rule) is not TopK:
            raise refuse(f"dictionaries with {type(rule).__name__}: TopK alone", "eai-sparsify")
        if parts.models > 1:
            raise refuse("crosscoders", "eai-sparsify", "Save it as 'dictionary_learning'.")
        if parts.d_in != parts.d_out:
            raise refuse(f"transcoders from a width of {parts.d_in} to {parts.d_out}", "eai-sparsify")
        parts = parts.folded()
        weights: dict[str, Tensor] = {"encoder.weight": parts.encoder, "encoder.bias": parts.bias,
                                      "W_dec": parts.decoder, "b_dec": parts.b_dec}  # fmt: skip
        if parts.skip is not None:
            weights["W_skip"] = parts.skip
        own = {"activation": "topk", "num_latents": len(parts.encoder), "k": rule.k, "d_in": parts.d_in,
               "skip_connection": parts.skip is not None, "transcode": not parts.centered}  # fmt: skip
        default = {"expansion_factor": max(1, len(parts.encoder) // parts.d_in), "multi_topk": False}
        # whether a training that goes on keeps rows at norm 1
        return {
            self.config: default | {"normalize_decoder": parts.norms_are_one()} | metadata | own,
            self.weights[0]: weights,
        }
