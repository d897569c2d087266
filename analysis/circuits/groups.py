"""A circuit: groups of heads, each at a position, as a file that can be read and edited by hand.

{
 "note": "entity tracking, tiny-boxes",
 "groups": {
  "A": {"position": -1, "to": "logits", "heads": [[9, 6], [10, 0]], "scores": [-0.41, -0.2]},
  "B": {"position": -1, "to": "A", "by": "q", "heads": [[8, 10]]},
  "D": {"position": "previous query label", "to": "B", "by": "v", "heads": [[3, 0]]}
 }
}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.result_files import _write
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from surgery.anatomy import Anatomy

EVERYWHERE = "all"
"""The position of heads that belong to a circuit at every token."""
DRAWN = 24
"""Heads up to which each is drawn by itself."""


class Head(NamedTuple):
    """One attention head."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"{self.layer}.{self.head}"


class Spot(NamedTuple):
    """A head at a position: what a circuit consists of."""

    layer: int
    head: int
    position: int | str


class Recall(NamedTuple):
    """How many heads of another circuit's group are in this one too."""

    found: int
    of: int

    @property
    def share(self) -> float:
        """0..1; NaN when the other group is empty."""
        return self.found / self.of if self.of else float("nan")


@dataclass(frozen=True)
class Group:
    """Heads at one position, with what they lead to. Raises `SurgeryError` for a head that is named twice."""

    heads: Sequence[Head]
    position: int | str
    """-1 the last token, -3 the third last; "all"; or a name that `positions=` explains."""
    to: str = ""
    """What they lead to: "logits", or another group."""
    by: str = ""
    """By which of its readers' q, k and v."""
    scores: Sequence[float] = ()
    """One a head, as found."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "heads", tuple(Head(int(layer), int(head)) for layer, head in self.heads))
        except (TypeError, ValueError):
            raise SurgeryError(f"Heads are pairs (layer, head), and these are {self.heads!r:.80}.") from None
        object.__setattr__(self, "scores", tuple(map(float, self.scores)))
        if twice := [head for head in self.heads if self.heads.count(head) > 1]:
            raise SurgeryError(f"Head {twice[0]} is named twice in one group.")
        if negative := [head for head in self.heads if min(head) < 0]:
            raise SurgeryError(f"There is no head {negative[0]}.")
        if self.scores and len(self.scores) != len(self.heads):
            raise SurgeryError(f"A group has {len(self.heads)} heads and {len(self.scores)} scores.")
        if isinstance(self.position, bool) or not isinstance(self.position, int | str) or self.position == "":
            raise SurgeryError(f"A group's position is a number, 'all' or a name, and not {self.position!r}.")

    def keep(self, heads: Iterable[Head]) -> Group:
        """The group with only those of its heads."""
        wanted = set(heads)
        kept = [i for i, head in enumerate(self.heads) if head in wanted]
        scores = [self.scores[i] for i in kept] if self.scores else ()
        return Group([self.heads[i] for i in kept], self.position, self.to, self.by, scores)

    def join(self, other: Group) -> Group:
        """Both groups' heads, each once; scores where all have one."""
        new = [i for i, head in enumerate(other.heads) if head not in self.heads]
        scored = len(self.scores) == len(self.heads) and len(other.scores) == len(other.heads)
        scores = [*self.scores, *(other.scores[i] for i in new)] if scored else ()
        return Group([*self.heads, *(other.heads[i] for i in new)], self.position, self.to, self.by, scores)


@dataclass(frozen=True)
class Circuit:
    """Groups of heads by name. `|`, `&` and `-` work group by group; `len` counts heads."""

    groups: Mapping[str, Group]
    note: str = field(default="", compare=False)

    @classmethod
    def of(cls, heads: Mapping[str, Iterable[Any]], positions: Mapping[str, int | str], note: str = "") -> Circuit:
        """From {"A": [(layer, head), ...]} and {"A": -1}. Raises `SurgeryError` for a group without a position."""
        if without := [name for name in heads if name not in positions]:
            raise SurgeryError(f"Group '{without[0]}' has no position: a circuit says where its heads count.",
                               hint="-1 is the last token, 'all' is every token.")  # fmt: skip
        return cls({name: Group(tuple(group), positions[name]) for name, group in heads.items()}, note)

    def __len__(self) -> int:
        return sum(len(group.heads) for group in self.groups.values())

    def __str__(self) -> str:
        parts = [f"{name} {len(group.heads)} at {group.position}" for name, group in self.groups.items()]
        return f"circuit of {len(self)} heads: {', '.join(parts)}"

    @property
    def spots(self) -> frozenset[Spot]:
        """Every head with its position; one in two groups at one position counts once."""
        return frozenset(Spot(*head, group.position) for group in self.groups.values() for head in group.heads)

    def check(self, anatomy: Anatomy) -> None:
        """Raises `SurgeryError` for a head that the model has not."""
        for name, group in self.groups.items():
            for head in group.heads:
                if head.layer >= anatomy.n_layers or head.head >= anatomy.n_heads:
                    raise SurgeryError(
                        f"Group '{name}' has head {head}, and the model {anatomy.n_layers} layers of {anatomy.n_heads} "
                        "heads.", hint="A circuit belongs to models of one shape.",
                    )  # fmt: skip

    # ---- sets

    def __or__(self, other: Circuit) -> Circuit:
        return self._by_group(other, Group.join)

    def __and__(self, other: Circuit) -> Circuit:
        return self._by_group(other, lambda mine, theirs: mine.keep(theirs.heads))

    def __sub__(self, other: Circuit) -> Circuit:
        return self._by_group(other, lambda mine, theirs: mine.keep(set(mine.heads) - set(theirs.heads)))

    def _by_group(self, other: Circuit, together: Any) -> Circuit:
        names = list(dict.fromkeys([*self.groups, *other.groups]))
        found = {}
        for name in names:
            group = self.groups.get(name) or Group((), other.groups[name].position)
            theirs = other.groups.get(name) or Group((), group.position)
            if group.position != theirs.position:
                raise SurgeryError(f"Group '{name}' is at {group.position!r} in one circuit and at "
                                   f"{theirs.position!r} in the other: they can't be put together.")  # fmt: skip
            found[name] = together(group, theirs)
        return Circuit(found, self.note)

    def only(self, *names: str) -> Circuit:
        """Some of the groups. Raises `SurgeryError` for a name that it has not."""
        if unknown := [name for name in names if name not in self.groups]:
            raise SurgeryError(f"There is no group '{unknown[0]}'.", hint=f"There are: {', '.join(self.groups)}.")
        return Circuit({name: self.groups[name] for name in names}, self.note)

    def recall(self, other: Circuit) -> dict[str, Recall]:
        """Of each group of `other`, how many of its heads are in the group of that name here."""
        mine = {name: set(group.heads) for name, group in self.groups.items()}
        return {
            name: Recall(len(mine.get(name, set()) & set(group.heads)), len(group.heads))
            for name, group in other.groups.items()
        }

    # ---- in and out

    def save(self, path: str | Path) -> Path:
        """Writes it as JSON, a group a line."""
        path = Path(path)
        lines = []
        for name, group in self.groups.items():
            words: dict[str, Any] = {"position": group.position, "to": group.to, "by": group.by}
            words = {key: word for key, word in words.items() if word != ""} | {"heads": list(map(list, group.heads))}
            if group.scores:
                words["scores"] = [round(score, 6) for score in group.scores]
            lines.append(f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(words, ensure_ascii=False)}")
        note, groups = json.dumps(self.note, ensure_ascii=False), ",\n".join(lines)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, f'{{\n "note": {note},\n "groups": {{\n{groups}\n }}\n}}\n'.encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Reads what `save` wrote. Raises `SurgeryError` for a missing file, and for what is no circuit."""
        try:
            text = json.loads(Path(path).read_text(encoding="utf-8"))
            groups = dict(text["groups"])
        except FileNotFoundError:
            raise SurgeryError(f"There is no circuit at {path}.") from None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise SurgeryError(f"{path} is not a circuit: {error!r:.200}") from None
        found = {}
        for name, words in groups.items():
            if not isinstance(words, dict) or "heads" not in words:
                raise SurgeryError(f"{path}: group '{name}' has no heads.")
            if "position" not in words:
                raise SurgeryError(f"{path}: group '{name}' has no position: a circuit says where its heads count.")
            if unknown := set(words) - {"heads", "position", "to", "by", "scores"}:
                raise SurgeryError(f"{path}: group '{name}' says '{min(unknown)}', which means nothing here.")
            found[name] = Group(**words)
        return cls(found, str(text.get("note", "")))

    def plot(self, *, title: str = "") -> Figure:
        """Its heads in rows by layer, each joined to the later heads of the group that it leads to, or to the logits.

        Of more than 24 heads each group is one node, with their number. Edges are as wide as the heads' scores.
        """
        from analysis.circuit_figure import circuit

        nodes, edges = self._heads_drawn() if len(self) <= DRAWN else self._groups_drawn()
        scored = any(group.scores for group in self.groups.values())
        return circuit(nodes, edges, title=title or self.note, unit="effect" if scored else "heads:")

    def _heads_drawn(self) -> tuple[dict[str, tuple[float, str]], dict[tuple[str, str], float]]:
        """Nodes (layer, group) and edges of single heads."""
        nodes: dict[str, tuple[float, str]] = {}
        edges: dict[tuple[str, str], float] = {}
        for name, group in self.groups.items():
            nodes |= {f"{name} {head}": (head.layer, name) for head in group.heads}
        top = max((layer for layer, _ in nodes.values()), default=0) + 1
        for name, group in self.groups.items():
            for head, score in zip(group.heads, group.scores or [1.0] * len(group.heads), strict=True):
                if group.to == "logits":
                    nodes["logits"], edges[f"{name} {head}", "logits"] = (top, ""), score
                for other in self.groups[group.to].heads if group.to in self.groups else ():
                    if other.layer > head.layer:
                        edges[f"{name} {head}", f"{group.to} {other}"] = score
        return nodes, edges

    def _groups_drawn(self) -> tuple[dict[str, tuple[float, str]], dict[tuple[str, str], float]]:
        """Nodes and edges of whole groups: how many steps they are from what nothing leads on from."""
        nodes: dict[str, tuple[float, str]] = {}
        edges: dict[tuple[str, str], float] = {}
        label = {name: f"{name} ({len(group.heads)})" for name, group in self.groups.items()} | {"logits": "logits"}
        for name, group in self.groups.items():
            level, to, seen = 0, group.to, {name}
            while to in self.groups and to not in seen:
                seen.add(to)
                level, to = level - 1, self.groups[to].to
            nodes[label[name]] = (level, name)
        for name, group in self.groups.items():
            if group.to in label and nodes[label[name]][0] <= nodes.get(label[group.to], (1.0, ""))[0]:
                nodes.setdefault(label[group.to], (1.0, ""))
                edges[label[name], label[group.to]] = sum(group.scores) if group.scores else float(len(group.heads))
        return nodes, edges
