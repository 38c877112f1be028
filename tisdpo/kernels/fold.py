"""Triton kernels of the two folds over rows of logits: statistics in one read, gradient in place.

One row of V logits, `item` bytes each (float32 from the head's product: 4). u = 2 N H V FLOP is one head-sized matrix product.

    kernel                        bytes a logit                    exponentials a logit
    statistics, one model         item                             1
    statistics, two models        2 item                           2
    gradient, one model           item + size of D (2 or 4)        1
    gradient, two models, KL      2 item + size of D               1 ("reverse"), 2 ("forward")
    combine                       0 (some tens a row)              0

Floor: bytes / memory bandwidth. At 4.3 TB/s, float32 logits and a 16-bit D, 8192 rows of 128256: 1.0 ms for the statistics, 1.5 ms for the
gradient (with KL 2.0 and 2.4 ms), beside 33 ms of three matrix products at 790 TFLOP/s. An H200 has some 3.6e12 exponentials a second: one
a logit takes 0.3 ms and hides behind the loads. Measured on an H200: 1.0 and 1.6 ms, with KL 2.0 and 2.5, which is 94 to 99 % of the
speed of a copy (benchmarks/NOTES.md, 2026-11-27).

A row is walked by one program, or, where rows are few, by several, each over a contiguous span of the vocabulary (`configs.splits`).
Every program leaves five partial results, which a second kernel combines in a fixed order: no atomics, the same bits every time.

Rows with a negative target are ignored: statistics 0, gradient 0. All offsets are int64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tisdpo.kernels import configs
from tisdpo.kernels.launch import FUSED, on, some

NONE, REVERSE, FORWARD = 0, 1, 2
_KL = {None: NONE, "reverse": REVERSE, "forward": FORWARD}


@triton.jit
def _tanh(x, EXACT: tl.constexpr = True):
    # exp(2x) overflows to inf for large x, and 1 - 2 / inf = 1 is right
    y = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    if EXACT:  # near 0 that loses digits, and a large cap multiplies what is lost: the polynomial of csrc/fold_kernels.h
        s = x * x
        p = ((2.06390887954e-2 - 5.70498872745e-3 * s) * s - 5.37397155531e-2) * s + 1.33314422036e-1
        y = tl.where(tl.abs(x) < 0.625, x + x * (s * (p * s - 3.33332819422e-1)), y)
    return y


@triton.jit
def _row(row, z_ptr, stride_outer, stride_inner, INNER):
    """Start of a row: rows are numbered through two dimensions, so that a slice of padded [B, T, V] logits needs no copy."""
    return z_ptr + (row // INNER) * stride_outer + (row % INNER) * stride_inner


@triton.jit
def _load_logits(row_ptr, offs, mask, bias_ptr, inner, outer, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """softcap(logit_scale * (raw + bias)) / temperature; -inf outside the mask."""
    z = tl.load(row_ptr + offs, mask=mask, other=-float("inf")).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if SOFTCAP:
        z = tl.where(mask, outer * _tanh(inner * z), -float("inf"))
    else:
        z = z * inner
    return z


@triton.jit
def _finite(m):
    """The maximum that is subtracted: 0 where everything so far was -inf, so that -inf - m stays -inf."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def statistics_kernel(
    z_ptr, q_ptr, target_ptr, bias_ptr, ref_bias_ptr, partial_ptr,
    rows, vocabulary, span, inner_rows, z_outer, z_inner, q_outer, q_inner,
    inner, outer,
    HAS_REF: tl.constexpr, KL: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial results of a row over one span of the vocabulary: max m and sum s of exp(z - m); the same of the reference; and
    t = sum e^(z-m) ((z - m) - (q - mq)) for reverse KL, with the models exchanged for forward KL. partial [5, splits, rows]."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    if tl.load(target_ptr + row) >= 0:
        z_row = _row(row, z_ptr, z_outer, z_inner, inner_rows)
        q_row = _row(row, q_ptr, q_outer, q_inner, inner_rows)
        begin = split * span
        end = tl.minimum(begin + span, vocabulary)
        m = tl.full((), -float("inf"), tl.float32)
        mq = tl.full((), -float("inf"), tl.float32)
        s = tl.zeros((), tl.float32)
        sq = tl.zeros((), tl.float32)
        t = tl.zeros((), tl.float32)
        for start in range(begin, end, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < vocabulary
            z = _load_logits(z_row, offs, mask, bias_ptr, inner, outer, SOFTCAP, HAS_BIAS)
            new = tl.maximum(m, tl.max(z, 0))
            shift = _finite(new)
            shrink = tl.exp(m - shift)
            z = z - shift
            p = tl.exp(z)
            if HAS_REF:
                q = _load_logits(q_row, offs, mask, ref_bias_ptr, inner, outer, SOFTCAP, HAS_REF_BIAS)
                new_q = tl.maximum(mq, tl.max(q, 0))
                shift_q = _finite(new_q)
                shrink_q = tl.exp(mq - shift_q)
                q = q - shift_q
                e = tl.exp(q)
                # the sums so far, seen from the new maxima
                if KL == 1:
                    moved = (_finite(m) - shift) - (_finite(mq) - shift_q)
                    t = shrink * (t + s * moved) + tl.sum(tl.where(p > 0.0, p * (z - q), 0.0), 0)
                if KL == 2:
                    moved = (_finite(mq) - shift_q) - (_finite(m) - shift)
                    t = shrink_q * (t + sq * moved) + tl.sum(tl.where(e > 0.0, e * (q - z), 0.0), 0)
                sq = sq * shrink_q + tl.sum(e, 0)
                mq = new_q
            s = s * shrink + tl.sum(p, 0)
            m = new
        place = partial_ptr + split * rows + row
        plane = tl.num_programs(1).to(tl.int64) * rows
        tl.store(place, m)
        tl.store(place + plane, s)
        if HAS_REF:
            tl.store(place + 2 * plane, mq)
            tl.store(place + 3 * plane, sq)
            if KL != 0:
                tl.store(place + 4 * plane, t)


@triton.jit
def combine_kernel(
    z_ptr, q_ptr, target_ptr, bias_ptr, ref_bias_ptr, partial_ptr, out_ptr,
    rows, splits, inner_rows, z_outer, z_inner, q_outer, q_inner,
    inner, outer,
    HAS_REF: tl.constexpr, KL: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Partial results -> out [5, rows]: lse, logp, reference lse, reference logp, KL. SPLITS >= splits is a power of two."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    target = tl.load(target_ptr + row, mask=inside, other=-1)
    kept = target >= 0
    split = tl.arange(0, SPLITS).to(tl.int64)
    where = split[None, :] * rows + row[:, None]
    mask = kept[:, None] & (split < splits)[None, :]
    plane = tl.cast(splits, tl.int64) * rows  # splits may be 1, which is then no tensor
    m_parts = tl.load(partial_ptr + where, mask=mask, other=-float("inf"))
    s_parts = tl.load(partial_ptr + plane + where, mask=mask, other=0.0)
    m = _finite(tl.max(m_parts, 1))
    shrink = tl.exp(m_parts - m[:, None])
    log_s = tl.log(tl.where(kept, tl.sum(s_parts * shrink, 1), 1.0))
    z = _load_logits(_row(row, z_ptr, z_outer, z_inner, inner_rows), target, kept, bias_ptr, inner, outer, SOFTCAP, HAS_BIAS)
    tl.store(out_ptr + row, tl.where(kept, m + log_s, 0.0), mask=inside)
    tl.store(out_ptr + rows + row, tl.where(kept, (z - m) - log_s, 0.0), mask=inside)
    if HAS_REF:
        mq_parts = tl.load(partial_ptr + 2 * plane + where, mask=mask, other=-float("inf"))
        sq_parts = tl.load(partial_ptr + 3 * plane + where, mask=mask, other=0.0)
        mq = _finite(tl.max(mq_parts, 1))
        shrink_q = tl.exp(mq_parts - mq[:, None])
        log_sq = tl.log(tl.where(kept, tl.sum(sq_parts * shrink_q, 1), 1.0))
        q = _load_logits(_row(row, q_ptr, q_outer, q_inner, inner_rows), target, kept, ref_bias_ptr, inner, outer, SOFTCAP, HAS_REF_BIAS)
        tl.store(out_ptr + 2 * rows + row, tl.where(kept, mq + log_sq, 0.0), mask=inside)
        tl.store(out_ptr + 3 * rows + row, tl.where(kept, (q - mq) - log_sq, 0.0), mask=inside)
        if KL != 0:
            t_parts = tl.load(partial_ptr + 4 * plane + where, mask=mask, other=0.0)
            moved = (_finite(m_parts) - m[:, None]) - (_finite(mq_parts) - mq[:, None])
            if KL == 1:
                t = tl.sum(shrink * (t_parts + s_parts * moved), 1)
                kl = t / tl.exp(log_s) - log_s + log_sq
            else:
                t = tl.sum(shrink_q * (t_parts - sq_parts * moved), 1)
                kl = t / tl.exp(log_sq) - log_sq + log_s
            tl.store(out_ptr + 4 * rows + row, tl.where(kept, kl, 0.0), mask=inside)


@triton.jit
def gradient_kernel(
    z_ptr, q_ptr, d_ptr, target_ptr, bias_ptr, ref_bias_ptr, lse_ptr, ref_lse_ptr, kl_ptr, g_logp_ptr, g_kl_ptr,
    vocabulary, first, span, inner_rows, z_outer, z_inner, q_outer, q_inner, d_outer, d_inner,
    inner, outer,
    KL: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, HAS_G: tl.constexpr,
    NARROW_IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """D = d(g_logp * logp + g_kl * KL) / d raw logits of a row, over one span of the vocabulary, or of its columns from `first` on.

    D may lie over z. With NARROW_IN_PLACE its items are smaller than those of z and share the start of the row: a block then writes where
    only blocks before it, and the block itself, were read. So all of a block is read before any of it is written (a barrier), and one
    program walks the whole row.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * span
    end = tl.minimum(begin + span, vocabulary)
    target = tl.load(target_ptr + row)
    kept = target >= 0
    readable = tl.where(kept, vocabulary, 0)
    z_row = _row(row, z_ptr, z_outer, z_inner, inner_rows)
    q_row = _row(row, q_ptr, q_outer, q_inner, inner_rows)
    d_row = _row(row, d_ptr, d_outer, d_inner, inner_rows)
    lse = tl.load(lse_ptr + row)
    g = 1.0
    if HAS_G:
        g = tl.load(g_logp_ptr + row)
    factor = -g
    g_kl = 0.0
    lse_q = 0.0
    if KL != 0:
        g_kl = tl.load(g_kl_ptr + row)
        lse_q = tl.load(ref_lse_ptr + row)
        if KL == 1:
            factor -= g_kl * (lse - lse_q + tl.load(kl_ptr + row))
        else:
            factor += g_kl
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < readable
        raw = tl.load(z_row + offs, mask=mask, other=-float("inf")).to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if SOFTCAP:
            bent = _tanh(inner * raw)
            z = outer * bent
            slope = outer * inner * (1.0 - bent * bent)
        else:
            z = raw * inner
            slope = inner
        p = tl.exp(z - lse)
        if KL == 0:
            d = p * factor
        else:
            q = _load_logits(q_row, offs, mask, ref_bias_ptr, inner, outer, SOFTCAP, HAS_REF_BIAS)
            if KL == 1:
                d = p * tl.where(p > 0.0, g_kl * (z - q) + factor, 0.0)  # what is no number stays none
            else:
                d = p * factor - g_kl * tl.exp(q - lse_q)
        d = tl.where(offs == target - first, d + g, d) * slope
        d = tl.where(kept, d, 0.0)
        if NARROW_IN_PLACE:
            tl.debug_barrier()
        tl.store(d_row + offs, d.to(d_ptr.dtype.element_ty), mask=offs < vocabulary)


def statistics(
    z: Tensor, target: Tensor, ref_z: Tensor | None, bias: Tensor | None, ref_bias: Tensor | None, ignored: bool,
    kl: str | None, logit_scale: float, softcap: float | None, temperature: float, *, tile: configs.Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(lse, logp, reference lse, reference logp, KL), float32 [n] each, of raw logits z [n, V] or [B, T, V] (n = B T; any strides, but 1 in
    the last dimension) in float32 or 16 bits; target [n]. Negative targets are ignored whatever `ignored` says."""
    rows, vocabulary = target.numel(), z.shape[-1]
    out = torch.empty(5, rows, dtype=torch.float32, device=z.device)
    if rows:
        tile = tile or configs.tile("statistics", z.device)
        splits, span = configs.splits(rows, vocabulary, tile)
        partial = torch.empty(5, splits, rows, dtype=torch.float32, device=z.device)
        inner, outer = transform(logit_scale, softcap, temperature)
        q = z if ref_z is None else ref_z
        shared = (z, q, target.contiguous(), some(bias, z), some(ref_bias, z), partial)
        strides = (*_rows(z), *_rows(q)[1:])
        flags = dict(
            HAS_REF=ref_z is not None, KL=_KL[kl], SOFTCAP=softcap is not None, HAS_BIAS=bias is not None,
            HAS_REF_BIAS=ref_bias is not None,
        )  # fmt: skip
        with on(z.device):
            statistics_kernel[(rows, splits)](
                *shared, rows, vocabulary, span, *strides, inner, outer, **flags, BLOCK=tile.block, num_warps=tile.warps, **FUSED
            )
            width = max(2, triton.next_power_of_2(splits))
            per_program = max(1, 256 // width)
            combine_kernel[(triton.cdiv(rows, per_program),)](
                *shared, out, rows, splits, *strides, inner, outer, **flags, ROWS=per_program, SPLITS=width, num_warps=4, **FUSED
            )
    has_ref = ref_z is not None
    return out[0], out[1], out[2] if has_ref else None, out[3] if has_ref else None, out[4] if kl else None


def gradient(
    z: Tensor, target: Tensor, ref_z: Tensor | None, stats: tuple[Tensor | None, ...], g_logp: Tensor | None, g_kl: Tensor | None,
    bias: Tensor | None, ref_bias: Tensor | None, ignored: bool,
    kl: str | None, logit_scale: float, softcap: float | None, temperature: float,
    *, out: Tensor | None = None, dtype: torch.dtype | None = None, columns: tuple[int, int] | None = None,
    tile: configs.Tile | None = None,
) -> Tensor:  # fmt: skip
    """The derivative of sum(g_logp * logp + g_kl * KL) with respect to raw logits z, from `stats` as `statistics` returned them.

    Written to `out` (shape of z) or, without it, over z: as items of `dtype` (default: that of z), which then lie at the start of each row;
    the result is a view of z's memory. Where rows are so few that most of the device would idle and `dtype` is narrower, several programs
    share a row and a new tensor is made. columns: (first, last) of the vocabulary, written to `out` [n, last - first].
    """
    first, last = columns or (0, z.shape[-1])
    if columns is not None:
        z, ref_z, bias, ref_bias = (None if x is None else x[..., first:last] for x in (z, ref_z, bias, ref_bias))
    rows, vocabulary = target.numel(), z.shape[-1]
    dtype = dtype or z.dtype
    tile = tile or configs.tile("gradient", z.device)
    narrow = out is None and dtype.itemsize < z.dtype.itemsize
    # one program a row needs no memory for D; only where it would leave most of the device idle is that bought by a second tensor
    splits, span = configs.splits(rows if not narrow else configs.OCCUPIED * rows, vocabulary, tile)
    if narrow and splits > 1:
        splits, span = configs.splits(rows, vocabulary, tile)
        out, narrow = torch.empty(z.shape, dtype=dtype, device=z.device), False
    elif out is None:
        out = _reinterpreted(z, dtype)
    if not rows:
        return out
    inner, outer = transform(logit_scale, softcap, temperature)
    lse, _, ref_lse, _, divergence = stats
    q, any_ = z if kl is None else ref_z, lse  # a pointer for what a variant of the kernel does not read
    with on(z.device):
        gradient_kernel[(rows, splits)](
            z, q, out, target.contiguous(), some(bias, z), some(ref_bias, z), lse.contiguous(), some(ref_lse, any_),
            some(divergence, any_), some(g_logp, any_), some(g_kl, any_),
            vocabulary, first, span, *_rows(z), *_rows(q)[1:], *_rows(out)[1:], inner, outer,
            KL=_KL[kl], SOFTCAP=softcap is not None, HAS_BIAS=bias is not None, HAS_REF_BIAS=ref_bias is not None,
            HAS_G=g_logp is not None, NARROW_IN_PLACE=narrow, BLOCK=tile.block, num_warps=tile.warps, **FUSED,
        )  # fmt: skip
    return out


def transform(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float, float]:
    """z = inner * raw, or with soft-capping z = outer * tanh(inner * raw)."""
    return (logit_scale / temperature, 1.0) if softcap is None else (logit_scale / softcap, softcap / temperature)


def _rows(x: Tensor) -> tuple[int, int, int]:
    """(rows of the inner dimension, stride of the outer one, stride of the inner one) of [n, V] or [B, T, V]."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"the logits of a row must lie next to each other, got strides {x.stride()}")
    return (x.shape[0], 0, x.stride(0)) if x.dim() == 2 else (x.shape[1], x.stride(0), x.stride(1))


def _reinterpreted(z: Tensor, dtype: torch.dtype) -> Tensor:
    """z's memory as items of `dtype`, of which the first V of each row count."""
    if dtype == z.dtype:
        return z
    return z.view(dtype)[..., : z.shape[-1]]
