"""The rows that carry loss, and the head over a range of them: what the one-pass and the two-pass drivers share."""

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

    def chunk_rows(self, models: int) -> int:
        """Rows of a chunk when `models` buffers of logits live at a time."""
        dtype = accumulation_dtype(self.hidden.dtype)
        return backend.chunk_rows(len(self.weight), models, dtype.itemsize, self.hidden.device.type)


class Tiles:
    """Logits of policy and reference for a range of rows, in one buffer that is used again and again.

    Where both have the same head (LoRA, or a frozen tied one), their hidden states are stacked: the head is read once.
    """

    def __init__(self, policy: HeadRows, reference: HeadRows | None, rows: int):
        self.policy, self.reference, self.rows = policy, reference, rows
        self.shared = reference is not None and _same(policy.weight, reference.weight)
        models = 1 if reference is None else 2
        dtype, device = accumulation_dtype(policy.hidden.dtype), policy.hidden.device
        try:
            self.buffer = torch.empty(models * rows, len(policy.weight), dtype=dtype, device=device)
        except torch.OutOfMemoryError as error:
            size = models * rows * len(policy.weight) * dtype.itemsize >> 20
            raise torch.OutOfMemoryError(
                f"no memory for a chunk of {size} MiB of logits; lower the budget by TISDPO_CHUNK_MIB "
                f"(now {backend.chunk_bytes(device.type, models) >> 20}; unset, a single pair may take as much as a head). {error}"
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


def row_ranges(start: int, stop: int, rows: int) -> list[tuple[int, int]]:
    """start..stop in steps of `rows`."""
    return [(a, min(a + rows, stop)) for a in range(start, stop, rows)]


def heads(hidden, weight, ref_hidden, ref_weight, index) -> tuple[HeadRows, HeadRows | None]:
    """Policy and reference (None without hidden states of it) over the same rows."""
    reference = None if ref_hidden is None else HeadRows(ref_hidden, ref_weight, index)
    return HeadRows(hidden, weight, index), reference


class GradientSums:
    """Gradients of hidden [N, H], weight [V, H] and bias [V] while the chunks go by; those not needed stay empty and cost nothing.

    dWeight = D^T @ (c * hidden) is summed over the chunks in a float32 [V, H], or, for a 16-bit head and few rows, made of all of D at the
    end: that takes less memory and less time (`products.WaitingRows`).
    """

    def __init__(self, rows: HeadRows, needs: tuple[bool, bool, bool]):
        self.rows, self.needs = rows, needs
        self.dtype = dtype = accumulation_dtype(rows.hidden.dtype)
        count = len(rows.hidden) if rows.index is None else len(rows.index)
        # every row that carries loss is written below; only the ignored ones need zeros
        empty = rows.hidden.new_empty
        self.hidden = (rows.hidden.new_zeros if count < len(rows.hidden) else empty)(rows.hidden.shape) if needs[0] else empty(0)
        waits = needs[1] and products.WaitingRows.serves(rows.weight, count)
        self.waiting = products.WaitingRows(rows.weight, count) if waits else None
        self.weight = empty(rows.weight.shape, dtype=dtype) if needs[1] and not waits else empty(0)
        self.bias = rows.weight.new_zeros(len(rows.weight), dtype=dtype) if needs[2] else empty(0)
        self.first = True

    def add(self, a: int, b: int, d: Tensor, coefficient: Tensor | None) -> None:
        """Add the rows a..b with dL/dlogits = coefficient [b-a] * d [b-a, V]: the factor goes to the skinny operands."""
        rows = self.rows
        if self.needs[0]:
            grad = products.grad_hidden(d, rows.weight, self.dtype)
            grad = grad if coefficient is None else grad.mul_(coefficient[:, None])
            place = slice(a, b) if rows.index is None else rows.index[a:b]
            self.hidden[place] = grad.to(self.hidden.dtype)
        if self.needs[1]:
            hidden = rows.take(a, b)
            hidden = hidden if coefficient is None else hidden * coefficient[:, None]
            if self.waiting is not None:
                self.waiting.put(a, b, d, hidden)
            else:
                products.add_grad_weight_(self.weight, d, hidden, first=self.first)
            self.first = False
        if self.needs[2]:
            ones = torch.ones(len(d), dtype=self.dtype, device=d.device) if coefficient is None else coefficient
            self.bias += products.column_sums(d, ones)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the dtypes of their inputs; 16-bit ones are rounded once, here."""
        if self.waiting is not None:
            self.weight = self.waiting.product()
        elif self.needs[1] and self.first:
            self.weight.zero_()  # no row carried loss
        return self.hidden, self.weight.to(self.rows.weight.dtype), self.bias.to(self.rows.weight.dtype)
