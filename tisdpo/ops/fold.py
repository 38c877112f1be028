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
    shifted, mass, total, lse = _shifted(_transformed(z, transform))
    logp = shifted.gather(-1, target[:, None])[:, 0] - total.log()
    if ref_z is None:
        return Statistics(lse, logp, None, None, None)
    ref_shifted, ref_mass, ref_total, ref_lse = _shifted(_transformed(ref_z, transform))
    ref_logp = ref_shifted.gather(-1, target[:, None])[:, 0] - ref_total.log()
    if kl is None:
        return Statistics(lse, logp, ref_lse, ref_logp, None)
    if kl == "forward":
        shifted, mass, total, ref_shifted, ref_total = ref_shifted, ref_mass, ref_total, shifted, total
    divergence = mass.mul_(_difference(shifted, ref_shifted)).sum(-1) / total - (total / ref_total).log()
    return Statistics(lse, logp, ref_lse, ref_logp, divergence)


def _shifted(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z - max, exp of that, its sum [n], log-sum-exp [n]). Log-probs are formed from the first: next to huge logits log-sum-exp rounds."""
    largest = z.amax(-1, keepdim=True)
    shifted = z - largest
    mass = shifted.exp()
    total = mass.sum(-1)
    return shifted, mass, total, largest[:, 0] + total.log()


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """x - y, and 0 where x is -inf: it will be multiplied by exp(x), and 0 log 0 = 0. Where only y is -inf it stays infinite."""
    return torch.sub(x, y).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=0.0)


def _block_gradient_(z, target, ref_z, stats, g_logp, g_kl, kl, transform):
    scale, softcap, temperature = transform
    # dz/d raw: the slope of the soft cap needs the logits before they are overwritten
    slope = scale / temperature if softcap is None else torch.tanh(z * (scale / softcap)).square_().neg_().add_(1).mul_(scale / temperature)
    logits = _transformed(z, transform)
    factor = -1.0 if g_logp is None else -g_logp
    if kl == "reverse":
        difference = _difference(logits, _transformed(ref_z, transform)).mul_(g_kl[:, None])
        difference.add_((factor - g_kl * (stats.lse - stats.ref_lse + stats.kl))[:, None])
        torch.sub(logits, stats.lse[:, None], out=z).exp_().mul_(difference)
    elif kl == "forward":
        q = (_transformed(ref_z, transform) - stats.ref_lse[:, None]).exp_().mul_(g_kl[:, None])
        torch.sub(logits, stats.lse[:, None], out=z).exp_().mul_((g_kl + factor)[:, None]).sub_(q)
    else:
        torch.sub(logits, stats.lse[:, None], out=z).exp_().mul_(factor if g_logp is None else factor[:, None])
    rows = torch.arange(len(z), device=z.device)
    z[rows, target] += 1.0 if g_logp is None else g_logp
    if softcap is not None or slope != 1.0:
        z.mul_(slope)
