"""`merge`: a recipe carried out, streamed from disk to disk on all cores in bounded memory.

Each worker takes one tensor, largest first: reads its rows from all inputs chunk by chunk, runs the method, rounds
once, writes the rows at their place, and notes what rounding lost. The answer does not depend on the number of
threads, on chunks or on the order of tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import surgery
from surgery.checkpoint.chat_templates import TEMPLATES, commonest
from surgery.checkpoint.companions import companion_folder, model_card, write_companions
from surgery.checkpoint.header import torch_dtype
from surgery.checkpoint.provenance import Provenance, fingerprint
from surgery.checkpoint.writer import CheckpointWriter
from surgery.errors import SurgeryError
from surgery.weights.engine import Engine
from surgery.weights.kinship import strangers
from surgery.weights.plan import Job, Plan, check_output, plan
from surgery.weights.progress import Progress
from surgery.weights.recipe import Recipe, load_recipes, recipe_from_source
from surgery.weights.streams import one_torch_thread

Rounding = Literal["nearest", "stochastic"]


@dataclass
class Merged:
    """The outcome of a merge: where it is, what happened to each tensor, what the reader should know."""

    out: Path
    method: str
    tensors: dict[str, dict[str, Any]] = field(repr=False)
    """Per tensor: `update` ||X - B||, `rounding_loss`, and what the method reports."""
    notes: list[str]
    nbytes: int
    numbers: int
    seconds: float
    resumed: int = 0
    """Tensors taken over from an interrupted run."""

    @property
    def rounding_loss(self) -> float | None:
        """Share of the wanted update lost to rounding, ||round(X) - X|| / ||X - B|| over all tensors."""
        known = [r for r in self.tensors.values() if "rounding_loss" in r]
        wanted = sum(r["update"] ** 2 for r in known)
        lost = sum((r["rounding_loss"] * r["update"]) ** 2 for r in known)
        return (lost / wanted) ** 0.5 if wanted > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "method": self.method,
            "numbers": self.numbers,
            "bytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "rounding_loss": self.rounding_loss,
            "resumed": self.resumed,
            "notes": self.notes,
        }


def merge(
    recipe: Recipe | Sequence[Recipe] | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    threads: int | None = None,
    device: str = "cpu",
    rounding: Rounding = "nearest",
    force: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Carries out `recipe` and writes the folder `out`: weights, config, tokenizer, card and provenance record.

    `recipe` is a `Recipe`, a dictionary, or YAML as text or path, in our dialect or mergekit's; the stages of a file
    (or of a list, as `load_recipes` gives it) are run in order, and the last is the result. `threads` defaults to the
    number of cores. `rounding` "stochastic" rounds up or down by seeded chance, so that small updates survive on
    average. An interrupted run is resumed when called again. Raises `SurgeryError` before anything is written for
    whatever headers can tell.
    """
    out = Path(out).expanduser()
    stages = _stages(recipe)
    names = {stage.name for stage in stages}
    refs = [ref for stage in stages for ref in stage.models if ref.path not in names]
    check_output(out, [Path(p) for ref in refs for p in (ref.path, ref.lora) if p], force=force)
    folders: dict[str, str] = {}
    scratch = out.absolute().parent / f".{out.name}.stages"
    how: dict[str, Any] = {"threads": threads, "device": device, "rounding": rounding, "progress": progress}
    notes: list[str] = []
    try:
        for i, stage in enumerate(stages):
            last = i == len(stages) - 1
            target = out if last else scratch / str(stage.name)
            ready = plan(stage.with_stages(folders), out=target, force=force or not last, allow_pickle=allow_pickle)
            result = execute(ready, target, force=force or not last, **how)
            notes += result.notes if last else [f"{stage.name}: {note}" for note in result.notes]
            if stage.name is not None:
                folders[stage.name] = str(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    result.notes = list(dict.fromkeys(notes))
    return result


def merge_in_memory(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    threads: int | None = None,
    device: str = "cpu",
    allow_pickle: bool = False,
) -> dict[str, Tensor]:
    """The merged tensors of a recipe of one stage by name, in their output types: for evaluating without a disk."""
    stages = _stages(recipe)
    if len(stages) != 1:
        raise SurgeryError("A recipe of several stages needs a folder for each.", hint="Use merge(recipe, out).")
    ready = plan(stages[0], allow_pickle=allow_pickle)
    state = {job.out.name: torch.empty(job.out.shape, dtype=torch_dtype(job.out.dtype)) for job in ready.jobs}

    def emit(job: Job, start: int, rows: Tensor) -> None:
        target = state[job.out.name].reshape(-1)
        target[start * job.out.cols : start * job.out.cols + rows.numel()] = rows.to("cpu")

    engine = Engine(ready, device=device, rounding="nearest", emit=emit)
    engine.survey(threads or os.cpu_count() or 1)
    engine.run(ready.jobs, threads or os.cpu_count() or 1, lambda job, report: None)
    return state


def execute(
    ready: Plan,
    out: str | Path,
    *,
    threads: int | None = None,
    device: str = "cpu",
    rounding: Rounding = "nearest",
    force: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Carries out a plan; see `merge`."""
    began = time.perf_counter()
    threads = threads or os.cpu_count() or 1
    recipe = ready.recipe
    job_id = _digest(ready, rounding)
    with one_torch_thread():  # a pool of torch's own threads costs more than the look itself
        warnings = strangers(ready)
    infos = [job.out for job in ready.jobs]
    with CheckpointWriter(out, infos, shard_size=recipe.shard_size, job=job_id, force=force) as writer:
        reports: dict[str, dict[str, Any]] = dict(writer.done)
        left = [job for job in ready.jobs if job.out.name not in writer.done]
        done = ready.out_bytes - sum(job.out.nbytes for job in left)
        lock = threading.Lock()

        def finished(job: Job, report: dict[str, Any]) -> None:
            nonlocal done
            writer.finish(job.out.name, report)
            with lock:
                reports[job.out.name] = report
                done += job.out.nbytes
                if progress is not None:
                    progress(job.out.name, done, ready.out_bytes)

        engine = Engine(ready, device=device, rounding=rounding, emit=lambda j, s, r: writer.write(j.out.name, r, s))
        engine.survey(threads)
        engine.run(left, threads, finished)
        result = Merged(
            out=Path(out),
            method=recipe.method,
            tensors={name: reports[name] for name in sorted(reports)},
            notes=[*ready.notes, *warnings, *ready.dropped],
            nbytes=writer.nbytes,
            numbers=ready.parameters,
            seconds=0.0,
            resumed=len(ready.jobs) - len(left),
        )
        result.notes += _observations(result)
        record = _provenance(ready, result, rounding)
        base, vocabulary = ready.sources[ready.template], ready.vocabulary
        with vocabulary.tokenizer_folder() if vocabulary else nullcontext() as tokenizer:
            write_companions(
                writer,
                base,
                config_changes=ready.config_changes,
                tokenizer_from=tokenizer,
                chat_template=_chat_template(ready),
                card=model_card(record, Path(out).name, base),
                provenance=record,
            )
        if vocabulary is not None and (generation := vocabulary.generation_config(base)) is not None:
            writer.add_file("generation_config.json", json.dumps(generation, indent=2) + "\n")
    result.seconds = time.perf_counter() - began
    return result


def _stages(recipe: Recipe | Sequence[Recipe] | Mapping[str, Any] | str | Path) -> list[Recipe]:
    if isinstance(recipe, Recipe):
        return [recipe]
    if isinstance(recipe, Mapping):
        return [recipe_from_source(recipe)]
    return load_recipes(recipe) if isinstance(recipe, (str, Path)) else list(recipe)


def _digest(ready: Plan, rounding: str) -> str:
    """What a resumed run must agree on: the work on every tensor, the inputs' files, our version."""
    recipe = ready.recipe
    files = {info.file for source in ready.sources for info in source.tensors.values() if info.file is not None}
    for ref in ready.refs:  # rows that an adapter or another tokenizer changes name no file
        for folder in (Path(ref.path), Path(ref.lora or ref.path)):
            files |= {path for path in folder.glob("*") if path.is_file()}
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(files)]
    how = [recipe.method, recipe.seed, recipe.nonfinite, recipe.shard_size, repr(recipe.tokenizer), rounding]
    jobs = [(repr(job.parts), job.out, job.merge, job.depth, job.double, job.parameters) for job in ready.jobs]
    facts = [surgery.__version__, how, [str(ref) for ref in ready.refs], stats, jobs]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def _observations(result: Merged) -> list[str]:
    """What a reader of the result should know and might not ask."""
    notes = []
    if (loss := result.rounding_loss) is not None and loss > 0.2:
        notes.append(
            f"Rounding to the output's type lost {loss:.0%} of the update. Write float32 (out_dtype: float32) "
            "or round stochastically to keep it."
        )
    branches = [r["branch"] for r in result.tensors.values() if "branch" in r]
    if branches:
        linear = branches.count("linear")
        notes.append(f"SLERP was linear interpolation for {linear} of {len(branches)} tensors (cosine above 0.9995).")
    replaced = sum(r.get("nonfinite_replaced", 0) for r in result.tensors.values())
    if replaced:
        notes.append(f"{replaced:,} values that were NaN or infinite were taken from the base.")
    return notes


def _provenance(ready: Plan, result: Merged, rounding: str) -> Provenance:
    recipe = ready.recipe
    record = Provenance(
        operation="merge",
        recipe=recipe.source,
        parameters={"method": recipe.method, "rounding": rounding},
        seed=recipe.seed,
        totals={
            "tensors": len(result.tensors),
            "numbers": result.numbers,
            "bytes": result.nbytes,
            "rounding_loss": result.rounding_loss,
        },
    )
    sums: list[dict[str, str]] = [{} for _ in ready.sources]
    aligned = ready.vocabulary.rewritten if ready.vocabulary else set()
    for job in ready.jobs:
        report = result.tensors[job.out.name]
        for part, digest in zip(job.parts, report.get("checksums", ()), strict=False):
            if (part.source, part.name) not in aligned:  # those rows are in no file as they were read
                sums[part.source][part.name] = digest
        record.tensors[job.out.name] = {k: v for k, v in report.items() if k != "checksums"}
    for i, (ref, source) in enumerate(zip(ready.refs, ready.sources, strict=True)):
        role = "base" if recipe.base is not None and ref.identity == recipe.base.identity else "tuned"
        record.inputs.append({"name": str(ref), "role": role, **fingerprint(source), "tensors": sums[i]})
    return record


def _chat_template(ready: Plan) -> str | None:
    """Jinja text of a recipe's `chat_template`; None leaves the tokenizer's own."""
    wanted = ready.recipe.chat_template
    if wanted == "auto":
        return commonest(companion_folder(source) for source in ready.sources)
    return TEMPLATES.get(wanted, wanted) if wanted is not None else None
