"""The geometry of a family of task vectors: how large they are, how they lie to each other, where they collide.

```python
found = geometry("base", {"math": "math-model", "code": "code-model"})
print(*found.summary(), sep="\n")
found.to_dataframe("layer")            # norms, zeros, kurtosis, ... of every vector in every layer
found.to_dataframe("total", "pairs")   # cosine, sign conflict and overlap of every pair
found.plot("heat map")
```

One streaming pass (sweep.py) leaves sums per tensor; everything here is arithmetic on those.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis import quantities
from analysis import spectra as singular
from analysis.family import family_of, labelled, refuse_nonfinite, shared
from analysis.result_files import _files, _write
from analysis.sweep import MAXIMA, Found, empty_sums, sweep
from surgery.anatomy import KINDS, kind_of, layer_of, stack_of
from surgery.checkpoint import Source, open_checkpoint
from surgery.errors import SurgeryError
from surgery.weights.streams import Workspace, in_parallel

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from rich.table import Table

By = Literal["tensor", "layer", "module", "layer and module", "total"]
Of = Literal["vectors", "pairs", "family"]

_KEYS: dict[str, tuple[str, ...]] = {
    "tensor": ("tensor", "stack", "layer", "module"),
    "layer": ("stack", "layer"),
    "module": ("module",),
    "layer and module": ("stack", "layer", "module"),
    "total": (),
}


@dataclass
class Geometry:
    """What `geometry` found. `sums` holds the fields of `analysis.sweep.empty_sums`, the tensors on axis 0.

    `spectra` maps a matrix to the singular values of each vector (K, min(rows, cols)); `missing` maps a vector to the
    tensors of the base that it lacks, which count as zero change.
    """

    base: str
    labels: list[str]
    tensors: list[str]
    density: float
    sums: dict[str, np.ndarray]
    spectra: dict[str, np.ndarray] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    # ---- groups

    def groups(self, by: By = "total") -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """The keys of every group (tensor, stack, layer, module) and the sums over it, groups on axis 0.

        Tensors outside layers form groups of their own, their kind in the place of the stack.
        """
        if by not in _KEYS:
            raise SurgeryError(f"There is no grouping '{by}'.", hint="Group by: " + ", ".join(_KEYS) + ".")
        places = [_place(name) for name in self.tensors]
        keys = [tuple(place[k] for k in _KEYS[by]) for place in places]
        if by == "module":
            ordered = sorted(set(keys), key=lambda key: KINDS.index(key[0]))
        else:
            ordered = list(dict.fromkeys(keys))
        index = np.array([ordered.index(key) for key in keys])
        sums = {}
        for name, values in self.sums.items():
            total = np.zeros((len(ordered), *values.shape[1:]))
            (np.maximum if name in MAXIMA else np.add).at(total, index, values)
            sums[name] = total
        return [dict(zip(_KEYS[by], key, strict=True)) for key in ordered], sums

    def gram(self, by: By = "total") -> np.ndarray:
        """Dot products of all pairs of vectors: (K, K) for the total, (groups, K, K) otherwise."""
        gram = self.groups(by)[1]["gram"]
        return gram[0] if by == "total" else gram

    def cosine(self, by: By = "total") -> np.ndarray:
        """Cosines of all pairs of vectors, NaN where one is zero: (K, K) for the total, (groups, K, K) otherwise."""
        return quantities.cosine(self.gram(by))

    def to_dataframe(self, by: By = "total", of: Of = "vectors") -> pd.DataFrame:
        """One row a group and vector (`of="vectors"`), pair of vectors ("pairs"), or group ("family").

        Vectors: norms l1, l2, linf; `relative` ||d||/||B||; `base_cosine` cos(B, B + d); `zeros`, the share of exact
        zeros; `kurtosis` (3 for a normal distribution); `kept_by_trim` and `kept_by_election`, the shares of the norm
        left by TIES at `density`; and, by tensor with spectra, the ranks. Pairs: dot, cosine, `sign_conflict` (of the
        elements that both change) and `top_overlap` (Jaccard index of the largest elements). Family: `any_conflict`,
        the share of elements that some raise and others lower; `interference` 1 - ||sum d||/sum ||d||; `mean_cosine`;
        `model_stock_t`; `rounding_loss`, the share of the mean vector lost when it is added in the base's type.
        """
        import pandas as pd

        keys, sums = self.groups(by)
        blocks: list[tuple[dict[str, Any], dict[str, np.ndarray]]] = []
        if of == "vectors":
            columns = quantities.vectors(sums)
            for i, label in enumerate(self.labels):
                ranks = self._ranks(i) if by == "tensor" and self.spectra else {}
                blocks.append(({"vector": label}, {c: v[:, i] for c, v in columns.items()} | ranks))
        elif of == "pairs":
            columns = quantities.pairs(sums)
            for (i, a), (j, b) in combinations(enumerate(self.labels), 2):
                blocks.append(({"a": a, "b": b}, {c: v[:, i, j] for c, v in columns.items()}))
        elif of == "family":
            blocks = [({}, quantities.family(sums))]
        else:
            raise SurgeryError(f"There is no frame of '{of}'.", hint="Choose vectors, pairs or family.")
        frames = [pd.DataFrame(keys, index=range(len(keys))).assign(**name, **values) for name, values in blocks]
        if not frames:  # the pairs of a single vector
            return pd.DataFrame(columns=[*_KEYS[by], "a", "b", *columns])
        frame = pd.concat(frames, ignore_index=True)
        return frame.astype({"layer": "Int64"}) if "layer" in frame else frame

    def _ranks(self, vector: int) -> dict[str, np.ndarray]:
        def each(rank: Callable[[np.ndarray], float]) -> np.ndarray:
            return np.array([rank(self.spectra[n][vector]) if n in self.spectra else np.nan for n in self.tensors])

        return {
            "stable_rank": each(singular.stable_rank),
            "entropy_rank": each(singular.entropy_rank),
            "rank_90": each(singular.rank_for_energy),
        }

    # ---- in words, tables and figures

    def summary(self) -> list[str]:
        """What is worth knowing, in a few sentences."""
        said = []
        layers = self.to_dataframe("layer").dropna(subset=["layer", "relative"]).to_dict("records")
        for row in self.to_dataframe("total").to_dict("records"):
            if row["l2"] == 0:
                said.append(f"{row['vector']} changes nothing.")
                continue
            mine = [layer for layer in layers if layer["vector"] == row["vector"]]
            most = max(mine, key=lambda layer: layer["relative"], default=None)
            where = f"; most in {most['stack']}.{most['layer']} ({most['relative']:.2%})" if most else ""
            said.append(
                f"{row['vector']} changes the base by {row['relative']:.2%} of its norm and leaves {row['zeros']:.1%} "
                f"of the numbers untouched{where}. The largest {self.density:.0%} hold {row['kept_by_trim']:.1%} of "
                "its norm."
            )
        (family,) = self.to_dataframe("total", "family").to_dict("records")
        pairs = self.to_dataframe("total", "pairs").dropna(subset=["cosine"]).to_dict("records")
        if pairs:
            low, *_, high = sorted(pairs * 2, key=lambda pair: pair["cosine"])
            ends = [f"{end['cosine']:.3f} ({end['a']}, {end['b']})" for end in (low, high)]
            conflict = np.nanmean([pair["sign_conflict"] for pair in pairs])
            said.append(
                f"{'The cosine is ' + ends[0] if len(pairs) == 1 else 'Cosines are ' + ' to '.join(ends)}. Of the "
                f"numbers that two vectors change, {conflict:.1%} are moved in opposite directions; "
                f"{family['interference']:.1%} of the norms cancel in the sum."
            )
        if np.isfinite(family["rounding_loss"]):
            what = "the mean of the vectors" if len(self.labels) > 1 else "the vector"
            said.append(
                f"Added in the base's type, {what} loses {family['rounding_loss']:.1%} of its norm to rounding."
            )
        for label, names in self.missing.items():
            said.append(f"{label} lacks {len(names)} tensors of the base, which count as unchanged: {names[0]}, ...")
        return said

    def table(self, by: By = "module") -> Table:
        """A rich table: one row a group and vector."""
        from rich.table import Table

        frame = self.to_dataframe(by)
        headings = {"l2": "norm", "relative": "of base", "zeros": "zeros", "kurtosis": "kurtosis",
                    "kept_by_trim": "trimmed", "kept_by_election": "elected"}  # fmt: skip
        keys = [k for k in (*_KEYS[by], "vector") if k in frame and not (by == "tensor" and k in ("stack", "layer"))]
        numbers = int(self.sums["numel"].sum())
        caption = f"{self.base}: {numbers:,} numbers. Trimmed, elected: share of the norm that TIES leaves"
        table = Table(title=f"Task vectors by {by}", caption=f"{caption} at density {self.density:g}.")
        for key in keys:
            table.add_column(key, overflow="fold", no_wrap=key != "tensor")
        for heading in headings.values():
            table.add_column(heading, justify="right")
        forms = {"l2": "{:.4g}", "kurtosis": "{:.1f}", "relative": "{:.3%}"}
        for row in frame.to_dict("records"):
            cells = [str(row[k]) for k in keys] + [forms.get(c, "{:.1%}").format(row[c]) for c in headings]
            table.add_row(*("-" if cell in ("nan", "nan%", "<NA>") else cell for cell in cells))
        return table

    def plot(self, kind: str = "heat map", *, vector: str | None = None, quantity: str = "relative") -> Figure:
        """A figure: "heat map" (layer by module), "cosine", "conflict", "ulps" or "spectrum".

        `vector` chooses one (default: the first; all of them for ulps); `quantity` is a column of the vectors' frame.
        """
        from analysis.geometry_figures import FIGURES

        return FIGURES.lookup(kind)(self, vector, quantity)

    # ---- in and out

    def to_dict(self) -> dict[str, Any]:
        """The totals, pairs and summary as plain JSON."""
        return {
            "base": self.base,
            "labels": self.labels,
            "density": self.density,
            "seconds": self.seconds,
            "missing": self.missing,
            "summary": self.summary(),
            **{of: json.loads(self.to_dataframe("total", of).to_json(orient="records")) for of in _OF},
        }

    def save(self, path: str | Path) -> Path:
        """Writes `path`.json (names, totals, summary) and `path`.safetensors (all sums); returns the JSON's path."""
        from safetensors.numpy import save

        numbers, words = _files(path)
        words.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"sums.{name}": np.ascontiguousarray(value) for name, value in self.sums.items()}
        arrays |= {f"spectra.{name}": np.ascontiguousarray(value) for name, value in self.spectra.items()}
        _write(numbers, save(arrays))
        _write(words, json.dumps(self.to_dict() | {"tensors": self.tensors}, indent=1).encode())
        return words

    @classmethod
    def load(cls, path: str | Path) -> Geometry:
        """Reads what `save` wrote. Raises `SurgeryError` when a file is missing or is something else."""
        from safetensors.numpy import load_file

        numbers, words = _files(path)
        try:
            text, arrays = json.loads(words.read_text(encoding="utf-8")), load_file(numbers)
            fields = {n: text[n] for n in ("base", "labels", "tensors", "density", "missing", "seconds")}
            for kind in ("sums", "spectra"):
                fields[kind] = {n.partition(".")[2]: v for n, v in arrays.items() if n.startswith(f"{kind}.")}
            return cls(**fields)
        except FileNotFoundError as error:
            raise SurgeryError(f"No geometry at {path}: {error.filename or error} is missing.") from None
        except Exception as error:
            raise SurgeryError(f"{path} is not a saved geometry: {error}") from error


_OF: tuple[Of, ...] = ("vectors", "pairs", "family")


def _place(name: str) -> dict[str, Any]:
    module = kind_of(name)
    return {"tensor": name, "stack": stack_of(name) or module, "layer": layer_of(name), "module": module}


def _depth(name: str) -> tuple[int, str, int]:
    """Sorts tensors as a model runs: embeddings, the layers of each stack, what comes after them."""
    stack, layer = stack_of(name), layer_of(name)
    return (1 if stack else 0 if kind_of(name) == "embedding" else 2), stack or "", layer or 0


def geometry(
    base: Source | str | Path,
    tuned: Mapping[str, Any] | Sequence[Any],
    *,
    density: float = 0.2,
    spectra: bool = False,
    threads: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Geometry:
    """Measures a family of task vectors in one streaming pass, in bounded memory; the same for any `threads`.

    `tuned` holds fine-tuned models (sources, or what `open_checkpoint` takes) or vectors (anything with `shapes` and
    `read`, a `TaskVector`), by label or in a list. `density` is the share of the largest elements that overlap and
    trimming look at. `spectra` adds all singular values of every matrix, which takes far longer. `progress` is called
    with the numbers done after each tensor. Raises `SurgeryError` for NaN or Inf, with every tensor and count, and for
    inputs without a common tensor.
    """
    started = time.perf_counter()
    if not 0 < density <= 1:
        raise SurgeryError(f"The density is {density}; it must be above 0 and at most 1.")
    source = open_checkpoint(base) if isinstance(base, (str, Path)) else base
    vectors = labelled(tuned)
    names, missing = shared(source, vectors)
    names.sort(key=_depth)
    families = {name: family_of(source, name, list(vectors.values())) for name in names}
    found: dict[str, tuple[Found, np.ndarray | None]] = {}
    lock = threading.Lock()

    def job(name: str, work: Workspace) -> None:
        result = sweep(families[name], density, work)
        wanted = spectra and len(source.tensors[name].shape) == 2 and not any(result.nonfinite)
        values = singular.spectra(families[name]) if wanted else None
        with lock:
            found[name] = result, values
            if progress is not None:
                progress(source.tensors[name].numel)

    in_parallel(sorted(names, key=lambda n: -source.tensors[n].numel), job, threads=threads)
    refuse_nonfinite([str(source.path), *vectors], {name: found[name][0].nonfinite for name in names})
    sums = {key: np.stack([found[name][0].sums[key] for name in names]) for key in empty_sums(len(vectors))}
    spectrum = {name: values for name in names if (values := found[name][1]) is not None}
    took = time.perf_counter() - started
    return Geometry(source.path.name, list(vectors), names, density, sums, spectrum, missing, took)
