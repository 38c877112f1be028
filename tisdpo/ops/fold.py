"""The two folds over rows of logits, and the weighted sums of sequences, of which the plans are made: what they mean, who computes them.

`Fold.statistics` reads raw logits z [n, V] (before bias and scaling) and returns what a row contributes to the loss; `Fold.gradient` writes
dL/dz, over z where that is allowed. With z = softcap(logit_scale * (raw + bias)) / temperature, p = softmax(z), q the reference's:

    logp        g_l * (onehot(y) - p)
    reverse KL  g_K * p * (log p - log q - KL)
    forward KL  g_K * (p - q)

A backend has four functions, `statistics`, `gradient`, `sequence_sums` and `spread`: `torch_fold` and `cpp_fold` here, `tisdpo.kernels` in
Triton.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from tisdpo.ops import cpp_fold, torch_fold
from tisdpo.ops.backend import accumulation_dtype


class Transform(NamedTuple):
    """z = softcap(logit_scale * raw) / temperature, applied to the raw product of the head."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class Statistics(NamedTuple):
    """Per row: log-sum-exp and target log-prob of the policy, the same of the reference (or None), KL (or None); what D is still to be
    multiplied by (or None)."""

    lse: Tensor
    logp: Tensor
    ref_lse: Tensor | None
    ref_logp: Tensor | None
    kl: Tensor | None
    factor: Tensor | None = None

    def scaled(self, coefficient: Tensor) -> Tensor:
        """coefficient [n] of D, times its factor."""
        return coefficient if self.factor is None else coefficient * self.factor


class Fold(NamedTuple):
    """The folds of one loss: by which backend, with which KL, scaling and biases of the two heads [V]. `ignored`: targets may be negative,
    which gives statistics and a gradient of 0."""

    backend: str
    kl: str | None
    transform: Transform
    bias: Tensor | None = None
    ref_bias: Tensor | None = None
    ignored: bool = False

    def statistics(self, z: Tensor, target: Tensor, ref_z: Tensor | None) -> Statistics:
        """Raw logits z, ref_z [n, V] or [B, T, V] (n = B T; any float dtype and strides), target [n] in 0..V-1 -> `Statistics` of [n] each
        in the accumulation dtype. No input is changed."""
        folds = implementation(self.backend)
        return Statistics(*folds.statistics(z, target, ref_z, self.bias, self.ref_bias, self.ignored, self.kl, *self.transform))

    def gradient(
        self, z: Tensor, target: Tensor, ref_z: Tensor | None, stats: Statistics, g_logp: Tensor | None, g_kl: Tensor | None,
        *, out: Tensor | None = None, dtype: torch.dtype | None = None, columns: tuple[int, int] | None = None,
    ) -> Tensor:  # fmt: skip
        """The derivative of sum(g_logp * logp + g_kl * KL) with respect to raw logits z, from the `stats` of the same rows.

        g_logp [n] or None for ones; g_kl [n], exactly with a KL. Written to `out` (shape of z), or else over z, as items of `dtype`
        (default: that of z): the result may then be a view of z's memory, and z is gone either way. columns: the first
        and the last column of z [n, V] that are asked for, written to `out` [n, last - first]; z is then left alone.
        """
        folds = implementation(self.backend)
        g_kl = None if self.kl is None else g_kl
        return folds.gradient(
            z, target, ref_z, stats[:5], g_logp, g_kl, self.bias, self.ref_bias, self.ignored, self.kl, *self.transform,
            out=out, dtype=dtype, columns=columns,
        )  # fmt: skip


def wide(bias: Tensor | None) -> Tensor | None:
    """A bias [V] in the accumulation dtype."""
    return None if bias is None else bias.to(accumulation_dtype(bias.dtype))


def implementation(backend: str):
    """The module (or its like) that computes the folds of a resolved backend."""
    if backend == "torch":
        return torch_fold
    if backend == "cpp":
        return cpp_fold
    from tisdpo.kernels import fold, sequence_sums  # triton is imported only where it runs

    return SimpleNamespace(
        statistics=fold.statistics, gradient=fold.gradient, sequence_sums=sequence_sums.sequence_sums, spread=sequence_sums.spread
    )


def concatenated(parts: list[Statistics], dtype: torch.dtype, device: torch.device) -> Statistics:
    """The statistics of consecutive ranges of rows as those of one range."""
    if not parts:
        return Statistics(*(torch.empty(0, dtype=dtype, device=device) for _ in range(5)))
    if len(parts) == 1:
        return parts[0]
    return Statistics(*(None if columns[0] is None else torch.cat(columns) for columns in zip(*parts)))
