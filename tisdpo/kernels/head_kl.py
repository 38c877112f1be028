"""Triton kernels of two heads without their logits: what `tisdpo.kernels.head` is without KL, with it.

With x and y the logits of models a and b above those of the target, e = exp(x), f = exp(y), their sums Z and Z', p = e / Z, q = f / Z':

    KL(p || q) = T / Z - log Z + log Z'        T = sum e (x - y)

a is the policy for reverse KL, the reference for forward KL. D for upstream g of log p(target) and g_K of KL, but at the target:

    reverse       (g_K r - (g_K T / Z + g)) e / Z         r = x - y
    forward       (g_K - g) f / Z' - g_K e / Z

So the product of a is made first and leaves e, in the dtype of D; that of b reads e where its own tile lies and leaves r in float16, whose
range suffices for it and whose rounding is eight times finer (forward: f, like e). Once the sums are known one more pass puts the two
together. Sums are exact but for e, which in T, and in the Z below it, is the rounded one: sum e x comes from the first product, sum e y
from the second, and models that agree have a KL of 0. In r alone x is what the rounded e says, which is off by as much as e itself.

One row of V logits, u = 2 N H V FLOP, two of them:

    kernel        bytes a logit of each model      exponentials (logarithms) a logit
    product a     2                                1
    product b     4                                1 (reverse: and 1)
    finish        28 / 256                         0
    combine       6                                0

12 bytes a logit; the folds (`tisdpo.kernels.fold`) move 26 for the same, with those that the products write.

Errors beyond the folds', with d <= 2^-8 that of rounding e: KL is off by sum p d (x - y - mean), at most d sqrt(2 KL), random in sign and
smaller with every token that counts; D by d p g_K (1 + |x - y| / 8), x and y relative to the target (forward: by d (p + q) g_K), which
is as large as its own rounding but for targets whose log-ratio is far from 0.

Not measured yet. By calculation, 8192 rows of Llama-3-8B's head on a cool H200: 2 x 11.1 ms for the products and 1.5 for the last pass,
instead of 23.1 and 4.7.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tisdpo.kernels import configs
from tisdpo.kernels.head import FINISH_ROWS, FINISH_TILES, LIMIT, LOG2E, _log_total, _product, _tile, descriptor, target_logits
from tisdpo.kernels.launch import FUSED, on, some

FAR = tl.constexpr(-1e30)  # a logit that does not count; finite, because 0 times it must be 0
LN2 = tl.constexpr(0.6931471805599453)
PARTS = 8  # of a tile's columns, one after the other in the epilogue: with 4 there are not registers enough (Triton 3.6)


@triton.jit
def _log2(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _halves(x):
    """The left and the right half of the columns."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _eighths(x):
    a, b = _halves(x)
    aa, ab = _halves(a)
    ba, bb = _halves(b)
    c0, c1 = _halves(aa)
    c2, c3 = _halves(ab)
    c4, c5 = _halves(ba)
    c6, c7 = _halves(bb)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def _tile_of_one(
    number, hidden_desc, weight_desc, e_ptr, r_ptr, target_ptr, target_logit_ptr, parts_ptr,
    rows, columns, first, begin, tiles, size, e_stride, r_stride, scale,
    SECOND: tl.constexpr, LOG: tl.constexpr, WRITE: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    down, across = _tile(number, tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, size, DEPTH):
        acc = _product(hidden_desc, weight_desc, acc, down, across, k, WIDEN, ROWS, COLUMNS)
    # Everything from the tile's corner on, in 32 bits: 64-bit addresses of every row would take registers.
    top, left = (down * ROWS).to(tl.int64), across * COLUMNS
    row = tl.arange(0, ROWS)
    inside = row < rows - down * ROWS
    target = (tl.load(target_ptr + top + row, mask=inside, other=-1) - (first + left)).to(tl.int32)
    shift = tl.load(target_logit_ptr + top + row, mask=inside, other=0.0) * LOG2E
    plane = tl.cast(tiles, tl.int64) * rows
    place = parts_ptr + ((begin + across).to(tl.int64) * rows + top) + row
    e_ptr += top * e_stride + left
    r_ptr += top * r_stride + left
    pieces = _eighths(acc)
    most = tl.full((ROWS,), -float("inf"), tl.float32)
    for i in tl.static_range(PARTS):  # not of columns beyond the edge, whose 0 may be far above all logits
        column = i * (COLUMNS // PARTS) + tl.arange(0, COLUMNS // PARTS)
        most = tl.maximum(most, tl.max(tl.where((column < columns - left)[None, :], pieces[i], -float("inf")), 1))
    most = most * scale - shift
    over = tl.where(most > LIMIT * LOG2E, most, 0.0)
    if LOG:
        apart = tl.load(place + plane, mask=inside, other=0.0) - over
    exact = tl.zeros((ROWS,), tl.float32)
    rounded = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    for i in tl.static_range(PARTS):
        column = i * (COLUMNS // PARTS) + tl.arange(0, COLUMNS // PARTS)
        counts = column < columns - left
        mask = inside[:, None] & counts[None, :]
        x = pieces[i] * scale - (shift + over)[:, None]
        x = tl.where(counts[None, :] & (column[None, :] != target[:, None]), x, FAR)
        own = tl.exp2(x)
        exact += tl.sum(own, 1)
        if SECOND:
            e = tl.load(e_ptr + row[:, None] * e_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
            moment += tl.sum(e * x, 1)
            if WRITE:
                if LOG:
                    own = (_log2(tl.maximum(e, 1e-37), WIDEN) - x) + apart[:, None]
                tl.store(r_ptr + row[:, None] * r_stride + column[None, :], own.to(r_ptr.dtype.element_ty), mask=mask)
        else:
            e = own.to(e_ptr.dtype.element_ty)
            tl.store(e_ptr + row[:, None] * e_stride + column[None, :], e, mask=mask)
            e = e.to(tl.float32)
            rounded += tl.sum(e, 1)
            moment += tl.sum(e * x, 1)
    if SECOND:
        place += 4 * plane
    tl.store(place, exact, mask=inside)
    tl.store(place + plane, over, mask=inside)
    tl.store(place + 2 * plane, moment, mask=inside)
    if not SECOND:
        tl.store(place + 3 * plane, rounded, mask=inside)


@triton.jit(do_not_specialize=["rows", "first", "begin", "tiles", "size"])
def model_kernel(
    hidden_desc, weight_desc, e_ptr, r_ptr, target_ptr, target_logit_ptr, parts_ptr,
    rows, columns, first, begin, tiles, size, e_stride, r_stride, scale,
    SECOND: tl.constexpr, LOG: tl.constexpr, WRITE: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The product of model a, which writes e [rows, columns], or of b (SECOND), which reads e and may (WRITE) write x - y (LOG) or f; of
    the vocabulary from `first` on. Both write planes of [7, tiles, rows], of which the launch has the tiles from `begin` on, in units of
    log 2: sum of e, shift beyond the target's logit, sum of rounded e times x, sum of rounded e; sum of f, its shift, sum of rounded e
    times y; x and y less their shifts."""
    for number in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS), tl.num_programs(0), flatten=True):
        _tile_of_one(
            number, hidden_desc, weight_desc, e_ptr, r_ptr, target_ptr, target_logit_ptr, parts_ptr,
            rows, columns, first, begin, tiles, size, e_stride, r_stride, scale,
            SECOND, LOG, WRITE, WIDEN, ROWS, COLUMNS, DEPTH, GROUP, PARTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tiles"])
def finish_kernel(
    target_ptr, target_logit_ptr, parts_ptr, g_logp_ptr, g_kl_ptr, out_ptr, rows, tiles, slope,
    REVERSE: tl.constexpr, HAS_G: tl.constexpr, WRITE: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Partial results of all tiles -> out [10, rows]: lse, logp, those of the reference, KL; and for `combine_kernel` the factors of e and
    of r, the two shifts beyond the target's logit, D at the target. target_logit [2, rows]: of a, of b."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    n = tl.cast(rows, tl.int64)
    plane = tl.cast(tiles, tl.int64) * n
    most = tl.zeros((ROWS,), tl.float32)
    b_most = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES).to(tl.int64)
        mask = (tile < tiles)[:, None] & inside[None, :]
        where = parts_ptr + tile[:, None] * n + row[None, :]
        most = tl.maximum(most, tl.max(tl.load(where + plane, mask=mask, other=0.0), 0))
        b_most = tl.maximum(b_most, tl.max(tl.load(where + 5 * plane, mask=mask, other=0.0), 0))
    others = tl.zeros((ROWS,), tl.float32)
    rounded = tl.zeros((ROWS,), tl.float32)
    b_others = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES).to(tl.int64)
        mask = (tile < tiles)[:, None] & inside[None, :]
        where = parts_ptr + tile[:, None] * n + row[None, :]
        moved = tl.load(where + plane, mask=mask, other=0.0) - most[None, :]
        b_moved = tl.load(where + 5 * plane, mask=mask, other=0.0) - b_most[None, :]
        scale = tl.exp2(moved)
        others += tl.sum(tl.load(where, mask=mask, other=0.0) * scale, 0)
        b_others += tl.sum(tl.load(where + 4 * plane, mask=mask, other=0.0) * tl.exp2(b_moved), 0)
        e = tl.load(where + 3 * plane, mask=mask, other=0.0)
        rounded += tl.sum(e * scale, 0)
        of_tile = tl.load(where + 2 * plane, mask=mask, other=0.0) - tl.load(where + 6 * plane, mask=mask, other=0.0)
        moment += tl.sum((of_tile + e * (moved - b_moved)) * scale, 0)
    kept = tl.load(target_ptr + row, mask=inside, other=-1) >= 0
    z = tl.load(target_logit_ptr + row, mask=inside, other=0.0)
    b_z = tl.load(target_logit_ptr + n + row, mask=inside, other=0.0)
    own, total, log_total = _log_total(z, most * LN2, others)
    b_own, b_total, b_log_total = _log_total(b_z, b_most * LN2, b_others)
    apart = most - b_most
    mean = (moment - own * apart) * LN2 / (rounded + own)  # of x - y, both less their shifts
    kl = mean - log_total + b_log_total
    mean += apart * LN2
    log_total += most * LN2
    b_log_total += b_most * LN2
    policy: tl.constexpr = 0 if REVERSE else 2
    reference: tl.constexpr = 2 - policy
    tl.store(out_ptr + policy * n + row, tl.where(kept, z + log_total, 0.0), mask=inside)
    tl.store(out_ptr + (policy + 1) * n + row, tl.where(kept, -log_total, 0.0), mask=inside)
    tl.store(out_ptr + reference * n + row, tl.where(kept, b_z + b_log_total, 0.0), mask=inside)
    tl.store(out_ptr + (reference + 1) * n + row, tl.where(kept, -b_log_total, 0.0), mask=inside)
    tl.store(out_ptr + 4 * n + row, tl.where(kept, kl, 0.0), mask=inside)
    if WRITE:
        g = tl.full((ROWS,), 1.0, tl.float32)
        if HAS_G:
            g = tl.load(g_logp_ptr + row, mask=inside, other=0.0)
        g_kl = tl.load(g_kl_ptr + row, mask=inside, other=0.0)
        if REVERSE:
            level = -g_kl * mean
            of_e = (level - g) / total
            of_r = g_kl * LN2 / total
            at_target = (g * others + level * own) / total
        else:
            of_e = -g_kl / total
            of_r = (g_kl - g) / b_total
            at_target = g * b_others / b_total + g_kl * (b_own / b_total - own / total)
        tl.store(out_ptr + 5 * n + row, of_e * slope, mask=inside)
        tl.store(out_ptr + 6 * n + row, of_r * slope, mask=inside)
        tl.store(out_ptr + 7 * n + row, most, mask=inside)
        tl.store(out_ptr + 8 * n + row, b_most, mask=inside)
        tl.store(out_ptr + 9 * n + row, at_target * slope, mask=inside)


@triton.jit(do_not_specialize=["rows", "first", "begin", "tiles"])
def combine_kernel(
    e_ptr, r_ptr, target_ptr, parts_ptr, out_ptr, rows, columns, first, begin, tiles, span, e_stride, r_stride,
    REVERSE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """D over e, of a row and one span of the columns, from the results of `finish_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    start_at = tl.program_id(1).to(tl.int64) * span
    n = tl.cast(rows, tl.int64)
    of_e, of_r, at_target = tl.load(out_ptr + 5 * n + row), tl.load(out_ptr + 6 * n + row), tl.load(out_ptr + 9 * n + row)
    most, b_most = tl.load(out_ptr + 7 * n + row), tl.load(out_ptr + 8 * n + row)
    target = tl.load(target_ptr + row)
    kept = target >= 0
    plane = tl.cast(tiles, tl.int64) * n
    for start in range(start_at, tl.minimum(start_at + span, columns), BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < columns
        e = tl.load(e_ptr + row * e_stride + offs, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row * r_stride + offs, mask=mask, other=0.0).to(tl.float32)
        if (most > 0.0) | (b_most > 0.0):  # tiles have shifts of their own
            place = parts_ptr + (begin + offs // COLUMNS).to(tl.int64) * n + row
            scale = tl.exp2(tl.load(place + plane, mask=mask, other=0.0) - most)
            e *= scale
            if not REVERSE:
                r *= tl.exp2(tl.load(place + 5 * plane, mask=mask, other=0.0) - b_most)
        if REVERSE:
            r = tl.where(e > 0.0, e * r, 0.0)  # of what does not count the difference may be infinite
        d = tl.where(offs == target - first, at_target, of_e * e + of_r * r)
        d = tl.where(kept, d, 0.0)
        tl.store(e_ptr + row * e_stride + offs, d.to(e_ptr.dtype.element_ty), mask=mask)


def divergences(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, target: Tensor,
    places: list[tuple[int, int, Tensor]], scratch: Tensor | None, g_logp: Tensor | None, g_kl: Tensor | None,
    kl: str, logit_scale: float, temperature: float, *, tile: configs.ProductTile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(lse, logp, reference lse, reference logp, KL), float32 [n] each, of the logits hidden [n, H] @ weight [V, H].T and the reference's.

    places: memory as for `head.exponentials`. With scratch [n, V] of the same dtype they hold the derivative of sum(g_logp * logp + g_kl
    * KL) with respect to raw logits in the end, g_logp [n] or None for ones, g_kl [n]; with scratch None nothing of use. target [n];
    rows with a negative one are 0 everywhere.
    """
    if scratch is not None and kl == "reverse" and scratch.dtype == torch.bfloat16:
        scratch = scratch.view(torch.float16)
    tile = tile or configs.product_tile(weight.device)
    rows, device, write = len(hidden), hidden.device, scratch is not None
    out = torch.empty(10, rows, dtype=torch.float32, device=device)
    if not rows:
        return tuple(out[:5])
    reverse, slope, target = kl == "reverse", logit_scale / temperature, target.contiguous()
    models = [(hidden, weight), (ref_hidden, ref_weight)]
    models = models if reverse else models[::-1]
    logits = torch.empty(2, rows, dtype=torch.float32, device=device)
    counts = [triton.cdiv(last - first, tile.columns) for first, last, _ in places]
    tiles = sum(counts)
    parts = torch.empty(7, tiles, rows, dtype=torch.float32, device=device)
    for (h, w), of_target in zip(models, logits):
        target_logits(h, w, target, None, slope, 1.0, False, of_target)
    with on(device):
        for second, ((h, w), of_target) in enumerate(zip(models, logits)):
            h_desc, begin = descriptor(h, tile.rows, tile.depth), 0
            for (first, last, e), count in zip(places, counts):
                r = scratch[:, first:last] if write else e
                programs = min(configs.multiprocessors(device), triton.cdiv(rows, tile.rows) * count)
                model_kernel[(programs,)](
                    h_desc, descriptor(w[first:last], tile.columns, tile.depth), e, r, target, of_target, parts,
                    rows, last - first, first, begin, tiles, h.shape[1], e.stride(0), r.stride(0), slope * LOG2E.value,
                    SECOND=bool(second), LOG=bool(second) and reverse and write, WRITE=write, WIDEN=device.type == "cpu",
                    ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=tile.group, PARTS=PARTS,
                    num_warps=tile.warps, num_stages=tile.stages, **FUSED,
                )  # fmt: skip
                begin += count
        finish_kernel[(triton.cdiv(rows, FINISH_ROWS),)](
            target, logits, parts, some(g_logp, out), some(g_kl, out), out, rows, tiles, slope,
            REVERSE=reverse, HAS_G=g_logp is not None, WRITE=write, ROWS=FINISH_ROWS, TILES=FINISH_TILES, num_warps=4, **FUSED,
        )  # fmt: skip
        begin = 0
        for (first, last, e), count in zip(places, counts) if write else ():
            block = configs.tile("gradient", device)
            splits, span = configs.splits(rows, last - first, block)
            r = scratch[:, first:last]
            combine_kernel[(rows, splits)](
                e, r, target, parts, out, rows, last - first, first, begin, tiles, span, e.stride(0), r.stride(0),
                REVERSE=reverse, COLUMNS=tile.columns, BLOCK=block.block, num_warps=block.warps, **FUSED,
            )  # fmt: skip
            begin += count
    return tuple(out[:5])
