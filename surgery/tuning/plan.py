"""What a recipe says under `tuning:`, as objects.

    tuning: lift                                            # with the usual budget, 5 %
    tuning: {lift: {density: 0.05, rank: 32, refresh: 100}}
    tuning: {half: {level: category, refresh: 200}}
    tuning: {delta: {sibling: tiny-chain, density: 0.01}}
    tuning: {lottery: {density: 0.01}}                      # LT-SFT: train all, choose what moved most, train again
    tuning: {lora: {rank: 8}}
    tuning: {corda: {rank: 8, mode: kpm, data: {task: facts}}}
    tuning: chosen.safetensors                              # a selection that is made already (`surgery tune select`)

Under the name of a selection stand its own options, the budget (`density`, `count`, `lora_rank`, `scope`), `modules`,
and what `Sparse` has besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from math import prod
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.registry import Registry, nearest
from surgery.tuning.nuclear import NuclearNorm
from surgery.tuning.selection import SELECTORS, Budget, Round, Scored, Selection, Selector, choose_by, targets
from surgery.tuning.selection.evidence import Evidence, Loss

DENSITY = 0.05
"""The budget where a recipe names a selection and no budget: LIFT's."""


class Expected(NamedTuple):
    """What a selection will be of, in numbers."""

    moving: int
    placed: int
    """Those that need their place kept: not of parameters that move whole."""
    largest: int
    """Of the largest parameter whose dense gradient passes through memory; 0 where none is dense for a moment only."""

    @classmethod
    def of(cls, selection: Selection) -> Expected:
        """Of a selection that is there."""
        scattered = [n for n, where in selection.places.items() if isinstance(where, Tensor)]
        placed = sum(selection.counted(n) for n, where in selection.places.items() if where is not None)
        return cls(selection.count, placed, max((prod(selection.shapes[n]) for n in scattered), default=0))


@dataclass(frozen=True)
class Sparse:
    """A selection that a run makes, and makes anew every `refresh` steps (0: once).

    `batches` are the updates that gradients or inputs are looked at on: the run's own next ones. `ages` as in
    `SparseAdamW`; `nuclear` is the weight of SaRA's nuclear-norm term.
    """

    selector: Selector
    budget: Budget
    modules: tuple[str, ...] | None = None
    refresh: int = 0
    batches: int = 4
    sibling: Any = None
    ages: Literal["entry", "optimizer"] = "entry"
    nuclear: float = 0.0

    def __post_init__(self) -> None:
        NuclearNorm(self.nuclear)
        _at_least(0, refresh=self.refresh)
        _at_least(1, batches=self.batches)

    @property
    def name(self) -> str:
        """The selection's."""
        return next(n for n, kind in SELECTORS.items() if kind is type(self.selector))

    @property
    def reads(self) -> bool:
        """Whether only the weights tell how many numbers that are."""
        return self.selector.budgeted == "optional" and not self.budget.given

    @property
    def penalty(self) -> NuclearNorm | None:
        """The term beside the loss, where there is one."""
        return NuclearNorm(self.nuclear) if self.nuclear else None

    def choose(
        self, model: nn.Module, turn: Round, *, batches: Sequence[Any] | None = None, loss: Loss | None = None
    ) -> Selection:
        """The selection of this turn."""
        return choose_by(self.selector, model, self.budget, modules=self.modules, batches=batches, loss=loss,
                         sibling=self.sibling, turn=turn)  # fmt: skip

    def expected(self, model: nn.Module) -> Expected:
        """What the selection will be of, from shapes (a meta model will do).

        Raises `SurgeryError` for a selection whose size only its weights tell.
        """
        found = targets(model, self.modules or self.selector.modules, matrices=self.selector.matrices)
        if self.budget.given and (isinstance(self.selector, Scored) or self.name == "sara"):
            count = sum(self.budget.shares({t.name: t.shape for t in found}).values())
            return Expected(count, count, max(t.parameter.numel() for t in found))
        if next(model.parameters()).is_meta and self.reads:
            raise SurgeryError("How many weights are below SaRA's threshold is known once they are read.",
                               hint="Give a budget instead (density: 0.1).")  # fmt: skip
        places = self.selector.pick(found, self.budget, Evidence(), Round())
        shapes = {t.name: t.shape for t in found}
        return Expected.of(Selection(dict(places), {n: shapes[n] for n in places}))


@dataclass(frozen=True)
class Fixed:
    """A selection that is made already."""

    selection: Selection
    refresh = 0
    ages = "entry"
    penalty = None

    def expected(self, model: nn.Module) -> Expected:
        """As `Sparse.expected`; raises `SurgeryError` for a selection of another model."""
        self.selection.check(model)
        return Expected.of(self.selection)


@dataclass(frozen=True)
class Lottery:
    """LT-SFT (arXiv:2110.07560): train everything, keep the `density` of numbers that moved most (of all tensors
    together), rewind, train those alone. With `rounds` the choice grows by equal parts, each after a run of its own.
    """

    density: float = 0.01
    rounds: int = 1
    modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        Budget(self.density)
        if self.rounds < 1:
            raise SurgeryError(f"A lottery of {self.rounds} rounds chooses nothing.", hint="rounds: 1 or more.")


@dataclass(frozen=True)
class Lora:
    """A LoRA through PEFT; `alpha` None: as the rank."""

    rank: int = 8
    alpha: float | None = None
    modules: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _adapter(self.rank, self.alpha)


@dataclass(frozen=True)
class Corda:
    """A LoRA that begins as what `samples` rows of `data` (by default the run's own) use most of the weights ("ipm":
    name the task), or least ("kpm": name what is to be kept): CorDA, arXiv:2406.05223.
    """

    rank: int = 8
    mode: Literal["ipm", "kpm"] = "ipm"
    alpha: float | None = None
    modules: tuple[str, ...] | None = None
    data: Any = None
    samples: int = 64

    def __post_init__(self) -> None:
        _adapter(self.rank, self.alpha)
        _at_least(1, samples=self.samples)
        if self.mode == "kpm" and self.data is None:
            raise SurgeryError("CorDA's kpm keeps what its data show, and none are named.",
                               hint="tuning: {corda: {mode: kpm, data: ...}}, text of what is to be kept.")  # fmt: skip


def _adapter(rank: int, alpha: float | None) -> None:
    _at_least(1, rank=rank)
    if alpha is not None and not 0 < alpha < float("inf"):
        raise SurgeryError(f"The alpha of a LoRA is above 0, found {alpha:g}.")


def _at_least(least: int, **given: int) -> None:
    for name, value in given.items():
        if value < least:
            raise SurgeryError(f"'{name}' is {least} or more, found {value}.")


Tuning = Sparse | Fixed | Lottery | Lora | Corda
OTHERS: dict[str, type[Any]] = {"lottery": Lottery, "lora": Lora, "corda": Corda}
NAMES: Registry[Any] = Registry("tuning")
NAMES.update({**SELECTORS, **OTHERS})


def parse(written: Any) -> Tuning | None:
    """What `tuning:` says. Raises `SurgeryError` for names, options and budgets that are wrong."""
    if written is None or isinstance(written, Sparse | Fixed | Lottery | Lora | Corda):
        return written
    if isinstance(written, Selection):
        return Fixed(written)
    if isinstance(written, str):
        if written.endswith(".safetensors"):
            return Fixed(Selection.load(written))
        written = {written: {}}
    if not isinstance(written, Mapping) or len(written) != 1:
        raise SurgeryError(f"One tuning is expected, found {written!r}.", hint="tuning: {lift: {density: 0.05}}")
    ((name, words),) = written.items()
    kind = NAMES.lookup(name)
    if not isinstance(words or {}, Mapping):
        raise SurgeryError(f"The tuning '{name}' takes options by name, found {words!r}.",
                           hint=f"`surgery tune list {name}` shows them.")  # fmt: skip
    words = dict(words or {})
    for key in ("modules",):
        if isinstance(words.get(key), str):
            words[key] = (words[key],)
        elif words.get(key) is not None:
            words[key] = tuple(words[key])
    own = {f.name for f in fields(kind)}
    if name in OTHERS:
        _known(name, words, own)
        return kind(**_fitting(name, words, get_type_hints(kind)))
    _known(name, words, _words(kind))
    budget, beside = _BUDGET & _words(kind), _words(kind) & {f.name for f in fields(Sparse)}
    words = _fitting(name, words, {**get_type_hints(Budget), **get_type_hints(Sparse), **get_type_hints(kind)})
    if "sibling" in kind.needs and "sibling" not in words:
        raise SurgeryError(f"The tuning '{name}' needs a fine-tuned sibling of the model.",
                           hint=f"tuning: {{{name}: {{sibling: tiny-chain}}}}")  # fmt: skip
    limit = {k: words[k] for k in budget & words.keys()}
    if kind.budgeted == "needed" and not limit.keys() & {"density", "count", "lora_rank"}:
        limit["density"] = DENSITY
    if kind.budgeted == "optional" and not (limit.keys() - {"scope"} or own & words.keys()):
        raise SurgeryError(f"The tuning '{name}' needs a budget or a {' or '.join(sorted(own))}.",
                           hint=f"tuning: {{{name}: {{density: 0.1}}}}")  # fmt: skip
    selector = kind(**{k: words[k] for k in own & words.keys()})
    return Sparse(selector, Budget(**{"scope": kind.scope, **limit}), **{k: words[k] for k in beside & words.keys()})


_BUDGET = {f.name for f in fields(Budget)}


def _words(kind: type[Any]) -> set[str]:
    """What may stand under the name of a selection."""
    found = {f.name for f in fields(kind)} | (_BUDGET if kind.budgeted != "never" else set())
    found |= {f.name for f in fields(Sparse)} - {"selector", "budget"}
    found -= {"sibling"} if "sibling" not in kind.needs else set()
    return found - ({"batches"} if not set(kind.needs) - {"sibling"} else set())


def _known(name: str, words: Mapping[str, Any], known: set[str]) -> None:
    for key in words:
        if key not in known:
            raise SurgeryError(f"The tuning '{name}' has no parameter '{key}'.", hint=nearest(key, known))


def _fitting(name: str, words: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """`words` as the types of the fields want them. Raises `SurgeryError` for what is neither number nor known word.

    YAML reads 1e-4 as a text.
    """
    found = dict(words)
    for key, value in words.items():
        hint = wanted.get(key, Any)
        types = {hint, *get_args(hint)}
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise SurgeryError(f"The tuning '{name}' has no {key} '{value}'.", hint=f"{', '.join(get_args(hint))}.")
        if not types & {int, float} or value is None and type(None) in types:
            continue
        try:
            number = float("nan" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            number = float("nan")
        if number != number or int in types and number % 1:
            kind = "whole number" if int in types else "number"
            raise SurgeryError(f"The tuning '{name}' takes a {kind} for {key}, found {value!r}.")
        found[key] = int(number) if int in types else number
    return found


def options(name: str) -> dict[str, tuple[str, str]]:
    """What a tuning takes under its name: (kind of value, default) of each option, as words."""
    kind = NAMES.lookup(name)
    kinds = [kind] if name in OTHERS else [kind, Budget, Sparse]
    found = {}
    for each in kinds:
        hints = get_type_hints(each)
        for f in fields(each):
            hint = hints[f.name]
            takes = ", ".join(map(str, get_args(hint))) if get_origin(hint) is Literal else _plainly(hint)
            found[f.name] = (takes, "" if f.default in (None, MISSING) else str(f.default))
    if name in OTHERS:
        return found
    found["scope"] = (found["scope"][0], kind.scope)
    found["modules"] = (found["modules"][0], ", ".join(kind.modules))
    if kind.budgeted == "needed":
        found["density"] = (found["density"][0], str(DENSITY))
    return {key: value for key, value in found.items() if key in _words(kind)}


def _plainly(hint: Any) -> str:
    types = {hint, *get_args(hint)}
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    told = next((plain[t] for t in plain if t in types), "")
    return told or ("names" if any(get_origin(t) is tuple for t in types) else "anything")
