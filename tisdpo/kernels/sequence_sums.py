"""Triton kernels of the weighted sums: contrast -> clamp -> exp -> weight, and sum_t w_t d_t, sum_t w_t KL_t of every sequence.

Bytes a token: up to five float32 read (log-probs of four models, KL) and one written (the weight): 24 B, so 100k tokens are 2.4 MB, below a
microsecond of an H200's memory; the backward reads one and writes two. Both are bound by their launch.

One program walks one sequence in blocks and keeps the sums of each lane: no atomics, a fixed order, the same bits every time.
One sequence of 100k tokens is 98 blocks, some 0.1 ms; 100k sequences of one token are 100k small programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tisdpo.kernels.launch import FUSED, on, some

BLOCK = 1024


@triton.jit
def sums_kernel(
    logp_ptr, ref_logp_ptr, kl_ptr, weight_ptr, pos_ptr, neg_ptr, cu_ptr, sums_ptr, used_ptr, sequences,
    k, mu_chosen, mu_rejected, lower, upper,
    HAS_KL: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [3, S]: weighted log-ratio, weighted KL, plain log-prob; used [N]: the weights. WEIGHTS: 0 one, 1 given, 2 from the contrast."""
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_ptr + sequence).to(tl.int64)
    end = tl.load(cu_ptr + sequence + 1).to(tl.int64)
    mu = tl.where(sequence % 2 == 0, mu_chosen, mu_rejected)
    D = tl.zeros((BLOCK,), tl.float32)
    K = tl.zeros((BLOCK,), tl.float32)
    L = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        logp = tl.load(logp_ptr + offs, mask=mask, other=0.0)
        d = logp - tl.load(ref_logp_ptr + offs, mask=mask, other=0.0)
        w = tl.full((BLOCK,), 1.0, tl.float32)
        if WEIGHTS == 1:
            w = tl.load(weight_ptr + offs, mask=mask, other=0.0)
        if WEIGHTS == 2:
            r = tl.load(pos_ptr + offs, mask=mask, other=0.0) - tl.load(neg_ptr + offs, mask=mask, other=0.0)
            w = k * tl.exp(mu * tl.minimum(tl.maximum(r, lower), upper))
        tl.store(used_ptr + offs, w, mask=mask)
        D += w * d
        L += logp
        if HAS_KL:
            K += w * tl.load(kl_ptr + offs, mask=mask, other=0.0)
    tl.store(sums_ptr + sequence, tl.sum(D, 0))
    tl.store(sums_ptr + sequences + sequence, tl.sum(K, 0))
    tl.store(sums_ptr + 2 * sequences + sequence, tl.sum(L, 0))


@triton.jit
def spread_kernel(
    g_D_ptr, g_K_ptr, weight_ptr, cu_ptr, out_D_ptr, out_K_ptr, HAS_D: tl.constexpr, HAS_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [N] = g [S] of the token's sequence times its weight, for the log-ratio and for the KL; 0 for a gradient that is not there."""
    sequence = tl.program_id(0).to(tl.int64)
    begin = tl.load(cu_ptr + sequence).to(tl.int64)
    end = tl.load(cu_ptr + sequence + 1).to(tl.int64)
    g_D = 0.0
    g_K = 0.0
    if HAS_D:
        g_D = tl.load(g_D_ptr + sequence)
    if HAS_K:
        g_K = tl.load(g_K_ptr + sequence)
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < end
        w = tl.load(weight_ptr + offs, mask=mask, other=0.0)
        tl.store(out_D_ptr + offs, g_D * w, mask=mask)
        tl.store(out_K_ptr + offs, g_K * w, mask=mask)


def sequence_sums(
    logps: Tensor, ref_logps: Tensor, kl: Tensor | None, cu_seqlens: Tensor, token_weights: Tensor | None,
    pos_logps: Tensor | None, neg_logps: Tensor | None, k: float, mu_chosen: float, mu_rejected: float, lower: float, upper: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sums [3, S]: weighted log-ratio, weighted KL, plain log-prob; weights [N]) of float32 [N] inputs over cu_seqlens [S+1]."""
    sequences = len(cu_seqlens) - 1
    sums, used = logps.new_empty(3, sequences), torch.empty_like(logps, memory_format=torch.contiguous_format)
    if sequences:
        logps, ref_logps, kl, token_weights, pos_logps, neg_logps = (
            None if x is None else x.float().contiguous() for x in (logps, ref_logps, kl, token_weights, pos_logps, neg_logps)
        )
        with on(logps.device):
            sums_kernel[(sequences,)](
                logps, ref_logps, some(kl, logps), some(token_weights, logps), some(pos_logps, logps), some(neg_logps, logps),
                cu_seqlens.contiguous(), sums, used, sequences, k, mu_chosen, mu_rejected, lower, upper,
                HAS_KL=kl is not None, WEIGHTS=1 if token_weights is not None else 2 if pos_logps is not None else 0,
                BLOCK=BLOCK, num_warps=4, **FUSED,
            )  # fmt: skip
    return sums, used


def spread(g_D: Tensor | None, g_K: Tensor | None, weights: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [N] of the log-probs and of the KL from those of the sums [S]."""
    out_D, out_K = torch.empty_like(weights), torch.empty_like(weights)
    sequences = len(cu_seqlens) - 1
    if sequences:
        with on(weights.device):
            spread_kernel[(sequences,)](
                some(g_D, weights), some(g_K, weights), weights, cu_seqlens.contiguous(), out_D, out_K,
                HAS_D=g_D is not None, HAS_K=g_K is not None, BLOCK=BLOCK, num_warps=4, **FUSED,
            )  # fmt: skip
    return out_D, out_K
