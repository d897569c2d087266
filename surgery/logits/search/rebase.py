"""REBASE: a tree of solution steps, in which good steps have more children (Wu et al. 2024, arXiv:2408.00724).

A solution grows step by step; a process scorer rates every step as it comes. Of a budget of N solutions the next step
gets N_i = N - (solutions that are complete), and the running nodes share it by softmax(score / T_b). Every search ends
with exactly N solutions, so `Rebase` is a `Generator` of groups of N, and a vote over `last_scores` is the paper's.

Where paper and released code differ this follows the code: the paper's W_j = Round(N_i softmax(R / T_b)_j) need not add
up to N_i; the code goes from the best node down and gives each the ceiling of its share of what is left (`shares`).
From the code's settings too: T_b = 0.2, temperature 1, steps of at most 256 tokens, at most 25 of them, votes weighted
by the score of the last step.

Nothing is read twice: a node's children start from its state in the decoder's memory. Nodes whose steps have different
numbers of tokens can't share a batch from then on (a `Decoder` knows no other way), so their batches become smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from surgery.decoding import Decoder, Rollout, Sampling, draw, end_tokens, undisturbed, uniforms
from surgery.errors import SurgeryError
from surgery.logits.search.forwards import Chorus, ChorusState, begun, check_room, left_padded
from surgery.logits.search.steps import Path, Scorer, Step, Tree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEPTH = 25
"""Steps of a solution at most, as in the released code."""


def shares(scores: Sequence[float], budget: int, balance: float) -> list[int]:
    """How many children each node gets; they sum to `budget`.

    From the best node (of equals the first) down: the ceiling of the node's share of what is left, softmax(score /
    balance) over the nodes that are left.
    """
    weights = np.exp((np.asarray(scores, dtype=float) - max(scores)) / balance)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    found, left = [0] * len(scores), budget
    for place, i in enumerate(order):
        if left == 0:
            break
        share = left * weights[i] / weights[order[place:]].sum()
        found[i] = min(left, math.ceil(round(share, 9)))  # 2.0000000001 children are two
        left -= found[i]
    return found


class Rebase:
    """REBASE over any `Decoder`; a `Generator`, whose groups are the budgets.

    `sampling` bounds whole solutions and may name stop strings; `delimiter` ends a step. Steps are drawn with noise
    that depends on the prompt's seed, the depth and the place among the prompt's nodes there.
    Raises `SurgeryError` for a `balance` that is not above 0, an empty delimiter, and prompts that leave no room.
    """

    def __init__(
        self,
        policy: nn.Module | Decoder,
        tokenizer: PreTrainedTokenizerBase,
        scorer: Scorer | Callable[[Sequence[Path]], Sequence[float]],
        *,
        delimiter: str = "\n",
        balance: float = 0.2,
        sampling: Sampling = Sampling(1024),  # noqa: B008 (frozen)
        step_tokens: int = 256,
        depth: int = DEPTH,
    ) -> None:
        if not (0 < balance < math.inf) or not delimiter:
            raise SurgeryError(f"REBASE: balance is {balance}, the delimiter {delimiter!r}; expected a number above 0 "
                               "and some text.")  # fmt: skip
        if step_tokens < 1 or not 1 <= depth < 256:
            raise SurgeryError(f"REBASE: step_tokens is {step_tokens}, depth {depth}; expected at least 1, depth below "
                               "256.")  # fmt: skip
        self.tokenizer, self.scorer, self.sampling = tokenizer, scorer, sampling
        self.delimiter, self.balance, self.step_tokens, self.depth = delimiter, balance, step_tokens, depth
        self.decoders = Chorus([policy, *getattr(scorer, "readers", ())])
        special = {str(t.content): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._ends = end_tokens(tokenizer, self.decoders.models)
        self._ends |= {special[text] for text in sampling.stop if text in special}
        self._delimiters = {special[text] for text in (delimiter,) if text in special}
        longest = max(len(text.encode()) for text in (delimiter, *sampling.stop))
        self._tail = longest + 8  # a token adds at least one byte, special ones apart

    def __call__(self, prompts: Sequence[Sequence[int]], group: int, seeds: Sequence[int]) -> list[Rollout]:
        """`group` solutions of each prompt (token ids), groups contiguous."""
        return [rollout for tree in self.search(prompts, group, seeds) for rollout in tree.rollouts]

    def search(self, prompts: Sequence[Sequence[int]], width: int, seeds: Sequence[int]) -> list[Tree]:
        """One tree a prompt, `width` solutions each; `sampling.batch_size` bounds the rows of a batch."""
        if width < 1 or len(prompts) != len(seeds):
            raise SurgeryError(f"REBASE: width {width}, {len(prompts)} prompts and {len(seeds)} seeds; expected a "
                               "width of at least 1 and one seed a prompt.")  # fmt: skip
        rows = begun(prompts, self.tokenizer)
        check_room(rows, self.sampling.max_new_tokens, self.decoders.context)
        each = max(1, self.sampling.batch_size // width)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: dict[int, Tree] = {}
        with undisturbed(*self.decoders.models):
            for start in range(0, len(order), each):
                block = order[start : start + each]
                trees = _Trees(self, [rows[i] for i in block], width, [seeds[i] for i in block])
                found |= dict(zip(block, trees.grown(), strict=True))
        return [found[i] for i in range(len(rows))]

    # ---- texts

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _over(self, ids: Sequence[int]) -> bool:
        """Whether a solution has ended with its last token."""
        stop = self.sampling.stop
        return ids[-1] in self._ends or (bool(stop) and any(s in self._text(ids[-self._tail :]) for s in stop))

    def _delimited(self, ids: Sequence[int]) -> bool:
        """Whether a step has ended with its last token."""
        return ids[-1] in self._delimiters or self.delimiter in self._text(ids[-self._tail :])

    def _longer(self, path: Path, step: Step, ended: bool) -> Path:
        """The path with one more step."""
        longer = replace(path, steps=(*path.steps, step), ended=ended)
        ids = longer.tokens
        text = self._text(ids[:-1] if ids[-1] in self._ends else ids)
        cuts = [cut for cut in (text.find(stop) for stop in self.sampling.stop) if cut >= 0]
        return replace(longer, text=text[: min(cuts)] if cuts else text)


@dataclass
class _Nodes:
    """Running nodes with as many tokens behind them: one batch in the decoders' memory."""

    logits: Tensor
    state: ChorusState
    paths: list[Path]

    def select(self, rows: Sequence[int]) -> _Nodes:
        index = torch.tensor(rows, device=self.logits.device)
        return _Nodes(self.logits[index], self.state.select(index), [self.paths[row] for row in rows])


@dataclass
class _Writing:
    """A step that is being written."""

    path: Path
    noise: Tensor
    before: list[int]
    """All tokens of the steps above."""
    tokens: list[int] = field(default_factory=list)
    said: list[list[float]] = field(default_factory=list)
    """A token's log-probabilities: the policy's, then each reader's."""

    def step(self) -> Step:
        own, *read = zip(*self.said, strict=True)
        return Step(tuple(self.tokens), own, tuple(read), math.nan)


class _Trees:
    """The searches of some prompts, side by side."""

    def __init__(self, search: Rebase, prompts: list[list[int]], width: int, seeds: Sequence[int]) -> None:
        self.search, self.prompts, self.width, self.seeds = search, prompts, width, seeds
        self.solutions: list[list[Path]] = [[] for _ in prompts]
        self.nodes: list[list[int]] = [[] for _ in prompts]
        self.tokens = [0] * len(prompts)

    def grown(self) -> list[Tree]:
        search = self.search
        pad = min(search._ends, default=0)
        logits, state = search.decoders.prefill(*left_padded(self.prompts, pad, search.decoders.device))
        running = [_Nodes(logits, state, [Path(i, tuple(ids)) for i, ids in enumerate(self.prompts)])]
        for level in range(search.depth):
            complete: list[Path] = []
            written = [part for group in self._given(running, level) for part in self._written(*group, complete)]
            running = self._rated(complete, written)
            if not running:
                break
        for group in running:
            for path in group.paths:
                self.solutions[path.prompt].append(path)
        return [Tree(tuple(s), tuple(n), t) for s, n, t in zip(self.solutions, self.nodes, self.tokens, strict=True)]

    def _given(self, running: list[_Nodes], level: int) -> Iterator[tuple[_Nodes, Tensor]]:
        """Every node as often as it has children, and their noise."""
        flat = [path for group in running for path in group.paths]
        children = [0] * len(flat)
        for prompt in dict.fromkeys(path.prompt for path in flat):
            mine = [i for i, path in enumerate(flat) if path.prompt == prompt]
            scores = [flat[i].scores[-1] if flat[i].steps else 0.0 for i in mine]
            left = self.width - len(self.solutions[prompt])
            for i, count in zip(mine, shares(scores, left, self.search.balance), strict=True):
                children[i] = count
            self.nodes[prompt].append(left)
        noise = uniforms([(seed << 8) + level for seed in self.seeds], self.width, self.search.step_tokens)
        used, counts = [0] * len(self.prompts), iter(children)
        for group in running:
            rows = [row for row in range(len(group.paths)) for _ in range(next(counts))]
            drawn = []
            for row in rows:
                prompt = group.paths[row].prompt
                drawn.append(noise[prompt, used[prompt]])
                used[prompt] += 1
            if rows:
                yield group.select(rows), torch.from_numpy(np.stack(drawn)).to(group.logits.device)

    def _written(self, nodes: _Nodes, noise: Tensor, complete: list[Path]) -> Iterator[_Nodes]:
        """One step for every row; rows leave as their steps are written, and `complete` gets what ends or is full."""
        search, limit = self.search, self.search.sampling.max_new_tokens
        rows = [_Writing(path, one, list(path.tokens)) for path, one in zip(nodes.paths, noise, strict=True)]
        for t in range(search.step_tokens):
            tokens, own = draw(nodes.logits, torch.stack([row.noise[t] for row in rows]), search.sampling)
            said = zip(own.tolist(), *search.decoders.said(tokens, nodes.state), strict=True)
            going, stepped = [], []
            for place, (row, token, each) in enumerate(zip(rows, tokens.tolist(), said, strict=True)):
                row.tokens.append(token)
                row.said.append(list(each))
                ids = row.before[-search._tail :] + row.tokens
                if (over := search._over(ids)) or len(row.before) + len(row.tokens) >= limit:
                    complete.append(search._longer(row.path, row.step(), over))
                    continue
                going.append(place)
                if t + 1 == search.step_tokens or search._delimited(row.tokens):
                    nodes.paths[place] = search._longer(row.path, row.step(), False)
                    stepped.append(place)
            if not going:
                return
            if len(going) < len(rows):
                nodes, tokens, rows = nodes.select(going), tokens[going], [rows[place] for place in going]
                stepped = [going.index(place) for place in stepped]
            nodes.logits, nodes.state = search.decoders.step(tokens, nodes.state)
            if stepped:
                yield nodes.select(stepped)
                going = [place for place in range(len(rows)) if place not in stepped]
                if not going:
                    return
                nodes, rows = nodes.select(going), [rows[place] for place in going]

    def _rated(self, complete: list[Path], written: list[_Nodes]) -> list[_Nodes]:
        """The nodes that go on, with the scores of their last steps; complete ones are solutions."""
        flat = [*complete, *(path for group in written for path in group.paths)]
        scores = [float(score) for score in self.search.scorer(flat)]
        if len(scores) != len(flat) or not np.isfinite(scores).all():
            raise SurgeryError(f"The scorer gave {scores} for {len(flat)} steps; expected one finite number a step.")
        for path in flat:
            self.tokens[path.prompt] += len(path.steps[-1].tokens)
        rated = (replace(p, steps=(*p.steps[:-1], replace(p.steps[-1], score=score)))
                 for p, score in zip(flat, scores, strict=True))  # fmt: skip
        for path in islice(rated, len(complete)):
            self.solutions[path.prompt].append(path)
        for group in written:
            group.paths = list(islice(rated, len(group.paths)))
        return written
