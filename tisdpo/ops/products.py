"""The matrix products of the head. Logits and dWeight accumulate in float32 whatever the dtype of the inputs.

By the vendor library, but for the one that leaves no logits (`tisdpo.kernels.head`) and those that a CPU makes with the C++ extension
(`tisdpo_cpp.mm`): of 16-bit items, of which torch has none there that keep their float32 sums, and of float32 on CPUs where that is faster
(`tisdpo doctor` says what is taken). A GPU's product hands out its float32 accumulators (`out_dtype`). Elsewhere a 16-bit weight is widened
to float32 a slice of the vocabulary at a time, so that no float32 copy of the head exists. Products of float32 operands are written as
`out=` or in-place calls: autocast, which may be on while an operator runs, would round the operands of the others to 16 bits.
"""

import math
from functools import cache

import torch
from torch import Tensor

from tisdpo.ops import extension
from tisdpo.ops.backend import accumulation_dtype

SLICE_BYTES = 32 << 20  # of a widened slice of the head, or of a float32 slice of dWeight
CACHED_BYTES = 4 << 20  # of a slice of the head in the library's product of a CPU's logits: 5 to 20 % faster than in one call

ALIGNED = 64  # items: a multiple of what the fastest loads and products want
FEW_ITEMS = 1 << 24  # a smaller 16-bit product may be split along its sums, and the parts then be added in 16 bits
IN_PLACE_BYTES = 8 << 20  # of a float32 slice of dWeight on a CPU, in a buffer or where D is: the product is 5 % slower with 4 MiB


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """hidden [n, H] @ weight [V, H].T into out [n, V] (float32 or float64)."""
    if out.dtype == torch.float32 and keeps_sums(hidden.device, hidden.dtype, weight.dtype):
        _mm(hidden.contiguous(), weight.T, out)  # of a transposed one the whole head would be packed
    elif hidden.dtype == out.dtype:
        for a, b in _slices(weight, out.dtype, CACHED_BYTES) if hidden.device.type == "cpu" else [(0, len(weight))]:
            torch.mm(hidden, weight[a:b].T, out=out[:, a:b])
    else:
        wide = hidden.to(out.dtype)
        for a, b in _slices(weight, out.dtype):
            torch.mm(wide, weight[a:b].to(out.dtype).T, out=out[:, a:b])
    return out


def gradient_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the two products below want dL/dlogits for a head of this dtype: 16 bits where that keeps float32 sums.

    Float16 would lose what is below 6e-8, so a CPU, which multiplies it no faster than float32, does without.
    """
    wide = accumulation_dtype(dtype)
    if device.type == "cpu" and dtype == torch.float16:
        return wide
    return dtype if keeps_sums(device, dtype, dtype) else wide


def grad_hidden(d: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """d [n, V] @ weight [V, H] -> [n, H] in `dtype`, the accumulation dtype; d as `gradient_dtype` says."""
    out = d.new_empty(d.shape[0], weight.shape[1], dtype=dtype)
    if weight.dtype == dtype or (dtype == torch.float32 and keeps_sums(d.device, d.dtype, weight.dtype)):
        return _mm(d, weight, out)
    out.zero_()
    for a, b in _slices(weight, d.dtype):
        out.addmm_(d[:, a:b], weight[a:b].to(d.dtype))
    return out


def add_grad_weight_(total: Tensor, d: Tensor, hidden: Tensor, *, first: bool) -> None:
    """total [V, H] += d [n, V].T @ hidden [n, H] in the dtype of total; `first` writes instead, so total need not be zeroed.

    hidden is rounded to the dtype of d, a 16-bit one where the product has float32 accumulators. No [V, H] temporary is made.
    """
    _mm(d.T, hidden.to(d.dtype), total, add=not first)


def grad_weight(d: Tensor, hidden: Tensor) -> Tensor:
    """d [n, V].T @ hidden [n, H] -> [V, H] in the dtype of d, where `rounds_itself`; hidden is rounded to it first."""
    return _mm(d.T, hidden.to(d.dtype), d.new_empty(d.shape[1], hidden.shape[1]))


class SummedRows:
    """dWeight [V, H] = D.T @ hidden for a D [n, V] that comes a few rows at a time, summed in the accumulation dtype.

    Of a 16-bit head one half of the float32 sums lies in the memory of the result, the other beside it: 2 V H bytes more than the result.
    """

    def __init__(self, weight: Tensor):
        dtype = accumulation_dtype(weight.dtype)
        self.result = weight.new_empty(weight.shape)
        self.inside, hidden_size = len(weight), weight.shape[1]
        if dtype != weight.dtype:  # whole vectors of D on both sides
            self.inside = len(weight) * weight.itemsize // dtype.itemsize // 8 * 8
        place = self.result.view(-1)[: self.inside * hidden_size * dtype.itemsize // weight.itemsize].view(dtype)
        self.sums = [place.view(self.inside, hidden_size), weight.new_empty(len(weight) - self.inside, hidden_size, dtype=dtype)]
        self.first = True

    def add(self, d: Tensor, hidden: Tensor) -> None:
        """Rows of D with those of hidden."""
        for sums, part in zip(self.sums, (d[:, : self.inside], d[:, self.inside :])):
            if len(sums):
                add_grad_weight_(sums, part, hidden, first=self.first)
        self.first = False

    def product(self) -> Tensor:
        """dWeight in the dtype of the head, rounded once; the sums are gone then. Without rows 0."""
        if self.first:
            return self.result.zero_()
        if self.result.dtype != self.sums[0].dtype:
            inside, beside = self.sums
            # Rounded, a row moves to where rows before it were: the first ones by way of a copy, then each time as many as are done.
            done = min(self.inside, max(1, IN_PLACE_BYTES // (inside[:1].nbytes or 1)))
            self.result[:done] = inside[:done].to(self.result.dtype)
            while done < self.inside:
                end = min(2 * done, self.inside)
                self.result[done:end] = inside[done:end]
                done = end
            self.result[self.inside :] = beside
        return self.result


class WaitingRows:
    """dWeight [V, H] = D.T @ hidden for a D [n, V] of the dtype of the head that comes a few rows at a time and waits until all are there.

    It waits by columns: as many as fit in the memory of the result, the others beside it. A slice of columns, [n, w], lies in one piece
    and becomes one product. Where that has the dtype of the result, slices are as wide as lets their rows of the result lie where nothing
    waits any more, and are written there at once; the others go by way of a buffer, as do all of 16 bits on a CPU, in float32. Of a large
    float32 head so many columns wait beside it that all slices are written at once.
    """

    def __init__(self, weight: Tensor, rows: int, memory: tuple[Tensor, Tensor] | None = None):
        """memory: `result` and `others` of one of the same sizes, whose D goes on waiting."""
        vocabulary, hidden_size = weight.shape
        self.result = weight.new_empty(weight.shape) if memory is None else memory[0]
        direct, step = rounds_itself(weight) or weight.dtype == torch.float32, self.step(weight)
        least = max(ALIGNED, step - ALIGNED) if weight.dtype == torch.float32 else step  # as much may be lost by the two roundings below
        inside = vocabulary - self.columns_beside(weight, rows)
        place = self.result.view(-1)
        offset = (len(place) - inside * rows) // ALIGNED * ALIGNED  # D lies at the end
        self.slices: list[tuple[int, int, Tensor]] = []  # first and last column, D
        self.at_once: list[bool] = []  # whether the product may be written to its place
        first = 0
        while first < inside:
            free = (offset + first * rows) // max(hidden_size, 1) // ALIGNED * ALIGNED if direct else 0  # rows of the result
            last = max(first + least, free)
            if inside - last < ALIGNED and last > free:  # a narrow last slice would begin where rows of the result before it lie
                last = inside
            last = min(last, inside)
            part = place[offset + first * rows : offset + last * rows]
            self.slices.append((first, last, part.view(rows, last - first)))
            self.at_once.append(direct and last * hidden_size <= offset + first * rows)
            first = last
        self.others = others = weight.new_empty(rows, vocabulary - inside) if memory is None else memory[1]
        step = max(vocabulary - inside, 1) if direct else step
        for first in range(inside, vocabulary, step):
            last = min(first + step, vocabulary)
            self.slices.append((first, last, others[:, first - inside : last - inside]))
            self.at_once.append(direct)

    @staticmethod
    def serves(weight: Tensor, rows: int) -> bool:
        """Whether D waits and dWeight is not summed: of 16 bits where that takes no more memory (`few`), of float32 on a CPU where D fits
        into dWeight."""
        itemsize = gradient_dtype(weight.device, weight.dtype).itemsize
        waits = itemsize == 2 or (weight.dtype == torch.float32 and weight.device.type == "cpu")
        return waits and WaitingRows.few(rows, weight.shape[1], itemsize)

    @staticmethod
    def few(rows: int, hidden_size: int, itemsize: int) -> bool:
        """D [rows, V] of such items is no larger than a [V, H] of float32."""
        return rows * itemsize <= 4 * hidden_size

    @staticmethod
    def step(weight: Tensor) -> int:
        """Columns of a slice, or more."""
        size = in_place_bytes(weight.shape[1]) if weight.device.type == "cpu" else 4 * SLICE_BYTES
        return math.ceil(max(1, size // (max(weight.shape[1], 1) * 4)) / ALIGNED) * ALIGNED

    @staticmethod
    def columns_beside(weight: Tensor, rows: int) -> int:
        """Columns of D [rows, V] that wait beside the memory of dWeight [V, H]."""
        vocabulary, hidden_size = weight.shape
        beside = WaitingRows.columns_without_room(weight.shape, rows, rounds_itself(weight))
        if weight.dtype == torch.float32 and 0 < rows <= hidden_size:
            # so many that the rows of the result for a slice of `step` columns always end before it: width * hidden_size >= step * rows
            width = math.ceil(WaitingRows.step(weight) * rows / hidden_size / ALIGNED) * ALIGNED
            beside = width if 8 * width <= vocabulary else beside
        return beside

    @staticmethod
    def columns_without_room(shape: tuple[int, int], rows: int, rounds: bool) -> int:
        """Columns of D for which the memory of a result of this shape, [V, H], does not suffice. Where the product rounds itself an eighth
        of that memory stays free, for the first slices that are written at once."""
        vocabulary, hidden_size = shape
        room = vocabulary * hidden_size * (7 if rounds else 8) // 8
        return 0 if rows * vocabulary <= room else vocabulary - room // rows // ALIGNED * ALIGNED

    def places(self, a: int, b: int) -> list[tuple[int, int, Tensor]]:
        """(first, last, D[a:b, first:last]) for all slices of columns."""
        return [(first, last, d[a:b]) for first, last, d in self.slices]

    def grad_hidden(self, a: int, b: int, weight: Tensor) -> Tensor:
        """Rows a..b of D @ weight [V, H] in float32, a sum over the slices."""
        out = weight.new_empty(b - a, weight.shape[1], dtype=torch.float32)
        for number, (first, last, d) in enumerate(self.places(a, b)):
            _mm(d, weight[first:last], out, add=number > 0)
        return out

    def column_sums(self, coefficient: Tensor) -> Tensor:
        """D.T @ coefficient [n] -> [V] in the dtype of the coefficient."""
        return torch.cat([column_sums(d, coefficient) for _, _, d in self.slices])

    def product(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """dWeight for hidden [n, H] in the dtype of the head; D is gone then, but not with an `out` of its own."""
        hidden, result = hidden.to(self.result.dtype), self.result if out is None else out
        widest = max((last - first for (first, last, _), at_once in zip(self.slices, self.at_once) if not at_once), default=0)
        dtype = result.dtype if rounds_itself(result) else torch.float32
        buffer = result.new_empty(widest, result.shape[1], dtype=dtype)
        for (first, last, d), at_once in zip(self.slices, self.at_once):
            if at_once:
                _mm(d.T, hidden, result[first:last])
            else:
                result[first:last] = _mm(d.T, hidden, buffer[: last - first])
        return result


def column_sums(d: Tensor, coefficient: Tensor) -> Tensor:
    """d [n, V].T @ coefficient [n] -> [V] in the dtype of the coefficient."""
    if d.dtype == coefficient.dtype:
        return torch.mv(d.T, coefficient, out=coefficient.new_empty(d.shape[1]))
    rounded = coefficient.to(d.dtype)  # and what that has lost: together exact to 16 bits
    both = torch.stack([rounded, (coefficient - rounded).to(d.dtype)], 1)
    return _mm(d.T, both, coefficient.new_empty(d.shape[1], 2)).sum(1)


def _mm(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b: all of one dtype of 32 or 64 bits, or a and b of which `keeps_sums` is true and a float32 out; where
    `rounds_itself`, out = a @ b in 16 bits, too."""
    if not keeps_sums(a.device, a.dtype, b.dtype):
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if a.device.type == "cpu":
        torch.ops.tisdpo_cpp.mm(_along_one_stride(a), _along_one_stride(b), out, add)
    elif not add and out.dtype == a.dtype:
        if out.numel() < FEW_ITEMS:
            out.copy_(torch.mm(a, b, out_dtype=torch.float32))
        else:
            torch.mm(a, b, out=out)
    elif not add:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif adds_in_place(out.device):
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        for first, last in _slices(out, out.dtype):
            out[first:last] += torch.mm(a[first:last], b, out_dtype=out.dtype)
    return out


def _along_one_stride(x: Tensor) -> Tensor:
    """x, or a copy where neither its rows nor its columns lie in one piece."""
    return x if 1 in x.stride() else x.contiguous()


def rounds_itself(x: Tensor) -> bool:
    """Whether products of operands like x, of 16 bits, have float32 sums that are rounded to 16 bits once."""
    return x.device.type != "cpu" and keeps_sums(x.device, x.dtype, x.dtype)


@cache
def keeps_sums(device: torch.device, a: torch.dtype, b: torch.dtype) -> bool:
    """Whether such operands have a product of their own in `_mm`: with float32 sums, and without widening one of them first."""
    if device.type == "cpu":
        return {a, b} <= compiled() or (a != b and {a, b} <= compiled() | {torch.float32})
    return a == b and a.itemsize == 2 and _works(lambda x: torch.mm(x, x, out_dtype=torch.float32), device)


@cache
def compiled() -> frozenset[torch.dtype]:
    """The dtypes whose products on a CPU are those of the extension: 16-bit ones, and float32 where that is faster than the library's."""
    if extension.problem() or not _mm_is_right():
        return frozenset()
    return frozenset(getattr(torch, name) for name in torch.ops.tisdpo_cpp.multiplied().split())


@cache
def adds_in_place(device: torch.device) -> bool:
    """Whether such a product can be added to a float32 matrix in the library (torch releases differ)."""
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    return _works(lambda x: torch.addmm(total, x, x, out_dtype=torch.float32, out=total), device)


def _mm_is_right() -> bool:
    """Of whole numbers, exactly. With AMX it rests on a function of libtorch that is not part of its stable interface."""
    x = (torch.arange(66 * 66, dtype=torch.float32, device="cpu") % 7).view(66, 66)
    try:
        torch.ops.tisdpo_cpp.mm(x.bfloat16(), x.bfloat16(), found := torch.empty_like(x), False)
    except RuntimeError:  # oneDNN is turned off, or told to use less than the CPU has
        return False
    return torch.equal(found, torch.mm(x, x, out=torch.empty_like(x)))


def _works(product, device: torch.device) -> bool:
    try:
        product(torch.zeros(16, 16, dtype=torch.bfloat16, device=device))
    except torch.OutOfMemoryError:  # says nothing of the product, and the answer would be remembered
        raise
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def in_place_bytes(hidden_size: int) -> int:
    """Of a float32 slice of dWeight that a CPU makes at a time: IN_PLACE_BYTES, or 2048 rows. For each all of hidden is packed anew."""
    return max(IN_PLACE_BYTES, (IN_PLACE_BYTES >> 12) * 4 * hidden_size)


def _slices(weight: Tensor, dtype: torch.dtype, size: int = SLICE_BYTES):
    rows = max(1, size // (max(weight.shape[1], 1) * dtype.itemsize))
    return [(a, min(a + rows, len(weight))) for a in range(0, len(weight), rows)]
