"""The rows that carry loss, and the head over a range of them: what the one-pass and the two-pass drivers share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tisdpo.ops import backend, products


@dataclass(frozen=True)
class HeadRows:
    """Hidden states [N, H] with their head, seen through the index of the rows that carry loss (None: all of them)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    index: Tensor | None

    def take(self, a: int, b: int) -> Tensor:
        """Hidden states of the rows a..b that carry loss."""
        return self.hidden[a:b] if self.index is None else self.hidden[self.index[a:b]]

    def logits(self, a: int, b: int, out: Tensor) -> Tensor:
        """Raw logits of rows a..b, written to the first b - a rows of `out` [rows, V]."""
        return products.logits(self.take(a, b), self.weight, self.bias, out[: b - a])

    def buffer(self, rows: int) -> Tensor:
        """Room for the logits of `rows` rows, in the accumulation dtype."""
        return torch.empty(rows, len(self.weight), dtype=products.accumulation_dtype(self.hidden.dtype), device=self.hidden.device)

    def chunk_rows(self, models: int) -> int:
        """Rows of a chunk when `models` buffers of logits live at a time."""
        dtype = products.accumulation_dtype(self.hidden.dtype)
        return backend.chunk_rows(len(self.weight), models, dtype.itemsize, self.hidden.device.type)


class Tiles:
    """Logits of policy and reference for a range of rows, in two buffers that are used again and again."""

    def __init__(self, policy: HeadRows, reference: HeadRows | None, rows: int):
        self.policy, self.reference = policy, reference
        self.z, self.ref_z = policy.buffer(rows), None if reference is None else reference.buffer(rows)

    def logits(self, a: int, b: int) -> tuple[Tensor, Tensor | None]:
        """Raw logits [b-a, V] of rows a..b; they live until the next call."""
        return self.policy.logits(a, b, self.z), None if self.reference is None else self.reference.logits(a, b, self.ref_z)


def row_ranges(start: int, stop: int, rows: int) -> list[tuple[int, int]]:
    """start..stop in steps of `rows`."""
    return [(a, min(a + rows, stop)) for a in range(start, stop, rows)]


def heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, index) -> tuple[HeadRows, HeadRows | None]:
    """Policy and reference (None without hidden states of it) over the same rows."""
    reference = None if ref_hidden is None else HeadRows(ref_hidden, ref_weight, ref_bias, index)
    return HeadRows(hidden, weight, bias, index), reference


def kept_rows(target: Tensor, ignore_index: int) -> Tensor | None:
    """Index of the rows whose target is not ignored, or None when that is all of them. The one place where the host waits for a count."""
    keep = target != ignore_index
    index = keep.nonzero()[:, 0]
    return None if len(index) == len(target) else index


class GradientSums:
    """Gradients of hidden [N, H], weight [V, H] and bias [V] while the chunks go by; those not needed stay empty and cost nothing."""

    def __init__(self, rows: HeadRows, needs: tuple[bool, bool, bool]):
        self.rows, self.needs = rows, needs
        dtype = products.accumulation_dtype(rows.hidden.dtype)
        count = len(rows.hidden) if rows.index is None else len(rows.index)
        # every row that carries loss is written below; only the ignored ones need zeros
        empty = rows.hidden.new_empty
        self.hidden = (rows.hidden.new_zeros if count < len(rows.hidden) else empty)(rows.hidden.shape) if needs[0] else empty(0)
        self.weight = empty(rows.weight.shape, dtype=dtype) if needs[1] else empty(0)
        self.bias = rows.weight.new_zeros(len(rows.weight), dtype=dtype) if needs[2] else empty(0)
        self.first = True

    def add(self, a: int, b: int, d: Tensor, coefficient: Tensor | None) -> None:
        """Add the rows a..b with dL/dlogits = coefficient [b-a] * d [b-a, V]: the factor goes to the skinny operands."""
        rows = self.rows
        if self.needs[0]:
            grad = products.grad_hidden(d, rows.weight)
            grad = grad if coefficient is None else grad.mul_(coefficient[:, None])
            place = slice(a, b) if rows.index is None else rows.index[a:b]
            self.hidden[place] = grad.to(self.hidden.dtype)
        if self.needs[1]:
            hidden = rows.take(a, b).to(d.dtype)
            hidden = hidden if coefficient is None else hidden * coefficient[:, None]
            products.add_grad_weight_(self.weight, d, hidden, rows.hidden.dtype, first=self.first)
            self.first = False
        if self.needs[2]:
            self.bias += d.sum(0) if coefficient is None else torch.mv(d.T, coefficient, out=torch.empty_like(self.bias))

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the dtypes of their inputs; 16-bit ones are rounded once, here."""
        if self.needs[1] and self.first:
            self.weight.zero_()  # no row carried loss
        return self.hidden, self.weight.to(self.rows.weight.dtype), self.bias.to(self.rows.weight.dtype)
