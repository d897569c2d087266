"""What stands in for the value of a site: a dictionary's reconstruction, or noise as long as its error.

    with edit(model, {"resid_post.2": stand_in(dictionary)}):
        model.generate(...)

| gradient | forward | backward |
|---|---|---|
| none | D(x) | nothing |
| straight | D(x) | as if D(x) were x |
| through | D(x) | D's own |

A reconstruction is computed in float32 whatever the model's type: in fewer bits its error grows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.activations.interventions import capture
from surgery.anatomy import anatomy_of
from surgery.errors import SurgeryError
from surgery.models import untouched
from surgery.registry import Registry
from surgery.sae.dictionary import Dictionary

Stand = Callable[[Tensor, int], Tensor]
"""What stands in for rows (n, width) in optimizer step `step`: the same when asked again, as checkpointing does."""
GRADIENTS: Registry[Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]] = Registry("gradient")


@dataclass(frozen=True, eq=False)
class Noise:
    """Rows displaced in random directions, each by the length of the dictionary's error at that row."""

    dictionary: Dictionary
    seed: int = 0

    def __call__(self, rows: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed((self.seed << 32) + step)
        direction = torch.randn(rows.shape, generator=generator).to(rows.device)
        error = (self.dictionary(rows) - rows).norm(dim=-1, keepdim=True)
        return rows + error * direction / direction.norm(dim=-1, keepdim=True)


@GRADIENTS.register("none")
@torch.no_grad()
def _none(rows: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
    return by(rows)


@GRADIENTS.register("straight")
def _straight(rows: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
    return rows + (_none(rows, by) - rows).detach()


@GRADIENTS.register("through")
def _through(rows: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
    return by(rows)


def stand_in(by: Dictionary | Stand, gradient: str = "none", step: int = 0) -> Callable[[Tensor], Tensor]:
    """An edit for `surgery.activations.edit`: a value (..., width) of any type, replaced in float32.

    `edit(model, {"resid_post.2": stand_in(dictionary)})` holds in generation too: a token's codes are its own.
    """
    rule = GRADIENTS.lookup(gradient)
    change: Callable[[Tensor], Tensor] = by if isinstance(by, Dictionary) else lambda rows: by(rows, step)

    def replaced(value: Tensor) -> Tensor:
        return rule(value.float().reshape(-1, value.shape[-1]), change).view(value.shape)

    return replaced


def in_float32(by: Any, device: torch.device) -> Any:
    """A dictionary, or what stands on one, in float32 on the model's device: itself where it is."""
    if isinstance(by, Noise):
        return Noise(in_float32(by.dictionary, device), by.seed)
    if not isinstance(by, Dictionary) or all(p.dtype == torch.float32 and p.device == device for p in by.parameters()):
        return by
    return copy.deepcopy(by).to(device).float().requires_grad_(False)


def check_site(model: Any, by: Any, site: str | None) -> None:
    """Raises `SurgeryError` when the dictionary can't stand in there: no site, several, another width."""
    if site is None:
        raise SurgeryError("A dictionary needs a site to stand in at.", hint="resid_post.2")
    places = anatomy_of(model).expand([site])
    if len(places) != 1:
        raise SurgeryError(f"'{site}' is {len(places)} places, and a dictionary stands in at one.", hint=f"{places[0]}")
    with untouched(model), capture(model, [site]) as seen:
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    width = seen[site].shape[-1]
    own = getattr(by, "dictionary", by)
    if isinstance(own, Dictionary) and (own.d_in, own.d_out) != (width, width):
        raise SurgeryError(f"The dictionary reads {own.d_in} numbers and gives {own.d_out}; '{site}' of the target has "
                           f"{width}.", hint="Source and target need one width.")  # fmt: skip
