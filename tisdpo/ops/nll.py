"""The weighted negative log-likelihood of tokens in one pass: what SFT needs, and every loss whose factors are known beforehand.

Every token's factor is known before its logits are, so chunks hold any rows: logits -> statistics -> D = dlogp/dlogits in place ->
dHidden = c * (D @ W), dWeight += D^T @ (c * hidden), c_t = -w_t / normalizer. Cost in head-sized products: 3, with a frozen head 2, without
gradients 1. Memory: as `tisdpo.ops.pairwise`, and no pair is ever too long.
"""

import torch
from torch import Tensor

from tisdpo.ops import backend as backends
from tisdpo.ops import one_pass, values
from tisdpo.ops.backend import accumulation_dtype
from tisdpo.ops.token_stats import gradient_shapes, kept_index, place, visits_of_rows


@backends.operator("tisdpo::linear_nll")
def linear_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, token_weights: Tensor | None, normalizer: Tensor | None,
    logit_scale: float, softcap: float | None, temperature: float, ignore_index: int, needs: list[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [], logps [N], gradients of hidden, weight, bias or empty ones); hidden [N, H], weight [V, H], bias [V], target, token_weights
    [N]; normalizer []: None for the number of rows that count."""
    values.target(target, len(weight), ignore_index)
    values.finite("token_weights", token_weights)
    dtype, index = accumulation_dtype(hidden.dtype), kept_index(target, ignore_index)
    divisor = max(len(target if index is None else index), 1) if normalizer is None else normalizer
    factors = torch.ones(len(target), dtype=dtype, device=hidden.device) if token_weights is None else token_weights.to(dtype)
    factors, logps = factors.neg() / divisor, torch.zeros_like(factors)
    wanted = any(needs)
    options = (index, None, (logit_scale, softcap, temperature), backend)
    visits, ranges = visits_of_rows(hidden, weight, bias, None, None, None, *options, needs=needs if wanted else None)
    grads, d = visits.grads, None
    for a, b in ranges:
        rows = place(index, a, b)
        found, d = visits.visit(a, b, target[rows], wanted=wanted)
        logps[rows] = found.logp
        if wanted:
            grads.add(a, b, d, found.scaled(factors[rows]))
    del visits, d  # and with them logits or D: what follows needs memory of its own
    gradients = grads.result() if wanted else gradient_shapes(hidden, weight, needs)
    return (logps * factors).sum(), logps, *gradients


@linear_nll.register_fake
def _(hidden, weight, bias, target, token_weights, normalizer, logit_scale, softcap, temperature, ignore_index, needs, backend):
    logps = hidden.new_empty(target.shape[0], dtype=accumulation_dtype(hidden.dtype))
    return logps.new_empty(()), logps, *gradient_shapes(hidden, weight, needs)


one_pass.register(linear_nll, needs=10, backend=11, function="linear_nll_loss")
