"""Weighted log-ratio and weighted KL of every sequence as one registered operator.

Inputs are [N] tensors over flat sequences with boundaries cu_seqlens [S+1]; the weights are ready, or formed here from the contrast of
pos_logps and neg_logps by the elementwise rule w_t = k * exp(mu_s * clamp(r_t, lower, upper)).
"""

import torch
from torch import Tensor

from tisdpo.ops import values
from tisdpo.weighting import Weighting, chosen_tokens, contrast_weights


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of values [N] over every sequence, [S]; in a fixed order, without atomics."""
    if len(cu_seqlens) < 2:
        return values.new_zeros(0)
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.to(torch.int64), initial=0.0)


@torch.library.custom_op("tisdpo::sequence_sums", mutates_args=())
def sequence_sums(
    logps: Tensor, ref_logps: Tensor, kl: Tensor | None, cu_seqlens: Tensor, token_weights: Tensor | None,
    pos_logps: Tensor | None, neg_logps: Tensor | None,
    k: float, mu_chosen: float, mu_rejected: float, lower: float, upper: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(D [S], K [S] (zeros without kl), the weights [N] that were used)."""
    values.cu_seqlens(cu_seqlens, len(logps))
    values.token_weights(token_weights)
    weights = _weights(logps, cu_seqlens, token_weights, pos_logps, neg_logps, Weighting("exp", k, mu_chosen, mu_rejected, lower, upper))
    D = segment_sums(weights * (logps - ref_logps), cu_seqlens)
    return D, torch.zeros_like(D) if kl is None else segment_sums(weights * kl, cu_seqlens), weights


@sequence_sums.register_fake
def _(logps, ref_logps, kl, cu_seqlens, token_weights, pos_logps, neg_logps, k, mu_chosen, mu_rejected, lower, upper, backend):
    sums = logps.new_empty(cu_seqlens.shape[0] - 1)
    return sums, torch.empty_like(sums), torch.empty_like(logps)


@torch.library.custom_op("tisdpo::sequence_sums_backward", mutates_args=())
def sequence_sums_backward(g_D: Tensor | None, g_K: Tensor | None, weights: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [N] of logps and kl: the sequence's upstream gradient times the weight."""
    lengths, tokens = cu_seqlens.diff(), len(weights)

    def spread(g):
        return torch.zeros_like(weights) if g is None else torch.repeat_interleave(g, lengths, output_size=tokens) * weights

    return spread(g_D), spread(g_K)


@sequence_sums_backward.register_fake
def _(g_D, g_K, weights, cu_seqlens):
    return torch.empty_like(weights), torch.empty_like(weights)


def _weights(logps, cu_seqlens, token_weights, pos_logps, neg_logps, weighting):
    if token_weights is not None:
        return token_weights.to(logps.dtype, copy=True)  # an operator's output must not alias an input
    if pos_logps is None:
        return torch.ones_like(logps)
    contrast = pos_logps.to(logps.dtype) - neg_logps.to(logps.dtype)
    values.finite("pos_logps - neg_logps", contrast)
    return contrast_weights(contrast, chosen_tokens(cu_seqlens, len(logps)), weighting)


def _setup(ctx, inputs, output):
    ctx.has_kl = inputs[2] is not None
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], inputs[3])


def _backward(ctx, g_D, g_K, _):
    g_logps, g_kl = sequence_sums_backward(g_D, g_K, *ctx.saved_tensors)
    return g_logps, None, g_kl if ctx.has_kl else None, *[None] * 10


sequence_sums.register_autograd(_backward, setup_context=_setup)
