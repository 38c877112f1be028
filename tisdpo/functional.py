"""The public functions: they check what comes in, choose a plan and call the registered operators.

Sizes: P pairs, S = 2P sequences interleaved chosen_0, rejected_0, chosen_1, ...; N completion tokens of all sequences; H hidden; V
vocabulary. Log-probs and KL are in nats. Results are float32, and float64 for float64 inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tisdpo import arguments, checks
from tisdpo.losses import Objective, PairSums, PreferenceOutput, preference_output, resolve_normalizer
from tisdpo.ops import nll, pairwise, token_stats, values
from tisdpo.ops import sequence_sums as sums_op
from tisdpo.ops.backend import accumulation_dtype
from tisdpo.ops.loss_rows import boundaries_on
from tisdpo.ops.torch_fold import segment_sums
from tisdpo.weighting import Weighting, contrast_weights

PLANS = ("auto", "one_pass", "two_pass")


class TokenStats(NamedTuple):
    """Per token, in the shape of `target`: log-probs of the policy (differentiable), of the reference (constant), KL (differentiable)."""

    logps: Tensor
    ref_logps: Tensor | None
    kl: Tensor | None


class SequenceSums(NamedTuple):
    """Per sequence [S]: weighted log-ratio D_s and weighted KL K_s (None without `kl`)."""

    logratio: Tensor
    kl: Tensor | None


class NLLOutput(NamedTuple):
    """The loss [], which carries the gradient, and detached, in the shape of `target`, the log-prob of every token."""

    loss: Tensor
    logps: Tensor


def token_logps(
    logits: Tensor,
    target: Tensor,
    *,
    ref_logits: Tensor | None = None,
    kl: str | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    overwrite_logits: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """Log-prob of every target token, and the KL to a reference, from logits.

    With z = softcap(logit_scale * logits) / temperature, the same as::

        logps = z.float().log_softmax(-1).gather(-1, target[..., None])[..., 0]        # log pi(y_t | x, y_<t)
        kl = (p * (p.log() - q.log())).sum(-1)     # "reverse", KL(pi || pi_ref); "forward" has p and q exchanged

    logits [..., V], target [...] (int64, 0..V-1 or ignore_index), ref_logits [..., V]; results have target's shape. Ignored
    positions give 0 and no gradient; ignore_index=None: there are none. Gradients reach `logits` through `logps` and `kl`, for any
    upstream gradient; a reference that requires a gradient raises. Needs `ref_logits` for `kl`.

    Memory: the gradient, in the dtype of the logits; none with `overwrite_logits`, where the backward writes it over the logits: they must
    then serve nobody else, and a second backward raises. Strided logits, such as ``logits[:, :-1]``, are read in place.

    Raises TypeError and ValueError that name the argument, what was expected and what came.
    """
    checks.floating("logits", logits, min_dim=1)
    ignore_index = checks.target(target, logits.shape[:-1], logits.shape[-1], ignore_index, "logits without its last dimension")
    checks.same_device(logits=logits, target=target, ref_logits=ref_logits)
    transform = checks.transform(logit_scale, softcap, temperature)
    arguments.kl_and_reference(kl, ref_logits, "ref_logits")
    checks.same("ref_logits", ref_logits, "logits", logits)
    checks.constants(ref_logits=ref_logits)
    if overwrite_logits and any(step == 0 and size > 1 for step, size in zip(logits.stride(), logits.shape)):
        raise ValueError(f"overwrite_logits needs rows with memory of their own, got strides {logits.stride()}; leave it out")
    logits, ref_logits = arguments.matrices(logits), arguments.matrices(ref_logits)
    out = token_stats.token_stats(logits, target.reshape(-1), ref_logits, kl, *transform, ignore_index, overwrite_logits, backend)
    return _token_stats(out, target.shape, ref_logits is not None, kl)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl: str | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    backend: str = "auto",
) -> TokenStats:
    """`token_logps` of ``F.linear(hidden, weight, bias)`` without the [N, V] logits: an ordinary differentiable op for any loss on top.

    hidden [..., H], weight [V, H] (the LM head), bias [V], target [...] (int64; ignore_index=None where no position is ignored, which
    spares a GPU's host the wait for their number); ref_hidden [..., H] with ref_weight [V, H'] and
    ref_bias [V] (both default to the policy's, which must then be frozen). Gradients reach hidden, weight and bias through `logps`
    and `kl`, for any upstream gradient.

    Cost in products of 2 N H V FLOP, forward and backward together, with a reference (but no KL) one more; N counts only positions that are
    not ignored:

        trained head                       4, with KL 6    the backward computes the logits again
        the same, no KL, H/2 <= N <= H     3               dlogp/dlogits waits in the memory of the head's gradient (bfloat16: N <= 2 H)
        frozen head (LoRA)                 2, with KL 4    the forward makes dlogp_t/dhidden_t [N, H], float32 (with KL two)
        under torch.no_grad()              1, with KL 2

    Float16, and a trained bias on a frozen head, take two passes: 4 or 3, with KL 6 or 5. The second row is for float32 and bfloat16, the
    latter where its products have float32 sums (a GPU, the C++ extension), and not under torch.compile; what waits takes [V, H] items of
    the head's dtype, of bfloat16 with N > 7/8 H some N V more, of a large float32 head some 8 MiB more (on a GPU 128), from the forward
    on. Memory besides: a chunk of logits (a byte budget) and, with a trained head, what `linear_tis_dpo_loss` sums its gradient in. With
    and without gradients log-probs may differ in their last bits.

    Raises TypeError and ValueError that name the argument, what was expected and what came.
    """
    transform = checks.transform(logit_scale, softcap, temperature)
    head, ignore_index = arguments.head(hidden, weight, bias, target, ref_hidden, ref_weight, ref_bias, ignore_index)
    arguments.kl_and_reference(kl, ref_hidden, "ref_hidden")
    return _linear_token_stats(head, kl, transform, ignore_index, backend, target.shape)


def linear_nll_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    normalizer: float | Tensor | None = None,
    backend: str = "auto",
) -> NLLOutput:
    """Cross-entropy from hidden states and the LM head, with a factor for every token, in one pass and without [N, V] logits::

        logps = linear_token_logps(hidden, weight, target, bias=bias).logps
        loss = -(token_weights * logps).sum() / normalizer

    hidden [..., H], weight [V, H], bias [V], target [...] (int64; positions with ignore_index count for nothing, None: there are none);
    token_weights [...] of either sign (None: 1): constants, so a loss whose factors depend on its own log-probs takes `linear_token_logps`.
    normalizer: the number of tokens of the whole global batch, or any other number above 0 (None: of the tokens here that are not ignored).

    Cost in products of 2 N H V FLOP, both ways: 3, with a frozen head 2, without gradients 1. The gradients are computed in the forward;
    float16, whose small gradients a GradScaler has to scale before they are rounded, takes `linear_token_logps` (4 and 3). Memory as in
    `linear_tis_dpo_loss`. No second derivatives.

    Raises TypeError and ValueError that name the argument, what was expected and what came.
    """
    transform = checks.transform(logit_scale, softcap, temperature)
    head, ignore_index = arguments.head(hidden, weight, bias, target, None, None, None, ignore_index)
    divisor = None if normalizer is None else resolve_normalizer(normalizer, "mean", 1)
    if token_weights is not None:
        token_weights = checks.weights(token_weights, target).reshape(-1)
        checks.same_device(hidden=hidden, token_weights=token_weights)
    flat, head_weight, bias, targets, *_ = head
    if flat.dtype == torch.float16:
        if not torch.compiler.is_compiling():
            values.finite("token_weights", token_weights)
        logps = _linear_token_stats(head, None, transform, ignore_index, backend, targets.shape).logps
        factors = torch.ones_like(logps) if token_weights is None else token_weights.to(logps.dtype)
        divisor = (targets != ignore_index).sum().clamp(min=1) if divisor is None else divisor
        return NLLOutput(-(factors * logps).sum() / divisor, logps.detach().reshape(target.shape))
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (flat, head_weight, bias)]
    divisor = None if divisor is None else _on_device(divisor, flat)
    loss, logps, *_ = nll.linear_nll(flat, head_weight, bias, targets, token_weights, divisor, *transform, ignore_index, needs, backend)
    return NLLOutput(loss, logps.reshape(target.shape))


def token_weights(
    pos_logps: Tensor,
    neg_logps: Tensor,
    is_chosen: Tensor,
    weighting: Weighting | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    is_eos: Tensor | None = None,
) -> Tensor:
    """Weight of every token from the log-probs of the contrastive pair; by default TIS-DPO's rule (arXiv 2410.04350)::

        r = pos_logps - neg_logps
        w = k * torch.exp(torch.where(is_chosen, mu_chosen, mu_rejected) * r.clamp(lower, upper))

    pos_logps, neg_logps [N] (nats), is_chosen [N] (bool) -> weights [N], non-negative, float32 (float64 for float64). Rules that
    look at whole sequences need cu_seqlens [S+1]; `eos_weight` needs is_eos [N]. Weights are constants: no gradient flows back.
    Raises ValueError for shapes that differ and for log-probs that are not finite.
    """
    weighting = checks.option("weighting", weighting, Weighting)
    checks.floating("pos_logps", pos_logps)
    checks.same("neg_logps", neg_logps, "pos_logps", pos_logps, dtype=False)
    checks.mask("is_chosen", is_chosen, pos_logps.shape)
    if is_eos is not None:
        checks.mask("is_eos", is_eos, pos_logps.shape)
    if cu_seqlens is not None:
        checks.cu_seqlens(cu_seqlens, pos_logps.numel())
    dtype = accumulation_dtype(pos_logps.dtype)
    contrast = pos_logps.detach().to(dtype) - neg_logps.detach().to(dtype)
    if not torch.compiler.is_compiling():  # a compiled graph must not depend on values
        values.finite("pos_logps - neg_logps", contrast)
        if cu_seqlens is not None:
            values.cu_seqlens(cu_seqlens, len(contrast))
    return contrast_weights(contrast, is_chosen, weighting, cu_seqlens=cu_seqlens, is_eos=is_eos)


def sequence_sums(
    logps: Tensor,
    ref_logps: Tensor,
    cu_seqlens: Tensor,
    *,
    token_weights: Tensor | None = None,
    pos_logps: Tensor | None = None,
    neg_logps: Tensor | None = None,
    weighting: Weighting | None = None,
    kl: Tensor | None = None,
    backend: str = "auto",
) -> SequenceSums:
    """D_s = sum_t w_t (logps_t - ref_logps_t) and K_s = sum_t w_t kl_t of every sequence.

    logps, ref_logps, kl [N] (nats), cu_seqlens [S+1] (int32 or int64, 0 first, N last). The weights: `token_weights` [N], or formed
    from pos_logps and neg_logps [N] by `weighting`, or 1. The same as::

        D = torch.stack([(w * (logps - ref_logps))[a:b].sum() for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:])])

    Differentiable in logps and kl; weights and reference are constants. Summed in a fixed order.
    Raises ValueError for shapes, decreasing cu_seqlens, negative or non-finite weights.
    """
    weights = arguments.weights(logps, ref_logps, cu_seqlens, token_weights, pos_logps, neg_logps, weighting)
    if kl is not None:
        checks.same("kl", kl, "logps", logps, dtype=False)
        checks.same_device(logps=logps, kl=kl)
    dtype = accumulation_dtype(logps.dtype)
    kl = None if kl is None else kl.to(dtype)
    D, K, _ = sums_op.sequence_sums(logps.to(dtype), ref_logps.detach().to(dtype), kl, cu_seqlens, *weights, backend)
    return SequenceSums(D, None if kl is None else K)


def tis_dpo_loss(
    logps: Tensor,
    ref_logps: Tensor,
    cu_seqlens: Tensor,
    *,
    token_weights: Tensor | None = None,
    pos_logps: Tensor | None = None,
    neg_logps: Tensor | None = None,
    weighting: Weighting | None = None,
    kl: Tensor | None = None,
    objective: Objective | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignored: Tensor | None = None,
    backend: str = "auto",
) -> PreferenceOutput:
    """TIS-DPO's loss (arXiv 2410.04350, Eqs. 16-17) from per-token log-probs of the completions::

        score = D - alpha * K                            # of every sequence, see `sequence_sums`; "forward": D + alpha * K
        loss = -logsigmoid(beta * (score[0::2] - score[1::2])).mean()

    logps, ref_logps, kl [N] (nats); sequences interleaved chosen_0, rejected_0, chosen_1, ... in cu_seqlens [S+1]. `kl` is given
    exactly when `objective.kl` is set. With weights 1 and no KL this is DPO. With `objective.nll_coef` the mean NLL of the chosen's tokens,
    without weights, is added to the loss of every pair. `normalizer` replaces the number of pairs that the
    sum of losses is divided by (pairs in the global batch, for accumulation and data parallelism); reduction "mean" or "sum".
    `ignored` [N] (bool) marks positions that are not tokens, for losses that count tokens (ipo, nll_coef).
    """
    objective = checks.option("objective", objective, Objective)
    if (kl is None) != (objective.kl is None):
        came = "missing: pass the per-token KL" if kl is None else "given: drop it or set objective.kl"
        raise ValueError(f"objective.kl is {objective.kl!r}, but kl is {came}")
    sums = sequence_sums(
        logps, ref_logps, cu_seqlens, token_weights=token_weights, pos_logps=pos_logps, neg_logps=neg_logps, weighting=weighting, kl=kl,
        backend=backend,
    )  # fmt: skip
    arguments.pairs(cu_seqlens)
    if ignored is not None:
        checks.mask("ignored", ignored, logps.shape)
    dtype = sums.logratio.dtype
    ones = torch.ones_like(logps, dtype=dtype) if ignored is None else (~ignored).to(dtype)
    plain = (logps if objective.nll_coef else logps.detach()).to(dtype)
    plain = plain if ignored is None else plain.masked_fill(ignored, 0)
    plain, lengths = segment_sums(plain, cu_seqlens), segment_sums(ones, cu_seqlens)
    return preference_output(None, PairSums(sums.logratio, sums.kl, plain, lengths), objective, reduction, normalizer)


def linear_tis_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    *,
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    objective: Objective | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    plan: str = "auto",
    backend: str = "auto",
) -> PreferenceOutput:
    """TIS-DPO's loss from hidden states and the LM head, in one pass and without [N, V] logits. The same as::

        stats = linear_token_logps(hidden, weight, target, ref_hidden=ref_hidden, ref_weight=ref_weight, kl=objective.kl)
        output = tis_dpo_loss(stats.logps, stats.ref_logps, cu_seqlens, token_weights=token_weights, kl=stats.kl, objective=objective)

    hidden [N, H], weight [V, H], bias [V], target [N] (int64; ignore_index positions count for nothing, None: there are none),
    cu_seqlens [S+1], on the CPU or beside hidden, with sequences interleaved chosen_0, rejected_0, chosen_1, ...; token_weights [N] >= 0
    (None: 1). The reference is either `ref_logps` [N], or `ref_hidden` [N, H'] with ref_weight [V, H'] and ref_bias [V] (default: the
    policy's head, which must then be frozen); the KL term needs the latter. `normalizer` and `reduction` as in `tis_dpo_loss`: with
    accumulation or several processes the number of pairs of the whole global batch (under DDP and FSDP, which average gradients, the loss
    is then to be multiplied by the number of processes).

    hidden[i] is the hidden state of the position before target[i], after the model's last norm: docs/usage.md has a whole loop.

    Cost in products of 2 N H V FLOP, forward and backward together: trainable head 3, with KL or online reference 4; frozen head 2
    and 3. plan="two_pass" (`linear_token_logps` and a loss on top) is for comparison, and what "auto" takes for float16, whose small
    gradients a GradScaler has to scale before they are rounded, and for `nll_coef` with a KL term whose chosen part has a gradient. Neither
    plan has second derivatives. Memory: a byte budget of logits and, with a trainable head of 16 bits, V H items of 16 bits, or
    max(N - H, 0) V if that is less (N <= 2 H; on a GPU max(N - 7/8 H, 0) V, and none for one chunk of a head of 16 million items or more);
    the gradients are computed in the forward, and skipped where none is needed. With a float32 sum a pair longer than the budget is
    held while its logits take no more than a head does (rows * models <= H), and computed twice beyond that; with TISDPO_CHUNK_MIB set,
    always (docs/design.md).

    On a GPU the host waits once for the device, for the boundaries among the tokens that carry loss: not with ignore_index=None and
    cu_seqlens on the CPU, nor with up to 512 tokens. A bad value is then an assertion on the device instead of a ValueError.

    Raises TypeError and ValueError that name the argument, what was expected and what came.
    """
    objective = checks.option("objective", objective, Objective)
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")
    checks.floating("hidden", hidden)
    if hidden.dim() != 2:
        raise ValueError(
            f"hidden must be [N, H] over flat sequences, got shape {tuple(hidden.shape)}; of padded batches tisdpo.batches.flatten_batch "
            "takes them"
        )
    transform = checks.transform(logit_scale, softcap, temperature)
    every = ignore_index is None
    head, ignore_index = arguments.head(hidden, weight, bias, target, ref_hidden, ref_weight, ref_bias, ignore_index)
    hidden, weight, bias, target, ref_hidden, ref_weight, ref_bias = head
    checks.cu_seqlens(cu_seqlens, len(target))
    arguments.pairs(cu_seqlens)
    ref_logps = arguments.reference_logps(ref_logps, ref_hidden, objective, target)
    dtype = accumulation_dtype(hidden.dtype)
    if token_weights is not None:
        token_weights = checks.weights(token_weights, target).to(dtype)
    checks.same_device(
        hidden=hidden, cu_seqlens=cu_seqlens if cu_seqlens.device.type != "cpu" else None, token_weights=token_weights, ref_logps=ref_logps
    )
    divisor = resolve_normalizer(normalizer, reduction, (len(cu_seqlens) - 1) // 2)
    ref_logps = None if ref_logps is None else ref_logps.to(dtype)

    # float16 gradients must be scaled before they are rounded (GradScaler), which gradients formed in the forward cannot be
    if plan == "two_pass" or (plan == "auto" and (hidden.dtype == torch.float16 or not objective.in_one_pass)):
        stats = _linear_token_stats(head, objective.kl, transform, ignore_index, backend, target.shape)
        ignored = None if every else target == ignore_index
        reference = stats.ref_logps if ref_logps is None else ref_logps if every else ref_logps.masked_fill(ignored, 0)
        return tis_dpo_loss(
            stats.logps, reference, boundaries_on(hidden.device, cu_seqlens), token_weights=token_weights, kl=stats.kl, objective=objective,
            reduction=reduction, normalizer=normalizer, ignored=ignored, backend=backend,
        )  # fmt: skip

    if not objective.in_one_pass:
        raise ValueError(
            f"with kl={objective.kl!r} and nll_coef={objective.nll_coef} a chosen token's gradient is not one factor times its score's, as "
            "plan='one_pass' needs; use plan='auto', or detach_chosen_kl=True"
        )
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    o = objective
    loss, sums, *_ = pairwise.linear_pairwise(
        hidden, weight, bias, target, cu_seqlens, token_weights, ref_logps, ref_hidden, ref_weight, ref_bias, _on_device(divisor, hidden),
        o.loss, o.beta, o.kl, o.alpha, o.detach_chosen_kl, o.label_smoothing, o.nll_coef, *transform, ignore_index, needs, backend,
    )  # fmt: skip
    return preference_output(loss, PairSums(sums[0], None if o.kl is None else sums[1], sums[2], sums[3]), o, reduction, normalizer)


def _on_device(divisor: float | Tensor, like: Tensor) -> Tensor:
    """A number as [] beside `like`, in its accumulation dtype."""
    dtype = accumulation_dtype(like.dtype)
    if isinstance(divisor, Tensor) and divisor.device.type == "cpu" and not torch.compiler.is_compiling():
        divisor = divisor.item()  # a copy to a device would wait until that has come to it
    if isinstance(divisor, Tensor):
        return divisor.to(like.device, dtype)
    return torch.full((), divisor, dtype=dtype, device=like.device)


def _linear_token_stats(head, kl: str | None, transform, ignore_index: int, backend: str, shape) -> TokenStats:
    hidden, weight, bias, target, ref_hidden, *_ = head
    with_slopes, waiting = False, None
    if torch.is_grad_enabled() and hidden.dtype != torch.float16:
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        with_slopes = hidden.requires_grad and not trained
        waiting = token_stats.waiting_sizes(weight, target, ignore_index) if weight.requires_grad and kl is None else None
    out = token_stats.linear_token_stats(*head, kl, *transform, ignore_index, backend, with_slopes, waiting)
    return _token_stats(out[:5], shape, ref_hidden is not None, kl)


def _token_stats(out, shape, has_ref: bool, kl: str | None) -> TokenStats:
    logps, _, ref_logps, _, divergence = out
    return TokenStats(
        logps.reshape(shape), ref_logps.reshape(shape) if has_ref else None, divergence.reshape(shape) if kl is not None else None
    )
