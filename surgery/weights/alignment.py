"""Models with different vocabularies, brought into one: their embeddings and heads as if they had one tokenizer.

Rows are aligned by token string, never by position (`checkpoint/token_alignment.py` says which row comes from where);
here the rows are fetched. A merge then sees models of one shape and knows nothing of tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery import anatomy
from surgery.checkpoint.companions import companion_folder
from surgery.checkpoint.reader import Source, locate, read_json
from surgery.checkpoint.vocabulary import Vocabulary, difference
from surgery.errors import SurgeryError
from surgery.weights.recipe import ModelRef, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.checkpoint.token_alignment import Alignment, Donor

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"


@dataclass
class Aligned:
    """The sources with one vocabulary, and what follows for the output's config and tokenizer."""

    sources: list[Source]
    alignment: Alignment
    vocabulary: Vocabulary
    """That of the template, which its configs were written for."""
    config_changes: dict[str, Any]
    notes: list[str]

    @property
    def rewritten(self) -> set[tuple[int, str]]:
        """(source, tensor) of everything whose rows are not as the files have them."""
        wrapped = [(i, source) for i, source in enumerate(self.sources) if isinstance(source, _AlignedSource)]
        return {(i, name) for i, source in wrapped for name in _vocabulary_tensors(source)}

    @contextmanager
    def tokenizer_folder(self) -> Iterator[Path]:
        """Within: a temporary folder that holds the output's tokenizer."""
        from surgery.checkpoint.tokenizer_files import write_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            yield write_tokenizer(self.alignment, folder)

    def generation_config(self, template: Source) -> dict[str, Any] | None:
        """The template's generation config with token ids renumbered; None when it has none."""
        folder = companion_folder(template)
        if not (folder / GENERATION).is_file():
            return None
        config = read_json(folder / GENERATION)
        return config | self.alignment.config_changes(config, self.vocabulary)


def align_sources(recipe: Recipe, refs: Sequence[ModelRef], sources: Sequence[Source], template: int) -> Aligned:
    """All `sources` with the vocabulary that the recipe asks for; `template` is the one whose config is carried on.

    Raises `SurgeryError` when a model has no tokenizer or no embedding to align.
    """
    from surgery.checkpoint.token_alignment import Donor, align  # brings numpy, which few plans need

    assert recipe.tokenizer is not None
    rule = recipe.tokenizer
    number = {ref.identity: i for i, ref in enumerate(refs)}
    vocabularies = [Vocabulary.open(companion_folder(source)) for source in sources]
    heights = [_height(source) for source in sources]
    mode: str | int | Vocabulary = rule.source
    if rule.model is not None:
        same = number.get(rule.model.identity)
        mode = Vocabulary.open(locate(rule.model.path, revision=rule.model.revision)) if same is None else same
    donors: dict[str, Donor | None] = {}
    for token, each in rule.tokens.items():
        if each.kind == "default":
            donors[token] = None
        elif each.kind == "zero":
            donors[token] = Donor(None, force=each.force)
        else:
            assert each.model is not None
            if each.model.identity not in number:
                raise SurgeryError(
                    f"The rule for the token {token!r} takes its row from {each.model}, which is not merged.",
                    hint="Name one of the models.",
                )
            donors[token] = Donor(number[each.model.identity], each.token, each.token_id, each.force)
    alignment = align(
        vocabularies,
        mode,
        base=number[recipe.base.identity] if recipe.base else None,
        rows=heights,
        donors=donors,
        pad_to_multiple_of=rule.pad_to_multiple_of,
    )
    wrapped: list[Source] = [
        source if alignment.identity(i) else _AlignedSource(i, sources, alignment) for i, source in enumerate(sources)
    ]
    borrowed = len(alignment.fills)
    notes = list(alignment.notes)
    if borrowed:
        notes.append(f"{borrowed:,} of {alignment.size:,} vocabulary rows are missing in some model and were borrowed.")
    changes = alignment.config_changes(sources[template].config, vocabularies[template])
    return Aligned(wrapped, alignment, vocabularies[template], changes, notes)


def refuse_other_tokens(refs: Sequence[ModelRef], sources: Sequence[Source]) -> None:
    """Raises `SurgeryError` with the differing tokens when inputs number their tokens differently."""
    folders = [companion_folder(source) / TOKENIZER for source in sources]
    present = [(ref, path) for ref, path in zip(refs, folders, strict=True) if path.is_file()]
    for ref, path in present[1:]:
        if path.read_bytes() == present[0][1].read_bytes():
            continue
        found = difference(Vocabulary.open(present[0][1].parent), Vocabulary.open(path.parent))
        if not found.same_rows:
            raise SurgeryError(
                f"{present[0][0]} and {ref} have different vocabularies: {found}",
                hint="Say what to do: `vocab: base`, `union` or `intersection` (mergekit: tokenizer_source).",
            )


def _vocabulary_tensors(source: Source) -> list[str]:
    """The tensors with a row for each token."""
    found = [anatomy.input_embedding(source.tensors), anatomy.output_head(source.tensors)]
    return [name for name in found if name is not None]


def _height(source: Source) -> int:
    names = _vocabulary_tensors(source)
    if not names:
        raise SurgeryError(f"{source.path} has no token embedding: its vocabulary can't be aligned.")
    return source.tensors[names[0]].rows


class _AlignedSource:
    """One model whose embedding and head have the output's rows, in float32 where rows are borrowed or averaged."""

    def __init__(self, model: int, sources: Sequence[Source], alignment: Alignment) -> None:
        self.model, self._sources, self.alignment = model, sources, alignment
        own = sources[model]
        self.path, self.config = companion_folder(own), own.config
        self._names = [_vocabulary_tensors(source) for source in sources]
        self.tensors = dict(own.tensors)
        for name in self._names[model]:
            info = own.tensors[name]
            self.tensors[name] = replace(info, shape=(alignment.size, *info.shape[1:]))
        self._means: dict[str, Tensor] = {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """As `Source.read`; rows of aligned tensors come as float32, whatever the declared type."""
        if name not in self._names[self.model]:
            return self._sources[self.model].read(name, start, stop)
        import torch

        start, stop, _ = slice(start, stop).indices(self.alignment.size)
        plan = self.alignment.plan(self.model, start, stop)
        own = self._sources[self.model].read(name)
        rows = torch.zeros(max(0, stop - start), *own.shape[1:])
        rows[torch.from_numpy(plan.out)] = own[torch.from_numpy(plan.own)].float()
        for out, model, row in zip(plan.lent_out, plan.lent_model, plan.lent_row, strict=True):
            rows[out] = self._row(name, int(model), int(row))
        for out, parts in plan.means:
            rows[out] = torch.stack([self._row(name, model, row) for model, row in parts]).mean(0)
        if len(plan.padding):
            rows[torch.from_numpy(plan.padding)] = self._mean(name)
        return rows

    def _row(self, name: str, model: int, row: int) -> Tensor:
        """One row of the tensor that plays the same part in another model."""
        names, place = self._names[model], self._names[self.model].index(name)
        return self._sources[model].read(names[min(place, len(names) - 1)], row, row + 1)[0].float()

    def _mean(self, name: str) -> Tensor:
        """The mean of the model's token rows, for padding that no model has."""
        if name not in self._means:
            import torch

            source, known = self._sources[self.model], self.alignment.rows[self.model]
            used = torch.from_numpy(known[known >= 0])
            own = source.read(name)
            parts = [own[part].double().sum(0) for part in used.split(4096)]
            self._means[name] = (torch.stack(parts).sum(0) / max(1, len(used))).float()
        return self._means[name]
