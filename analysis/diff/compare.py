"""One pass in which a base and its fine-tuning read the same texts: `diff`, and its measures by themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from analysis.diff.measures import measured
from analysis.diff.per_token import PerToken, Texts
from analysis.prompts import Progress
from analysis.results import Result
from surgery.errors import SurgeryError
from surgery.models import Pair
from surgery.registry import nearest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.html import Html

DEFAULT = ("kl", "agreement", "norms", "cosine", "cka", "procrustes")


def diff(
    pair: Pair,
    texts: Any,
    *,
    measures: Sequence[str] = DEFAULT,
    site: str = "resid_post",
    max_tokens: int = 1024,
    sample: int = 2048,
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Diff:
    """Measures of `MEASURES` on the first `max_tokens` tokens of each text, each model running once over each batch.

    `texts`: strings, chats, lists of token ids, or a `Batch`. `site` is the place of the stream that is compared, in
    all layers or in one ("resid_post.3"). CKA and Procrustes are of `sample` tokens, drawn by `seed`. Values do not
    depend on `batch_size`, beyond rounding. Raises `SurgeryError` for a measure or site that is none and for texts that
    the tokenizers read differently.
    """
    names = [measures] if isinstance(measures, str) else list(measures)
    read = Texts.of(pair, texts, max_tokens)
    found = measured(pair, read, names, site=site, sample=sample, seed=seed, batch_size=batch_size, progress=progress)
    return Diff(found, read, site)


@dataclass(frozen=True, eq=False)
class Diff:
    """What `diff` found, by name: numbers of every token (`PerToken`), or one a layer (`Result`)."""

    found: Mapping[str, PerToken | Result]
    texts: Texts
    site: str = "resid_post"

    def __getitem__(self, name: str) -> PerToken | Result:
        if name not in self.found:
            raise SurgeryError(f"'{name}' was not measured.", hint=nearest(name, self.found))
        return self.found[name]

    @property
    def results(self) -> dict[str, Result]:
        """Every measure as a result: (example,), (example, layer), or (1, layer) for CKA and Procrustes."""
        return {name: one.result if isinstance(one, PerToken) else one for name, one in self.found.items()}

    def summary(self) -> list[dict[str, Any]]:
        """One row a measure and layer, as plain JSON; no interval where all texts make one value."""
        rows = []
        for name, result in self.results.items():
            layers: Sequence[Any] = result.axes.get("layer", [None])
            one = result.summary()
            alone = len(result) < 2
            for i, layer in enumerate(layers):
                mean, low, high = (one[key] if layer is None else one[key][i] for key in ("mean", "low", "high"))
                rows.append({"measure": name, "layer": layer, "mean": mean, "low": None if alone else low,
                             "high": None if alone else high})  # fmt: skip
        return rows

    def plot(self, title: str = "") -> Figure:
        """One panel a measure: of the distribution over tokens, or by layer."""
        from analysis.diff.figures import panels

        size = f"{len(self.texts)} text{'s' * (len(self.texts) > 1)}, {self.texts.total} tokens"
        return panels(self.found, title or f"tuned against base at {self.site}: {size}")

    def html(self, name: str = "kl", which: int | Sequence[int] = 8, layer: int | None = None) -> Html:
        """Texts coloured by a measure. As `PerToken.html`."""
        one = self[name]
        if not isinstance(one, PerToken):
            raise SurgeryError(f"'{name}' is one value a layer, and not one a token.")
        return one.html(which, layer=layer)

    def save(self, folder: str | Path) -> Path:
        """Everything in a folder: results (JSON, safetensors), the summary, the figure, the numbers of all tokens."""
        from safetensors.numpy import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, result in self.results.items():
            result.save(folder / _file(name))
        tokens = {name: one for name, one in self.found.items() if isinstance(one, PerToken)}
        arrays = {_file(name): np.ascontiguousarray(one.values) for name, one in tokens.items()}
        ids = np.array([i for row in self.texts.rows for i in row], dtype=np.int64)
        save_file({**arrays, "ids": ids, "lengths": self.texts.lengths.astype(np.int64)}, folder / "tokens.safetensors")
        named = {name: one.name if name in tokens else None for name, one in self.found.items()}
        (folder / "summary.json").write_text(json.dumps(self.summary(), indent=1), encoding="utf-8")
        self.plot().savefig(folder / "diff.png", dpi=150)
        (folder / "diff.json").write_text(json.dumps({"site": self.site, "found": named}, indent=1), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Any = None) -> Diff:
        """What `save` wrote; tokens are shown by number without the tokenizer. Raises `SurgeryError` if it is none."""
        from safetensors.numpy import load_file

        folder = Path(folder)
        try:
            about = json.loads((folder / "diff.json").read_text(encoding="utf-8"))
            arrays = load_file(folder / "tokens.safetensors")
        except FileNotFoundError as error:
            raise SurgeryError(
                f"No comparison in {folder}: {Path(error.filename or folder).name} is missing."
            ) from None
        rows = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
        texts = Texts([row.tolist() for row in rows], tokenizer)
        found: dict[str, PerToken | Result] = {}
        for name, told in about["found"].items():
            result = Result.load(folder / _file(name))
            layers = result.axes.get("layer")
            found[name] = result if told is None else PerToken(told, arrays[_file(name)], texts, layers)
        return cls(found, texts, about["site"])


def _file(name: str) -> str:
    return name.replace(" ", "_")


# ---- one measure by itself


def token_kl(pair: Pair, texts: Any, **options: Any) -> PerToken:
    """KL(tuned || base) in nats of the next token's distribution behind every token. Options as of `diff`."""
    return _one(pair, texts, "kl", options)


def agreement(pair: Pair, texts: Any, **options: Any) -> PerToken:
    """1 where both models find the same next token most likely, behind every token. Options as of `diff`."""
    return _one(pair, texts, "agreement", options)


def _one(pair: Pair, texts: Any, name: str, options: Mapping[str, Any]) -> PerToken:
    found = diff(pair, texts, measures=[name], **options)[name]
    assert isinstance(found, PerToken)
    return found


class ActivationNorms(NamedTuple):
    """How far activations moved, by token and layer."""

    difference: PerToken
    """||x_tuned - x_base||_2"""
    relative: PerToken
    """That over ||x_base||_2, token by token."""


def activation_norms(pair: Pair, texts: Any, site: str = "resid_post", **options: Any) -> ActivationNorms:
    """L2 norm of the activation difference at a site of the stream, by token and layer. Options as of `diff`.

    Tokens on which the difference is greatest: `.difference.top(20, layer=5)`.
    """
    found = diff(pair, texts, measures=["norms"], site=site, **options)
    difference, relative = found["norms"], found["relative norms"]
    assert isinstance(difference, PerToken) and isinstance(relative, PerToken)
    return ActivationNorms(difference, relative)


def similarity_by_layer(pair: Pair, texts: Any, site: str = "resid_post", **options: Any) -> dict[str, Result]:
    """Cosine of activations token by token (example, layer), unbiased CKA and Procrustes residual (1, layer).

    Identical models: 1, 1, 0. Options as of `diff`; `sample` tokens make the clouds of CKA and Procrustes. A Procrustes
    residual grows with the number of tokens per dimension: compare values of one sample size.
    """
    return diff(pair, texts, measures=["cosine", "cka", "procrustes"], site=site, **options).results
