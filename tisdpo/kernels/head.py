"""Triton kernels of a head without its logits: the product hidden @ weight.T, in whose place exponentials are written.

With s the logit of the target, known beforehand (a dot product of H numbers), and e_v = exp(z_v - s):

    Z = sum_{v != y} e_v        logp = -log(1 + Z)        dlogp/dz = (onehot(y) - p) = -(e_v, or -Z at y) / (1 + Z)

So a tile of the product needs to know nothing of the rest of its row: it writes e in the dtype of D and a partial sum, and the factor
-1 / (1 + Z) of a row goes with those that are applied where H is, not V. Neither are logits written, nor is anything read again. That
serves where the gradient of a row is one number times (onehot - p): without KL. A range of 16 bits like that of bfloat16 is needed.

One row of V logits, u = 2 N H V FLOP:

    kernel                     bytes a logit         exponentials a logit
    target                     0 (4 H a row)         0
    exponentials               size of D (2), or 0   1
    finish                     20 / 256              0

Floor: that of the product. The folds (`tisdpo.kernels.fold`) move 14 bytes a logit for the same. An exponential a logit is 4 % of a product
with H = 4096 on an H200: a multiprocessor has room for one program, whose epilogue multiplies nothing. Measured there, 8192 rows of
Llama-3-8B's head, on a cool and on a hot card: 11.0 and 13.0 ms; the library's product takes 10.5 and 12.2 with 16-bit logits, and 13.7
and 15.7 with float32 ones and both folds (benchmarks/NOTES.md, 2026-11-27).

Where a tile has a logit more than LIMIT above that of the target, its exponentials are shifted by its own maximum, which is noted, and the
row is scaled to one shift afterwards (`fix`): rows with a log-prob below -LIMIT or so, read and written once more. Differences z - s are
rounded at their own size: lse and D of a target 10,000 below the others are good to 1e-3. For a target with the logit -inf, whose log-prob
is -inf, s is 0; where all others lie below -80 then, D is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tisdpo.kernels import configs
from tisdpo.kernels.fold import _finite, _tanh, transform
from tisdpo.kernels.launch import FUSED, on, some

LIMIT = tl.constexpr(30.0)  # exp(30) * V, and 1 over it times hidden states and factors, are well within bfloat16
LOG2E = tl.constexpr(1.4426950408889634)
FINISH_ROWS, FINISH_TILES = 32, 64
FIX_BLOCK = 1024


@triton.jit
def target_kernel(
    hidden_ptr, weight_ptr, target_ptr, bias_ptr, out_ptr, size, hidden_stride, weight_stride, inner, outer,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [rows]: the target's logit after bias, scale, soft-capping and temperature; inf, of which every logit is infinitely far
    away, for a negative target."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    z = tl.full((), float("inf"), tl.float32)
    if target >= 0:
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < size
            h = tl.load(hidden_ptr + row * hidden_stride + offs, mask=mask, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + target * weight_stride + offs, mask=mask, other=0.0).to(tl.float32)
            sums += h * w
        z = tl.sum(sums, 0)
        if HAS_BIAS:
            z += tl.load(bias_ptr + target).to(tl.float32)
        if SOFTCAP:
            z = outer * _tanh(inner * z)
        else:
            z = z * inner
    tl.store(out_ptr + row, z)


@triton.jit
def _tile(number, tiles_down, tiles_across, GROUP: tl.constexpr):
    """Place of a tile, (down, across): GROUP tiles down, then the next column of tiles, so that programs that run together share rows and
    columns in the L2 cache."""
    group = number // (GROUP * tiles_across)
    down = tl.minimum(tiles_down - group * GROUP, GROUP)
    inside = number % (GROUP * tiles_across)
    return group * GROUP + inside % down, inside // down


@triton.jit
def _product(hidden_desc, weight_desc, acc, down, across, k, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    h = hidden_desc.load([down * ROWS, k])
    w = weight_desc.load([across * COLUMNS, k])
    if WIDEN:  # the interpreter multiplies no bfloat16
        h, w = h.to(tl.float32), w.to(tl.float32)
    return tl.dot(h, w.T, acc)


@triton.jit
def _above_target(acc, bias_ptr, column, columns, shift, inner, outer, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """By how much the logits of a tile exceed that of the target."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        return outer * _tanh(inner * acc, EXACT=False) - shift[:, None]  # there are no registers left: off by 1.2e-7 of the cap
    return acc * inner - shift[:, None]


@triton.jit
def _own_shift(x):
    """Of every row of a tile: 0, or its maximum where that is more than LIMIT."""
    over = tl.max(x, 1)
    return tl.where(over > LIMIT, over, 0.0)


@triton.jit
def _exponentials(
    number, hidden_desc, weight_desc, d_ptr, target_ptr, target_logit_ptr, bias_ptr, sums_ptr, over_ptr,
    rows, columns, first, begin, size, d_stride, inner, outer,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, WRITE: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile."""
    down, across = _tile(number, tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS), GROUP)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, size, DEPTH):
        acc = _product(hidden_desc, weight_desc, acc, down, across, k, WIDEN, ROWS, COLUMNS)
    row = down * ROWS + tl.arange(0, ROWS)
    column = across * COLUMNS + tl.arange(0, COLUMNS)
    target = tl.load(target_ptr + row, mask=row < rows, other=-1)
    shift = _finite(tl.load(target_logit_ptr + row, mask=row < rows, other=0.0))
    x = _above_target(acc, bias_ptr + first, column, columns, shift, inner, outer, SOFTCAP, HAS_BIAS)
    # No branch around this for tiles in which nothing is masked: that took 2 ms of 13.
    x = tl.where((column < columns)[None, :] & (column[None, :] != (target - first).to(tl.int32)[:, None]), x, -float("inf"))
    over = _own_shift(x)
    e = tl.exp2(x * LOG2E - (over * LOG2E)[:, None])
    place = (begin + across).to(tl.int64) * rows + row
    tl.store(sums_ptr + place, tl.sum(e, 1), mask=row < rows)
    tl.store(over_ptr + place, over, mask=row < rows)
    if WRITE:
        if SOFTCAP:
            bent = x * (1.0 / outer) + tl.where(target < 0, 0.0, shift / outer)[:, None]
            e *= tl.maximum(1.0 - bent * bent, 0.0)  # x may be -inf
        where = row.to(tl.int64)[:, None] * d_stride + column[None, :]
        tl.store(d_ptr + where, e.to(d_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["rows", "first", "begin", "size"])
def exponentials_kernel(
    hidden_desc, weight_desc, d_ptr, target_ptr, target_logit_ptr, bias_ptr, sums_ptr, over_ptr,
    rows, columns, first, begin, size, d_stride, inner, outer,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, WRITE: tl.constexpr, WIDEN: tl.constexpr, AHEAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tiles of e [rows, columns], of the vocabulary from `first` on, 0 at the target and in ignored rows (a target logit of inf); and of
    every row of a tile the sum, and by how much more than the target's logit the exponentials were shifted: [tiles, rows] each, from
    `begin` on. AHEAD: a program makes many tiles, and the loads of the next begin before the epilogue of this one; else it makes one."""
    if AHEAD:
        for number in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS), tl.num_programs(0), flatten=True):
            _exponentials(
                number, hidden_desc, weight_desc, d_ptr, target_ptr, target_logit_ptr, bias_ptr, sums_ptr, over_ptr,
                rows, columns, first, begin, size, d_stride, inner, outer, SOFTCAP, HAS_BIAS, WRITE, WIDEN, ROWS, COLUMNS, DEPTH, GROUP,
            )  # fmt: skip
    else:
        _exponentials(
            tl.program_id(0), hidden_desc, weight_desc, d_ptr, target_ptr, target_logit_ptr, bias_ptr, sums_ptr, over_ptr,
            rows, columns, first, begin, size, d_stride, inner, outer, SOFTCAP, HAS_BIAS, WRITE, WIDEN, ROWS, COLUMNS, DEPTH, GROUP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tiles"])
def finish_kernel(
    d_ptr, target_ptr, target_logit_ptr, sums_ptr, over_ptr, out_ptr, rows, tiles, inner, outer,
    SOFTCAP: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Partial sums of all tiles -> out [5, rows]: lse, logp, factor of D, shift beyond the target's logit, D at the target. Of d only the
    dtype counts."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    most = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES).to(tl.int64)
        mask = (tile < tiles)[:, None] & inside[None, :]
        most = tl.maximum(most, tl.max(tl.load(over_ptr + tile[:, None] * rows + row[None, :], mask=mask, other=0.0), 0))
    others = tl.zeros((ROWS,), tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES).to(tl.int64)
        mask = (tile < tiles)[:, None] & inside[None, :]
        where = tile[:, None] * rows + row[None, :]
        over = tl.load(over_ptr + where, mask=mask, other=0.0)
        others += tl.sum(tl.load(sums_ptr + where, mask=mask, other=0.0) * tl.exp(over - most[None, :]), 0)
    kept = tl.load(target_ptr + row, mask=inside, other=-1) >= 0
    z = tl.load(target_logit_ptr + row, mask=inside, other=0.0)
    shift = _finite(z)
    own = tl.where(z == -float("inf"), 0.0, tl.exp(-most))  # the target's exponential
    total = others + own
    # log(1 + x) to the last digit also of a small x: what 1 + x has lost of x, the quotient brings back
    step = total - 1.0
    near = tl.where(step == 0.0, others, tl.log(total) * (others / step))
    log_total = tl.where((most == 0.0) & (own > 0.0), near, tl.log(total))
    logp = tl.where(z == -float("inf"), z, -most - log_total)
    slope = inner
    at_target = -others
    if SOFTCAP:
        slope = inner * outer
        bent = shift / outer
        at_target = at_target * (1.0 - bent * bent)
    factor = tl.where(total > 1e-30, -slope / total, 0.0)  # of an impossible target among very small logits nothing may be left
    # D at the target is as large as the rest of the row together (but for soft-capping), so that one is made exact: what rounding does to
    # it goes to the factor.
    rounded = at_target.to(d_ptr.dtype.element_ty).to(tl.float32)
    factor = tl.where(rounded == 0.0, factor, factor * (at_target / rounded))
    tl.store(out_ptr + row, tl.where(kept, shift + most + log_total, 0.0), mask=inside)
    tl.store(out_ptr + rows + row, tl.where(kept, logp, 0.0), mask=inside)
    tl.store(out_ptr + 2 * rows + row, tl.where(kept, factor, 0.0), mask=inside)
    tl.store(out_ptr + 3 * rows + row, most, mask=inside)
    tl.store(out_ptr + 4 * rows + row, rounded, mask=inside)


@triton.jit(do_not_specialize=["rows", "first", "begin"])
def fix_kernel(
    d_ptr, target_ptr, over_ptr, out_ptr, rows, columns, first, begin, d_stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """D at the target; and rows of which some tile has a shift of its own, scaled to one shift."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    most = tl.load(out_ptr + 3 * tl.cast(rows, tl.int64) + row)
    d_row = d_ptr + row * d_stride
    if most > 0.0:
        for start in range(0, columns, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < columns
            over = tl.load(over_ptr + (begin + offs // COLUMNS).to(tl.int64) * rows + row, mask=mask, other=0.0)
            d = tl.load(d_row + offs, mask=mask, other=0.0).to(tl.float32) * tl.exp(over - most)
            tl.store(d_row + offs, d.to(d_ptr.dtype.element_ty), mask=mask)
        tl.debug_barrier()
    if (target >= first) & (target < first + columns):
        at_target = tl.load(out_ptr + 4 * tl.cast(rows, tl.int64) + row)
        tl.store(d_row + (target - first), at_target.to(d_ptr.dtype.element_ty))


def target_logits(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, inner: float, outer: float, softcap: bool, out: Tensor
) -> None:
    """`target_kernel` into out [n]."""
    with on(hidden.device):
        target_kernel[(len(hidden),)](
            hidden, weight, target, some(bias, out), out, hidden.shape[1], hidden.stride(0), weight.stride(0), inner, outer,
            SOFTCAP=softcap, HAS_BIAS=bias is not None, BLOCK=min(1024, triton.next_power_of_2(hidden.shape[1])), num_warps=4, **FUSED,
        )  # fmt: skip


def serves(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `exponentials` takes such hidden states and such a head, in this dtype, at these addresses, on this device."""
    if not (hidden.dtype == weight.dtype == torch.bfloat16 and min(hidden.numel(), weight.numel()) > 0):
        return False
    aligned = all(
        x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in (hidden, weight)
    )
    # rows that are gathered from these lie packed
    return aligned and hidden.shape[1] % 8 == 0 and configs.product_tile(weight.device) is not None


def exponentials(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, places: list[tuple[int, int, Tensor]] | None,
    logit_scale: float, softcap: float | None, temperature: float, *, tile: configs.ProductTile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(lse, logp, factor), float32 [n] each, of the logits hidden [n, H] @ weight [V, H].T, and the derivative of logp with respect to raw
    logits, divided by factor. That goes to `places`, which cover the vocabulary: (first column, last column, [n, last - first] with
    any row stride); None: it is not written. target [n]; rows with a negative one are 0 everywhere."""
    tile = tile or configs.product_tile(weight.device)
    (rows, size), vocabulary = hidden.shape, len(weight)
    out = torch.empty(5, rows, dtype=torch.float32, device=hidden.device)
    if not rows:
        return out[0], out[1], out[2]
    inner, outer = transform(logit_scale, softcap, temperature)
    target, flags = target.contiguous(), dict(SOFTCAP=softcap is not None, HAS_BIAS=bias is not None)
    target_logit = torch.empty_like(out[0])
    parts = [(0, vocabulary, None)] if places is None else places
    counts = [triton.cdiv(last - first, tile.columns) for first, last, _ in parts]
    sums, over = torch.empty(2, sum(counts), rows, dtype=torch.float32, device=hidden.device)
    ahead = softcap is None and bias is None  # with either there are not registers enough
    target_logits(hidden, weight, target, bias, inner, outer, softcap is not None, target_logit)
    with on(hidden.device):
        h = descriptor(hidden, tile.rows, tile.depth)
        begin = 0
        for (first, last, d), count in zip(parts, counts):
            tiles = triton.cdiv(rows, tile.rows) * count
            exponentials_kernel[(min(configs.multiprocessors(hidden.device), tiles) if ahead else tiles,)](
                h, descriptor(weight[first:last], tile.columns, tile.depth), out if d is None else d, target, target_logit,
                some(bias, out), sums, over, rows, last - first, first, begin, size, 0 if d is None else d.stride(0), inner, outer,
                **flags, WRITE=d is not None, WIDEN=hidden.device.type == "cpu", AHEAD=ahead,
                ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, GROUP=tile.group,
                num_warps=tile.warps, num_stages=tile.stages, **FUSED,
            )  # fmt: skip
            begin += count
        finish_kernel[(triton.cdiv(rows, FINISH_ROWS),)](
            out if places is None else places[0][2], target, target_logit, sums, over, out, rows, begin, inner, outer,
            SOFTCAP=softcap is not None, ROWS=FINISH_ROWS, TILES=FINISH_TILES, num_warps=4, **FUSED,
        )  # fmt: skip
        begin = 0
        for (first, last, d), count in zip(parts, counts):
            if d is not None:
                fix_kernel[(rows,)](
                    d, target, over, out, rows, last - first, first, begin, d.stride(0),
                    COLUMNS=tile.columns, BLOCK=FIX_BLOCK, num_warps=4, **FUSED,
                )  # fmt: skip
            begin += count
    return out[0], out[1], out[2]


def descriptor(x: Tensor, rows: int, columns: int):
    from triton.tools.tensor_descriptor import TensorDescriptor  # of Triton 3.4 and later

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])
