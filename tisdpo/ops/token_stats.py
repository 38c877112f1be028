"""Per-token log-probs and KL as registered operators: from logits, and from hidden states for any loss on top.

From hidden states there are three ways, in head-sized products (u = 2 N H V FLOP) a reference's logits included with KL:

    two passes    4 u, with KL 6 u    the forward keeps [N] statistics, the backward makes every logit again (`rows.Visits`)
    waiting       3 u                 a trained head, no KL, H / 2 to H rows, of bfloat16 to 2 H (`products.WaitingRows`): D = dlogp/dlogits
                                      of the forward waits in the memory of dWeight, which the second of two passes would take
                                      (of a large float32 head a slice of it waits beside)
    slopes        2 u, with KL 4 u    a frozen head (LoRA): a token's log-prob depends on no other token's hidden state, so the forward
                                      makes dlogp_t/dhidden_t [N, H], in the accumulation dtype, and with KL dKL_t/dhidden_t

In the last two what comes from upstream is one factor a row, and the logits are gone when the forward ends. Float16 takes two passes: what
a GradScaler makes of the upstream gradient has to be in D before that is rounded.

The outputs of every operator: (logps, lse, ref_logps, ref_lse, kl), each [N] in the accumulation dtype; those that were not asked
for are empty. Rows with `ignore_index` give 0 and no gradient.
"""

import torch
from torch import Tensor

from tisdpo.ops import backend as backends
from tisdpo.ops import fold, one_pass, products, values
from tisdpo.ops.backend import accumulation_dtype
from tisdpo.ops.loss_rows import refuse_in_graph
from tisdpo.ops.rows import HIDDEN_ROWS, GradientSums, HeadRows, Visits, heads, needs_no_logits, row_ranges, visit_rows
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


def for_backward(output: Statistics5, kl: str | None) -> tuple[Tensor, ...]:
    """What the gradient of some outputs reads of them: lse, and with KL ref_lse and kl. Never what the caller has in hand and may edit."""
    return (output[1],) if kl is None else (output[1], output[3], output[4].clone())


def _gathered(saved: tuple[Tensor, ...], place) -> fold.Statistics:
    """Rows of `for_backward`; nothing needs the log-probs again."""
    lse, *of_kl = (x[place] for x in saved)
    ref_lse, divergence = of_kl or (None, None)
    return fold.Statistics(lse, lse, ref_lse, ref_lse, divergence)


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
    """Gradient with respect to the logits, in their shape and dtype; stats: `for_backward` of the forward's outputs."""
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
    ctx.save_for_backward(logits, target, ref_logits, *for_backward(output, ctx.options[0]))


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
    with_slopes: bool, waiting: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """hidden [N, H], weight [V, H], bias [V], target [N] (and the same of the reference) -> (logps, lse, ref_logps, ref_lse, kl) and three
    that are for the backward, or empty: with_slopes: dlogp_t/dhidden_t, dKL_t/dhidden_t [N, H], nothing; waiting (see `waiting_sizes`,
    None: D does not wait): the two memories of D, its factors [N]."""
    values.target(target, len(weight), ignore_index)
    outputs = _outputs(hidden, len(target), ref_hidden is not None, kl, torch.zeros)
    index = kept_index(target, ignore_index, None if waiting is None else waiting[0])
    options = (index, kl, (logit_scale, softcap, temperature), backend)
    memory = None if waiting is None else products.WaitingRows(weight, waiting[0])
    visits, ranges = visits_of_rows(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *options, apart=with_slopes, waiting=memory)
    slopes = [] if not with_slopes else [visits.grads] if kl is None else [visits.grads, _slopes(visits.policy)]
    factors = outputs[0].new_zeros(len(target))
    for a, b in ranges:
        rows = place(index, a, b)
        found, *derivatives = visits.visit_apart(a, b, target[rows]) if visits.grads else visits.visit(a, b, target[rows])
        ones = torch.ones_like(found.lse)
        for sums, d in zip(slopes, derivatives):
            sums.add(a, b, d, found.scaled(ones))
        if memory:
            factors[rows] = found.scaled(ones)
        _scatter(outputs, rows, found)
    later = [memory.result, memory.others, factors] if memory else [x.hidden for x in slopes]
    return *outputs, *later, *(outputs[0].new_empty(0) for _ in range(3 - len(later)))


@linear_token_stats.register_fake
def _(
    hidden, weight, bias, target, ref_hidden, ref_weight, ref_bias,
    kl, logit_scale, softcap, temperature, ignore_index, backend, with_slopes, waiting,
):  # fmt: skip
    outputs = _outputs(hidden, target.shape[0], ref_hidden is not None, kl, torch.empty)
    make = outputs[0].new_empty
    if waiting is not None:
        return *outputs, weight.new_empty(weight.shape), weight.new_empty(waiting), make(target.shape[0])
    return *outputs, make(hidden.shape if with_slopes else 0), make(hidden.shape if with_slopes and kl is not None else 0), make(0)


def waiting_sizes(weight: Tensor, target: Tensor, ignore_index: int) -> list[int] | None:
    """[rows that carry loss, columns of the vocabulary whose D waits beside dWeight], if D of a trained head waits; None: it does not.

    What waits takes the memory of a dWeight or more, so not for fewer rows than H / 2: then even several calls before one backward take no
    more than twice their logits in the dtype of the head, as in plain torch. Nor for a compiler's own tensors."""
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, torch.nn.Parameter):
        return None
    narrow, hidden_size = weight.dtype == torch.bfloat16, weight.shape[1]
    if not (products.WaitingRows.serves(weight, 0) if narrow else weight.dtype == torch.float32):
        return None
    rows = len(target)
    if ignore_index != values.NOTHING:
        refuse_in_graph()
        rows = int((target != ignore_index).sum())
    if 2 * rows < hidden_size or not products.WaitingRows.few(rows, hidden_size, weight.dtype.itemsize):
        return None
    return [rows, products.WaitingRows.columns_beside(weight, rows)]


@backends.operator("tisdpo::waiting_gradients")
def waiting_gradients(
    g_logps: Tensor, inside: Tensor, beside: Tensor, factors: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias from a D that waits; those not in `needs` are empty."""
    return _of_waiting(g_logps, inside, beside, factors, hidden, weight, target, ignore_index, needs, torch.empty_like(inside))


@waiting_gradients.register_fake
def _(g_logps, inside, beside, factors, hidden, weight, target, ignore_index, needs):
    return gradient_shapes(hidden, weight, needs)


@backends.operator("tisdpo::waiting_gradients_", mutates=("inside",))
def waiting_gradients_(
    g_logps: Tensor, inside: Tensor, beside: Tensor, factors: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same of hidden and bias, and that of weight where D was."""
    found = _of_waiting(g_logps, inside, beside, factors, hidden, weight, target, ignore_index, needs, None)
    return found[0], found[2]


@waiting_gradients_.register_fake
def _(g_logps, inside, beside, factors, hidden, weight, target, ignore_index, needs):
    return gradient_shapes(hidden, weight, needs)[::2]


def _of_waiting(g_logps, inside, beside, factors, hidden, weight, target, ignore_index, needs, out):
    policy = HeadRows(hidden, weight, kept_index(target, ignore_index, len(beside)))
    sums = GradientSums(policy, tuple(needs), 0, waiting=products.WaitingRows(weight, len(beside), (inside, beside)))
    sums.hold(0, sums.count, None)
    sums.scale(0, sums.count, (g_logps * factors)[place(policy.index, 0, sums.count)])
    return sums.result(out)


@torch.library.custom_op("tisdpo::times_slopes", mutates_args=())
def times_slopes(
    g_logps: Tensor | None, g_kl: Tensor | None, of_logps: Tensor, of_kl: Tensor, target: Tensor, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """dHidden [N, H] in `dtype`: every row of the slopes times what comes from upstream, [N]."""
    result = torch.empty(of_logps.shape, dtype=dtype, device=of_logps.device)
    parts = [(g, slopes) for g, slopes in ((g_logps, of_logps), (g_kl, of_kl)) if g is not None]
    if ignore_index != values.NOTHING:  # 0 times what is not a number would be none
        parts = [(g.masked_fill(target == ignore_index, 0), slopes) for g, slopes in parts]
    for a, b in row_ranges(0, len(result), HIDDEN_ROWS):
        result[a:b] = sum(g[a:b, None] * slopes[a:b] for g, slopes in parts)
    return result


@times_slopes.register_fake
def _(g_logps, g_kl, of_logps, of_kl, target, ignore_index, dtype):
    return of_logps.new_empty(of_logps.shape, dtype=dtype)


@backends.operator("tisdpo::linear_token_stats_backward")
def linear_token_stats_backward(
    g_logps: Tensor | None, g_kl: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, stats: list[Tensor],
    kl: str | None, logit_scale: float, softcap: float | None, temperature: float, ignore_index: int, backend: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden [N, H], weight [V, H], bias [V]; those not in `needs` are empty."""
    index = kept_index(target, ignore_index)
    g_logps, g_kl = _upstream(g_logps, g_kl, stats, kl)
    options = (index, kl, (logit_scale, softcap, temperature), backend)
    visits, ranges = visits_of_rows(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *options, needs)
    sums, d = visits.grads, None
    for a, b in ranges:
        rows = place(index, a, b)
        g = None if kl is None else g_kl[rows]
        found, d = visits.visit(a, b, target[rows], g, g_logp=g_logps[rows], wanted=True, stats=_gathered(stats, rows))
        sums.add(a, b, d, found.scaled(torch.ones_like(found.lse)))
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


def _slopes(policy) -> GradientSums:
    return GradientSums(policy, (True, False, False), len(policy.hidden), wide=True)


def visits_of_rows(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, index, kl, transform, backend, needs=None, apart=False, waiting=None
):
    """Visits of the rows that carry loss, and their ranges (a, b). For whom D is: the gradients that are needed, the slopes (`apart`),
    where it is to wait (`waiting`), or nobody."""
    policy, reference = heads(hidden, weight, ref_hidden, ref_weight, index)
    name = backends.resolve(backend, hidden.device.type, hidden.dtype)
    folds = fold.Fold(name, kl, fold.Transform(*transform), bias, ref_bias)
    no_logits, models = needs_no_logits(policy, reference, folds), 1 if reference is None else 2
    most = policy.chunk_rows(models, True, no_logits)
    if apart:
        grads = _slopes(policy)
    elif waiting is not None:
        grads = GradientSums(policy, (False, True, False), 0, waiting=waiting)
    else:
        grads = None if needs is None else GradientSums(policy, tuple(needs), most)
    rows = visit_rows(policy, models, no_logits, grads)
    if apart and kl is not None:
        rows = max(1, 2 * rows // 3)  # D of the log-probs beside two models' logits
    ranges = policy.ranges(0, len(hidden) if index is None else len(index), rows)
    rows = max((b - a for a, b in ranges), default=0)
    return Visits(policy, reference, folds, no_logits, grads, rows, apart=apart), ranges


def kept_index(target: Tensor, ignore_index: int, rows: int | None = None) -> Tensor | None:
    """Index of the rows that carry loss, None where that is all of them. rows: how many, if the host knows; else it waits to learn it."""
    if ignore_index == values.NOTHING or rows == len(target):
        return None
    if rows is not None:
        return torch.nonzero_static(target != ignore_index, size=rows)[:, 0]
    refuse_in_graph()
    return kept_rows(target != ignore_index)


def place(index: Tensor | None, a: int, b: int):
    """The rows a..b of those that carry loss among all."""
    return slice(a, b) if index is None else index[a:b]


def _setup_linear_token_stats(ctx, inputs, output):
    *tensors, kl, logit_scale, softcap, temperature, ignore_index, backend, ctx.with_slopes, waiting = inputs
    hidden, weight, _, target, *_ = tensors
    if kl is None:
        tensors = [*tensors[:4], None, None, None]  # the reference's log-probs are constants: nothing reads its hidden states any more
    ctx.options, ctx.waits = (kl, logit_scale, softcap, temperature, ignore_index, backend), waiting is not None
    ctx.dtype, ctx.inputs = hidden.dtype, len(inputs)
    ctx.mark_non_differentiable(*output[1:4], *output[5:])
    ctx.set_materialize_grads(False)
    if ctx.with_slopes:
        ctx.save_for_backward(*output[5:7], target)
    elif ctx.waits:
        ctx.save_for_backward(*output[5:], hidden, weight, target)
    else:
        ctx.save_for_backward(*tensors, *for_backward(output, kl))


def _backward_linear_token_stats(ctx, g_logps, g_lse, g_ref_logps, g_ref_lse, g_kl, *_):
    saved, ignore_index, nothing = ctx.saved_tensors, ctx.options[4], [None] * (ctx.inputs - 3)
    if ctx.with_slopes:
        g_kl = None if ctx.options[0] is None else g_kl
        return times_slopes(g_logps, g_kl, *saved, ignore_index, ctx.dtype), None, None, *nothing
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    if ctx.waits and g_logps is None:
        return None, None, None, *nothing
    if ctx.waits and one_pass.is_last_backward(g_logps) and not torch.is_grad_enabled():
        d_hidden, d_bias = waiting_gradients_(g_logps, *saved, ignore_index, needs)
        grads = d_hidden, saved[0], d_bias
    elif ctx.waits:
        grads = waiting_gradients(g_logps, *saved, ignore_index, needs)
    else:
        grads = linear_token_stats_backward(g_logps, g_kl, *saved[:7], list(saved[7:]), *ctx.options, needs)
    return *(g if need else None for g, need in zip(grads, needs)), *nothing


linear_token_stats.register_autograd(_backward_linear_token_stats, setup_context=_setup_linear_token_stats)
