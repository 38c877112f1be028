"""The folds and the weighted sums by the C++ kernels of csrc/, on a CPU, in float32 and 16 bits. Their contracts are in `tisdpo.ops.fold`.

Here results get their memory, and vectors become contiguous float32; the operators check everything and compute.
"""

import torch
from torch import Tensor

from tisdpo.ops import extension, torch_fold


def statistics(z, target, ref_z, bias, ref_bias, ignored, kl, logit_scale, softcap, temperature):
    """`Fold.statistics`, as a tuple. Negative targets are ignored whatever `ignored` says."""
    if not _rows_in_one_piece(z, ref_z):
        return torch_fold.statistics(z, target, ref_z, bias, ref_bias, ignored, kl, logit_scale, softcap, temperature)
    out = torch.empty(5, target.numel(), dtype=torch.float32, device="cpu")
    _ops().statistics(z, target.contiguous(), ref_z, *_vectors(bias, ref_bias), *_options(kl, logit_scale, softcap, temperature), out)
    lse, logp, ref_lse, ref_logp, divergence = out
    has_ref = ref_z is not None
    return lse, logp, ref_lse if has_ref else None, ref_logp if has_ref else None, divergence if kl else None


def gradient(
    z, target, ref_z, stats, g_logp, g_kl, bias, ref_bias, ignored, kl, logit_scale, softcap, temperature,
    *, out=None, dtype=None, columns=None,
):  # fmt: skip
    """`Fold.gradient`. Items of `dtype` that are narrower than those of z lie at the start of each row of z."""
    if not _rows_in_one_piece(z, ref_z, out):
        return torch_fold.gradient(
            z, target, ref_z, stats, g_logp, g_kl, bias, ref_bias, ignored, kl, logit_scale, softcap, temperature,
            out=out, dtype=dtype, columns=columns,
        )  # fmt: skip
    dtype = dtype or z.dtype
    if out is None and dtype.itemsize > z.dtype.itemsize:
        out = torch.empty(z.shape, dtype=dtype, device=z.device)
    elif out is None:
        out = z if dtype == z.dtype else z.view(dtype)[..., : z.shape[-1]]
    lse, _, ref_lse, _, divergence = stats
    vectors = _vectors(lse, *((ref_lse, divergence, g_logp, g_kl) if kl else (None, None, g_logp, None)))
    options = _options(kl, logit_scale, softcap, temperature)
    first, last = columns or (0, z.shape[-1])
    _ops().gradient(z, target.contiguous(), ref_z if kl else None, *_vectors(bias, ref_bias), *options, *vectors, first, last, out)
    return out


def sequence_sums(logps, ref_logps, kl, cu_seqlens, token_weights, pos_logps, neg_logps, k, mu_chosen, mu_rejected, lower, upper):
    """`tisdpo.ops.sequence_sums.weighted_sums`."""
    logp, ref_logp, kl, *weights = _vectors(logps, ref_logps, kl, token_weights, pos_logps, neg_logps)
    sums, used = logp.new_empty(3, len(cu_seqlens) - 1), torch.empty_like(logp)
    cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    _ops().sequence_sums(logp, ref_logp, kl, cu_seqlens, *weights, k, mu_chosen, mu_rejected, lower, upper, sums, used)
    return sums.to(logps.dtype), used.to(logps.dtype)


def spread(g_D, g_K, weights, cu_seqlens):
    """Gradients [N] of the log-probs and of the KL from those of the sums [S]."""
    g_D, g_K, factors = _vectors(g_D, g_K, weights)
    out_D, out_K = torch.empty_like(factors), torch.empty_like(factors)
    _ops().spread(g_D, g_K, factors, cu_seqlens.to(torch.int64).contiguous(), out_D, out_K)
    return out_D.to(weights.dtype), out_K.to(weights.dtype)


def _ops():
    reason = extension.problem()
    if reason:
        raise RuntimeError(f"the cpp backend cannot run: {reason}")
    return torch.ops.tisdpo_cpp


def _vectors(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.to(torch.float32).contiguous() for x in vectors)


def _options(kl: str | None, logit_scale: float, softcap: float | None, temperature: float) -> tuple[str, float, float, bool]:
    """(KL, inner, outer, soft cap or not): z = inner * raw, or with soft-capping z = outer * tanh(inner * raw)."""
    if softcap is None:
        return kl or "", logit_scale / temperature, 1.0, False
    return kl or "", logit_scale / softcap, softcap / temperature, True


def _rows_in_one_piece(*matrices: Tensor | None) -> bool:
    """Whether the logits of a row lie next to each other. They do in everything a head produces; transposed ones are left to torch."""
    return all(x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 for x in matrices)
