"""What an exploration found: how much of it is new, how many of the new things, how different from one another.

| measure | of a text | over all texts |
|---|---|---|
| `detection` | is it in a novel domain (arXiv:2410.14765)? | detection rate |
| `coverage` | has each domain been hit by the k-th text? | coverage, a curve over k |
| `novelty` | mean contrast of a token | |
| `distinct` | its n-grams that no text before had (arXiv:1510.03055) | distinct-n |
| `similarity` | mean Jaccard similarity of its n-grams to the other texts' | mean pairwise similarity |

Labels say of each text which domain it is in (None: none that is new); they come from an oracle or a classifier. The
last two need none. `report` is all of it on one page, with every token coloured by its contrast.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from analysis.html import Html, coloured_many, page, table
from analysis.results import Result
from analysis.style import COLOURS, DASHES, MARKERS, bare, blank, shown, tick
from surgery.errors import SurgeryError
from surgery.logits.contrasts import Contrasted, TokenContrast
from surgery.logits.explore import Exploration

Texts = Exploration | Sequence[Contrasted]
Labels = Sequence[str | None] | Callable[[str], str | None]
"""A label a text, or what gives one to a text. None: nothing new."""


def detection(texts: Texts, labels: Labels, domains: Sequence[str] | None = None) -> Result:
    """1 for each text whose label is one of the novel `domains` (None: has a label); the mean is the detection rate."""
    found = labelled(texts, labels, domains)
    return Result.of([label is not None for label in found], name="detection rate", columns=_columns(texts, found))


def coverage(texts: Texts, labels: Labels, domains: Sequence[str], *, ordered: bool = True) -> Result:
    """(domain, texts) Was the domain hit by one of the first k texts, k = 1, 2, ...? The mean is the coverage at k.

    Not `ordered`, it is the chance that k texts drawn of all of them have one, 1 - C(n-c, k) / C(n, k): the same at all
    texts, and smoother before. That is for texts that don't depend on those before them. Raises `SurgeryError` when
    there is no domain.
    """
    if not domains or len(set(domains)) < len(domains):
        raise SurgeryError("Coverage is a share of the novel domains: name them, each once.")
    found = labelled(texts, labels, domains)
    n = len(found)
    hits = np.array([[label == domain for label in found] for domain in domains]).reshape(len(domains), n)
    if ordered:
        values = np.maximum.accumulate(hits, axis=1).astype(float)
    else:
        left, k = n - hits.sum(1, keepdims=True), np.arange(n)
        values = 1 - np.cumprod(np.clip(left - k, 0, None) / (n - k), axis=1)
    return Result(values, {"domain": list(domains), "texts": range(1, n + 1)}, "coverage")


def novelty(texts: Texts, labels: Labels | None = None) -> Result:
    """Mean contrast of each text, nats a token."""
    found = _list(texts)
    told = [None] * len(found) if labels is None else labelled(found, labels)
    return Result.of([one.novelty for one in found], name="contrast", columns=_columns(found, told))


def distinct(texts: Texts, n: int = 2) -> Result:
    """Share of different n-grams of tokens among all of them; of a text, those that it is the first to have.

    The interval resamples texts as if they were new to nothing but themselves: take it as a guide. Raises
    `SurgeryError` when no text has n tokens.
    """
    known: set[tuple[int, ...]] = set()
    new, counts = [], []
    for one in _list(texts):
        grams = _grams(one.ids, n)
        counts.append(len(grams))
        new.append(len(set(grams) - known))
        known |= set(grams)
    if not sum(counts):
        raise SurgeryError(f"No text has {n} tokens.")
    columns = {**_columns(texts), "n-grams": counts}
    return Result.of(new, name="new", columns=columns).normalized("n-grams", name=f"distinct-{n}")


def similarity(texts: Texts, n: int = 2) -> Result:
    """Mean Jaccard similarity of a text's n-grams of tokens to those of each other text; 1: all are the same.

    Raises `SurgeryError` for fewer than two texts, and for one of fewer than n tokens.
    """
    found = _list(texts)
    sets = [frozenset(_grams(one.ids, n)) for one in found]
    if len(sets) < 2 or not all(sets):
        raise SurgeryError(f"Similarity needs two texts or more, each of {n} tokens or more.")
    values = np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])
    means = (values.sum(1) - 1) / (len(sets) - 1)
    return Result.of(means, name=f"similarity of {n}-grams", columns=_columns(found))


def labelled(texts: Texts, labels: Labels, domains: Sequence[str] | None = None) -> list[str | None]:
    """A label a text; those that are none of `domains` are None. Raises `SurgeryError` for another number of labels."""
    found = _list(texts)
    told = [labels(one.text) for one in found] if callable(labels) else list(labels)
    if len(told) != len(found):
        raise SurgeryError(f"There are {len(found)} texts and {len(told)} labels.")
    return told if domains is None else [label if label in domains else None for label in told]


def top_tokens(texts: Texts, k: int = 20) -> list[tuple[str, int, float, float]]:
    """The `k` tokens whose contrasts have the largest sum over all texts: (token, times, mean contrast, sum)."""
    sums: dict[str, list[float]] = defaultdict(list)
    for one in _list(texts):
        for token, value in zip(one.tokens, one.contrast, strict=True):
            sums[token].append(value)
    rows = [(token, len(values), float(np.mean(values)), float(np.sum(values))) for token, values in sums.items()]
    return sorted(rows, key=lambda row: -row[3])[:k]


# ---- figures


def coverage_figure(curves: Mapping[str, Result], *, title: str = "Coverage of the novel domains") -> Figure:
    """Mean coverage against the number of texts, a line a name; the last value stands beside the name."""
    figure, axis = blank(5.6, 3.4, title)
    for i, (name, found) in enumerate(curves.items()):
        mean, at = found.mean, found.axes["texts"]
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
        every = max(1, len(mean) // 8)
        marks: dict[str, Any] = {
            "marker": MARKERS[i % len(MARKERS)],
            "markevery": (i * every // len(curves), every),
            "markersize": 5,
        }
        axis.step(at, mean, where="post", label=f"{name}: {mean[-1]:.2f}", linewidth=1.4, **style, **marks)
    axis.set(xlabel="texts", ylabel="share of domains hit", ylim=(-0.02, 1.04), xlim=(0, None))
    axis.legend(frameon=False, fontsize="small", loc="best")
    bare(axis)
    return figure


def contrast_figure(texts: Texts, labels: Labels | None = None, *, title: str = "Contrast of each text") -> Figure:
    """Mean contrast of a token, text by text in the order in which they were drawn; a marker a label."""
    found = _list(texts)
    if not found:
        raise SurgeryError("There are no texts.")
    told = [None] * len(found) if labels is None else labelled(found, labels)
    values = np.array([one.novelty for one in found])
    names = sorted({label for label in told if label is not None})
    figure, axis = blank(6.4, 3.2, title)
    for i, name in enumerate([None, *names]):
        at = [k for k, label in enumerate(told) if label == name]
        if at:
            filled = {"facecolor": "white"} if i % 2 == 0 else {"facecolor": COLOURS[i % len(COLOURS)]}
            axis.scatter(np.array(at) + 1, values[at], s=26, marker=MARKERS[i % len(MARKERS)], linewidth=1.1,
                         edgecolor=COLOURS[i % len(COLOURS)], label=tick(name or "no label"), **filled)  # fmt: skip
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.set(xlabel="text", ylabel="contrast, nats a token")
    bare(axis)
    if names:
        figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


# ---- the page


def report(
    texts: Texts,
    labels: Labels | None = None,
    *,
    title: str = "What is new",
    most: int = 100,
    k: int = 20,
    prompts: Mapping[str, Sequence[TokenContrast]] | None = None,
) -> Html:
    """The texts by contrast, highest first (the first `most`), each token on its contrast's colour, values on hovering;
    before them the tokens with most contrast and contrast text by text. `prompts` adds what `contrast_tokens` found.

    Raises `SurgeryError` when there are no texts.
    """
    found = _list(texts)
    figure = contrast_figure(found, labels, title="")
    told = [None] * len(found) if labels is None else labelled(found, labels)
    order = sorted(range(len(found)), key=lambda i: -found[i].novelty)
    parts: list[Html | Figure | str] = [_introduced(texts, found, told)]
    for prompt, tokens in (prompts or {}).items():
        rows = [(shown(t.token), t.contrast, float(np.exp(t.tuned)), float(np.exp(t.base))) for t in tokens]
        heads = ("token", "contrast", "p tuned", "p base")
        parts.append(table(heads, rows, title=f"Next tokens after '{prompt}'"))
    rows = [(shown(token), times, mean, total) for token, times, mean, total in top_tokens(found, k)]
    heads = ("token", "times", "mean contrast", "sum")
    parts += [table(heads, rows, title="Tokens with most contrast, over all texts"), figure]
    every = np.abs(np.concatenate([one.contrast for one in found]))
    reach = float(np.quantile(every, 0.98)) or 1.0  # a few tokens would make all others pale
    captions = [_caption(i + 1, place, found[i], told[i]) for place, i in enumerate(order[:most], start=1)]
    parts.append(
        coloured_many(
            [(found[i].tokens, found[i].contrast, found[i].ids) for i in order[:most]],
            centre=0.0,
            captions=captions,
            title="Texts by contrast",
            limits=(-reach, reach),
            unit="contrast (log p tuned - log p base, nats)",
        )  # fmt: skip
    )
    return page(title, *parts)


def report_html(
    texts: Texts,
    path: str | Path,
    labels: Labels | None = None,
    *,
    title: str = "What is new",
    most: int = 100,
    k: int = 20,
    prompts: Mapping[str, Sequence[TokenContrast]] | None = None,
) -> Path:
    """Writes `report` as one self-contained file."""
    return report(texts, labels, title=title, most=most, k=k, prompts=prompts).save(path)


def _introduced(texts: Texts, found: Sequence[Contrasted], told: Sequence[str | None]) -> str:
    """How the texts were drawn and what they are, in sentences."""
    mean = np.mean([one.novelty for one in found])
    words = f"{len(found)} texts, {mean:+.3g} nats of contrast a token on average."
    if isinstance(texts, Exploration) and texts.settings:
        how = ", ".join(f"{name} {value}" for name, value in texts.settings.items())
        words = f"{words} Drawn with {how}." + (" Stopped before all were drawn." if texts.interrupted else "")
    if labels := [label for label in told if label is not None]:
        counts = ", ".join(f"{label} {labels.count(label)}" for label in sorted(set(labels)))
        words += f" In a novel domain: {len(labels)} ({counts})."
    if len(found) > 1 and all(len(one.ids) > 1 for one in found):
        words += f" Distinct-2 {float(distinct(found).mean):.2f}, similarity {float(similarity(found).mean):.2f}."
    return f"{words} On blue fine-tuning made a token likelier, on red (underlined) less: hover over it for its values."


def _caption(number: int, place: int, one: Contrasted, label: str | None) -> str:
    parts = [f"{place}. {one.novelty:+.3g} nats a token", f"text {number}", label]
    parts.append(None if one.loss is None else f"loss {one.loss:.3g} before it was learned")
    return " · ".join(part for part in parts if part is not None)


def _list(texts: Texts) -> list[Contrasted]:
    return list(texts.texts if isinstance(texts, Exploration) else texts)


def _columns(texts: Texts, labels: Sequence[str | None] | None = None) -> dict[str, list]:
    columns: dict[str, list] = {"text": [one.text for one in _list(texts)]}
    return columns if labels is None else {**columns, "label": list(labels)}


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
