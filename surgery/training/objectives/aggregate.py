"""From token losses (rows, completion) to a micro-batch's share of the update's loss. Denominators never are 0."""

from __future__ import annotations

from torch import Tensor

from surgery.training.batch import Batch


def token_mean(losses: Tensor, batch: Batch) -> Tensor:
    """Sum over tokens / number of tokens in the whole update (DAPO, SFT)."""
    return (losses * batch.mask).sum() / max(batch.total_tokens, 1.0)


def sequence_mean(losses: Tensor, batch: Batch) -> Tensor:
    """Mean over the update's rows of the mean over each row's tokens (GRPO)."""
    each = (losses * batch.mask).sum(1) / batch.mask.sum(1).clamp(min=1.0)
    return each.sum() / max(batch.total_rows, 1)


def constant(losses: Tensor, batch: Batch, length: float) -> Tensor:
    """Sum over tokens / (rows of the update * `length`): no row's weight depends on its length (Dr.GRPO)."""
    return (losses * batch.mask).sum() / max(batch.total_rows * length, 1.0)


def micro_batch_mean(losses: Tensor, batch: Batch) -> Tensor:
    """Mean over the micro-batch's tokens, micro-batches weighted by rows (BNPO): by definition the one aggregation
    that depends on how an update is cut up."""
    share = len(batch) / max(batch.total_rows, 1)
    return share * (losses * batch.mask).sum() / batch.mask.sum().clamp(min=1.0)


def row_sums(values: Tensor, batch: Batch) -> Tensor:
    """(rows,) sums over each row's tokens (DPO)."""
    return (values * batch.mask).sum(1)
