"""What a merge will do, said before anything is read: which tensors come from where, what is written, what it needs.

`plan(recipe)` looks at headers and configs only, without torch; `surgery merge --plan` prints it and stops, and
`merge.py` carries it out. Every tensor of every input is merged, copied or reported: none is lost in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery import anatomy
from surgery.checkpoint.header import TensorInfo, dtype_code
from surgery.checkpoint.reader import Source
from surgery.checkpoint.writer import check_target
from surgery.errors import SurgeryError
from surgery.weights.alignment import Aligned, align_sources, refuse_other_tokens
from surgery.weights.depth import layers_in_config
from surgery.weights.heads import head_is_copied, with_like_heads
from surgery.weights.opening import open_model
from surgery.weights.recipe import ModelRef, Recipe, Slice, relative_depth, resolve
from surgery.weights.recipe.schema import Input
from surgery.weights.recipe.signatures import signature_of

STREAMED = frozenset({
    "linear", "task_arithmetic", "lines", "passthrough", "ties", "dare_linear", "dare_ties", "breadcrumbs",
    "breadcrumbs_ties", "ram", "magmax", "emr", "consensus", "nearswap", "slerp", "nuslerp", "multislerp", "karcher",
    "model_stock",
})  # fmt: skip
"""Methods that work chunk by chunk with their usual parameters (a test holds this against the methods)."""
CHUNK = 1 << 19
"""As in `streams`, which needs torch."""
SHOWN = 12
"""How many tensor names a message lists before it says how many more there are."""


@dataclass(frozen=True)
class Part:
    """One tensor of one input: `source` counts the plan's sources."""

    source: int
    name: str


@dataclass(frozen=True)
class Job:
    """How one tensor of the output is made: merged from `inputs` (and `base`), or copied from the only input."""

    out: TensorInfo
    inputs: tuple[Part, ...]
    base: Part | None
    parameters: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the method, resolved for this tensor; empty for a copy."""
    merge: bool = True
    depth: float = 0.0
    """Position of its layer in its slice, 0 to 1."""
    double: bool = False
    """Computed in float64, since an input is float64."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The base's part, if any, and all inputs'."""
        return self.inputs if self.base is None else (self.base, *self.inputs)


@dataclass
class Plan:
    """A merge ready to be carried out."""

    recipe: Recipe
    refs: list[ModelRef]
    sources: list[Source]
    jobs: list[Job]
    template: int
    """The source whose config and tokenizer the output carries."""
    config_changes: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """Tensors of inputs that are not in the output, each with the reason."""
    vocabulary: Aligned | None = None
    """How vocabularies are brought together, where the recipe asks for it."""

    @property
    def out_bytes(self) -> int:
        """Bytes of weights that will be written."""
        return sum(job.out.nbytes for job in self.jobs)

    @property
    def in_bytes(self) -> int:
        """Bytes of weights that will be read (once)."""
        return sum(self.sources[p.source].tensors[p.name].nbytes for job in self.jobs for p in job.parts)

    @property
    def parameters(self) -> int:
        """Numbers in the output."""
        return sum(job.out.numel for job in self.jobs)

    def memory(self, threads: int) -> int:
        """An upper estimate in bytes of the anonymous memory that `threads` workers take, beside the interpreter's."""
        largest = sorted((job_bytes(self.recipe.method, job) for job in self.jobs), reverse=True)
        return sum(largest[:threads])

    def to_dict(self) -> dict[str, Any]:
        """The plan for `--json`: inputs, counts, sizes, tensor lists."""
        merged = [job.out.name for job in self.jobs if job.merge]
        return {
            "method": self.recipe.method,
            "models": [str(ref) for ref in self.refs],
            "base": str(self.recipe.base) if self.recipe.base else None,
            "tensors": len(self.jobs),
            "merged": len(merged),
            "copied": [job.out.name for job in self.jobs if not job.merge],
            "dropped": self.dropped,
            "numbers": self.parameters,
            "bytes_read": self.in_bytes,
            "bytes_written": self.out_bytes,
            "config_changes": self.config_changes,
            "notes": self.notes,
        }


def job_bytes(method: str, job: Job) -> int:
    """Scratch memory in bytes for one tensor: some chunks for what is streamed, some copies of it for what is not."""
    streamed = not job.merge or (method in STREAMED and not job.double)
    numbers = max(CHUNK, job.out.cols) if streamed else job.out.numel
    return numbers * (8 if job.double else 4) * (2 * len(job.parts) + 4)


def plan(recipe: Recipe, *, out: str | Path | None = None, force: bool = False, allow_pickle: bool = False) -> Plan:
    """The plan of `recipe`. Raises `SurgeryError` for everything that headers can tell is wrong, all tensors at once.

    With `out`, also refuses an output that exists (unless `force`) or that is one of the inputs.
    """
    refs = [ref for ref in recipe.models if ref.identity in _merged(recipe)]
    sources = [open_model(ref.spec, allow_pickle=allow_pickle, revision=ref.revision) for ref in refs]
    if out is not None:
        check_output(Path(out), [Path(p) for ref in refs for p in (ref.path, ref.lora) if p], force=force)
    return _Planner(recipe, refs, sources).plan()


def _merged(recipe: Recipe) -> set[tuple[str, ...]]:
    """The models whose tensors are used; a folder that lends only its tokenizer needs no weights."""
    items = [item for piece in recipe.slices for item in (piece.base, *piece.inputs) if item is not None]
    return {item.model.identity for item in items} | ({recipe.base.identity} if recipe.base else set())


def check_output(out: Path, inputs: Iterable[Path], *, force: bool = False) -> None:
    """Raises `SurgeryError` when `out` is one of the `inputs`, lies inside or around one, or exists without `force`."""
    target = Path(os.path.realpath(out))
    for path in inputs:
        real = Path(os.path.realpath(path))
        if target == real or target in real.parents or real in target.parents:
            raise SurgeryError(f"The output {out} is the input {path}, or one holds the other.", hint="Name another.")
    check_target(out, force=force)


class _Planner:
    """Builds a plan slice by slice; problems are gathered and told together."""

    def __init__(self, recipe: Recipe, refs: list[ModelRef], sources: list[Source]) -> None:
        self.recipe, self.refs, self.sources = recipe, refs, sources
        self.signature = signature_of(recipe.method)
        self.index = {ref.identity: i for i, ref in enumerate(refs)}
        self.plan_ = Plan(recipe, refs, sources, [], 0, notes=list(recipe.notes))
        self.missing: dict[str, list[str]] = {}
        self.mismatched: list[str] = []
        self.mine: Callable[[str], bool] = lambda tensor: True
        """Whether a tensor belongs to the module that is being planned."""

    def plan(self) -> Plan:
        recipe, plan = self.recipe, self.plan_
        template = recipe.base or recipe.slices[0].inputs[0].model
        plan.template = self.index[template.identity]
        plan.sources = self.sources = with_like_heads(self.sources)
        if materialised := [str(ref) for ref, s in zip(self.refs, self.sources, strict=True) if head_is_copied(s)]:
            plan.config_changes["tie_word_embeddings"] = False
            plan.notes.append(
                f"{', '.join(materialised)} ties its head to the embedding and other inputs do not: "
                "the output gets a head of its own, and tie_word_embeddings becomes false."
            )
        if recipe.tokenizer is None:
            self._refuse_other_vocabularies()
        else:
            plan.vocabulary = align_sources(recipe, self.refs, self.sources, plan.template)
            plan.sources = self.sources = plan.vocabulary.sources
            plan.config_changes |= plan.vocabulary.config_changes
            plan.notes += plan.vocabulary.notes
        jobs: dict[str, Job] = {}
        rest = self._module_of_the_rest()
        for name, module in recipe.modules.items():
            self.mine = self._claims(name, rest)
            if name != rest and any(piece.depth is not None for piece in module.slices):
                raise SurgeryError(f"Module '{name}': only '{rest}' can be made of layers.", hint="Use `models`.")
            if all(piece.depth is None for piece in module.slices):
                found = list(self._whole(module.slices[0]))
            else:
                found = list(self._stacked(module.slices))
            jobs |= {job.out.name: job for job in found}
        self._tell()
        if not any(job.merge for job in jobs.values()):
            raise SurgeryError("The models share no tensor that could be merged.", hint="Are they one architecture?")
        plan.jobs = [jobs[name] for name in sorted(jobs)]
        self._account()
        return plan

    # ---- which tensors ---------------------------------------------------------------------------------------------

    def _module_of_the_rest(self) -> str:
        """The module of all tensors that name no other: `text_decoder` beside a `vision_tower`."""
        named = {part for source in self.sources for tensor in source.tensors for part in tensor.split(".")}
        others = [module for module in self.recipe.modules if module not in named]
        if len(others) != 1 and len(self.recipe.modules) > 1:
            told = ", ".join(others) if others else "none of " + ", ".join(self.recipe.modules)
            raise SurgeryError(
                "A module takes the tensors that have its name among the parts of theirs, and one module the rest; "
                f"{told} would be that one.",
                hint="Call them as the tensors are called: vision_tower, multi_modal_projector.",
            )
        return others[0] if others else next(iter(self.recipe.modules))

    def _claims(self, module: str, rest: str) -> Callable[[str], bool]:
        """Whether a tensor belongs to `module`."""
        others = set(self.recipe.modules) - {rest}
        return lambda tensor: (others.isdisjoint(tensor.split("."))) if module == rest else module in tensor.split(".")

    def _whole(self, piece: Slice) -> Iterator[Job]:
        """Jobs for the tensors of whole models, by name."""
        members = ([piece.base] if piece.base else []) + piece.inputs
        names = list(dict.fromkeys(n for m in members for n in self._source(m).tensors))
        if len(members) > 1 and not set.intersection(*(set(self._source(m).tensors) for m in members)):
            raise SurgeryError(
                "The models share no tensor: " + ", ".join(str(m.model) for m in members) + ".",
                hint="A merge needs models of one architecture.",
            )
        depth = anatomy.stacks(names)
        for name in names:
            stack, layer = anatomy.stack_of(name), anatomy.layer_of(name)
            t = 0.0 if stack is None or layer is None else relative_depth(layer, depth[stack])
            yield from self._job(name, piece, [name] * len(piece.inputs), name, t)

    def _stacked(self, slices: list[Slice]) -> Iterator[Job]:
        """Jobs for a stack of slices: layers are renumbered; what is before the layers comes from the first slice,
        what is behind them from the last."""
        depth = 0
        origins: list[tuple[dict[str, Any], int]] = []
        for piece in slices:
            if piece.depth is None:
                raise SurgeryError("A slice names no layers.", hint="Give every source of every slice a layer range.")
            for item in ([piece.base] if piece.base else []) + piece.inputs:
                layers = anatomy.num_layers(self._source(item).tensors)
                if item.layers is not None and item.layers[1] > layers:
                    raise SurgeryError(f"{item.model} has {layers} layers; a slice takes {list(item.layers)}.")
            first = piece.inputs[0]
            stack = anatomy.main_stack(self._source(first).tensors)
            for name in self._source(first).tensors:
                layer = anatomy.layer_of(name)
                if layer is None or anatomy.stack_of(name) != stack:
                    continue
                assert first.layers is not None
                place = layer - first.layers[0]
                if 0 <= place < piece.depth:
                    names = [anatomy.with_layer(name, i.layers[0] + place) if i.layers else name for i in piece.inputs]
                    base = piece.base
                    base_name = anatomy.with_layer(name, base.layers[0] + place) if base and base.layers else name
                    out = anatomy.with_layer(name, depth + place)
                    yield from self._job(out, piece, names, base_name, relative_depth(place, piece.depth))
            depth += piece.depth
            origins += [(self._source(first).config, first.layers[0] + i) for i in range(piece.depth) if first.layers]
        first_piece, last_piece = slices[0], slices[-1]
        for piece, behind in ((first_piece, False), (last_piece, True)):
            members = self._source(piece.inputs[0]).tensors
            stack = anatomy.main_stack(members)
            for name in members:
                if anatomy.stack_of(name) == stack and anatomy.layer_of(name) is not None:
                    continue
                if (anatomy.kind_of(name) in ("norm", "head")) == behind:
                    yield from self._job(name, piece, [name] * len(piece.inputs), name, 0.0)
        self.plan_.config_changes |= layers_in_config(self.sources[self.plan_.template].config, origins)

    def _job(self, out: str, piece: Slice, names: list[str], base_name: str, t: float) -> Iterator[Job]:
        """The job of one output tensor; nothing when it is missing somewhere (which is noted)."""
        if not self.mine(out):
            return
        recipe = self.recipe
        parts = [Part(self._number(i), n) for i, n in zip(piece.inputs, names, strict=True)]
        base = Part(self._number(piece.base), base_name) if piece.base else None
        wanted = [base, *parts] if base else parts
        lacking = [p for p in wanted if p.name not in self.sources[p.source].tensors]
        has = [p for p in parts if p not in lacking]
        baseless, base = base in lacking, None if base in lacking else base
        if not recipe.merges(out):
            yield self._copy(out, base or has[0])
            return
        for p in lacking:
            self.missing.setdefault(str(self.refs[p.source]), []).append(p.name)
        if lacking and recipe.missing == "error":
            return
        used = list(range(len(parts)))
        if recipe.missing == "base" and base is not None:
            parts = [p if p in has else base for p in parts]
        else:
            used = [i for i in used if parts[i] in has]
        if len(used) < self.signature.inputs[0] or (baseless and self.signature.base == "required"):
            yield self._copy(out, base or has[0])  # too few are left, or nothing to take a difference from
            return
        infos = [self._info(parts[i]) for i in used] + ([self._info(base)] if base else [])
        lead = infos[-1] if base else infos[0]
        if any(info.shape != lead.shape for info in infos):
            shapes = ", ".join(f"{self.refs[parts[i].source]} {list(self._info(parts[i]).shape)}" for i in used)
            told = f" (base {list(lead.shape)})" if base else ""
            self.mismatched.append(f"{out}: {shapes}{told}")
            return
        floats = [info.is_float for info in infos]
        if not all(floats):
            if any(floats):
                self.mismatched.append(f"{out}: whole numbers in one model, fractions in another")
                return
            yield Job(replace(lead, name=out), tuple(parts[i] for i in used), base, merge=False)
            return
        given = resolve(recipe, self.signature.parameters, piece, out, t, names)
        parameters: dict[str, Any] = {
            word: [value[i] for i in used] if isinstance(value, list) else value for word, value in given.items()
        }
        code = lead.dtype if recipe.out_dtype == "base" else dtype_code(recipe.out_dtype)
        double = recipe.dtype == "float64" or any(info.dtype == "F64" for info in infos)
        yield Job(
            TensorInfo(out, code, lead.shape),
            tuple(parts[i] for i in used),
            base,
            parameters,
            depth=t,
            double=double,
        )

    def _copy(self, out: str, part: Part) -> Job:
        info = self._info(part)
        code = info.dtype if self.recipe.out_dtype == "base" or not info.is_float else dtype_code(self.recipe.out_dtype)
        return Job(TensorInfo(out, code, info.shape), (part,), None, merge=False)

    # ---- vocabularies ------------------------------------------------------------------------------------

    def _refuse_other_vocabularies(self) -> None:
        """Raises `SurgeryError` when embeddings or tokens differ: the recipe must say what to do."""
        rows = {}
        for ref, source in zip(self.refs, self.sources, strict=True):
            name = anatomy.input_embedding(source.tensors)
            if name is not None:
                rows[str(ref)] = source.tensors[name].rows
        if len(set(rows.values())) > 1:
            told = ", ".join(f"{ref} {count:,}" for ref, count in rows.items())
            raise SurgeryError(
                f"The vocabularies differ in size ({told} rows), and the recipe does not say what to do.",
                hint="Add `vocab: base`, `union` or `intersection` (mergekit: tokenizer_source); "
                "rows are then aligned by token string.",
            )
        refuse_other_tokens(self.refs, self.sources)

    # ---- telling ---------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        """Raises one `SurgeryError` for all mismatched and missing tensors."""
        problems = [f"shapes or types differ: {line}" for line in self.mismatched[:SHOWN]]
        more = len(self.mismatched) - SHOWN
        problems += [f"... and {more} more"] if more > 0 else []
        for ref, names in self.missing.items():
            told = f"{ref} lacks {len(names)} tensors: {_some(names)}"
            if self.recipe.missing == "error":
                problems.append(told)
            else:
                self.plan_.notes.append(told)
        if problems:
            hint = "Are these fine-tunings of one model?"
            if self.missing and not self.mismatched:
                hint += " To merge all the same: `missing: base` (no change there) or `missing: skip` (leave it out)."
            raise SurgeryError("The models don't fit together:\n  " + "\n  ".join(problems), hint=hint)

    def _account(self) -> None:
        """Lists what is in no job, so that nothing is lost in silence."""
        used = {(p.source, p.name) for job in self.plan_.jobs for p in job.parts}
        for i, (ref, source) in enumerate(zip(self.refs, self.sources, strict=True)):
            lost = [n for n in source.tensors if (i, n) not in used]
            if lost and any(part[0] == i for part in used):
                self.plan_.dropped.append(f"{ref}: {len(lost)} tensors are not used: {_some(lost)}")

    def _source(self, item: Input) -> Source:
        return self.sources[self._number(item)]

    def _number(self, item: Input) -> int:
        return self.index[item.model.identity]

    def _info(self, part: Part) -> TensorInfo:
        return self.sources[part.source].tensors[part.name]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
