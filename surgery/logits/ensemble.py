"""The algebra of models at the output: weighted sums of log-probabilities, which decode like one model.

    large, tuned, small = member("large"), member("small-tuned", prompt="chat"), member("small")
    ensemble = large + 1.0 * (tuned - small)       # emulated fine-tuning; `rules` has names for the usual ones
    ensemble = ensemble.filtered("plausible", 0.1, on=tuned)
    generate(ensemble, ["How tall is it?"])         # or wherever a `Decoder` is taken: evaluation, beams, search

Equal members meet, so that `base + (tuned - base)` is `tuned` and runs one model. Members of one model share its
weights and, but for different adapters, its forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.decoding.adapter import Adapter
from surgery.errors import SurgeryError
from surgery.logits.combine import Filter, Missing, Mode, combine, normalised
from surgery.logits.lockstep import Encoded, EnsembleState, Reader, readers_of
from surgery.logits.members import Member, Prompt, Style

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import PreTrainedTokenizerBase


def member(
    model: nn.Module | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    prompt: Style = "given",
    name: str | None = None,
    layer: int | Sequence[int] | None = None,
    token_map: dict[Any, Any] | None = None,
    foreign: bool = False,
    adapter: Adapter = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
) -> Ensemble:
    """One model as an ensemble of itself: a model in memory, or whatever `surgery.models.load` takes.

    `prompt` says how it is asked: "given", texts as they are and messages in its chat template; "plain", messages as
    their text; "chat", texts as a user's message; or a function of the prompt, whose text, messages or ids (the
    member's own) are read. One model may be several members: asked otherwise, or by a logit lens. `layer` is that of
    the lens: the index of a block whose stream goes through norm and head, or several of which the one farthest from
    the last speaks. `token_map` is {token of the base: token here} where strings alone don't tell; a `foreign` member
    has a tokenizer that splits text otherwise (experimental, and slow: see `foreign.py`). `adapter` is the name of that
    PEFT adapter of the model which speaks here, or False for none of them, the base; by default those that are active
    when it is asked. `name` is how sums and results call it. `dtype` and `device` are for loading. Raises
    `SurgeryError` for what is no model, for an adapter that it has not, and as loading does.
    """
    from surgery.interop import unwrap
    from surgery.models import load

    if isinstance(model, (str, Path)):
        name = str(model) if name is None else name
        model, own = load(model, dtype, device)
        tokenizer = tokenizer or own
    elif not hasattr(model, "peft_config"):  # an adapter's own module is the one that runs
        model = unwrap(model)
    label = name or getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    label = Path(label).name if Path(label).is_absolute() else label
    label += f"+{adapter}" if adapter and name is None else ""
    layers: Any = tuple(layer) if isinstance(layer, Iterable) else layer
    one = Member(model, tokenizer, prompt, label, layers, token_map or {}, foreign, adapter)
    return Ensemble([(one, 1.0)])


class Ensemble:
    """A weighted sum of members' log-probabilities with at most one token filter: a `surgery.decoding.Decoder`.

    Weights need not sum to 1. The base is the first member of positive weight: its vocabulary is everybody's, what it
    forbids is forbidden. Raises `SurgeryError` for a weight that is not finite, for a base or a filter that speaks of
    no member, and on use when all weights are 0.
    """

    def __init__(
        self,
        terms: Sequence[tuple[Member, float]],
        filter: Filter | None = None,
        base: Member | None = None,
        missing: Missing = "mask",
    ) -> None:
        met: dict[Any, tuple[Member, float]] = {}
        for one, weight in terms:
            if not isinstance(one, Member):
                raise SurgeryError(f"A term is (Member, weight), and not of a {type(one).__name__}.",
                                   hint="Ensembles are added up: 0.5 * a + b.")  # fmt: skip
            if not math.isfinite(weight):
                raise SurgeryError(f"The weight of '{one.name}' is {weight}: weights are finite numbers.")
            first, before = met.get(one.key, (one, 0.0))
            met[one.key] = first, before + float(weight)
        if not met:
            raise SurgeryError("An ensemble has one member or more.")
        if missing not in ("mask", "zero_reward"):
            raise SurgeryError(f"Tokens that a member lacks are 'mask' or 'zero_reward', and not {missing!r}.")
        if base is not None and base.key not in met:
            raise SurgeryError(f"The base '{base.name}' is no member of this ensemble.")
        seen = None
        if filter is not None and filter.on not in ("scores", "base", None):
            seen = _member(filter.on, [m for m, _ in met.values()])
        needed = {m.key for m in (base, seen) if m is not None}
        left = [(m, w) for key, (m, w) in met.items() if w != 0 or key in needed]
        self.terms = left or list(met.values())  # 0 * something is nothing yet: it may be added to something
        if seen is not None and seen.key not in met:
            self.terms.append((seen, 0.0))
        self.filter = filter if filter is None or filter.on == "scores" else replace(filter, on=seen)
        self._base, self.missing = base, missing
        self._whole = False

    # ---- algebra

    def _with(self, terms: Sequence[tuple[Member, float]], other: Ensemble | None = None) -> Ensemble:
        filters = [e.filter for e in (self, other) if e is not None and e.filter is not None]
        if len(filters) > 1:
            raise SurgeryError("Both sides of a sum have a token filter: an ensemble has one.",
                               hint="Filter the sum: (a + b).filtered(...).")  # fmt: skip
        bases = [e._base for e in (self, other) if e is not None and e._base is not None]
        missing = "zero_reward" if "zero_reward" in {self.missing, other.missing if other else ""} else "mask"
        return Ensemble(terms, filters[0] if filters else None, bases[0] if bases else None, missing)  # type: ignore[arg-type]

    def __add__(self, other: Any) -> Ensemble:
        if not isinstance(other, Ensemble):
            return NotImplemented
        return self._with([*self.terms, *other.terms], other)

    def __radd__(self, other: Any) -> Ensemble:
        return self if type(other) is int and other == 0 else NotImplemented  # `sum` begins with 0

    def __sub__(self, other: Any) -> Ensemble:
        if not isinstance(other, Ensemble):
            return NotImplemented
        return self._with([*self.terms, *((m, -w) for m, w in other.terms)], other)

    def __mul__(self, factor: Any) -> Ensemble:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return self._with([(m, factor * w) for m, w in self.terms])

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> Ensemble:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        return self * (1 / factor)

    def __neg__(self) -> Ensemble:
        return self * -1.0

    def __str__(self) -> str:
        text = ""
        for m, weight in self.terms:
            size = "" if abs(weight) == 1 else f"{abs(weight):g}*"
            text += f" {'-' if weight < 0 else '+'} {size}{self.name_of(m)}"
        return text[3:] if text.startswith(" + ") else "-" + text[3:]

    def __repr__(self) -> str:
        if self.filter is None:
            return f"<Ensemble {self}>"
        on = self.filter.on
        seen = self.name_of(on) if isinstance(on, Member) else on or self.name_of(self.base)
        return f"<Ensemble {self}, {self.filter.rule} {self.filter.value:g} on {seen} ({self.filter.mode})>"

    # ---- what it is

    def filtered(
        self, rule: str | Filter, value: float | None = None, *, on: Any = None, mode: Mode = "mask"
    ) -> Ensemble:
        """The same with a token filter: "plausible" (p >= alpha * max p), "nucleus" or "top_k", by alpha, p or k.

        It looks at `on`: a member as `member` gives it (read along where it is in no term), its name or its model,
        "scores" (the composition itself), or None for the base. `mode` "mask" forbids what it leaves out, "zero_reward"
        leaves it the base's probability. Raises `SurgeryError` where there is a filter already, or no such member.
        """
        if self.filter is not None:
            raise SurgeryError(f"There is a token filter already ({self.filter.rule}): an ensemble has one.",
                               hint="Filter what is not filtered yet; of a rule, change its own argument.")  # fmt: skip
        found = rule if isinstance(rule, Filter) else Filter(rule, math.nan if value is None else value, on, mode)
        return Ensemble(self.terms, found, self._base, self.missing)

    def based_on(self, base: Ensemble | Member | str) -> Ensemble:
        """The same with another member as the base."""
        return Ensemble(self.terms, self.filter, _member(base, self.members), self.missing)

    def where_missing(self, missing: Missing) -> Ensemble:
        """The same, tokens that a member lacks forbidden ("mask") or scored by the base alone ("zero_reward")."""
        return Ensemble(self.terms, self.filter, self._base, missing)

    @property
    def members(self) -> list[Member]:
        """All members, the order of every list by member here."""
        return [m for m, _ in self.terms]

    @property
    def weights(self) -> list[float]:
        return [w for _, w in self.terms]

    @property
    def base(self) -> Member:
        """Whose vocabulary it is."""
        return self._base or next((m for m, w in self.terms if w > 0), self.terms[0][0])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's. Raises `SurgeryError` when it has none."""
        if self.base.tokenizer is None:
            raise SurgeryError(f"The base '{self.base.name}' has no tokenizer.", hint="member(model, tokenizer).")
        return self.base.tokenizer

    def name_of(self, one: Member) -> str:
        """A member's name, numbered where two share it."""
        same = [m for m in self.members if m.name == one.name]
        lens = "" if one.layer is None else f"[{one.layer}]"
        at = next((i for i, m in enumerate(same) if m.key == one.key), 0)
        return f"{one.name}{lens}" if len({m.layer for m in same}) == len(same) else f"{one.name}{lens}#{at + 1}"

    # ---- a decoder

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """Every model once."""
        return tuple({id(m.model): m.model for m in self.members}.values())

    @property
    def readers(self) -> list[Reader]:
        """One a model (and adapter); made when first needed, which compares vocabularies and tries the models out."""
        return self._made.readers

    @cached_property
    def _made(self) -> _Made:
        """What decoding needs of this sum, found once."""
        if not any(self.weights):
            raise SurgeryError(f"Nothing is left of this ensemble: all weights are 0 ({self}).")
        places = {one.key: at for at, one in enumerate(self.members)}
        base = places[self.base.key]
        readers, vocabulary = readers_of(self.members, base, self._whole)
        first = next(self.members[0].model.parameters()).device  # where everybody's scores meet
        tables = {at: reader.known for reader in readers for at in reader.index}
        known = [None if (table := tables[at]) is None else table.to(first) for at in range(len(tables))]
        seen = base
        if self.filter is not None and isinstance(self.filter.on, Member):
            seen = places[self.filter.on.key]
        return _Made(readers, vocabulary, base, known, seen)

    def croppable(self) -> Ensemble:
        """The same, with states that can be cropped."""
        found = Ensemble(self.terms, self.filter, self._base, self.missing)
        found._whole = True
        return found

    @property
    def vocabulary(self) -> int:
        """Size of the common vocabulary."""
        return self._made.vocabulary

    @property
    def context(self) -> int | None:
        """The shortest context of a member."""
        return min((r.decoder.context for r in self.readers if r.decoder.context is not None), default=None)

    @property
    def room(self) -> int:
        """How many columns a cache keeps free for tokens to come."""
        return self.readers[0].decoder.room

    @room.setter
    def room(self, columns: int) -> None:
        for reader in self.readers:
            reader.decoder.room = columns

    @property
    def ends(self) -> set[int]:
        """Tokens of the common vocabulary that end a response, for any member."""
        return {end for reader in self.readers for end in reader.ends if end < self.vocabulary}

    def encode(self, prompt: Prompt) -> Encoded:
        """The prompt for every reader and view, in their own tokens."""
        return tuple(reader.encode(prompt, self.base.tokenizer) for reader in self.readers)

    def prefill(
        self, ids: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"]
    ) -> tuple[Float[Tensor, "row vocab"], EnsembleState]:
        """Reads left-padded prompts, ids of the base's vocabulary; the scores of the next token."""
        return self.prefill_encoded(
            [self.encode(row[there.bool()].tolist()) for row, there in zip(ids, mask, strict=True)]
        )

    def prefill_encoded(self, rows: Sequence[Encoded]) -> tuple[Float[Tensor, "row vocab"], EnsembleState]:
        """Reads prompts that `encode` made; the scores of the next token."""
        found = [reader.prefill([row[i] for row in rows]) for i, reader in enumerate(self.readers)]
        views = [len(reader.styles) for reader in self.readers]
        state = EnsembleState([state for _, state in found], views, len(rows))
        return self._scores([told for told, _ in found], state)[:, -1], state

    def step(
        self, tokens: Int[Tensor, " row"], state: EnsembleState
    ) -> tuple[Float[Tensor, "row vocab"], EnsembleState]:
        """Reads one token a row; the scores of the next."""
        return self.read(tokens.unsqueeze(1), state)[:, -1], state

    def read(self, tokens: Int[Tensor, "row pos"], state: EnsembleState) -> Float[Tensor, "row pos vocab"]:
        """Reads several tokens a row and changes `state`; the scores after each of them."""
        told = [reader.read(tokens, part) for reader, part in zip(self.readers, state.parts, strict=True)]
        return self._scores(told, state)

    def _scores(self, told: Sequence[Sequence[Tensor]], state: EnsembleState) -> Tensor:
        by_member: dict[int, Tensor] = {}
        for reader, logits in zip(self.readers, told, strict=True):
            by_member |= {at: reader.values(one) for at, one in zip(reader.index, logits, strict=True)}
        values = [by_member[at].to(by_member[0].device) for at in range(len(self.terms))]
        # Of one member nothing is summed, and what draws from it normalises anyway.
        state.log_probs = values if len(values) == 1 and self.filter is None else [v.log_softmax(-1) for v in values]
        return self.combined(state.log_probs)

    def combined(self, log_probs: Sequence[Float[Tensor, "*row vocab"]]) -> Float[Tensor, "*row vocab"]:
        """The members' log-probabilities as unnormalised scores, filtered."""
        made, weights = self._made, self.weights
        if len(weights) == 1 and self.filter is None and made.known[0] is None:
            return log_probs[0] if weights[0] == 1 else log_probs[0] * weights[0]
        scores = combine(log_probs, weights, made.base, made.known, self.missing)
        if self.filter is None:
            return scores
        seen = normalised(scores) if self.filter.on == "scores" else log_probs[made.seen]
        return self.filter.apply(scores, seen, weights[made.base] * log_probs[made.base])

    def failing(self, state: EnsembleState) -> str | None:
        """Which member said something that is no number, if one did."""
        for one, values in zip(self.members, state.log_probs, strict=False):
            if bool(values.sum().isnan()):  # one pass; -inf among numbers is no NaN
                return self.name_of(one)
        return None


@dataclass(frozen=True)
class _Made:
    readers: list[Reader]
    vocabulary: int
    base: int
    """The base's place among the members."""
    known: list[Tensor | None]
    """By member: which tokens it has."""
    seen: int
    """The member that the filter looks at."""


def _member(thing: Any, members: Sequence[Member]) -> Member:
    """What a filter or a base names: a member, an ensemble of one, or the name or the model of one of `members`."""
    if isinstance(thing, Ensemble):
        if len(thing.terms) != 1:
            raise SurgeryError(f"'{thing}' is not one member.", hint="Name one of the models of the ensemble.")
        return thing.terms[0][0]
    if isinstance(thing, Member):
        return thing
    found = [one for one in members if (thing == one.name if isinstance(thing, str) else thing is one.model)]
    if len(found) != 1:
        told = repr(thing) if isinstance(thing, str) else f"a {type(thing).__name__}"
        raise SurgeryError(
            f"{len(found) or 'No'} members of this ensemble are {told}: one is expected.",
            hint="Give it as `member` does, or by its name: " + ", ".join(one.name for one in members),
        )
    return found[0]
