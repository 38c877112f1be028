"""Padded batches of trainers to the flat sequences of the loss functions, and back.

Sizes: S = 2B rows of a batch (chosen_0, rejected_0, chosen_1, ...), T padded length, N completion tokens of all rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class FlatBatch(NamedTuple):
    """The completion tokens of a padded batch, row after row.

    where [S, T-1] bool: positions whose next token is a completion token; target [N]: that token; cu_seqlens [S+1];
    token_weights [N] and ref_logps [N], or None where the batch has none.
    """

    where: Tensor
    target: Tensor
    cu_seqlens: Tensor
    token_weights: Tensor | None
    ref_logps: Tensor | None

    def take(self, hidden: Tensor) -> Tensor:
        """The hidden states that predict completion tokens: [S, T, H] -> [N, H]."""
        return hidden[:, :-1][self.where]


def flatten_batch(batch: dict) -> FlatBatch:
    """The flat form of a batch with `input_ids` [S, T] and `completion_mask` [S, T] (bool), optionally `token_weights` and `ref_logps`
    [S, T] in the coordinates of `input_ids`.

    The first position of a row is never a target: nothing predicts it.
    """
    mask = batch["completion_mask"].bool()
    where = mask[:, 1:]
    lengths = where.sum(1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    def take(name: str) -> Tensor | None:
        return batch[name][:, 1:][where] if batch.get(name) is not None else None

    return FlatBatch(where, batch["input_ids"][:, 1:][where], cu_seqlens, take("token_weights"), take("ref_logps"))


def unflatten(values: Tensor, completion_mask: Tensor) -> Tensor:
    """Values [N] of flat completion tokens back in [S, T], 0 elsewhere."""
    mask = completion_mask.bool().clone()
    mask[:, 0] = False
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
