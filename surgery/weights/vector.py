"""`TaskVector`: what fine-tuning changed, as a thing to compute with.

```python
math = TaskVector.between("base", "math")
code = TaskVector.between("base", "code")
both = 0.5 * (math + code)                     # nothing is read yet
both.only("mlp").scaled(gradient=[0, 1]).apply("base", "out")
with math.applied(model, scale=-1):            # in memory, undone at the end
    ...
```

Vectors are immutable and lazy: an expression over sources (expression.py) that is computed in pieces of 256 K numbers
when it is read, saved or applied. Source: task arithmetic, arXiv:2212.04089.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from surgery.checkpoint import Source, TensorInfo
from surgery.errors import SurgeryError
from surgery.weights.expression import Difference, Expression, Restricted, Unbound, Weighted, combine, shapes_of
from surgery.weights.factors import PerLayer, examples, tensor_factors
from surgery.weights.opening import open_model
from surgery.weights.sources import Anchor, check_pair, label, ranges, same_heads

if TYPE_CHECKING:
    from torch import nn

    from surgery.weights.adapters import ExportedLora
    from surgery.weights.apply import Applied
    from surgery.weights.live import Undo
    from surgery.weights.vector_file import Saved


@dataclass(frozen=True, repr=False)
class TaskVector:
    """A lazy difference of models, float32: `a + b`, `a - b`, `0.5 * a`, `-a`, and the methods below.

    Adding vectors of different bases, shapes or (where no base is known) names raises `SurgeryError`.
    """

    expression: Expression

    # Where vectors come from

    @classmethod
    def between(
        cls, base: Source | nn.Module | str | Path, tuned: Source | nn.Module | str | Path, *, missing: str = "error"
    ) -> TaskVector:
        """tuned - base. Integer buffers must be equal and are left out; a tied head is the embedding (sources.py).

        `missing="skip"` leaves out tensors that only one of them has. Raises `SurgeryError` for tensors that are
        missing, of another shape, or integers that differ.
        """
        base, tuned = _open(base), _open(tuned)
        if Path(base.path) == Path(tuned.path):
            raise SurgeryError(f"Base and tuned model are the same: {base.path}.", hint="Name two different models.")
        anchor = Anchor.of(base)
        base, tuned = same_heads(base, tuned)
        anchor = Anchor(anchor.name, anchor.header, None, base)
        check_pair(base, tuned, missing)
        shapes = {n: i.shape for n, i in base.tensors.items() if n in tuned.tensors and i.is_float}
        return cls(Difference(base, tuned, (label(base), label(tuned)), shapes, anchor))

    @classmethod
    def load(cls, path: str | Path, base: Source | str | Path | None = None) -> TaskVector:
        """A vector that was saved, or a sparse delta (deltas/).

        The lossless form and deltas of mode "set" need their `base` to be read as numbers (not to be applied). Raises
        `SurgeryError` when `base` is another one: by its tensors at once, by its numbers when they are read.
        """
        from surgery.weights.deltas.file import SparseDelta, is_delta
        from surgery.weights.vector_file import Stored, VectorFile

        if is_delta(path):
            return SparseDelta.load(path).vector(base)
        stored = Stored(VectorFile(path))
        return cls(stored if base is None else stored.bound(_open(base)))

    @classmethod
    def from_adapter(cls, base: Source | str | Path, adapter: str | Path) -> TaskVector:
        """The change that a PEFT adapter makes: s B A for LoRA, read row by row, never dense."""
        from surgery.weights.adapters import adapter_expression

        return cls(adapter_expression(_open(base), Path(adapter)))

    # What is in it

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that may differ."""
        return dict(self.expression.shapes)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors as a source describes them; their type is float32."""
        return {name: TensorInfo(name, "F32", shape) for name, shape in self.expression.shapes.items()}

    @property
    def names(self) -> list[str]:
        return list(self.expression.shapes)

    @property
    def anchors(self) -> tuple[Anchor, ...]:
        """The bases that it was taken from: usually one, none when it is not known."""
        return self.expression.anchors()

    def __len__(self) -> int:
        return len(self.expression.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.expression.shapes

    def __repr__(self) -> str:
        numbers = sum(math.prod(shape) for shape in self.expression.shapes.values())
        return f"TaskVector({self.expression}: {len(self)} tensors, {numbers:,} numbers)"

    def __str__(self) -> str:
        return str(self.expression)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start:stop` of dimension 0 of one tensor's difference, float32, in memory of its own."""
        shape = self._shape(name)
        rows = shape[0] if shape else 1
        cols = math.prod(shape[1:])
        start, stop, _ = slice(start, stop).indices(rows)
        stop = max(start, stop)
        numbers = self.expression.flat(name, start * cols, stop * cols)
        return numbers.view((stop - start, *shape[1:]) if shape else ())

    def tensor(self, name: str) -> Tensor:
        """The whole difference of one tensor, float32."""
        self._shape(name)
        return self.expression.whole(name)

    def norm(self, name: str | None = None) -> float:
        """Frobenius norm of one tensor's difference, or of all, streamed with a float64 sum."""
        total = 0.0
        for each in self.names if name is None else [name]:
            for start, stop in ranges(math.prod(self._shape(each))):
                numbers = self.expression.flat(each, start, stop)
                total += float(numbers.double().square_().sum())
        return math.sqrt(total)

    # Algebra

    def __add__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        return TaskVector(combine((1.0, self.expression), (1.0, other.expression)))

    def __radd__(self, other: Any) -> TaskVector:
        return self if other == 0 else NotImplemented  # sum(vectors) starts at 0

    def __sub__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        return TaskVector(combine((1.0, self.expression), (-1.0, other.expression)))

    def __mul__(self, factor: float) -> TaskVector:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        if not math.isfinite(factor):
            raise SurgeryError(f"A vector can't be multiplied by {factor}.")
        return TaskVector(combine((float(factor), self.expression)))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        return self * (1 / divisor)

    def __neg__(self) -> TaskVector:
        return self * -1.0

    @staticmethod
    def analogy(a: TaskVector, b: TaskVector, c: TaskVector) -> TaskVector:
        """A is to B as C is to D: d_D = d_C + (d_B - d_A) (arXiv:2212.04089, section 5)."""
        return c + (b - a)

    def scaled(
        self,
        *,
        per_layer: PerLayer | None = None,
        per_module: Mapping[str, float] | None = None,
        gradient: Sequence[float] | None = None,
    ) -> TaskVector:
        """A factor for every tensor; those given are multiplied.

        `per_layer` by layer number (tensors outside layers keep 1). `per_module` by the first substring of the name
        that fits ("*": all), else 1. `gradient` as in recipes: piecewise linear over the layers from first to last,
        tensors outside layers get the first value; a gradient of two ends is LiNeS (arXiv:2410.17146).
        """
        factors, note = tensor_factors(self.names, per_layer, per_module, gradient)
        return TaskVector(Weighted(self.expression, factors, note))

    def only(self, *patterns: str) -> TaskVector:
        """The tensors whose name contains one of `patterns` or matches it as a regular expression."""
        return self._filtered(patterns, True)

    def without(self, *patterns: str) -> TaskVector:
        """The tensors that `only(*patterns)` leaves out."""
        return self._filtered(patterns, False)

    def sparsified(self, density: float, method: str = "magnitude", **options: Any) -> TaskVector:
        """Most numbers dropped, by "magnitude", "breadcrumbs" (`top`) or "random" (`seed`, `rescale`): sparse.py."""
        from surgery.weights.sparse import Sparse

        return TaskVector(Sparse(self.expression, density, method, options))

    def low_rank(self, rank: int | None = None, *, energy: float | None = None, seed: int = 0) -> TaskVector:
        """Every matrix approximated by `rank`, or by the rank that keeps `energy` of its squared norm: low_rank.py."""
        from surgery.weights.low_rank import LowRank

        if (rank is None) == (energy is None):
            raise SurgeryError("low_rank needs either a rank or an energy.")
        return TaskVector(LowRank(self.expression, rank, energy, seed))

    @staticmethod
    def merged(vectors: Sequence[TaskVector], method: str = "ties", *, seed: int = 0, **parameters: Any) -> TaskVector:
        """Vectors made into one by a merge method that works on differences (`ties`, `breadcrumbs`, ...)."""
        from surgery.weights.methods import METHODS
        from surgery.weights.sparse import Merged

        known = METHODS.lookup(method)
        if not vectors or known.needs_base is not True or known.inputs[1] == 1:  # the others look at the base itself
            raise SurgeryError(f"'{method}' does not merge differences, or there are none.", hint="Try 'ties'.")
        expressions = tuple(v.expression for v in vectors)
        shapes = shapes_of([(1.0, e) for e in expressions])  # refuses what does not fit
        return TaskVector(Merged(expressions, method, parameters, seed, shapes))

    def unbound(self) -> TaskVector:
        """The same numbers with the base forgotten, so that they can be added to vectors of another base."""
        return TaskVector(Unbound(self.expression))

    def bound(self, base: Source | str | Path) -> TaskVector:
        """The same vector with `base` at hand, for stored forms that need it."""
        source = _open(base)
        return TaskVector(self.expression.over(lambda leaf: leaf.bound(source)))

    # Putting it somewhere

    def save(self, out: str | Path, form: str = "float32", **options: Any) -> Saved:
        """Writes it in a storage form of formats.py; see `vector_file.save` for the options."""
        from surgery.weights.vector_file import save

        return save(self.expression, out, form, **options)

    def apply(self, base: Source | str | Path, out: str | Path, *, scale: float = 1.0, **options: Any) -> Applied:
        """Writes base + scale * vector as a checkpoint; see `apply.apply` for the options and what is checked."""
        from surgery.weights.apply import apply

        return apply(self.expression, _open(base), out, scale=scale, **options)

    def export_lora(self, out: str | Path, **options: Any) -> ExportedLora:
        """Writes it as a PEFT LoRA by `rank`, `energy` or `budget`; see `adapters.export_lora`."""
        from surgery.weights.adapters import export_lora

        return export_lora(self.expression, out, **options)

    def apply_to(self, model: nn.Module, scale: float = 1.0) -> Undo:
        """Adds scale * vector to a model in memory; calling `undo()` on the answer restores it bit for bit."""
        from surgery.weights.live import apply_to

        return apply_to(self.expression, model, scale)

    @contextmanager
    def applied(self, model: nn.Module, scale: float = 1.0) -> Iterator[nn.Module]:
        """Within: the model with scale * vector added. After it, also after an exception, every bit is as before."""
        undo = self.apply_to(model, scale)
        try:
            yield model
        finally:
            undo()

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.expression.shapes:
            raise SurgeryError(f"The vector {self} has no tensor '{name}'.", hint=examples(self.names))
        return self.expression.shapes[name]

    def _filtered(self, patterns: Sequence[str], keep: bool) -> TaskVector:
        for pattern in patterns:
            if not any(_fits(pattern, name) for name in self.names):
                raise SurgeryError(f"No tensor fits the pattern '{pattern}'.", hint=examples(self.names))
        shapes = {n: s for n, s in self.shapes.items() if any(_fits(p, n) for p in patterns) is keep}
        if not shapes:
            raise SurgeryError(f"Nothing is left of {self} without {', '.join(patterns)}.")
        note = f"{'only' if keep else 'without'}({', '.join(patterns)})"
        return TaskVector(Restricted(self.expression, shapes, note))


def _open(source: Source | nn.Module | str | Path) -> Source:
    if isinstance(source, (str, Path)):
        return open_model(source)
    if hasattr(source, "state_dict"):
        from surgery.weights.live import ModelSource

        return ModelSource(source)  # type: ignore[arg-type]
    return source


def _fits(pattern: str, name: str) -> bool:
    try:
        return pattern in name or re.search(pattern, name) is not None
    except re.error as error:
        raise SurgeryError(f"'{pattern}' is neither part of a name nor a regular expression: {error}.") from None
