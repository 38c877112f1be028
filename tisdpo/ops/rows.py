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

    def chunk_rows(self, models: int, waits: bool = False) -> int:
        """Rows of a chunk when `models` buffers of logits live at a time, and D elsewhere (`waits`) or in one of them."""
        dtype = accumulation_dtype(self.hidden.dtype)
        return backend.chunk_rows(len(self.weight), models, dtype.itemsize, self.hidden.device.type, waits)


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
    """start..stop in equal steps of at most `rows`: few rows in the last one would be a slow product."""
    parts = max(math.ceil((stop - start) / max(rows, 1)), 1)
    step = max(math.ceil((stop - start) / parts), 1)
    return [(a, min(a + step, stop)) for a in range(start, stop, step)]


def heads(hidden, weight, ref_hidden, ref_weight, index) -> tuple[HeadRows, HeadRows | None]:
    """Policy and reference (None without hidden states of it) over the same rows."""
    reference = None if ref_hidden is None else HeadRows(ref_hidden, ref_weight, index)
    return HeadRows(hidden, weight, index), reference


class GradientSums:
    """Gradients of hidden [N, H], weight [V, H] and bias [V] while the chunks go by; those not needed stay empty and cost nothing.

    With dL/dlogits = c_t * d_t: dHidden = c * (D @ W), dWeight = D^T @ (c * hidden), dBias = D^T @ c: the factors go where H is, not V.
    dWeight is summed over the chunks in a float32 [V, H], or, for a 16-bit head and few rows, made of all of D at the end: that takes less
    memory and less time (`products.WaitingRows`), and the factors may come later than D (`waits`).
    """

    def __init__(self, rows: HeadRows, needs: tuple[bool, bool, bool]):
        self.rows, self.needs = rows, needs
        self.dtype = dtype = accumulation_dtype(rows.hidden.dtype)
        self.count = len(rows.hidden) if rows.index is None else len(rows.index)
        self.waits = needs[1] and products.WaitingRows.serves(rows.weight, self.count)
        # every row that carries loss is written below; only the ignored ones need zeros
        empty = rows.hidden.new_empty
        self.hidden = (rows.hidden.new_zeros if self.count < len(rows.hidden) else empty)(rows.hidden.shape) if needs[0] else empty(0)
        self.weight = empty(rows.weight.shape, dtype=dtype) if needs[1] and not self.waits else empty(0)
        self.bias = rows.weight.new_zeros(len(rows.weight), dtype=dtype) if needs[2] else empty(0)
        self.first = True
        if self.waits:
            self.waiting = products.WaitingRows(rows.weight, self.count)
            self.unscaled = empty(self.count, rows.hidden.shape[1], dtype=dtype) if needs[0] else None
            self.coefficient = empty(self.count, dtype=dtype)

    def add(self, a: int, b: int, d: Tensor, coefficient: Tensor | None = None) -> None:
        """Add the rows a..b with dL/dlogits = coefficient [b-a] * d [b-a, V]; no coefficients: 1."""
        if coefficient is None:
            coefficient = torch.ones(len(d), dtype=self.dtype, device=d.device)
        if self.waits:
            self.hold(a, b, d)
            self.scale(a, b, coefficient)
            return
        if self.needs[0]:
            self._set_hidden(a, b, products.grad_hidden(d, self.rows.weight, self.dtype).mul_(coefficient[:, None]))
        if self.needs[1]:
            products.add_grad_weight_(self.weight, d, self.rows.take(a, b) * coefficient[:, None], first=self.first)
            self.first = False
        if self.needs[2]:
            self.bias += products.column_sums(d, coefficient)

    def hold(self, a: int, b: int, d: Tensor) -> None:
        """d [b-a, V] of the rows a..b, where it waits; their coefficients follow."""
        if self.needs[0]:
            self.unscaled[a:b] = products.grad_hidden(d, self.rows.weight, self.dtype)
        self.waiting.put(a, b, d)

    def scale(self, a: int, b: int, coefficient: Tensor) -> None:
        """The coefficients of rows that wait."""
        self.coefficient[a:b] = coefficient

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the dtypes of their inputs; 16-bit ones are rounded once, here."""
        if self.waits:
            if self.needs[0]:
                self._set_hidden(0, self.count, self.unscaled.mul_(self.coefficient[:, None]))
                self.unscaled = None
            if self.needs[2]:
                self.bias = self.waiting.column_sums(self.coefficient)
            self.weight = self.waiting.product(self.rows.take(0, self.count) * self.coefficient[:, None])
        elif self.needs[1] and self.first:
            self.weight.zero_()  # no row carried loss
        return self.hidden, self.weight.to(self.rows.weight.dtype), self.bias.to(self.rows.weight.dtype)

    def _set_hidden(self, a: int, b: int, grad: Tensor) -> None:
        self.hidden[slice(a, b) if self.rows.index is None else self.rows.index[a:b]] = grad.to(self.hidden.dtype)
