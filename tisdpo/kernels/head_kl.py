"""Triton kernels of two heads without their logits: what `tisdpo.kernels.head` is without KL, with it.

With x and y the logits of policy and reference above those of the target, e = exp(x), f = exp(y), Z and Z' their sums:

    log p - log q = x - y - log Z + log Z'
    reverse KL    T / Z - log Z + log Z'       T = sum e (x - y)        forward KL    sum f (y - x) / Z' - log Z' + log Z

    D for g log p(target) + g_K KL, but at the target:
    reverse       (g_K r + (g_K (log Z' - log Z - KL) - g) e) / Z       r = e (x - y)
    forward       (g_K - g) e / Z - g_K r / Z'                          r = f

So a program makes the same tile of both products, writes e and r in the dtype of D and five partial results, and one more pass over e and r
puts them together once the sums are known.

One row of V logits, u = 2 N H V FLOP, two of them:

    kernel        bytes a logit                    exponentials a logit
    pair          4 (e and r of 16 bits), or 0     2
    finish        20 / 128                         0
    combine       6                                0

The folds (`tisdpo.kernels.fold`) move 26 bytes a logit for the same, with those that the products write.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tisdpo.kernels import configs
from tisdpo.kernels.fold import _KL, _finite, transform
from tisdpo.kernels.head import (
    FINISH_ROWS,
    FINISH_TILES,
    LOG2E,
    _above_target,
    _log_total,
    _own_shift,
    _product,
    _tile,
    descriptor,
    target_logits,
)
from tisdpo.kernels.launch import on, some


@triton.jit(do_not_specialize=["rows", "first", "begin", "tiles", "size"])
def pair_kernel(
    hidden_desc, weight_desc, ref_hidden_desc, ref_weight_desc, e_ptr, r_ptr, target_ptr, target_logit_ptr, bias_ptr, ref_bias_ptr,
    parts_ptr, rows, columns, first, begin, tiles, size, e_stride, r_stride, inner, outer,
    KL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_REF_BIAS: tl.constexpr, WRITE: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of e and r [rows, columns], of the vocabulary from `first` on, 0 at the target and in ignored rows (target logits of inf); and
    [5, tiles, rows], of which the launch writes the tiles from `begin` on: the sum of e and its shift beyond the target's logit, the same
    of f, and the partial T. target_logit [2, rows]."""
    down, across = _tile(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    q = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, size, DEPTH):
        z = _product(hidden_desc, weight_desc, z, down, across, k, WIDEN, ROWS, COLUMNS)
        q = _product(ref_hidden_desc, ref_weight_desc, q, down, across, k, WIDEN, ROWS, COLUMNS)
    row = down * ROWS + tl.arange(0, ROWS)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    target = tl.load(target_ptr + row, mask=row < rows, other=-1)
    shift = _finite(tl.load(target_logit_ptr + row, mask=row < rows, other=0.0))
    ref_shift = _finite(tl.load(target_logit_ptr + rows + row, mask=row < rows, other=0.0))
    x = _above_target(z, bias_ptr + first, column, columns, shift, inner, outer, False, HAS_BIAS)
    y = _above_target(q, ref_bias_ptr + first, column, columns, ref_shift, inner, outer, False, HAS_REF_BIAS)
    counted = (column < columns)[None, :] & (column[None, :] != (target - first).to(tl.int32)[:, None])
    x = tl.where(counted, x, -float("inf"))
    y = tl.where(counted, y, -float("inf"))
    over = _own_shift(x)
    ref_over = _own_shift(y)
    e = tl.exp2(x * LOG2E - (over * LOG2E)[:, None])
    f = tl.exp2(y * LOG2E - (ref_over * LOG2E)[:, None])
    if KL == 1:
        r = tl.where(e > 0.0, e * (x - y), 0.0)
        t = tl.sum(r, 1)
    else:
        r = f
        t = tl.sum(tl.where(f > 0.0, f * (y - x), 0.0), 1)
    place = parts_ptr + (begin + across).to(tl.int64) * rows + row
    plane = tl.cast(tiles, tl.int64) * rows
    tl.store(place, tl.sum(e, 1), mask=row < rows)
    tl.store(place + plane, over, mask=row < rows)
    tl.store(place + 2 * plane, tl.sum(f, 1), mask=row < rows)
    tl.store(place + 3 * plane, ref_over, mask=row < rows)
    tl.store(place + 4 * plane, t, mask=row < rows)
    if WRITE:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(e_ptr + row.to(tl.int64)[:, None] * e_stride + column[None, :], e.to(e_ptr.dtype.element_ty), mask=inside)
        tl.store(r_ptr + row.to(tl.int64)[:, None] * r_stride + column[None, :], r.to(r_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles"])
def finish_kernel(
    target_ptr, target_logit_ptr, parts_ptr, g_logp_ptr, g_kl_ptr, out_ptr, rows, tiles, slope,
    KL: tl.constexpr, HAS_G: tl.constexpr, WRITE: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Partial results of all tiles -> out [10, rows]: lse, logp, those of the reference, KL; and for `combine_kernel` the factors of e and
    r, the two shifts beyond the target's logit, D at the target."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    plane = tl.cast(tiles, tl.int64) * rows
    most = tl.zeros((ROWS,), tl.float32)
    ref_most = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES).to(tl.int64)
        mask = (tile < tiles)[:, None] & inside[None, :]
        where = parts_ptr + tile[:, None] * rows + row[None, :]
        most = tl.maximum(most, tl.max(tl.load(where + plane, mask=mask, other=0.0), 0))
        ref_most = tl.maximum(ref_most, tl.max(tl.load(where + 3 * plane, mask=mask, other=0.0), 0))
    others = tl.zeros((ROWS,), tl.float32)
    ref_others = tl.zeros((ROWS,), tl.float32)
    t = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES).to(tl.int64)
        mask = (tile < tiles)[:, None] & inside[None, :]
        where = parts_ptr + tile[:, None] * rows + row[None, :]
        scale = tl.exp(tl.load(where + plane, mask=mask, other=0.0) - most[None, :])
        ref_scale = tl.exp(tl.load(where + 3 * plane, mask=mask, other=0.0) - ref_most[None, :])
        others += tl.sum(tl.load(where, mask=mask, other=0.0) * scale, 0)
        ref_others += tl.sum(tl.load(where + 2 * plane, mask=mask, other=0.0) * ref_scale, 0)
        t += tl.sum(tl.load(where + 4 * plane, mask=mask, other=0.0) * (scale if KL == 1 else ref_scale), 0)
    kept = tl.load(target_ptr + row, mask=inside, other=-1) >= 0
    z = tl.load(target_logit_ptr + row, mask=inside, other=0.0)
    q = tl.load(target_logit_ptr + rows + row, mask=inside, other=0.0)
    shift = _finite(z)
    ref_shift = _finite(q)
    own, total, log_total = _log_total(z, most, others)
    ref_own, ref_total, ref_log_total = _log_total(q, ref_most, ref_others)
    log_total += most
    ref_log_total += ref_most
    if KL == 1:
        kl = t / total - log_total + ref_log_total
    else:
        kl = t / ref_total - ref_log_total + log_total
    tl.store(out_ptr + row, tl.where(kept, shift + log_total, 0.0), mask=inside)
    tl.store(out_ptr + rows + row, tl.where(kept, (z - shift) - log_total, 0.0), mask=inside)
    tl.store(out_ptr + 2 * rows + row, tl.where(kept, ref_shift + ref_log_total, 0.0), mask=inside)
    tl.store(out_ptr + 3 * rows + row, tl.where(kept, (q - ref_shift) - ref_log_total, 0.0), mask=inside)
    tl.store(out_ptr + 4 * rows + row, tl.where(kept, kl, 0.0), mask=inside)
    if WRITE:
        g = tl.full((ROWS,), 1.0, tl.float32)
        if HAS_G:
            g = tl.load(g_logp_ptr + row, mask=inside, other=0.0)
        g_kl = tl.load(g_kl_ptr + row, mask=inside, other=0.0)
        if KL == 1:
            level = g_kl * (ref_log_total - log_total - kl)
            of_e = (level - g) / total
            of_r = g_kl / total
            at_target = (g * others + level * own) / total
        else:
            of_e = (g_kl - g) / total
            of_r = -g_kl / ref_total
            at_target = g * others / total + g_kl * (own / total - ref_own / ref_total)
        tl.store(out_ptr + 5 * rows + row, tl.where(kept, of_e * slope, 0.0), mask=inside)
        tl.store(out_ptr + 6 * rows + row, tl.where(kept, of_r * slope, 0.0), mask=inside)
        tl.store(out_ptr + 7 * rows + row, most, mask=inside)
        tl.store(out_ptr + 8 * rows + row, ref_most, mask=inside)
        tl.store(out_ptr + 9 * rows + row, tl.where(kept, at_target * slope, 0.0), mask=inside)


@triton.jit(do_not_specialize=["rows", "first", "begin", "tiles"])
def combine_kernel(
    e_ptr, r_ptr, target_ptr, parts_ptr, out_ptr, rows, columns, first, begin, tiles, span, e_stride, r_stride,
    KL: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """D over e, of a row and one span of the columns, from the results of `finish_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    start_at = tl.program_id(1).to(tl.int64) * span
    scalars = out_ptr + row
    n = tl.cast(rows, tl.int64)
    of_e, of_r, at_target = tl.load(scalars + 5 * n), tl.load(scalars + 6 * n), tl.load(scalars + 9 * n)
    most, ref_most = tl.load(scalars + 7 * n), tl.load(scalars + 8 * n)
    target = tl.load(target_ptr + row) - first
    plane = tl.cast(tiles, tl.int64) * rows
    for start in range(start_at, tl.minimum(start_at + span, columns), BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < columns
        e = tl.load(e_ptr + row * e_stride + offs, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row * r_stride + offs, mask=mask, other=0.0).to(tl.float32)
        if (most > 0.0) | (ref_most > 0.0):  # tiles have shifts of their own
            place = parts_ptr + (begin + offs // COLUMNS).to(tl.int64) * rows + row
            scale = tl.exp(tl.load(place + plane, mask=mask, other=0.0) - most)
            e *= scale
            if KL == 1:
                r *= scale
            else:
                r *= tl.exp(tl.load(place + 3 * plane, mask=mask, other=0.0) - ref_most)
        d = of_e * e + of_r * r
        d = tl.where(offs == target, at_target, d)
        tl.store(e_ptr + row * e_stride + offs, d.to(e_ptr.dtype.element_ty), mask=mask)


def divergences(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, target: Tensor, bias: Tensor | None, ref_bias: Tensor | None,
    places: list[tuple[int, int, Tensor]] | None, scratch: Tensor | None, g_logp: Tensor | None, g_kl: Tensor | None,
    kl: str, logit_scale: float, temperature: float, *, tile: configs.ProductTile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(lse, logp, reference lse, reference logp, KL), float32 [n] each, of the logits hidden [n, H] @ weight [V, H].T and the reference's.

    places, scratch [n, V]: None, or where the derivative of sum(g_logp * logp + g_kl * KL) with respect to raw logits goes, as for
    `head.exponentials`, and memory of the same dtype that this takes; g_logp [n] or None for ones, g_kl [n]. target [n]; rows with a
    negative one are 0 everywhere.
    """
    tile = tile or configs.product_tile(weight.device, models=2)
    (rows, size), vocabulary, device = hidden.shape, len(weight), hidden.device
    out = torch.empty(10, rows, dtype=torch.float32, device=device)
    if not rows:
        return tuple(out[:5])
    slope, _ = transform(logit_scale, None, temperature)
    target, write = target.contiguous(), places is not None
    at_target = torch.empty(2, rows, dtype=torch.float32, device=device)
    parts = [(0, vocabulary, None)] if places is None else places
    counts = [triton.cdiv(last - first, tile.columns) for first, last, _ in parts]
    tiles = sum(counts)
    sums = torch.empty(5, tiles, rows, dtype=torch.float32, device=device)
    target_logits(hidden, weight, target, bias, slope, 1.0, False, at_target[0])
    target_logits(ref_hidden, ref_weight, target, ref_bias, slope, 1.0, False, at_target[1])
    with on(device):
        h, ref_h = descriptor(hidden, tile.rows, tile.depth), descriptor(ref_hidden, tile.rows, tile.depth)
        begin = 0
        for (first, last, d), count in zip(parts, counts):
            w, ref_w = (descriptor(x[first:last], tile.columns, tile.depth) for x in (weight, ref_weight))
            e, r = (out, out) if d is None else (d, scratch[:, first:last])
            pair_kernel[(triton.cdiv(rows, tile.rows) * count,)](
                h, w, ref_h, ref_w, e, r, target, at_target, some(bias, out), some(ref_bias, out), sums,
                rows, last - first, first, begin, tiles, size, e.stride(0), r.stride(0), slope, 1.0,
                KL=_KL[kl], HAS_BIAS=bias is not None, HAS_REF_BIAS=ref_bias is not None, WRITE=write, WIDEN=device.type == "cpu",
                ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            begin += count
        finish_kernel[(triton.cdiv(rows, FINISH_ROWS),)](
            target, at_target, sums, some(g_logp, out), some(g_kl, out), out, rows, tiles, slope,
            KL=_KL[kl], HAS_G=g_logp is not None, WRITE=write, ROWS=FINISH_ROWS, TILES=FINISH_TILES, num_warps=4,
        )  # fmt: skip
        begin = 0
        for (first, last, d), count in zip(parts, counts) if write else ():
            block = configs.tile("gradient", device)
            splits, span = configs.splits(rows, last - first, block)
            combine_kernel[(rows, splits)](
                d, scratch[:, first:last], target, sums, out, rows, last - first, first, begin, tiles, span, d.stride(0), scratch.stride(0),
                KL=_KL[kl], COLUMNS=tile.columns, BLOCK=block.block, num_warps=block.warps,
            )  # fmt: skip
            begin += count
    return tuple(out[:5])
