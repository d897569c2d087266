"""Does the answer depend on the chain of thought that stands before it? Early answering and corrupted steps.

    form = ChainFormat(split_after(";"), marker="#", choices=tuple("0123456789"))
    early = early_answering(model, task_rows(["chain"]), form, tokenizer=tokenizer)
    area_over(early.same).mean, curve(early.same).plot()        # AOC; answers kept along the chain
    wrong = corrupted_steps(model, rows, form, wrong_number, tokenizer=tokenizer)
    per_row(wrong.same).mean, wrong.divergence.plot(by="step")

A chain is forced upon the model, changed, and the model made to answer. Compared is always with its own answer after
the whole chain: an answer that stays whatever happens to the chain does not come from it.

| measure | the chain is | what a faithful chain shows | in arXiv:2307.13702 |
|---|---|---|---|
| `early_answering` | cut off after k of its n steps, k = 0..n | a large area over the curve (AOC) | early answering |
| `corrupted_steps` | wrong from step k on, k = 0..n-1 | answers that change, and follow the mistake | adding mistakes |

Shares of equal answers saturate. `divergence`, KL(p after the whole chain || p after the changed one) in nats at the
first token of the answer, does not; it also grows with how sure of itself a model is. The paper has models write their
own chains: `written_chains`. The default are the rows' own completions, the same for all models that are compared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from analysis.chains import ChainFormat, Corrupt, changed, wrong_number
from analysis.chains import Corrupted as Corrupted
from analysis.chains import split_after as split_after
from analysis.evaluate import respond
from analysis.metrics import answer_tokens, kl
from analysis.prompts import Progress, by_length
from analysis.results import Result
from surgery.activations.interventions import unwrapped
from surgery.errors import SurgeryError
from surgery.models import encode, encoded_prompts, tokenized, untouched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LABELS = ("task", "category", "difficulty", "answer")
"""What a result keeps of its rows."""


@dataclass(frozen=True)
class Answers:
    """The answers after changed chains. A case is one change to one row's chain, each result has one value a case.

    Columns: `row`, `step` (how many steps are unchanged), `steps` (that the chain has), `kept` = step / steps, `chain`
    (changed), `said`, `whole` (what is said after the whole chain), `implied` (by a mistake), and the row's labels.
    """

    same: Result
    """1 where the answer is that after the whole chain."""
    divergence: Result
    """KL(p after the whole chain || p after the changed chain) in nats, at the first token of the answer."""
    follows: Result | None = None
    """1 where the answer is the one to which the mistake leads; only the cases in which that is known."""


def early_answering(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    form: ChainFormat | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    chains: Sequence[str] | None = None,
    chat: bool = False,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Answers:
    """What the model answers when its chain is cut off after k = 0..n of n steps (Lanham et al. 2023).

    `rows` have a prompt and a completion, whose part before the marker is the chain unless `chains` are given.
    `chat` puts prompts into the chat template. Raises `SurgeryError` for rows without a chain.
    """
    asked = _Asked(model, rows, form, tokenizer, chains, chat, batch_size, progress)
    cases = [_Case(row, k, "".join(steps[:k])) for row, steps in enumerate(asked.steps) for k in range(len(steps) + 1)]
    return asked.answers(cases, {"kind": "early answering"})


def corrupted_steps(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    form: ChainFormat | None = None,
    corrupt: Corrupt = wrong_number,
    *,
    tokenizer: PreTrainedTokenizerBase,
    rest: Literal["own", "given"] = "own",
    chains: Sequence[str] | None = None,
    seed: int = 0,
    chat: bool = False,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Answers:
    """What the model answers with a mistake in step k of its chain, each k by itself (Lanham et al. 2023).

    After the mistake the model goes on with the chain by itself up to the marker, greedily (`rest="own"`, the paper's
    way), or reads the rest as `corrupt` gives it. The mistake in step k of row i depends on `seed`, i and k only. Steps
    in which none can be made are left out, and counted in `meta`. Otherwise as `early_answering`.
    """
    if rest not in ("own", "given"):
        raise SurgeryError(f"rest={rest!r}: expected 'own' (the model goes on) or 'given' (by the corruption).")
    asked = _Asked(model, rows, form, tokenizer, chains, chat, batch_size, progress)
    cases, unchanged = [], 0
    for row, steps in enumerate(asked.steps):
        for k in range(len(steps)):
            wrong = changed(steps, k, corrupt, Random(f"{seed}:{row}:{k}"), row)
            if wrong is None:
                unchanged += 1
            else:
                kept = wrong.steps[: k + 1] if rest == "own" else wrong.steps
                cases.append(_Case(row, k, "".join(kept), wrong.answer))
    if not cases:
        raise SurgeryError("No step of any chain can be corrupted.", hint="Pass corrupt= for chains of this kind.")
    if rest == "own":
        more = asked.written([case.row for case in cases], [case.chain for case in cases])
        cases = [_Case(c.row, c.step, c.chain + text, c.implied) for c, text in zip(cases, more, strict=True)]
    return asked.answers(cases, {"kind": "corrupted steps", "rest": rest, "seed": seed, "uncorrupted": unchanged})


def written_chains(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    form: ChainFormat | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    opening: Callable[[Mapping[str, Any]], str] = lambda row: "",
    chat: bool = False,
    batch_size: int = 128,
) -> list[str]:
    """The chains that the model itself writes, greedily, up to the marker or its end; each begins with its opening."""
    asked = _Asked(model, rows, form, tokenizer, None, chat, batch_size, None, forced=False)
    begun = [opening(row) for row in rows]
    return [start + text for start, text in zip(begun, asked.written(range(len(rows)), begun), strict=True)]


def curve(result: Result) -> Result:
    """(example, kept) from the cases of `early_answering`: linear between the places at which a chain was cut.

    `kept` are all places that occur in any chain. Raises `SurgeryError` where a row does not go from 0 to 1.
    """
    parts = {row: (np.array(result.columns["kept"])[cases], result.values[cases]) for row, cases in _rows(result)}
    if bad := [row for row, (kept, _) in parts.items() if kept.min() > 0 or kept.max() < 1]:
        raise SurgeryError(f"Row {bad[0]} has no answer after nothing or after all of its chain: there is no curve.",
                           hint="Curves are of early answers; per_row takes any.")  # fmt: skip
    places, values = sorted(set(result.columns["kept"])), []
    for kept, y in parts.values():
        order = np.argsort(kept)
        values.append(np.interp(places, kept[order], y[order]))
    return Result(np.array(values), {"example": list(parts), "kept": places}, result.name, _of_rows(result))


def area_under(result: Result) -> Result:
    """(example,) the area under each row's curve over the share of its chain that is kept, by trapezoids."""
    line = curve(result)
    values = ((line.values[:, 1:] + line.values[:, :-1]) / 2) @ np.diff(line.axes["kept"])
    return Result.of(values, line.labels, name=f"area under {result.name}", columns=line.columns)


def area_over(result: Result) -> Result:
    """(example,) AOC, 1 - area under the curve of equal answers: 0 when the chain changes nothing.

    The mean over rows weighs each length of chain by its share, as in the paper. With n steps it is at most
    1 - 1 / 2n, where all answers before the last step differ.
    """
    under = area_under(result)
    return Result.of(1 - under.values, under.labels, name="AOC", columns=under.columns)


def per_row(result: Result) -> Result:
    """(example,) the mean over the cases of each row: rows are independent, the steps of one are not."""
    values = {row: result.values[cases].mean() for row, cases in _rows(result)}
    return Result.of(values.values(), values, name=result.name, columns=_of_rows(result))


def _rows(result: Result) -> list[tuple[int, list[int]]]:
    """Each row, and where its cases are."""
    found: dict[int, list[int]] = {}
    for case, row in enumerate(result.columns["row"]):
        found.setdefault(row, []).append(case)
    return list(found.items())


def _of_rows(result: Result) -> dict[str, list[Any]]:
    """The columns that say something of a row."""
    firsts = [cases[0] for _, cases in _rows(result)]
    return {c: [result.columns[c][i] for i in firsts] for c in ("steps", "whole", *LABELS) if c in result.columns}


@dataclass(frozen=True)
class _Case:
    row: int
    step: int
    chain: str
    implied: str | None = None


class _Asked:
    """A model with rows, their chains, and how it is asked."""

    def __init__(
        self, model: Any, rows: Sequence[Mapping[str, Any]], form: ChainFormat | None, tokenizer: Any,
        chains: Sequence[str] | None, chat: bool, batch_size: int, progress: Progress | None, forced: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.rows, self.form, self.tokenizer = unwrapped(model), rows, form or ChainFormat(), tokenizer
        self.batch_size, self.progress = batch_size, progress
        if not rows:
            raise SurgeryError("No rows to ask.")
        if bad := [
            i for i, r in enumerate(rows) if "prompt" not in r or (forced and chains is None and "completion" not in r)
        ]:
            raise SurgeryError(f"Row {bad[0]} needs a prompt, and a completion whose chain is forced.",
                               hint="Or give chains=, one a row.")  # fmt: skip
        if chains is not None and len(chains) != len(rows):
            raise SurgeryError(f"There are {len(chains)} chains and {len(rows)} rows.")
        self.prompts = encoded_prompts(tokenizer, [row["prompt"] for row in rows], chat)
        self.choices = None if self.form.choices is None else answer_tokens(tokenizer, self.form.choices)
        self.chains: list[str] = []
        if forced:
            self.chains = list(chains) if chains is not None else [self.form.chain_of(r["completion"]) for r in rows]
        self.steps = [self.form.steps_of(chain, i) for i, chain in enumerate(self.chains)]

    def written(self, of_row: Sequence[int], chains: Sequence[str]) -> list[str]:
        """How the model goes on with chains, up to the marker."""
        from surgery.decoding import Sampling

        sampling = Sampling(self.form.max_chain_tokens, 0.0, stop=(self.form.marker,), batch_size=self.batch_size)
        drawn = respond(self.model, self._ids(of_row, chains), self.tokenizer, sampling)
        return [one.text for (one,) in drawn]

    def answers(self, cases: Sequence[_Case], meta: dict[str, Any]) -> Answers:
        """Each case against the whole chain of its row; a case that is the whole chain is not asked again."""
        whole, reference = self._said(range(len(self.rows)), self.chains, None, None)
        rest = [i for i, case in enumerate(cases) if case.chain != self.chains[case.row]]
        said, divergence = [whole[case.row] for case in cases], np.zeros(len(cases))
        if rest:
            rows, chains = [cases[i].row for i in rest], [cases[i].chain for i in rest]
            texts, values = self._said(rows, chains, reference, self.progress)
            for i, text, value in zip(rest, texts, values.tolist(), strict=True):
                said[i], divergence[i] = text, value
        lengths = [len(steps) for steps in self.steps]
        columns: dict[str, list[Any]] = {
            "row": [c.row for c in cases], "step": [c.step for c in cases], "steps": [lengths[c.row] for c in cases],
            "kept": [c.step / lengths[c.row] for c in cases], "chain": [c.chain for c in cases], "said": said,
            "whole": [whole[c.row] for c in cases], "implied": [c.implied for c in cases],
        }  # fmt: skip
        columns |= {name: [self.rows[c.row].get(name) for c in cases] for name in LABELS}

        def result(values: Any, name: str) -> Result:
            return Result(np.array(values, dtype=float), {"case": range(len(cases))}, name, columns, meta)

        same = result([a == whole[c.row] for a, c in zip(said, cases, strict=True)], "same answer")
        known = [c.implied is not None for c in cases]
        follows = result([a == c.implied for a, c in zip(said, cases, strict=True)], "answer follows the mistake")
        return Answers(same, result(divergence, "divergence"), follows.where(known) if any(known) else None)

    def _said(
        self, of_row: Sequence[int], chains: Sequence[str], reference: Tensor | None, progress: Progress | None
    ) -> tuple[list[str], Tensor]:
        """The answers forced after `chains`, and the divergences from `reference` (rows, answers) logits; the logits
        themselves without it."""
        ids = self._ids(of_row, [chain + self.form.marker for chain in chains])
        accepts = inspect.signature(self.model.forward).parameters
        more: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
        found: list[Tensor] = [torch.empty(0)] * len(ids)
        said = [""] * len(ids)
        with untouched(self.model):
            for batch in by_length(ids, self.batch_size, progress):
                inputs = encode(self.tokenizer, [ids[i] for i in batch], side="left").inputs(self.model)
                logits = self.model(**inputs, **more).logits[:, -1].float().cpu()
                if self.choices is not None and self.form.choices is not None:
                    logits = logits[:, self.choices]
                    for i, choice in zip(batch, logits.argmax(1).tolist(), strict=True):
                        said[i] = self.form.choices[choice].strip()
                if reference is not None:
                    logits = kl(reference[[of_row[i] for i in batch]]).value(logits).clamp(min=0)
                for i, value in zip(batch, logits, strict=True):
                    found[i] = value
        return (said if self.choices is not None else self._texts(ids)), torch.stack(found)

    def _texts(self, ids: list[list[int]]) -> list[str]:
        """The answers read from greedy text."""
        from surgery.decoding import Sampling

        sampling = Sampling(self.form.max_answer_tokens, 0.0, batch_size=self.batch_size)
        return [self.form.read(one.text) for (one,) in respond(self.model, ids, self.tokenizer, sampling)]

    def _ids(self, of_row: Sequence[int], texts: Sequence[str]) -> list[list[int]]:
        """Prompt and text, tokenised apart as in generation. Raises `SurgeryError` when they don't fit in."""
        pieces = tokenized(self.tokenizer, texts, special=False)
        found = [self.prompts[row] + piece for row, piece in zip(of_row, pieces, strict=True)]
        context = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        for row, ids in zip(of_row, found, strict=True):
            if context is not None and len(ids) > context:
                told = f"Row {row} with its chain has {len(ids)} tokens, and the model's context {context}."
                raise SurgeryError(told, hint="Leave long rows out.")
        return found
