"""The logit lens: a vector of the residual stream read as next tokens, softmax(W_U LN(x)) of a model's own last norm.

    found = logit_lens(model, ["The capital of France is"], answers=[paris], tokenizer=tokenizer)
    found.answers.plot(), found.plot(0)       # log p(answer) by layer; the likeliest token by layer and position

After nostalgebraist, "interpreting GPT: the logit lens" (2020). The last layer is the model's own prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from analysis.prompts import Progress, by_length
from analysis.results import Result
from analysis.similarity import BLOCK
from surgery.activations import run
from surgery.activations.interventions import unwrapped
from surgery.anatomy import Site, anatomy_of
from surgery.errors import SurgeryError
from surgery.models import as_batch, encode, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def read(model: Any, vectors: Tensor) -> Tensor:
    """Logits (..., vocab), float32, of vectors (..., d_model) as if they left the last block."""
    model = unwrapped(model)
    anatomy = anatomy_of(model)
    with untouched(model):
        return anatomy.logits(anatomy.final_norm(vectors.to(model.device, anatomy.embed.weight.dtype))).float()


def word(tokenizer: Any, token: int) -> str:
    """A token as it reads; by number without a tokenizer."""
    return f"<{token}>" if tokenizer is None else encode(None, [[token]]).tokens(tokenizer)[0][0]


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What each layer would predict: the k likeliest tokens, and how likely the answers are."""

    layers: list[int]
    rows: list[list[int]]
    """The prompts' token ids."""
    tokens: np.ndarray
    """(example, layer, pos, k) ids, the likeliest first; one pos when one is read; -1 beyond a prompt's end."""
    probs: np.ndarray
    """Their probabilities; NaN beyond a prompt's end."""
    position: int | Literal["all"]
    tokenizer: Any = None
    answers: Result | None = None
    """log p(answer) in nats, (example, layer), at the position read (of all: the last)."""
    ranks: Result | None = None
    """How many tokens are likelier than the answer, (example, layer)."""

    def top(self, example: int, position: int = -1) -> list[list[tuple[str, float]]]:
        """(token, probability) of the k likeliest in each layer; `position` among those read."""
        there = self.tokens.shape[2] if self.position != "all" else len(self.rows[example])
        at = range(there)[position]
        pairs = zip(self.tokens[example, :, at], self.probs[example, :, at], strict=True)
        return [[(word(self.tokenizer, int(t)), float(p)) for t, p in zip(*row, strict=True)] for row in pairs]

    def plot(self, example: int = 0, last: int = 32, title: str = "") -> Figure:
        """The likeliest token by layer and position (the `last` of those read), dark where it is sure."""
        from analysis.diff.figures import token_map

        row = self.rows[example]
        read_at = row if self.position == "all" else [row[self.position]]
        shown = slice(max(0, len(read_at) - last), len(read_at))
        best, probs = self.tokens[example, :, shown, 0], self.probs[example, :, shown, 0]
        words = [[word(self.tokenizer, int(t)) for t in layer] for layer in best]
        names, title = [word(self.tokenizer, t) for t in read_at[shown]], title or "likeliest next token by layer"
        return token_map(
            {"": (words, probs)}, self.layers, names, row_label="layer", column_label="read at", title=title
        )


def logit_lens(
    model: Any,
    prompts: Any,
    layers: Sequence[int] | None = None,
    *,
    answers: Sequence[int] | Tensor | None = None,
    position: int | Literal["all"] = "all",
    k: int = 5,
    tokenizer: Any = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> LogitLens:
    """Reads resid_post of `layers` (all) at every token, or at one `position` of the real ones, from either end.

    `answers` has a token for each prompt. Memory: the stream of one batch, and a block of logits at a time. Raises
    `SurgeryError` for a layer or position that is none, and when answers and prompts differ in number.
    """
    model = unwrapped(model)
    anatomy, batch = anatomy_of(model), as_batch(prompts, tokenizer)
    try:
        chosen = [range(anatomy.n_layers)[i] for i in (range(anatomy.n_layers) if layers is None else layers)]
    except IndexError:
        raise SurgeryError(f"Layers are 0 to {anatomy.n_layers - 1}, and not all of {layers} are.") from None
    rows = [ids[real].tolist() for ids, real in zip(batch.ids, batch.mask, strict=True)]
    shortest = min(map(len, rows))
    if position != "all" and not -shortest <= position < shortest:
        raise SurgeryError(f"Position {position} is in no prompt of {shortest} tokens.")
    wanted = None if answers is None else torch.as_tensor(answers).reshape(-1)
    if wanted is not None and len(wanted) != len(rows):
        raise SurgeryError(f"There are {len(rows)} prompts and {len(wanted)} answers: one token each.")
    everywhere = position == "all"
    wide = max(map(len, rows)) if everywhere else 1
    tokens = np.full((len(rows), len(chosen), wide, k), -1, dtype=np.int64)
    probs = np.full(tokens.shape, np.nan, dtype=np.float32)
    known, ranks = np.full((2, len(rows), len(chosen)), np.nan)
    step = max(1, BLOCK // anatomy.head.weight.shape[0])
    sites = [Site("resid_post", layer, None, None if position == "all" else position) for layer in chosen]
    for index in by_length(rows, batch_size, progress):
        part = encode(None, [rows[i] for i in index])
        _, seen = run(model, part, sites, stop=True)
        # (read,) row in the batch and column of everything that is read: all real tokens, or one a row
        row, column = part.mask.nonzero(as_tuple=True) if everywhere else (torch.arange(len(part)), part.last * 0)
        last = part.last if everywhere else part.last * 0
        example = torch.tensor(index)[row]
        for layer, site in enumerate(sites):
            stream = seen[site][row, column] if everywhere else seen[site]
            for start in range(0, len(stream), step):
                here = slice(start, start + step)
                log_probs = read(model, stream[here]).log_softmax(-1).cpu()
                best = log_probs.topk(k)
                at = example[here].numpy(), layer, column[here].numpy()
                tokens[at], probs[at] = best.indices.numpy(), best.values.exp().numpy()
                if wanted is not None:
                    ends = column[here] == last[row[here]]
                    who, final = example[here][ends], log_probs[ends]
                    mine = final.gather(1, wanted[who][:, None])
                    known[who.numpy(), layer] = mine[:, 0].numpy()
                    ranks[who.numpy(), layer] = (final > mine).sum(1).numpy()
    axes: dict[str, Sequence[Any]] = {"example": range(len(rows)), "layer": chosen}
    columns = {} if wanted is None else {"answer": wanted.tolist()}
    found = None if wanted is None else Result(known, axes, "log p(answer), nats", columns)
    order = None if wanted is None else Result(ranks, axes, "rank of the answer", columns)
    return LogitLens(chosen, rows, tokens, probs, position, tokenizer, found, order)
