"""Directions in the residual stream: found as differences of means, added (steering) or taken out (ablation).

    v = steering_vector(model, positive, negative, "resid_pre.6", tokenizer=tokenizer)
    with steer(model, {"resid_pre.6": v}, scale=4.0):
        model.generate(...)
    with ablate_direction(model, v):                 # at everything that writes into the stream
        model.generate(...)

Differences of means: Arditi et al. 2024 (arXiv:2406.11717), Rimsky et al. 2023 (arXiv:2312.06681). Activation addition,
where the two sets are one prompt each and the vectors of its first tokens are added to a prompt's first tokens: Turner
et al. 2023 (arXiv:2308.10248); that is `position="each"` here. Directional ablation: Arditi et al. 2024, section 2.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from surgery.activations.interventions import Call, When, edit, unwrapped
from surgery.activations.passes import run
from surgery.anatomy import Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import Batch, as_batch

Position = int | Literal["mean", "each"]


def steering_vector(
    model: Any,
    positive: Any,
    negative: Any,
    site: str | Site,
    position: Position = -1,
    *,
    tokenizer: Any = None,
    batch_size: int = 16,
) -> Tensor:
    """Mean of a site's value over `positive` prompts minus that over `negative` ones, float32.

    `site` is of one layer: (d_model,) of the stream, (head, d_head) of heads, (d_head,) of one head. `position` is that
    of a token (-1: the last), "mean" averages over a prompt's tokens, "each" keeps them apart, (pos, ...), for as many
    first tokens as every prompt has. The model is left as it was.
    Raises `SurgeryError` for a site of all layers or of attention patterns, and for prompts without such a token.
    """
    model = unwrapped(model)
    where = _one_site(model, site)
    means = [_mean(model, as_batch(p, tokenizer), where, position, batch_size) for p in (positive, negative)]
    length = min(len(mean) for mean in means) if position == "each" else None
    return means[0][:length] - means[1][:length]


def _one_site(model: Any, site: str | Site) -> Site:
    parsed = Site.parse(site)
    found = anatomy_of(model).expand([parsed])
    if len(found) != 1 or parsed.kind == "pattern" or parsed.position is not None:
        raise SurgeryError(f"A direction lies at one site of one layer, and not at '{parsed}'.",
                           hint=f"Write '{parsed.name if parsed.kind != 'pattern' else 'resid_pre'}.3', for one; "
                           "the position is an argument of its own.")  # fmt: skip
    return found[0]


def _mean(model: Any, batch: Batch, site: Site, position: Position, batch_size: int) -> Tensor:
    """The mean over prompts, float32."""
    if position not in ("mean", "each") and not isinstance(position, int):
        raise SurgeryError(f"position={position!r}: expected a number, 'mean' or 'each'.")
    length, total = int(batch.lengths.min()), torch.zeros(())
    if isinstance(position, int) and not -length <= position < length:
        raise SurgeryError(f"There is no token at position {position} in a prompt of {length} tokens.")
    for start in range(0, len(batch), batch_size):
        part = batch.select(slice(start, start + batch_size)).right_padded()
        _, seen = run(model, part, [site], stop=True)
        value = seen[site].float()
        mask = part.mask.to(value.device)
        if position == "each":
            kept = value[:, :length]
        elif position == "mean":
            weights = (mask / mask.sum(1, keepdim=True)).view(*mask.shape, *[1] * (value.dim() - 2))
            kept = (value * weights).sum(1)
        else:
            columns = (part.lengths + position if position < 0 else torch.full_like(part.lengths, position)).to(
                value.device
            )
            kept = value[torch.arange(len(value), device=value.device), columns]
        total = total.to(value.device) + kept.sum(0)
    return total / len(batch)


# ---- adding


@contextmanager
def steer(
    model: Any,
    vectors: Mapping[str | Site, Tensor],
    scale: float = 1.0,
    *,
    positions: Sequence[int] | int | None = None,
    when: When = "always",
    normalised: bool = False,
) -> Iterator[None]:
    """Adds `scale` times a vector at each of the sites, in forward passes and in generation.

    At every token, or only at `positions` (0 the first real token, -1 the newest), in passes that `when` names. A
    vector with one axis more than the site's value of a token, (pos, ...), is added to the first tokens, one each.
    `normalised`: the vector counts by its direction, in units of each token's own value: x + scale * ||x|| * v / ||v||.
    Raises `SurgeryError` for unknown sites, vectors of another shape, and a vector of zeros to be normalised.
    """
    model = unwrapped(model)
    anatomy = anatomy_of(model)
    chosen = [positions] if isinstance(positions, int) else None if positions is None else list(positions)
    edits: dict[str | Site, Any] = {}
    for name, vector in vectors.items():
        site = Site.parse(name)
        if site.kind == "pattern" or site.position is not None:
            raise SurgeryError(
                f"A vector can't be added at '{site}'.", hint="Positions are an argument: positions=[...]."
            )
        anatomy.expand([site])
        shape = _shape(anatomy, site)
        vector = torch.as_tensor(vector)
        if vector.shape not in (shape, (*vector.shape[:1], *shape)):
            raise SurgeryError(f"'{site}': the vector has shape {tuple(vector.shape)}, and {tuple(shape)} is expected.")
        if (each := vector.dim() > len(shape)) and chosen is not None:
            raise SurgeryError("A vector for each of the first tokens has its positions already.")
        if normalised and not bool((vector.flatten(int(each)).norm(dim=-1) > 0).all()):
            raise SurgeryError(f"'{site}': the vector has no direction, all of it is 0.")
        edits[site] = _adder(vector, scale, chosen, each, len(shape), normalised)
    with edit(model, edits, when=when):
        yield


def _shape(anatomy: Any, site: Site) -> tuple[int, ...]:
    """Of a site's value at one token."""
    if site.kind == "stream":
        return (anatomy.d_model,)
    if site.kind == "neurons":
        return (anatomy.d_mlp(site.layer or 0),) if site.head is None else ()
    return (anatomy.d_head,) if site.head is not None else (anatomy.heads_of(site.name), anatomy.d_head)


def _adder(
    vector: Tensor, scale: float, positions: list[int] | None, each: bool, axes: int, normalised: bool
) -> Any:  # fmt: skip
    """The edit that adds one vector."""

    def add(value: Tensor, call: Call) -> Tensor:
        given = vector.to(value.device, torch.float32)
        if each:
            here = call.positions.to(value.device)
            inside = (here >= 0) & (here < len(given))
            added = given[here.clamp(0, len(given) - 1)]
        else:
            inside = torch.zeros(value.shape[:2], dtype=torch.bool, device=value.device)
            for position in positions or []:
                rows, columns = call.at(position)
                inside[rows.to(value.device), columns.to(value.device)] = True
            inside = inside if positions is not None else ~inside
            added = given.expand(value.shape)
        if normalised:
            added = added / _length(added, axes) * _length(value.float(), axes)
        inside = inside.view(*inside.shape, *[1] * axes)
        return torch.where(inside, value.float() + scale * added, value.float()).to(value.dtype)

    return add


def _length(value: Tensor, axes: int) -> Tensor:
    """The Euclidean norm of each token's value, (batch, pos, 1, ...)."""
    return value.abs() if axes == 0 else torch.linalg.vector_norm(value, dim=tuple(range(2, 2 + axes)), keepdim=True)


# ---- taking out


def writers(model: Any) -> list[Site]:
    """The sites of everything that writes into the stream: what enters the first block, and every attention and MLP."""
    anatomy = anatomy_of(unwrapped(model))
    return [Site("resid_pre", 0), *anatomy.expand(["attn_out", "mlp_out"])]


@contextmanager
def ablate_direction(
    model: Any,
    direction: Float[Tensor, "... d_model"],
    sites: Sequence[str | Site] | Literal["all writers"] = "all writers",
    *,
    when: When = "always",
) -> Iterator[None]:
    """Takes the component along `direction` out of the value at each site: x - d d'x with d of length 1.

    With "all writers" the whole stream has no such component any more, at any layer and token, in generation too.
    Several directions, (k, d_model), span a subspace that is taken out. Sites are of the stream, one layer or all.
    Raises `SurgeryError` for sites of another kind, and directions of another width, of zeros, or dependent ones.
    """
    model = unwrapped(model)
    anatomy = anatomy_of(model)
    chosen = writers(model) if isinstance(sites, str) and sites == "all writers" else anatomy.expand(sites)
    if wrong := [site for site in chosen if site.kind != "stream"]:
        raise SurgeryError(f"A direction of the stream is not found at '{wrong[0]}'.",
                           hint="Sites of the stream are resid_pre, resid_post, attn_out, mlp_out, embed.")  # fmt: skip
    basis = _basis(torch.as_tensor(direction), anatomy.d_model)

    def ablate(value: Tensor) -> Tensor:
        rows = basis.to(value.device)
        exact = value.to(rows.dtype) if value.dtype != torch.float64 else value
        rows = rows.to(exact.dtype)
        return (exact - (exact @ rows.T) @ rows).to(value.dtype)

    with edit(model, dict.fromkeys(chosen, ablate), when=when):
        yield


def _basis(direction: Tensor, width: int) -> Tensor:
    """Orthonormal rows (k, d_model), float32, that span the directions."""
    rows = direction.detach().to(torch.float64).reshape(-1, direction.shape[-1] if direction.dim() else 1)
    if direction.dim() not in (1, 2) or rows.shape[1] != width:
        raise SurgeryError(f"A direction has shape ({width},), several ({width} wide) have one a row: found "
                           f"{tuple(direction.shape)}.")  # fmt: skip
    if not bool(torch.isfinite(rows).all()) or int(torch.linalg.matrix_rank(rows)) < len(rows):
        raise SurgeryError("The direction is zero or not finite." if len(rows) == 1 else
                           "The directions are not independent: some are zero, or sums of others.")  # fmt: skip
    return torch.linalg.qr(rows.T).Q.T.float()
