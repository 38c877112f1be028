"""Weighted log-ratio and weighted KL of every sequence as one registered operator.

Inputs are [N] tensors over flat sequences with boundaries cu_seqlens [S+1]; the weights are ready, or formed here from the contrast of
pos_logps and neg_logps by the elementwise rule w_t = k * exp(mu_s * clamp(r_t, lower, upper)).
"""

import torch
from torch import Tensor

from tisdpo.ops import backend as backends
from tisdpo.ops import values
from tisdpo.ops.fold import implementation


def weighted_sums(
    backend: str, logps: Tensor, ref_logps: Tensor, kl: Tensor | None, cu_seqlens: Tensor, token_weights: Tensor | None,
    pos_logps: Tensor | None = None, neg_logps: Tensor | None = None,
    k: float = 1.0, mu_chosen: float = 1.0, mu_rejected: float = -1.0, lower: float = -0.5, upper: float = 1.5,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sums [3, S]: weighted log-ratio, weighted KL (0 without kl), plain log-prob; the weights [N] that were used), by a resolved backend.

    The weights are token_weights, or formed from the contrast, or 1.
    """
    folds = implementation(backend)
    weights = (token_weights, pos_logps, neg_logps, k, mu_chosen, mu_rejected, lower, upper)
    return folds.sequence_sums(logps, ref_logps, kl, cu_seqlens, *weights)


@torch.library.custom_op("tisdpo::sequence_sums", mutates_args=())
def sequence_sums(
    logps: Tensor, ref_logps: Tensor, kl: Tensor | None, cu_seqlens: Tensor, token_weights: Tensor | None,
    pos_logps: Tensor | None, neg_logps: Tensor | None,
    k: float, mu_chosen: float, mu_rejected: float, lower: float, upper: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(D [S], K [S] (zeros without kl), the weights [N] that were used)."""
    values.cu_seqlens(cu_seqlens, len(logps))
    values.token_weights(token_weights)
    if pos_logps is not None:
        values.finite("pos_logps - neg_logps", pos_logps.to(logps.dtype) - neg_logps.to(logps.dtype))
    name = backends.resolve(backend, logps.device.type, logps.dtype)
    weighting = (k, mu_chosen, mu_rejected, lower, upper)
    sums, weights = weighted_sums(name, logps, ref_logps, kl, cu_seqlens, token_weights, pos_logps, neg_logps, *weighting)
    if pos_logps is not None:
        values.finite("the weights k * exp(mu * clamp(pos_logps - neg_logps, lower, upper))", weights)
    return sums[0].clone(), sums[1].clone(), weights  # outputs of an operator share no memory


@sequence_sums.register_fake
def _(logps, ref_logps, kl, cu_seqlens, token_weights, pos_logps, neg_logps, k, mu_chosen, mu_rejected, lower, upper, backend):
    sums = logps.new_empty(cu_seqlens.shape[0] - 1)
    return sums, torch.empty_like(sums), torch.empty_like(logps)


@torch.library.custom_op("tisdpo::sequence_sums_backward", mutates_args=())
def sequence_sums_backward(
    g_D: Tensor | None, g_K: Tensor | None, weights: Tensor, cu_seqlens: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients [N] of logps and kl: the sequence's upstream gradient times the weight."""
    return implementation(backends.resolve(backend, weights.device.type, weights.dtype)).spread(g_D, g_K, weights, cu_seqlens)


@sequence_sums_backward.register_fake
def _(g_D, g_K, weights, cu_seqlens, backend):
    return torch.empty_like(weights), torch.empty_like(weights)


def _setup(ctx, inputs, output):
    ctx.has_kl, ctx.backend = inputs[2] is not None, inputs[-1]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], inputs[3])


def _backward(ctx, g_D, g_K, _):
    g_logps, g_kl = sequence_sums_backward(g_D, g_K, *ctx.saved_tensors, ctx.backend)
    return g_logps, None, g_kl if ctx.has_kl else None, *[None] * 10


sequence_sums.register_autograd(_backward, setup_context=_setup)
