"""The names of places in a forward pass.

| site                     | what it is                                         | shape                         |
|--------------------------|----------------------------------------------------|-------------------------------|
| `embed`                  | output of the token embedding                      | (batch, pos, d_model)         |
| `resid_pre`,`resid_post` | the residual stream before and after a block       | (batch, pos, d_model)         |
| `resid_mid`              | between attention and MLP; not in parallel blocks  | (batch, pos, d_model)         |
| `attn_out`, `mlp_out`    | what attention and MLP add to the stream           | (batch, pos, d_model)         |
| `q`                      | output of the query projection, before any norm    | (batch, pos, head, d_head)    |
| `k`, `v`                 | likewise; one entry a key-value head               | (batch, pos, kv_head, d_head) |
| `scores`, `pattern`      | attention before and after the softmax             | (batch, head, dst, src)       |
| `z`                      | of each head, before the output projection         | (batch, pos, head, d_head)    |
| `mlp_in`                 | what the MLP reads, behind its norm                | (batch, pos, d_model)         |
| `mlp_pre`, `mlp_post`    | neurons before and after the activation (and gate) | (batch, pos, d_mlp)           |
| `final`                  | output of the last norm: what the head reads       | (batch, pos, d_model)         |

Written `name.layer`, `name.layer.head` (for mlp_pre and mlp_post: the neuron), with `@position` behind it: `z.3.2@-1`
is head 2 of layer 3 at the last token. Positions count real tokens: 0 is the first, -1 the last, whatever the padding.
Without a layer all layers are meant. The names of TransformerLens (`blocks.3.attn.hook_z`) are understood too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from surgery.errors import SurgeryError
from surgery.registry import nearest

_STREAM, _HEADS, _PATTERN, _NEURONS = "stream", "heads", "pattern", "neurons"
SITES = {
    "embed": _STREAM, "resid_pre": _STREAM, "resid_mid": _STREAM, "resid_post": _STREAM, "attn_out": _STREAM,
    "mlp_out": _STREAM, "q": _HEADS, "k": _HEADS, "v": _HEADS, "z": _HEADS, "scores": _PATTERN, "pattern": _PATTERN,
    "mlp_in": _STREAM, "mlp_pre": _NEURONS, "mlp_post": _NEURONS, "final": _STREAM,
}  # fmt: skip
"""The kind of value of every site."""
UNLAYERED = ("embed", "final")

_TRANSFORMER_LENS = {
    "hook_resid_pre": "resid_pre", "hook_resid_mid": "resid_mid", "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out", "hook_mlp_out": "mlp_out", "attn.hook_q": "q", "attn.hook_k": "k",
    "attn.hook_v": "v", "attn.hook_z": "z", "attn.hook_pattern": "pattern", "attn.hook_attn_scores": "scores",
    "mlp.hook_pre": "mlp_pre", "mlp.hook_post": "mlp_post",
}  # fmt: skip
_LONG = re.compile(r"blocks\.([0-9]+)\.((?:attn\.|mlp\.)?hook_\w+)")
_OUTSIDE = {"hook_embed": "embed", "embed.hook_out": "embed"}
_OUTSIDE |= {"ln_final.hook_out": "final", "ln_final.hook_normalized": "final"}
_SHORT = re.compile(r"(\w+?)(?:\.([0-9]+|\*)(?:\.([0-9]+))?)?(?:@(-?[0-9]+))?")


@dataclass(frozen=True)
class Site:
    """A place in a forward pass; None means all layers, heads or positions."""

    name: str
    layer: int | None = None
    head: int | None = None
    position: int | None = None

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """The site of a name, short or TransformerLens's. Raises `SurgeryError` with the nearest right name."""
        if isinstance(text, Site):
            return text._possible(text)
        if not isinstance(text, str):
            raise SurgeryError(f"A site is written as text, and this is {type(text).__name__}.", hint="'z.3.2@-1'")
        text = text.strip()
        if text in _OUTSIDE:
            return cls(_OUTSIDE[text])
        if long := _LONG.fullmatch(text):
            if long[2] not in _TRANSFORMER_LENS:
                raise SurgeryError(f"There is no site '{text}'.", hint=nearest(long[2], _TRANSFORMER_LENS))
            return cls(_TRANSFORMER_LENS[long[2]], int(long[1]))
        short = _SHORT.fullmatch(text)
        if short is None or short[1] not in SITES:
            wrong = short[1] if short else text
            raise SurgeryError(f"There is no site '{text}'.", hint=nearest(wrong, SITES))
        numbers = [None if part in (None, "*") else int(part) for part in short.groups()[1:]]
        return cls(short[1], *numbers)._possible(text)

    def _possible(self, text: str | Site) -> Site:
        if self.name not in SITES:
            raise SurgeryError(f"There is no site '{text}'.", hint=nearest(self.name, SITES))
        if self.name in UNLAYERED and self.layer is not None:
            raise SurgeryError(f"'{self.name}' is in no layer, and '{text}' names one.", hint=f"Write '{self.name}'.")
        if self.head is not None and self.kind == _STREAM:
            raise SurgeryError(f"'{self.name}' has no heads, and '{text}' names one.",
                               hint=f"Write '{self.whole}', or a site of heads: q, k, v, z.")  # fmt: skip
        return self

    @property
    def kind(self) -> str:
        """What its value is: stream, heads, pattern or neurons."""
        return SITES[self.name]

    @property
    def whole(self) -> Site:
        """The same site without head and position."""
        return Site(self.name, self.layer)

    def at(self, layer: int) -> Site:
        """The same site in one layer."""
        return replace(self, layer=layer)

    def __str__(self) -> str:
        parts = [self.name]
        if self.layer is not None:
            parts.append(str(self.layer))
        elif self.head is not None:
            parts.append("*")
        if self.head is not None:
            parts.append(str(self.head))
        return ".".join(parts) + ("" if self.position is None else f"@{self.position}")


def lens_name(site: Site) -> str | None:
    """TransformerLens's name of a site of one layer (`blocks.3.hook_resid_post`); None where it has none."""
    names = {ours: theirs for theirs, ours in reversed(_TRANSFORMER_LENS.items())}
    if site.name not in names or site.layer is None:
        return {"embed": "hook_embed", "final": "ln_final.hook_normalized"}.get(site.name)
    return f"blocks.{site.layer}.{names[site.name]}"
