"""Per-token log-probs and KL as registered operators: from logits, and from hidden states in two passes.

Two passes: the forward keeps [N] statistics only, the backward makes every logit again (`rows.Visits`). Cost in head-sized products
(u = 2 N H V FLOP): 4 u, with reference and KL 6 u, for any loss on top.

The outputs of every operator: (logps, lse, ref_logps, ref_lse, kl), each [N] in the accumulation dtype; those that were not asked
for are empty. Rows with `ignore_index` give 0 and no gradient.
"""

import torch
from torch import Tensor

from tisdpo.ops import backend as backends
from tisdpo.ops import fold, values
from tisdpo.ops.backend import accumulation_dtype
from tisdpo.ops.rows import GradientSums, Visits, heads, needs_no_logits, visit_rows
from tisdpo.ops.torch_fold import kept_rows

Statistics5 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _outputs(like: Tensor, rows: int, has_ref: bool, kl: str | None, fill) -> Statistics5:
    dtype = accumulation_dtype(like.dtype)
    sizes = (rows, rows, rows if has_ref else 0, rows if has_ref else 0, 0 if kl is None else rows)
    return tuple(fill(n, dtype=dtype, device=like.device) for n in sizes)


def _from_statistics(stats: fold.Statistics, like: Tensor) -> Statistics5:
    """The statistics of all rows as the outputs of an operator, which share no memory; an empty tensor for each that was not asked for."""
    nothing = torch.empty(0, dtype=accumulation_dtype(like.dtype), device=like.device)
    lse, logp, ref_lse, ref_logp, kl = stats[:5]
    return tuple((nothing if x is None else x).clone() for x in (logp, lse, ref_logp, ref_lse, kl))


def _scatter(outputs: Statistics5, place, stats: fold.Statistics) -> None:
    for out, value in zip(outputs, (stats.logp, stats.lse, stats.ref_logp, stats.ref_lse, stats.kl)):
        if value is not None:
            out[place] = value


def _gathered(saved: Statistics5, place) -> fold.Statistics:
    logp, lse, ref_logp, ref_lse, kl = (None if not s.numel() else s[place] for s in saved)
    return fold.Statistics(lse, logp, ref_lse, ref_logp, kl)


# From logits


@torch.library.custom_op("tisdpo::token_stats", mutates_args=())
def token_stats(
    logits: Tensor,
    target: Tensor,
    ref_logits: Tensor | None,
    kl: str | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    overwrite_logits: bool,
    backend: str,
) -> Statistics5:
    """logits [N, V] or [B, T, V] (any strides), target [N], ref_logits as logits -> (logps, lse, ref_logps, ref_lse, kl), [N] each."""
    values.target(target, logits.shape[-1], ignore_index)
    folds = _folds(logits, kl, logit_scale, softcap, temperature, backend)
    stats = folds.statistics(logits, _marked(target, ignore_index), ref_logits)
    return _from_statistics(stats, logits)


@token_stats.register_fake
def _(logits, target, ref_logits, kl, logit_scale, softcap, temperature, ignore_index, overwrite_logits, backend):
    return _outputs(logits, target.shape[0], ref_logits is not None, kl, torch.empty)


@torch.library.custom_op("tisdpo::token_stats_backward", mutates_args=())
def token_stats_backward(
    g_logps: Tensor | None, g_kl: Tensor | None, logits: Tensor, target: Tensor, ref_logits: Tensor | None, stats: list[Tensor],
    kl: str | None, logit_scale: float, softcap: float | None, temperature: float, ignore_index: int, backend: str,
) -> Tensor:  # fmt: skip
    """Gradient with respect to the logits, in their shape and dtype."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    folds = _folds(logits, kl, logit_scale, softcap, temperature, backend)
    g_logps, g_kl = _upstream(g_logps, g_kl, stats, kl)
    return folds.gradient(logits, _marked(target, ignore_index), ref_logits, _gathered(stats, slice(None)), g_logps, g_kl, out=grad)


@token_stats_backward.register_fake
def _(g_logps, g_kl, logits, target, ref_logits, stats, kl, logit_scale, softcap, temperature, ignore_index, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("tisdpo::token_stats_backward_", mutates_args=("logits",))
def token_stats_backward_(
    g_logps: Tensor | None, g_kl: Tensor | None, logits: Tensor, target: Tensor, ref_logits: Tensor | None, stats: list[Tensor],
    kl: str | None, logit_scale: float, softcap: float | None, temperature: float, ignore_index: int, backend: str,
) -> None:  # fmt: skip
    """The same, written over the logits."""
    folds = _folds(logits, kl, logit_scale, softcap, temperature, backend)
    g_logps, g_kl = _upstream(g_logps, g_kl, stats, kl)
    folds.gradient(logits, _marked(target, ignore_index), ref_logits, _gathered(stats, slice(None)), g_logps, g_kl)


def _folds(logits, kl, logit_scale, softcap, temperature, backend) -> fold.Fold:
    name = backends.resolve(backend, logits.device.type, logits.dtype)
    return fold.Fold(name, kl, fold.Transform(logit_scale, softcap, temperature), ignored=True)


def _marked(target: Tensor, ignore_index: int) -> Tensor:
    """Targets with -1 where they are ignored, as the folds want them."""
    return target if ignore_index == values.NOTHING else torch.where(target == ignore_index, -1, target)


def _upstream(g_logps, g_kl, stats, kl):
    """Upstream gradients as [N] tensors; those autograd left out are zero."""
    like = stats[0]
    g_logps = torch.zeros_like(like) if g_logps is None else g_logps
    if kl is None:
        return g_logps, None
    return g_logps, torch.zeros_like(like) if g_kl is None else g_kl


def _setup_token_stats(ctx, inputs, output):
    logits, target, ref_logits, *options, ctx.overwrite, backend = inputs
    ctx.options = (*options, backend)
    if ctx.options[0] is None:
        ref_logits = None  # log-probs of the reference are constants: nothing reads its logits any more
    ctx.mark_non_differentiable(output[1], output[2], output[3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, ref_logits, *output)


def _backward_token_stats(ctx, g_logps, g_lse, g_ref_logps, g_ref_lse, g_kl):
    logits, target, ref_logits, *stats = ctx.saved_tensors
    nothing = [None] * (3 + len(ctx.options))
    if ctx.overwrite and not torch.compiler.is_compiling():
        token_stats_backward_(g_logps, g_kl, logits, target, ref_logits, stats, *ctx.options)
        return logits, *nothing
    return token_stats_backward(g_logps, g_kl, logits, target, ref_logits, stats, *ctx.options), *nothing


token_stats.register_autograd(_backward_token_stats, setup_context=_setup_token_stats)


# From hidden states


@backends.operator("tisdpo::linear_token_stats")
def linear_token_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None,
    kl: str | None, logit_scale: float, softcap: float | None, temperature: float, ignore_index: int, backend: str,
) -> Statistics5:  # fmt: skip
    """hidden [N, H], weight [V, H], bias [V], target [N] (and the same of the reference) -> (logps, lse, ref_logps, ref_lse, kl)."""
    values.target(target, len(weight), ignore_index)
    outputs = _outputs(hidden, len(target), ref_hidden is not None, kl, torch.zeros)
    index = None if ignore_index == values.NOTHING else kept_rows(target != ignore_index)
    options = (index, kl, (logit_scale, softcap, temperature), backend)
    visits, ranges = _visits(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *options)
    for a, b in ranges:
        place = _place(index, a, b)
        _scatter(outputs, place, visits.visit(a, b, target[place])[0])
    return outputs


@linear_token_stats.register_fake
def _(hidden, weight, bias, target, ref_hidden, ref_weight, ref_bias, kl, logit_scale, softcap, temperature, ignore_index, backend):
    return _outputs(hidden, target.shape[0], ref_hidden is not None, kl, torch.empty)


@backends.operator("tisdpo::linear_token_stats_backward")
def linear_token_stats_backward(
    g_logps: Tensor | None, g_kl: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, stats: list[Tensor],
    kl: str | None, logit_scale: float, softcap: float | None, temperature: float, ignore_index: int, backend: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden [N, H], weight [V, H], bias [V]; those not in `needs` are empty."""
    index = None if ignore_index == values.NOTHING else kept_rows(target != ignore_index)
    g_logps, g_kl = _upstream(g_logps, g_kl, stats, kl)
    options = (index, kl, (logit_scale, softcap, temperature), backend)
    visits, ranges = _visits(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *options, needs)
    sums, d = visits.grads, None
    for a, b in ranges:
        place = _place(index, a, b)
        g = None if kl is None else g_kl[place]
        found, d = visits.visit(a, b, target[place], g, g_logp=g_logps[place], wanted=True, stats=_gathered(stats, place))
        coefficient = torch.ones_like(g_logps[place]) if found.factor is None else found.factor
        if sums.later:
            sums.hold(a, b, d)
            sums.scale(a, b, coefficient)
        else:
            sums.add(a, b, d, coefficient)
    del visits, d  # and with them logits or D: what follows needs memory of its own
    return sums.result()


@linear_token_stats_backward.register_fake
def _(
    g_logps, g_kl, hidden, weight, bias, target, ref_hidden, ref_weight, ref_bias, stats,
    kl, logit_scale, softcap, temperature, ignore_index, backend, needs,
):  # fmt: skip
    return gradient_shapes(hidden, weight, needs)


def gradient_shapes(hidden: Tensor, weight: Tensor, needs) -> tuple[Tensor, Tensor, Tensor]:
    """Fake gradients of hidden, weight and bias; an empty tensor for each that is not needed."""
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        weight.new_empty(weight.shape if needs[1] else (0,)),
        weight.new_empty((weight.shape[0],) if needs[2] else (0,)),
    )


def _visits(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, index, kl, transform, backend, needs=None):
    """Visits of the rows that carry loss, and their ranges (a, b). needs: which gradients; None: none."""
    policy, reference = heads(hidden, weight, ref_hidden, ref_weight, index)
    name = backends.resolve(backend, hidden.device.type, hidden.dtype)
    folds = fold.Fold(name, kl, fold.Transform(*transform), bias, ref_bias)
    no_logits = needs_no_logits(policy, reference, folds)
    models = 1 if reference is None or (no_logits and kl is None) else 2
    most = policy.chunk_rows(models, True, no_logits)
    grads = None if needs is None else GradientSums(policy, tuple(needs), most, by_columns=name == "triton")
    ranges = policy.ranges(0, len(hidden) if index is None else len(index), visit_rows(policy, models, no_logits, grads))
    rows = max((b - a for a, b in ranges), default=0)
    return Visits(policy, reference, folds, no_logits, grads, rows), ranges


def _place(index: Tensor | None, a: int, b: int):
    """The rows a..b of those that carry loss among all."""
    return slice(a, b) if index is None else index[a:b]


def _setup_linear_token_stats(ctx, inputs, output):
    *tensors, kl, logit_scale, softcap, temperature, ignore_index, backend = inputs
    if kl is None:
        tensors = [*tensors[:4], None, None, None]  # the reference's log-probs are constants: nothing reads its hidden states any more
    ctx.options = (kl, logit_scale, softcap, temperature, ignore_index, backend)
    ctx.mark_non_differentiable(output[1], output[2], output[3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward_linear_token_stats(ctx, g_logps, g_lse, g_ref_logps, g_ref_lse, g_kl):
    saved = ctx.saved_tensors
    tensors, stats = saved[:7], list(saved[7:])
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    grads = linear_token_stats_backward(g_logps, g_kl, *tensors, stats, *ctx.options, needs)
    grads = [g if need else None for g, need in zip(grads, needs)]
    return *grads, None, None, None, None, *[None] * len(ctx.options)


linear_token_stats.register_autograd(_backward_linear_token_stats, setup_context=_setup_linear_token_stats)
