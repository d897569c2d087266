"""The check before a merge or an apply: do these models belong together, and will the update survive?

Two levels, each a list of `Finding`s. `compare` needs headers and configs only (no torch, unless there are integer
buffers to hold against each other); `ancestry` and `sanity` stream the numbers once. `check` runs what is asked for.

A finding *fails* when the result would be wrong (other shapes, another initialisation, NaN), and *warns* when it is
defined but may not be what is wanted (rope changed, head tied here and not there, most of the update rounded away).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from surgery.anatomy import input_embedding, output_head
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.reader import Source
from surgery.checkpoint.vocabulary import Vocabulary, difference
from surgery.errors import SurgeryError
from surgery.weights.ancestry import ancestry, blocks, comparable
from surgery.weights.findings import CompatibilityReport, Finding, Level, listed
from surgery.weights.progress import Progress

__all__ = ["CompatibilityReport", "Finding", "check", "compare"]


def check(
    base: Source,
    others: Sequence[Source],
    *,
    data: bool = True,
    sample: int | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> CompatibilityReport:
    """Everything that can be said before `others`, fine-tunings of `base`, are merged.

    `data=False` looks at headers and configs only. `sample` bounds the numbers read per tensor (None: all of them).
    `progress` counts the bytes of all `others`.
    """
    report = CompatibilityReport(compare(base, others))
    sizes = [sum(other.tensors[n].nbytes for n in comparable(base, other)) for other in others]
    for i, other in enumerate(others if data else ()):

        def advance(name: str, done: int, _: int, before: int = sum(sizes[:i])) -> None:
            if progress is not None:
                progress(name, before + done, sum(sizes))

        related = ancestry(base, other, sample=sample, threads=threads, progress=advance)
        report.findings += related.findings()
        report.measures[_label(other, others)] = related.to_dict()
    return report


# ---- headers and configs -------------------------------------------------------------------------------------------

_FIELDS: dict[str, tuple[Level, tuple[str, ...]]] = {
    "model_type": ("fail", ("model_type",)),
    "hidden size": ("fail", ("hidden_size", "n_embd", "d_model", "dim")),
    "MLP size": ("fail", ("intermediate_size", "n_inner", "d_ff", "ffn_dim")),
    "layers": ("fail", ("num_hidden_layers", "n_layer", "num_layers", "n_layers")),
    "heads": ("fail", ("num_attention_heads", "n_head", "num_heads", "n_heads")),
    "key-value heads": ("fail", ("num_key_value_heads", "num_kv_heads")),
    "head size": ("fail", ("head_dim", "d_kv")),
    "experts": ("fail", ("num_local_experts", "num_experts", "n_routed_experts")),
    "experts per token": ("warn", ("num_experts_per_tok", "num_experts_per_token")),
    "activation": ("warn", ("hidden_act", "hidden_activation", "activation_function")),
    "vocabulary size": ("warn", ("vocab_size",)),
    "context length": ("warn", ("max_position_embeddings", "n_positions")),
    "sliding window": ("warn", ("sliding_window",)),
    "norm epsilon": ("warn", ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")),
}
# Made from the config when a model is built; files of older libraries store them, newer ones do not.
_DERIVED = re.compile(r"(inv_freq|attn\.bias|attention\.bias|masked_bias|position_ids)$")


def compare(base: Source, others: Sequence[Source]) -> list[Finding]:
    """Findings on configs, tensor names, shapes, types, heads, integer buffers and vocabularies of all inputs.

    Everything that differs is listed, not only the first. Raises `SurgeryError` when there is nothing to compare.
    """
    if not others:
        raise SurgeryError(f"Nothing was given to compare {base.path} with.")
    findings: list[Finding] = []
    for other in others:
        label = _label(other, others)
        for look in (_same_folder, _configs, _tensors, _types, _heads, _buffers, _vocabularies):
            findings += look(base, other, label)
    resolved = [other.path.resolve() for other in others]
    twice = sorted({str(path) for path in resolved if resolved.count(path) > 1})
    if twice:
        hint = "Give it once, with a larger weight if that is meant."
        findings.append(Finding("warn", "inputs", f"Given more than once: {', '.join(twice)}.", hint))
    return findings


def _label(source: Source, among: Sequence[Source]) -> str:
    """A short name for messages: the folder's name where it tells the inputs apart, else its path."""
    name = source.path.name
    return str(source.path) if sum(s.path.name == name for s in among) > 1 else name


def _same_folder(base: Source, other: Source, label: str) -> Iterator[Finding]:
    if type(base) is type(other) and base.path.resolve() == other.path.resolve():
        yield Finding("fail", "inputs", f"{label} is the base itself: their difference is zero.", "Name a fine-tuning.")


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of the text model, which vision-language models keep one level down."""
    inner = config.get("text_config")
    return config | inner | {"model_type": config.get("model_type")} if isinstance(inner, dict) else config


def _rope(config: dict[str, Any]) -> dict[str, Any] | None:
    """Rotary settings in one spelling (transformers 5: rope_parameters; before: rope_theta, rope_scaling)."""
    found = config.get("rope_parameters") or config.get("rope_scaling")
    rope = dict(found) if isinstance(found, dict) else {}
    theta = rope.pop("rope_theta", config.get("rope_theta"))
    kind = rope.pop("rope_type", rope.pop("type", None))
    if theta is None and not rope and kind is None:
        return None
    return rope | {"rope_theta": theta, "rope_type": kind or "default"}


def _configs(base: Source, other: Source, label: str) -> Iterator[Finding]:
    if not base.config or not other.config:
        who = label if not other.config else str(base.path)
        yield Finding("warn", "config", f"{who} has no config.json: only tensors were compared.")
        return
    mine, theirs = _text_config(base.config), _text_config(other.config)
    equal = 0
    for what, (level, keys) in _FIELDS.items():
        ours, yours = (next((c[k] for k in keys if c.get(k) is not None), None) for c in (mine, theirs))
        if ours is None or yours is None:
            continue  # left to the library's default, which we do not know
        if ours == yours:
            equal += 1
        else:
            hint = "Another architecture can't be merged." if level == "fail" else "The base's value will be kept."
            yield Finding(level, "config", f"{label}: {what} is {yours!r}, the base has {ours!r}.", hint)
    ours, yours = _rope(mine), _rope(theirs)
    if ours and yours and ours != yours:
        differing = sorted(k for k in ours.keys() | yours.keys() if ours.get(k) != yours.get(k))
        detail = ", ".join(f"{k} {yours.get(k)!r} (base {ours.get(k)!r})" for k in differing)
        hint = "Positions mean something else there; the base's setting will be kept."
        yield Finding("warn", "config", f"{label}: rotary embeddings differ: {detail}.", hint)
    else:
        equal += ours is not None and yours is not None
    yield Finding("pass", "config", f"{label}: {equal} fields equal.")


def _tensors(base: Source, other: Source, label: str) -> Iterator[Finding]:
    heads = {output_head(base.tensors), output_head(other.tensors)}  # tied or not: `_heads` speaks of it
    missing = base.tensors.keys() - other.tensors.keys() - heads
    extra = other.tensors.keys() - base.tensors.keys() - heads
    shared = [n for n in base.tensors if n in other.tensors]
    prefix = _prefix(missing, extra)
    for names, text in ((missing, "lacks tensors that the base has"), (extra, "has tensors that the base lacks")):
        learned = {n for n in names if not _DERIVED.search(n)}
        hint = f"The names differ by the prefix '{prefix}': one was saved without its outer model." if prefix else None
        if learned:
            detail = f"{label} {text} ({len(learned)}): {listed(learned)}."
            yield Finding("fail", "tensor names", detail, hint, tuple(sorted(learned)))
        if derived := names - learned:
            detail = f"{label} {text}, all of them computed from the config ({len(derived)}): {listed(derived)}."
            yield Finding("warn", "tensor names", detail, None, tuple(sorted(derived)))
    if not shared:
        yield Finding("fail", "tensor names", f"{label} has no tensor in common with the base.", hint)
        return
    unequal = [n for n in shared if base.tensors[n].shape != other.tensors[n].shape]
    ends = {input_embedding(base.tensors), output_head(base.tensors)}
    vocabulary = {n for n in unequal if n in ends and _same_width(base.tensors[n], other.tensors[n])}
    for names, hint in (
        (vocabulary, "Another vocabulary: align it by token (base, union or intersection)."),
        ({*unequal} - vocabulary, "Shapes must be equal."),
    ):
        if names:
            shapes = (f"{n} {list(other.tensors[n].shape)} (base {list(base.tensors[n].shape)})" for n in names)
            detail = f"{label}: {len(names)} shapes differ: {listed(shapes)}."
            yield Finding("fail", "shapes", detail, hint, tuple(sorted(names)))
    if not unequal and not missing and not extra:
        yield Finding("pass", "tensors", f"{label}: {len(shared)} names and shapes equal.")


def _same_width(a: TensorInfo, b: TensorInfo) -> bool:
    return len(a.shape) == len(b.shape) == 2 and a.cols == b.cols


def _prefix(missing: set[str], extra: set[str]) -> str | None:
    """What stands before all names of one side and not of the other, such as `model.` or `transformer.`."""
    for short, long in ((missing, extra), (extra, missing)):
        if not short:
            continue
        name = max(short, key=len)
        for candidate in (n[: -len(name)] for n in long if n.endswith("." + name)):
            if {candidate + n for n in short} <= long:
                return candidate
    return None


def _types(base: Source, other: Source, label: str) -> Iterator[Finding]:
    pairs = [(n, info, other.tensors[n]) for n, info in base.tensors.items() if n in other.tensors]
    mixed = [n for n, a, b in pairs if a.is_float != b.is_float]
    if mixed:
        detail = f"{label}: whole numbers in one and fractions in the other: {listed(mixed)}."
        yield Finding("fail", "types", detail, "One of them is quantised.", tuple(mixed))
    differing = [(n, a.dtype, b.dtype) for n, a, b in pairs if a.dtype != b.dtype and n not in mixed]
    if differing:
        kinds = sorted({f"{b} (base {a})" for _, a, b in differing})
        detail = f"{label}: {len(differing)} tensors are stored in another type: {', '.join(kinds)}."
        hint = "Arithmetic is in float32 whatever the storage; the output takes the base's type unless told otherwise."
        yield Finding("warn", "types", detail, hint, tuple(n for n, _, _ in differing))


def _heads(base: Source, other: Source, label: str) -> Iterator[Finding]:
    states = []
    for source, who in ((base, "the base"), (other, label)):
        tied = _text_config(source.config).get("tie_word_embeddings", source.config.get("tie_word_embeddings"))
        head = output_head(source.tensors)
        if tied and head:
            detail = f"{who} stores {head} although tie_word_embeddings is true: transformers ignores it on loading."
            yield Finding("warn", "head", detail, "If the head was trained, set tie_word_embeddings to false.", (head,))
        states.append((head is not None, bool(tied) if tied is not None else None))
    (has, tied), (other_has, other_tied) = states
    if has != other_has or (None not in (tied, other_tied) and tied != other_tied):
        kinds = {True: "its own head", False: "a head tied to the embedding"}
        detail = f"{label} has {kinds[other_has and not other_tied]}, the base {kinds[has and not tied]}."
        yield Finding("warn", "head", detail, "The result needs its own head, and tie_word_embeddings: false.")


def _buffers(base: Source, other: Source, label: str) -> Iterator[Finding]:
    def whole(info: TensorInfo | None) -> bool:
        return info is not None and not info.is_float

    shared = [n for n, info in base.tensors.items() if whole(info) and whole(other.tensors.get(n))]
    shared = [n for n in shared if base.tensors[n].shape == other.tensors[n].shape]
    unequal = [n for n in shared if not all(bool((a == b).all()) for a, b in blocks((base, other), n))]
    if unequal:
        detail = f"{label}: buffers of whole numbers differ from the base's: {listed(unequal)}."
        yield Finding("fail", "buffers", detail, "They can't be averaged: make them equal first.", tuple(unequal))
    elif shared:
        yield Finding("pass", "buffers", f"{label}: {len(shared)} buffers of whole numbers equal.")


def _vocabularies(base: Source, other: Source, label: str) -> Iterator[Finding]:
    lacking = [str(s.path) for s in (base, other) if not (s.path / "tokenizer.json").is_file()]
    if lacking:
        if len(lacking) == 1:
            yield Finding("warn", "tokenizer", f"{lacking[0]} has no tokenizer.json: vocabularies were not compared.")
        return
    differ = difference(Vocabulary.open(base.path), Vocabulary.open(other.path))
    if differ.equal:
        yield Finding("pass", "tokenizer", f"{label}: {differ.sizes[1]:,} tokens equal.")
    elif differ.same_rows:
        hint = "Rows mean the same tokens; the base's tokenizer will be kept."
        yield Finding("warn", "tokenizer", str(differ), hint)
    else:
        hint = "Rows mean other tokens: align them by token (base, union or intersection)."
        yield Finding("fail", "tokenizer", str(differ), hint)
