"""Batches from rows that hold them: demonstrations and pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError
from surgery.training.sources.base import SOURCES, Source, Update

if TYPE_CHECKING:
    from surgery.training.context import Context


@SOURCES.register("dataset")
@dataclass
class Dataset(Source):
    """Demonstrations or pairs, `batch.rows` of the recipe a step."""

    kind: str = "demonstrations"

    def __post_init__(self) -> None:
        if self.kind not in ("demonstrations", "pairs"):
            raise SurgeryError(f"A data set gives demonstrations or pairs, not '{self.kind}'.")
        self.gives = (self.kind,)

    def draw(self, context: Context) -> list[Update]:
        """The curriculum's next rows, as tokens."""
        rows = context.rows(context.recipe.batch.rows, self.kind)
        return [Update({self.kind: context.encode(rows, self.kind)})]
