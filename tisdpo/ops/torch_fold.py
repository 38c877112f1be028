"""The folds and the weighted sums in plain torch operations: any device, any float dtype. Their contracts are in `tisdpo.ops.fold`.

Rows are visited in blocks, so that the temporaries of a block are small (and stay in a CPU's cache).
"""

import torch
from torch import Tensor

from tisdpo.ops.backend import accumulation_dtype, block_rows
from tisdpo.weighting import Weighting, chosen_tokens, contrast_weights


def statistics(z, target, ref_z, bias, ref_bias, ignored, kl, logit_scale, softcap, temperature):
    """`Fold.statistics`, as a tuple."""
    dtype = accumulation_dtype(z.dtype)
    transform = logit_scale, softcap, temperature
    used = (True, True, ref_z is not None, ref_z is not None, kl is not None)
    out = [torch.zeros(len(target), dtype=dtype, device=z.device) if column else None for column in used]
    for matrix, rows, place in _blocks(z, target, ignored):
        x = _transformed(matrix(z)[rows].to(dtype), bias, transform)
        q = None if ref_z is None else _transformed(matrix(ref_z)[rows].to(dtype), ref_bias, transform)
        for column, value in zip(out, _block_statistics(x, target[place], q, kl)):
            if column is not None:
                column[place] = value
    return tuple(out)


def gradient(
    z, target, ref_z, stats, g_logp, g_kl, bias, ref_bias, ignored, kl, logit_scale, softcap, temperature,
    *, out=None, dtype=None, columns=None,
):  # fmt: skip
    """`Fold.gradient`."""
    first, last = columns or (0, z.shape[-1])
    z, ref_z, bias, ref_bias = (None if x is None else x[..., first:last] for x in (z, ref_z, bias, ref_bias))
    wide = accumulation_dtype(z.dtype)
    transform = logit_scale, softcap, temperature
    result = z if out is None else out
    for matrix, rows, place in _blocks(z, target, ignored):
        in_place = out is None and z.dtype == wide and isinstance(rows, slice)
        x = matrix(z)[rows].to(wide, copy=not in_place)
        q = None if kl is None else _transformed(matrix(ref_z)[rows].to(wide), ref_bias, transform)
        vectors = [None if s is None else s[place] for s in (*stats, g_logp, g_kl)]
        d = _block_gradient_(x, target[place] - first, q, *vectors, bias, kl, transform)
        if not in_place:
            matrix(result)[rows] = d.to(result.dtype)
    if ignored:
        result[(target < 0).reshape(result.shape[:-1])] = 0
    return result if dtype is None else result.to(dtype)


def sequence_sums(logps, ref_logps, kl, cu_seqlens, token_weights, pos_logps, neg_logps, k, mu_chosen, mu_rejected, lower, upper):
    """`tisdpo.ops.sequence_sums.weighted_sums`."""
    weights = token_weights
    if pos_logps is not None:
        rule = Weighting("exp", k, mu_chosen, mu_rejected, lower, upper)
        contrast = pos_logps.to(logps.dtype) - neg_logps.to(logps.dtype)
        weights = contrast_weights(contrast, chosen_tokens(cu_seqlens, len(logps)), rule)
    weights = torch.ones_like(logps) if weights is None else weights.to(logps.dtype, copy=True)  # an operator's output is no input
    D = segment_sums(weights * (logps - ref_logps), cu_seqlens)
    K = torch.zeros_like(D) if kl is None else segment_sums(weights * kl, cu_seqlens)
    return torch.stack([D, K, segment_sums(logps, cu_seqlens)]), weights


def spread(g_D, g_K, weights, cu_seqlens):
    """Gradients [N] of the log-probs and of the KL from those of the sums [S]: the sequence's gradient times the weight of the token."""
    lengths, tokens = cu_seqlens.diff(), len(weights)

    def over_tokens(g):
        return torch.zeros_like(weights) if g is None else torch.repeat_interleave(g, lengths, output_size=tokens) * weights

    return over_tokens(g_D), over_tokens(g_K)


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of values [N] over every sequence, [S]; in a fixed order, without atomics."""
    if len(cu_seqlens) < 2:
        return values.new_zeros(0)
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.to(torch.int64), initial=0.0)


def _blocks(z: Tensor, target: Tensor, ignored: bool):
    """(matrix, rows, place) block after block: matrix(x) is a [n, V] view of x, rows an index or slice of it, place that of the outputs."""
    size = block_rows(z.shape[-1], accumulation_dtype(z.dtype).itemsize, z.device.type)
    batches, n = (1, len(z)) if z.dim() == 2 else z.shape[:2]
    for b in range(batches):
        matrix = (lambda x: x) if z.dim() == 2 else (lambda x, b=b: x[b])
        index = kept_rows(target[b * n : (b + 1) * n] >= 0) if ignored else None
        if index is None:
            for a in range(0, n, size):
                stop = min(a + size, n)
                yield matrix, slice(a, stop), slice(b * n + a, b * n + stop)
        else:
            for rows in index.split(size) if len(index) else ():
                yield matrix, rows, rows + b * n


def kept_rows(keep: Tensor) -> Tensor | None:
    """Index of the rows to keep [N] (bool), or None when that is all of them. The host waits for the count."""
    index = keep.nonzero()[:, 0]
    return None if len(index) == len(keep) else index


def _transformed(z: Tensor, bias: Tensor | None, transform) -> Tensor:
    """The logits that the softmax sees; z itself where nothing changes."""
    scale, softcap, temperature = transform
    z = z if bias is None else z + bias
    if softcap is not None:
        return torch.tanh(z * (scale / softcap)).mul_(softcap / temperature)
    return z if scale == temperature else z * (scale / temperature)


def _block_statistics(z, target, ref_z, kl):
    shifted, mass, total, lse = _shifted(z)
    logp = shifted.gather(-1, target[:, None])[:, 0] - total.log()
    if ref_z is None:
        return lse, logp, None, None, None
    ref_shifted, ref_mass, ref_total, ref_lse = _shifted(ref_z)
    ref_logp = ref_shifted.gather(-1, target[:, None])[:, 0] - ref_total.log()
    if kl is None:
        return lse, logp, ref_lse, ref_logp, None
    if kl == "forward":
        shifted, mass, total, ref_shifted, ref_total = ref_shifted, ref_mass, ref_total, shifted, total
    divergence = mass.mul_(_difference(shifted, ref_shifted, mass)).sum(-1) / total - (total / ref_total).log()
    return lse, logp, ref_lse, ref_logp, divergence


def _shifted(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z - max, exp of that, its sum [n], log-sum-exp [n]). Log-probs are formed from the first: next to huge logits log-sum-exp rounds."""
    largest = z.amax(-1, keepdim=True)
    shifted = z - largest
    mass = shifted.exp()
    total = mass.sum(-1)
    return shifted, mass, total, largest[:, 0] + total.log()


def _difference(x: Tensor, y: Tensor, mass: Tensor) -> Tensor:
    """x - y, and 0 where the mass of x, which it will be multiplied by, is 0: 0 log 0 = 0. Elsewhere it is infinite where y is -inf."""
    return torch.sub(x, y).masked_fill_(mass == 0, 0)


def _block_gradient_(z, target, q, lse, logp, ref_lse, ref_logp, divergence, g_logp, g_kl, bias, kl, transform):
    """Overwrite raw logits z [n, V] with their gradient; q are the reference's transformed logits."""
    scale, softcap, temperature = transform
    logits = _transformed(z, bias, transform)
    # dz/d raw; the slope of the soft cap is read off the capped logits before they are overwritten
    slope = scale / temperature
    if softcap is not None:
        slope = (logits * (temperature / softcap)).square_().neg_().add_(1).mul_(slope)
    factor = -1.0 if g_logp is None else -g_logp
    if kl == "reverse":
        p = torch.sub(logits, lse[:, None]).exp_()
        difference = _difference(logits, q, p).mul_(g_kl[:, None])
        difference.add_((factor - g_kl * (lse - ref_lse + divergence))[:, None])
        torch.mul(p, difference, out=z)
    elif kl == "forward":
        q = (q - ref_lse[:, None]).exp_().mul_(g_kl[:, None])
        torch.sub(logits, lse[:, None], out=z).exp_().mul_((g_kl + factor)[:, None]).sub_(q)
    else:
        torch.sub(logits, lse[:, None], out=z).exp_().mul_(factor if g_logp is None else factor[:, None])
    rows, columns = torch.arange(len(z), device=z.device), z.shape[1]
    here = ((target >= 0) & (target < columns)).to(z.dtype)  # 0 where the target is none of these columns
    z[rows, target.clamp(0, columns - 1)] += here if g_logp is None else here * g_logp
    if softcap is not None or slope != 1.0:
        z.mul_(slope)
    return z
