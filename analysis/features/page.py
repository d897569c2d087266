"""A page of features: what is known of each latent, as one HTML file that needs nothing else.

    feature_page(crosscoder, examples(reader, texts), latents=[17, 40], scaling=latent_scaling(...),
                 tokens=dict(zip([17, 40], promoted(tuned, reader.decoder()[[17, 40]], tokenizer=tokenizer))))

No script, no network; what comes from texts and tokens is never read as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from analysis.features.changes import Changed
from analysis.features.examples import EDGES, Examples
from analysis.features.kinds import KINDS, Scaling
from analysis.html import WORDS, Html, page, table
from analysis.results import Result
from surgery.errors import SurgeryError
from surgery.sae.dictionary import Dictionary

Sides = tuple[list[tuple[str, float]], list[tuple[str, float]]]
"""Tokens that a latent promotes and suppresses, as `promoted` gives them."""


def feature_page(
    dictionary: Dictionary,
    found: Examples | Mapping[str, Examples],
    *,
    latents: Sequence[int] | None = None,
    scaling: Scaling | None = None,
    changes: Changed | None = None,
    tokens: Mapping[int, Sides] | None = None,
    effects: Result | None = None,
    k: int = 6,
    title: str = "Features",
) -> Html:
    """A section a latent: numbers, histogram, tokens promoted and suppressed, `k` examples of each model.

    `found` are examples, or by model {"base": ..., "tuned": ...} where one dictionary read both; `latents` those to
    show (all that examples were looked for, 50 at most). `effects` has an axis "latent" (`ablate_latents`).
    Raises `SurgeryError` for latents without examples, and for results of another dictionary.
    """
    sets = {"": found} if isinstance(found, Examples) else dict(found)
    if not sets:
        raise SurgeryError("A page needs examples.", hint="examples(reader, texts, latents)")
    one = next(iter(sets.values()))
    chosen = list(one.latents[:50]) if latents is None else [int(j) for j in latents]
    for each in sets.values():
        for j in chosen:
            each._place(j)
    _fitting(dictionary, one, scaling)
    facts = facts_of(dictionary, sets, scaling, changes, effects)
    heads = ["latent", *dict.fromkeys(name for j in chosen for name in facts(j))]
    rows = [[j, *(_there(facts(j).get(name, "")) for name in heads[1:])] for j in chosen]
    about = f"{dictionary.latents} latents at {one.site}; {one.texts} texts, {one.tokens} tokens."
    parts: list[Any] = [about, *_overview(scaling, changes, one), table(heads, rows, title="At a glance")]
    for j in chosen:
        parts += _section(j, sets, facts(j), (tokens or {}).get(j), k)
    return page(title, *parts)


def _fitting(dictionary: Dictionary, found: Examples, scaling: Scaling | None) -> None:
    many = dictionary.latents
    if max(found.latents) >= many or (scaling is not None and len(scaling.norm) != many):
        raise SurgeryError(f"These results are not of this dictionary: it has {many} latents.")


def _overview(scaling: Scaling | None, changes: Changed | None, found: Examples) -> list[Any]:
    if scaling is not None:
        kinds = scaling.to_dataframe()["kind"].value_counts()
        said = ", ".join(f"{int(kinds.get(kind, 0))} {kind}" for kind in KINDS)
        return [f"By decoder norm: {said}. Tuned only by both nu as well: {len(scaling.tuned_only())}.", scaling.plot()]
    if changes is not None:
        return ["Firing rates of the same dictionary in both models, on the same tokens.", changes.plot()]
    return [found.plot()] if len(found.latents) > 20 else []


def facts_of(
    dictionary: Dictionary, sets: Mapping[str, Examples], scaling: Scaling | None, changes: Changed | None,
    effects: Result | None,
) -> Any:  # fmt: skip
    """A function of a latent: what is known of it, by name."""
    norms = dictionary.decoder.detach().view(dictionary.latents, dictionary.models, -1).norm(dim=-1)
    kinds: Any = {} if scaling is None else scaling.to_dataframe().to_dict("index")
    fates: Any = {} if changes is None else changes.to_dataframe().to_dict("index")
    tables: dict[str, Any] = {name: each.table().to_dict("index") for name, each in sets.items()}

    def known(j: int) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if j in kinds:
            row = kinds[j]
            told |= {"kind": row["kind"], "relative norm": float(row["norm"]), "nu error": float(row["error"]),
                     "nu reconstruction": float(row["reconstruction"]), "cosine": float(row["cosine"])}  # fmt: skip
        if j in fates:
            told |= {"fate": fates[j]["fate"], "overlap": float(fates[j]["overlap"])}
        names = [""] if dictionary.models == 1 else ["base", "tuned"] if dictionary.models == 2 else [
            str(i) for i in range(dictionary.models)]  # fmt: skip
        told |= {f"norm {name}".strip(): float(norm) for name, norm in zip(names, norms[j], strict=True)}
        for name, one in tables.items():
            told |= {f"{what} {name}".strip(): float(one[j][column])
                     for what, column in (("fires", "rate"), ("mean", "mean"), ("max", "max"))}  # fmt: skip
        if effects is not None and j in effects.axes["latent"]:
            place = list(effects.axes["latent"]).index(j)
            told[effects.name] = float(effects.mean[place])
        return told

    return known


def _section(
    latent: int, sets: Mapping[str, Examples], facts: Mapping[str, Any], tokens: Sides | None, k: int
) -> list[Any]:
    kind = facts.get("kind") or facts.get("fate") or ""
    head = f"latent {latent}" + (f": {kind}" if kind else "")
    rule = "border-top:2px solid #111;margin:2em 0 0;padding-top:0.6em;font-size:1.1em"
    parts: list[Any] = [Html(f'<h2 id="latent-{latent}" style="{WORDS};{rule}">{escape(head)}</h2>')]
    numbers = {name: value for name, value in facts.items() if name not in ("kind", "fate")}
    parts.append(table(list(numbers), [[_there(value) for value in numbers.values()]]))
    if tokens is not None:
        said = [", ".join(f"{_quoted(token)} {value:+.2g}" for token, value in side) for side in tokens]
        parts += [f"promotes: {said[0]}", f"suppresses: {said[1]}"]
    for name, found in sets.items():
        place = found._place(latent)
        parts.append(_histogram(found.histogram[place], name))
        if not found.fired[place]:
            continue
        parts.append(found.html(latent, k=k, title=f"examples{f', {name}' if name else ''}"))
    return parts


def _there(value: Any) -> Any:
    """Nothing for what is not a number: the mean of a latent that is never active."""
    return "" if isinstance(value, float) and np.isnan(value) else value


def _quoted(token: str) -> str:
    return f"'{token}'"


def _histogram(counts: np.ndarray, name: str) -> Html:
    """Active tokens by activation (log scale), as an SVG of the page itself."""
    there = np.flatnonzero(counts)
    if not there.size:
        return Html(f'<p style="{WORDS}">never active{f" in {escape(name)}" if name else ""}</p>')
    first, last = int(there[0]), int(there[-1])
    part, wide, high = counts[first : last + 1], 360, 70
    step = min(24.0, wide / len(part))
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{high - high * n / part.max():.1f}" width="{step * 0.9:.1f}" '
        f'height="{high * n / part.max():.1f}" fill="#777"><title>{EDGES[first + i]:.3g} to '
        f"{EDGES[first + i + 1]:.3g}: {int(n)} tokens</title></rect>"
        for i, n in enumerate(part)
    )
    width = step * len(part)
    low, top = f"{EDGES[first]:.3g}", f"{EDGES[last + 1]:.3g}"
    ends = f'<text x="0" y="{high + 13}">{low}</text>'
    ends += f'<text x="{width:.0f}" y="{high + 13}" text-anchor="end">{top}</text>'
    if width < 100:
        ends = f'<text x="0" y="{high + 13}">{low} to {top}</text>'
    said = f"activations{f' in {name}' if name else ''}: {int(counts.sum())} tokens, at most {int(part.max())} a bar"
    return Html(
        f'<figure style="margin:0.6em 0"><svg role="img" width="{max(width, 120):.0f}" height="{high + 18}" '
        f'font-size="11" font-family="system-ui,sans-serif"><title>{escape(said)}</title>'
        f'<line x1="0" x2="{width:.1f}" y1="{high}" y2="{high}" stroke="#111"/>{bars}{ends}</svg>'
        f'<figcaption style="{WORDS}">{escape(said)}</figcaption></figure>'
    )
