"""The rows that carry loss, and the head over a range of them: what the one-pass and the two-pass drivers share."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tisdpo.ops import backend, products
from tisdpo.ops.backend import accumulation_dtype


@dataclass(frozen=True)
class HeadRows:
    """Hidden states [N, H] with their head [V, H], seen through the index of the rows that carry loss (None: all of them)."""

    hidden: Tensor
    weight: Tensor
    index: Tensor | None

    def take(self, a: int, b: int) -> Tensor:
        """Hidden states of the rows a..b that carry loss."""
        return self.hidden[a:b] if self.index is None else self.hidden[self.index[a:b]]

    def logits(self, a: int, b: int, out: Tensor) -> Tensor:
        """hidden @ weight.T of rows a..b, written to `out` [b - a, V]."""
        return products.logits(self.take(a, b), self.weight, out)

    def chunk_rows(self, models: int, later: bool) -> int:
        """Rows of a chunk when `models` buffers of logits live at a time; `later`: nothing in them waits for its pair."""
        dtype = accumulation_dtype(self.hidden.dtype)
        return backend.chunk_rows(len(self.weight), models, dtype.itemsize, self.hidden.device.type, later)

    def ranges(self, start: int, stop: int, rows: int) -> list[tuple[int, int]]:
        """start..stop in steps of at most `rows`, see `row_ranges`."""
        return row_ranges(start, stop, rows, backend.row_multiple(self.hidden.device.type))


class Tiles:
    """Logits of policy and reference for a range of rows, in one buffer that is used again and again.

    Where both have the same head (LoRA, or a frozen tied one), their hidden states are stacked: the head is read once.
    """

    def __init__(self, policy: HeadRows, reference: HeadRows | None, rows: int, later: bool):
        self.policy, self.reference, self.rows = policy, reference, rows
        self.shared = reference is not None and _same(policy.weight, reference.weight)
        models = 1 if reference is None else 2
        dtype, device = accumulation_dtype(policy.hidden.dtype), policy.hidden.device
        try:
            self.buffer = torch.empty(models * rows, len(policy.weight), dtype=dtype, device=device)
        except torch.OutOfMemoryError as error:
            size = models * rows * len(policy.weight) * dtype.itemsize >> 20
            pairs = "" if later else "; unset, a single pair may take as much as a head"
            raise torch.OutOfMemoryError(
                f"no memory for a chunk of {size} MiB of logits; lower the budget by TISDPO_CHUNK_MIB "
                f"(now {backend.chunk_bytes(device.type, models, later) >> 20}{pairs}). {error}"
            ) from None

    def logits(self, a: int, b: int) -> tuple[Tensor, Tensor | None]:
        """Raw logits [b-a, V] of rows a..b, without bias; they live until the next call."""
        n = b - a
        z, ref_z = self.buffer[:n], self.buffer[n : 2 * n]
        if self.shared:
            products.logits(torch.cat([self.policy.take(a, b), self.reference.take(a, b)]), self.policy.weight, self.buffer[: 2 * n])
        else:
            self.policy.logits(a, b, z)
            if self.reference is not None:
                self.reference.logits(a, b, ref_z)
        return z, None if self.reference is None else ref_z


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same memory, seen the same way."""
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) == (y.data_ptr(), y.shape, y.stride(), y.dtype)


def row_ranges(start: int, stop: int, rows: int, multiple: int = 1) -> list[tuple[int, int]]:
    """start..stop in equal steps of at most `rows`, or in multiples of `multiple` that leave at least half a step for the last: few rows
    would be a slow product."""
    parts = max(math.ceil((stop - start) / max(rows, 1)), 1)
    step = max(math.ceil((stop - start) / parts), 1)
    wider = math.ceil(step / multiple) * multiple
    if wider <= rows and stop - start - (parts - 1) * wider >= wider // 2:
        step = wider
    return [(a, min(a + step, stop)) for a in range(start, stop, step)]


def heads(hidden, weight, ref_hidden, ref_weight, index) -> tuple[HeadRows, HeadRows | None]:
    """Policy and reference (None without hidden states of it) over the same rows."""
    reference = None if ref_hidden is None else HeadRows(ref_hidden, ref_weight, index)
    return HeadRows(hidden, weight, index), reference


class GradientSums:
    """Gradients of hidden [N, H], weight [V, H] and bias [V] while the chunks go by; those not needed stay empty and cost nothing.

    With dL/dlogits = c_t * d_t: dHidden = c * (D @ W), dWeight = D^T @ (c * hidden), dBias = D^T @ c: the factors go where H is, not V.
    dWeight is summed over the chunks in float32 (`products.SummedRows`), or, for a 16-bit head and few rows, made of all of D at the end,
    which takes less memory (`products.WaitingRows`). Then, and without dWeight and dBias, the factors may come later than D (`later`): by
    `hold` and `scale` instead of `add`. Where all rows are one chunk, and the product rounds itself, it is dWeight already.
    """

    def __init__(self, rows: HeadRows, needs: tuple[bool, bool, bool], most: int, by_columns: bool = False):
        """most: rows of a chunk of whole pairs; by_columns: the gradient is written for ranges of columns, to where it waits."""
        self.rows, self.needs, self.by_columns = rows, needs, by_columns
        self.dtype = dtype = accumulation_dtype(rows.hidden.dtype)
        self.count = len(rows.hidden) if rows.index is None else len(rows.index)
        self.weight = None  # dWeight, of one chunk
        self.alone = needs[1] and self.count <= most and products.rounds_itself(rows.weight)
        self.waits = needs[1] and not self.alone and products.WaitingRows.serves(rows.weight, self.count)
        # every row that carries loss is written below; only the ignored ones need zeros
        empty = rows.hidden.new_empty
        self.hidden = (rows.hidden.new_zeros if self.count < len(rows.hidden) else empty)(rows.hidden.shape) if needs[0] else empty(0)
        self.summed = products.SummedRows(rows.weight) if needs[1] and not (self.waits or self.alone) else None
        self.later = self.waits or not (needs[1] or needs[2])
        self.bias = rows.weight.new_zeros(len(rows.weight), dtype=dtype) if needs[2] and not self.waits else empty(0)
        self.held: list[tuple[int, int, Tensor]] = []  # D @ W of rows a..b, without the factors
        if self.waits:
            self.waiting, self.coefficient = products.WaitingRows(rows.weight, self.count), empty(self.count, dtype=dtype)

    def add(self, a: int, b: int, d: Tensor, coefficient: Tensor) -> None:
        """Add the rows a..b with dL/dlogits = coefficient [b-a] * d [b-a, V]."""
        if self.needs[0]:
            self._set_hidden(a, b, products.grad_hidden(d, self.rows.weight, self.dtype), coefficient)
        if self.needs[1]:
            hidden = self.rows.take(a, b) * coefficient[:, None]
            if self.alone:
                self.weight = products.grad_weight(d, hidden)
            else:
                self.summed.add(d, hidden)
        if self.needs[2]:
            self.bias += products.column_sums(d, coefficient)

    def hold(self, a: int, b: int, gradient) -> None:
        """The rows a..b, whose coefficients follow. gradient(): D [b-a, V], over the logits; gradient(out=d, columns=(first, last)): writes
        these columns of it to d, where `by_columns` says so."""
        if self.waits and self.by_columns:
            for first, last, place in self.waiting.places(a, b):
                gradient(out=place, columns=(first, last))
            if self.needs[0]:
                self.held.append((a, b, self.waiting.grad_hidden(a, b, self.rows.weight)))
            return
        d = gradient()
        if self.waits:
            self.waiting.put(a, b, d)
        if self.needs[0]:
            self.held.append((a, b, products.grad_hidden(d, self.rows.weight, self.dtype)))

    def scale(self, a: int, b: int, coefficient: Tensor) -> None:
        """The coefficients of all rows that are held, a..b."""
        for first, last, grad in self.held:
            self._set_hidden(first, last, grad, coefficient[first - a : last - a])
        self.held.clear()
        if self.waits:
            self.coefficient[a:b] = coefficient

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the dtypes of their inputs; 16-bit ones are rounded once, here."""
        if self.waits:
            if self.needs[2]:
                self.bias = self.waiting.column_sums(self.coefficient)
            hidden = self.rows.take(0, self.count)
            scaled = torch.mul(hidden, self.coefficient[:, None], out=torch.empty_like(hidden, dtype=self.rows.weight.dtype))
            weight = self.waiting.product(scaled)
        elif self.summed is not None:
            weight = self.summed.product()
        elif self.needs[1]:
            weight = self.rows.weight.new_zeros(self.rows.weight.shape) if self.weight is None else self.weight
        else:
            weight = self.rows.weight.new_empty(0)
        return self.hidden, weight, self.bias.to(self.rows.weight.dtype)

    def _set_hidden(self, a: int, b: int, grad: Tensor, coefficient: Tensor) -> None:
        place = slice(a, b) if self.rows.index is None else self.rows.index[a:b]
        self.hidden[place] = grad.mul_(coefficient[:, None]).to(self.hidden.dtype)
