"""Rows of prompt and completion as tensors: what sources make, objectives read, and micro-batches cut up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """Prompts padded on the left, completions on the right; every tensor has one entry (or line) a row.

    Rows of one group are neighbours and have the same prompt: `group` of them at a time (1: no groups).
    """

    prompt_ids: Tensor
    """(rows, prompt) token ids."""
    prompt_mask: Tensor
    """(rows, prompt) True on real tokens."""
    completion_ids: Tensor
    """(rows, completion) token ids, the end mark included where there is one."""
    lengths: Tensor
    """(rows,) tokens of each completion: where padding begins, whatever the padding token is."""
    mask: Tensor
    """(rows, completion) float: 1 on tokens that count in the loss; 0 after the end, in given parts, in padding."""
    rows: list[dict[str, Any]]
    """The data columns each row came from."""
    group: int = 1
    kind: str = "rollouts"
    """What the batch is: rollouts, demonstrations or pairs. Objectives say which they read."""
    temperature: float = 1.0
    """Of the sampling distribution: log-probabilities are those of softmax(logits / temperature)."""
    max_new_tokens: int = 1
    """The longest completion that sampling allowed: a constant, whatever the rows' lengths."""
    inputs: Tensor | None = None
    """(rows, completion) tokens that the model reads in place of `completion_ids` (masked thought)."""
    unseen: Tensor | None = None
    """(rows, completion) True on input tokens that nothing may attend to; set for a pass, never kept."""
    columns: dict[str, Tensor] = field(default_factory=dict)
    """More about the rows: reward, advantage, old_log_probs, ref_log_probs, weight, ... first axis rows."""
    step: int = 0
    """The optimizer step it is used in, and ..."""
    steps: int = 1
    """... the steps of the whole run: what schedules are evaluated at."""
    total_rows: int = 0
    """Rows of the whole update, over all micro-batches and processes: the denominator of row means."""
    total_tokens: float = 0.0
    """Sum of `mask` over the whole update: the denominator of token means."""

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        pad: int = 0,
        rows: Sequence[Mapping[str, Any]] | None = None,
        masks: Sequence[Sequence[float]] | None = None,
        **more: Any,
    ) -> Batch:
        """Pads lists of token ids. `masks` marks the completion tokens that count (default: all of them)."""
        n, sizes = len(prompts), [len(c) for c in completions]
        assert n == len(sizes) and (masks is None or [len(m) for m in masks] == sizes)
        width, length = max(map(len, prompts), default=1), max([1, *sizes])
        lengths = torch.tensor(sizes, dtype=torch.long)
        before = torch.tensor([width - len(p) for p in prompts], dtype=torch.long)
        prompt_ids = right_padded([[*[pad] * (width - len(p)), *p] for p in prompts], width, pad)
        prompt_mask = torch.arange(width) >= before[:, None]
        completion_ids = right_padded(completions, length, pad)
        there = torch.arange(length) < lengths[:, None]
        mask = there.float() if masks is None else right_padded(masks, length, 0.0)
        found = [dict(row) for row in rows] if rows is not None else [{} for _ in range(n)]
        batch = cls(prompt_ids, prompt_mask, completion_ids, lengths, mask, found, **more)
        return batch.with_totals()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, column: str) -> Tensor:
        return self.columns[column]

    def __setitem__(self, column: str, values: Tensor) -> None:
        self.columns[column] = values

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    @property
    def attended(self) -> Tensor:
        """(rows, completion) True on tokens that are there, whether they count or not."""
        return torch.arange(self.completion_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def with_totals(self) -> Batch:
        """The same batch as a whole update of its own: denominators are its own sums."""
        return replace(self, total_rows=len(self), total_tokens=float(self.mask.sum()))

    def select(self, index: Sequence[int] | Tensor) -> Batch:
        """Some rows, in that order, without columns that are padding in all of them; totals stay the update's.

        What was a group stays one when the index takes whole groups; else `group` is 1.
        """
        index = torch.as_tensor(index, dtype=torch.long, device=self.lengths.device)
        lengths, prompt_mask = self.lengths[index], self.prompt_mask[index]
        first = int(prompt_mask.any(0).float().argmax()) if len(index) else 0
        last = max(1, int(lengths.max())) if len(index) else 1
        whole = len(index) % self.group == 0 and bool(
            (index.view(-1, self.group) == index.view(-1, self.group)[:, :1] + self._offsets(index)).all()
            and (index.view(-1, self.group)[:, 0] % self.group == 0).all()
        )

        def cut(tensor: Tensor) -> Tensor:
            per_token = tensor.dim() > 1 and tensor.shape[1] == self.completion_ids.shape[1]
            return tensor[index, :last] if per_token else tensor[index]

        return replace(
            self,
            prompt_ids=self.prompt_ids[index, first:],
            prompt_mask=prompt_mask[:, first:],
            completion_ids=cut(self.completion_ids),
            lengths=lengths,
            mask=cut(self.mask),
            rows=[self.rows[i] for i in index.tolist()],
            group=self.group if whole else 1,
            inputs=None if self.inputs is None else cut(self.inputs),
            unseen=None if self.unseen is None else cut(self.unseen),
            columns={name: cut(values) for name, values in self.columns.items()},
        )

    def _offsets(self, index: Tensor) -> Tensor:
        return torch.arange(self.group, device=index.device)

    def to(self, device: torch.device | str) -> Batch:
        """All tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, columns={k: v.to(device) for k, v in self.columns.items()}, **moved)

    def chunks(self, rows: int) -> list[Batch]:
        """Micro-batches of at most `rows` rows: whole groups where a group fits."""
        step = max(1, rows // self.group) * self.group if self.group <= rows else rows
        return [self.select(range(i, min(i + step, len(self)))) for i in range(0, len(self), step)]


def right_padded(rows: Sequence[Sequence[float]], width: int, fill: float) -> Tensor:
    """(rows, width): int64 or float32, as `fill` is. One tensor at once is quicker than one a row."""
    kind = torch.long if isinstance(fill, int) else torch.float32
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=kind).view(len(rows), width)
