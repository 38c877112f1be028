"""The two folds over rows of logits that every plan is made of, in plain torch operations (any device, float32 and float64).

`statistics` reads raw logits z [n, V] (before scaling) and returns what a row contributes to the loss; `gradient_` overwrites z with
dL/dz. Both work on blocks of rows, so that the temporaries of a block are small (and stay in a CPU's cache).

    logp        g_l * (onehot(y) - p)              p, q: policy and reference probabilities
    reverse KL  g_K * p * (log p - log q - KL)
    forward KL  g_K * (p - q)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tisdpo.ops.backend import block_rows


class Transform(NamedTuple):
    """z = softcap(logit_scale * raw) / temperature, applied to the raw product of the head."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0


class Statistics(NamedTuple):
    """Per row: log-sum-exp and target log-prob of the policy, the same of the reference (or None), KL (or None)."""

    lse: Tensor
    logp: Tensor
    ref_lse: Tensor | None
    ref_logp: Tensor | None
    kl: Tensor | None


def statistics(z: Tensor, target: Tensor, ref_z: Tensor | None, kl: str | None, transform: Transform) -> Statistics:
    """z [n, V], target [n] in 0..V-1, ref_z [n, V] or None -> `Statistics` of [n] each. Neither input is changed."""
    blocks = [_block_statistics(z[a:b], target[a:b], None if ref_z is None else ref_z[a:b], kl, transform) for a, b in _blocks(z)]
    return concatenated(blocks, z.dtype, z.device)


def concatenated(parts: list[Statistics], dtype: torch.dtype, device: torch.device) -> Statistics:
    """The statistics of consecutive ranges of rows as those of one range."""
    if not parts:
        return Statistics(*(torch.empty(0, dtype=dtype, device=device) for _ in range(5)))
    return Statistics(*(None if columns[0] is None else torch.cat(columns) for columns in zip(*parts)))


def gradient_(
    z: Tensor,
    target: Tensor,
    ref_z: Tensor | None,
    stats: Statistics,
    g_logp: Tensor | None,
    g_kl: Tensor | None,
    kl: str | None,
    transform: Transform,
) -> Tensor:
    """Overwrite raw logits z [n, V] with the derivative of sum(g_logp * logp + g_kl * KL) with respect to them, and return z.

    g_logp [n] or None for ones; g_kl [n], only with `kl`. `stats` are those of the same rows.
    """
    for a, b in _blocks(z):
        block = Statistics(*(None if s is None else s[a:b] for s in stats))
        g = None if g_logp is None else g_logp[a:b]
        _block_gradient_(
            z[a:b], target[a:b], None if ref_z is None else ref_z[a:b], block, g, None if g_kl is None else g_kl[a:b], kl, transform
        )
    return z


def _blocks(z: Tensor):
    rows = block_rows(z.shape[1], z.element_size(), z.device.type)
    return [(a, min(a + rows, len(z))) for a in range(0, len(z), rows)]


def _transformed(z: Tensor, transform: Transform) -> Tensor:
    """The logits that the softmax sees; z itself where nothing changes."""
    scale, softcap, temperature = transform
    if softcap is not None:
        return torch.tanh(z * (scale / softcap)).mul_(softcap / temperature)
    return z if scale == temperature else z * (scale / temperature)


def _block_statistics(z, target, ref_z, kl, transform):
    z = _transformed(z, transform)
    lse = z.logsumexp(-1)
    logp = z.gather(-1, target[:, None])[:, 0] - lse
    if ref_z is None:
        return Statistics(lse, logp, None, None, None)
    ref_z = _transformed(ref_z, transform)
    ref_lse = ref_z.logsumexp(-1)
    ref_logp = ref_z.gather(-1, target[:, None])[:, 0] - ref_lse
    if kl is None:
        return Statistics(lse, logp, ref_lse, ref_logp, None)
    p, difference = _kl_terms(z, lse, ref_z, ref_lse, kl)
    return Statistics(lse, logp, ref_lse, ref_logp, p.mul_(difference).sum(-1))


def _kl_terms(z, lse, ref_z, ref_lse, kl):
    """(p, log p - log q) for the reverse direction, (q, log q - log p) for the forward one; the difference is 0 where it has no mass."""
    logp, logq = z - lse[:, None], ref_z - ref_lse[:, None]
    if kl == "forward":
        logp, logq = logq, logp
    difference = torch.sub(logp, logq, out=logq)
    p = logp.exp_()
    return p, difference.masked_fill_(p == 0, 0)  # 0 log 0 = 0, also for logits of -inf


def _block_gradient_(z, target, ref_z, stats, g_logp, g_kl, kl, transform):
    scale, softcap, temperature = transform
    # dz/d raw: the slope of the soft cap needs the logits before they are overwritten
    slope = scale / temperature if softcap is None else torch.tanh(z * (scale / softcap)).square_().neg_().add_(1).mul_(scale / temperature)
    logits = _transformed(z, transform)
    if kl == "reverse":
        p, difference = _kl_terms(logits, stats.lse, _transformed(ref_z, transform), stats.ref_lse, kl)
        difference.sub_(stats.kl[:, None]).mul_(g_kl[:, None]).sub_(1.0 if g_logp is None else g_logp[:, None])
        torch.mul(p, difference, out=z)
    else:
        torch.sub(logits, stats.lse[:, None], out=z).exp_()
        factor = -1.0 if g_logp is None else -g_logp
        if kl == "forward":
            q = (_transformed(ref_z, transform) - stats.ref_lse[:, None]).exp_()
            factor = g_kl + factor
            z.mul_(factor[:, None]).sub_(q.mul_(g_kl[:, None]))
        else:
            z.mul_(factor if g_logp is None else factor[:, None])
    rows = torch.arange(len(z), device=z.device)
    z[rows, target] += 1.0 if g_logp is None else g_logp
    z.mul_(slope) if softcap is not None or slope != 1.0 else None
