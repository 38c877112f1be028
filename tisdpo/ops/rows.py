"""The rows that carry loss, and the head over a range of them: what the one-pass and the two-pass drivers share.

A range of rows is visited in one of two ways (`Visits`). Any backend: logits into a buffer, the fold's statistics over them, its gradient
in their place or where it waits. By Triton, for bfloat16, on chips with a row in `kernels.configs.PRODUCT`: products that leave D and the
statistics, and no logits (`tisdpo.kernels.head`, with KL `tisdpo.kernels.head_kl`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tisdpo.ops import backend, fold, products
from tisdpo.ops.backend import accumulation_dtype

HIDDEN_ROWS = 2048  # of float32 D @ W at a time where D lies ready: as fast as more, see benchmarks/NOTES.md
DIRECT_ROWS = 1 << 14  # of a visit that needs no memory for logits or D
TILE_COLUMNS = 256  # or more of the kernel's tiles


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

    def chunk_rows(self, models: int, later: bool, no_logits: bool) -> int:
        """Rows of a chunk: as many as the budget allows logits of, of `models` models at a time; `later`: nothing in them waits for its
        pair. no_logits: as many as it allows D of, and with two models exponentials of the other, whatever `later` says."""
        size, device = len(self.weight), self.hidden.device
        if no_logits:
            return backend.chunk_rows(size, models, products.gradient_dtype(device, self.weight.dtype).itemsize, device.type, True)
        return backend.chunk_rows(size, models, accumulation_dtype(self.hidden.dtype).itemsize, device.type, later)

    def ranges(self, start: int, stop: int, rows: int) -> list[tuple[int, int]]:
        """start..stop in steps of at most `rows`, see `row_ranges`."""
        return row_ranges(start, stop, rows, backend.row_multiple(self.hidden.device.type))


class Tiles:
    """Logits of policy and reference for a range of rows, in one buffer that is used again and again.

    Where both have the same head (LoRA, or a frozen tied one), their hidden states are stacked: the head is read once.
    """

    def __init__(self, policy: HeadRows, reference: HeadRows | None, rows: int):
        self.policy, self.reference = policy, reference
        self.shared = reference is not None and same_memory(policy.weight, reference.weight)
        models = 1 if reference is None else 2
        dtype, device = accumulation_dtype(policy.hidden.dtype), policy.hidden.device
        self.buffer = torch.empty(models * rows, len(policy.weight), dtype=dtype, device=device)

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


class Visits:
    """Statistics and D = dscore/dlogits of one range of rows after the other, in memory that is used again and again."""

    def __init__(
        self, policy: HeadRows, reference: HeadRows | None, folds: fold.Fold, no_logits: bool, grads: "GradientSums | None", rows: int,
        *, apart: bool = False,
    ):  # fmt: skip
        """no_logits: see `needs_no_logits`; grads: for whom D is, None for statistics alone; rows: the most of a range; apart: visits will
        be those of that name."""
        if folds.backend == "cpp":  # which reads them in float32, once a range of columns
            folds = folds._replace(bias=fold.wide(folds.bias), ref_bias=fold.wide(folds.ref_bias))
        self.policy, self.reference, self.folds, self.no_logits, self.grads = policy, reference, folds, no_logits, grads
        self.dtype = products.gradient_dtype(policy.weight.device, policy.weight.dtype)
        if not no_logits:
            self.tiles = Tiles(policy, reference, rows)
            if apart and folds.kl is not None:
                self.d = torch.empty(rows, len(policy.weight), dtype=self.dtype, device=policy.weight.device)
            return
        # D, where it does not wait elsewhere, and with KL the exponentials of another model
        count = (grads is not None and not grads.waits) + (folds.kl is not None)
        self.memory = torch.empty(count * rows, len(policy.weight), dtype=self.dtype, device=policy.weight.device)

    def visit(
        self, a: int, b: int, target: Tensor, g_kl: Tensor | None = None, *, g_logp: Tensor | None = None, wanted: bool = False,
        stats: fold.Statistics | None = None,
    ) -> tuple[fold.Statistics, Tensor | None]:  # fmt: skip
        """Statistics of rows a..b, target [b - a], and where `wanted` D [b - a, V] for upstream g_logp (None: ones) and, with KL, g_kl.

        D is still to be multiplied by the `factor` of these statistics, if there is one; it lives until the next visit, and is None where
        it was written to the places of `grads`. stats: those of an earlier visit; what D does not need is not found again."""
        places = self.grads.places(a, b) if wanted else None
        if self.no_logits:
            d = self.memory[: b - a] if wanted and places is None else None
            places = places if d is None else [(0, len(self.policy.weight), d)]
            return self._without_logits(a, b, target, places, g_logp, g_kl, stats), d
        z, ref_z = self.tiles.logits(a, b)
        stats = self.folds.statistics(z, target, ref_z) if stats is None else stats
        if not wanted:
            return stats, None
        if places is None:
            return stats, self.folds.gradient(z, target, ref_z, stats, g_logp, g_kl, dtype=self.dtype)
        for first, last, d in places:
            self.folds.gradient(z, target, ref_z, stats, g_logp, g_kl, dtype=self.dtype, out=d, columns=(first, last))
        return stats, None

    def visit_apart(self, a: int, b: int, target: Tensor) -> tuple[fold.Statistics, Tensor, Tensor | None]:
        """Statistics of rows a..b, and D [b - a, V] of the log-probs alone (see `visit`) and of the KL alone, None where there is none."""
        if self.folds.kl is None:
            return *self.visit(a, b, target, wanted=True), None
        z, ref_z = self.tiles.logits(a, b)
        stats = self.folds.statistics(z, target, ref_z)
        of_logps = self.folds._replace(kl=None).gradient(z, target, None, stats, None, None, dtype=self.dtype, out=self.d[: b - a])
        nothing, one = torch.zeros_like(stats.logp), torch.ones_like(stats.logp)
        return stats, of_logps, self.folds.gradient(z, target, ref_z, stats, nothing, one, dtype=self.dtype)

    def _without_logits(self, a, b, target, places, g_logp, g_kl, stats) -> fold.Statistics:
        from tisdpo.kernels.head import exponentials
        from tisdpo.kernels.head_kl import divergences

        policy, reference, transform, other = self.policy, self.reference, self.folds.transform, self.memory[a - b :]
        if self.folds.kl is not None:
            inputs = (policy.take(a, b), policy.weight, reference.take(a, b), reference.weight, target)
            memory = ([(0, len(policy.weight), other)], None) if places is None else (places, other)
            return fold.Statistics(
                *divergences(*inputs, *memory, g_logp, g_kl, self.folds.kl, transform.logit_scale, transform.temperature)
            )
        lse, logp, factor = exponentials(policy.take(a, b), policy.weight, target, self.folds.bias, places, *transform)
        factor = factor if g_logp is None else factor * g_logp
        ref_lse, ref_logp = (None, None) if stats is None else (stats.ref_lse, stats.ref_logp)
        if reference is not None and stats is None:
            ref_lse, ref_logp, _ = exponentials(reference.take(a, b), reference.weight, target, self.folds.ref_bias, None, *transform)
        return fold.Statistics(lse, logp, ref_lse, ref_logp, None, factor)


def needs_no_logits(policy: HeadRows, reference: HeadRows | None, folds: fold.Fold) -> bool:
    """Whether D comes from the product itself, see the head of this module. reference: that of which log-probs, and with KL logits, are
    needed."""
    if folds.backend != "triton":
        return False
    plain = folds.bias is None and folds.ref_bias is None and folds.transform.softcap is None and folds.transform.logit_scale > 0
    if folds.kl is not None and not plain:  # not registers enough for more
        return False
    from tisdpo.kernels.head import serves

    return all(serves(rows.hidden, rows.weight) for rows in (policy, reference) if rows is not None)


def visit_rows(policy: HeadRows, models: int, no_logits: bool, grads: "GradientSums | None") -> int:
    """The most rows of a visit. models: whose logits (or exponentials) live at a time; grads: for whom D is, None for statistics alone."""
    rows = policy.chunk_rows(models, grads is None or grads.later, no_logits)
    if no_logits and models == 1 and (grads is None or grads.waits):  # what is needed then: two float32 partial results a row and tile
        sums = 8 * math.ceil(len(policy.weight) / TILE_COLUMNS)
        return max(rows, min(DIRECT_ROWS, backend.chunk_bytes(policy.weight.device.type, 1, True) // sums))
    return rows


def same_memory(x: Tensor, y: Tensor) -> bool:
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
    dWeight is summed over the chunks in float32 (`products.SummedRows`), or, for few rows (not of a float32 head on a GPU), made of all of
    D at the end, in less memory (`products.WaitingRows`). Then, and without dWeight and dBias, the factors may come later (`later`): by
    `hold` and `scale` instead of `add`. Where all rows are one chunk, and the product rounds itself, it is dWeight already.
    """

    def __init__(
        self, rows: HeadRows, needs: tuple[bool, bool, bool], most: int, *, wide: bool = False,
        waiting: products.WaitingRows | None = None,
    ):  # fmt: skip
        """most: rows of a chunk of whole pairs; wide: the gradient of hidden stays in the accumulation dtype; waiting: where D is to wait,
        or does so already."""
        self.rows, self.needs = rows, needs
        self.dtype = dtype = accumulation_dtype(rows.hidden.dtype)
        self.count = len(rows.hidden) if rows.index is None else len(rows.index)
        self.weight = None  # dWeight, of one chunk
        self.alone = waiting is None and needs[1] and self.count <= most and products.rounds_itself(rows.weight)
        serves = needs[1] and not self.alone and products.WaitingRows.serves(rows.weight, self.count)
        self.waits = waiting is not None or serves
        # every row that carries loss is written below; only the ignored ones need zeros
        empty = rows.hidden.new_empty
        make = rows.hidden.new_zeros if self.count < len(rows.hidden) else empty
        self.hidden = make(rows.hidden.shape, dtype=dtype if wide else rows.hidden.dtype) if needs[0] else empty(0)
        self.summed = products.SummedRows(rows.weight) if needs[1] and not (self.waits or self.alone) else None
        self.later = self.waits or not (needs[1] or needs[2])
        self.bias = rows.weight.new_zeros(len(rows.weight), dtype=dtype) if needs[2] and not self.waits else empty(0)
        self.held: list[tuple[int, int, Tensor | None]] = []  # D @ W of rows a..b, without the factors; None: of the D that waits
        if self.waits:
            self.waiting = waiting or products.WaitingRows(rows.weight, self.count)
            self.coefficient = empty(self.count, dtype=dtype)

    def add(self, a: int, b: int, d: Tensor | None, coefficient: Tensor) -> None:
        """Add the rows a..b with dL/dlogits = coefficient [b-a] * d [b-a, V], d as for `hold`."""
        if self.later:
            self.hold(a, b, d)
            if self.waits:
                self.coefficient[a:b] = coefficient  # D @ W of all rows is one product, see `result`
            else:
                self.scale(a, b, coefficient)
            return
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

    def places(self, a: int, b: int) -> list[tuple[int, int, Tensor]] | None:
        """(first, last, D [b-a, last-first]) for all ranges of columns, where D of the rows a..b waits; None: it does not."""
        return self.waiting.places(a, b) if self.waits else None

    def hold(self, a: int, b: int, d: Tensor | None) -> None:
        """The rows a..b, whose coefficients follow, with D [b-a, V], or None where it is in its `places`."""
        assert d is None or not self.waits, "where D waits it is written to its places"
        if not self.needs[0]:
            return
        if d is None and self.held:  # one product for rows that follow each other
            self.held[-1] = (self.held[-1][0], b, None)
        else:
            self.held.append((a, b, None if d is None else products.grad_hidden(d, self.rows.weight, self.dtype)))

    def scale(self, a: int, b: int, coefficient: Tensor) -> None:
        """The coefficients of all rows that are held, a..b."""
        for first, last, grad in self.held:
            if grad is not None:
                self._set_hidden(first, last, grad, coefficient[first - a : last - a])
                continue
            for i, j in row_ranges(first, last, HIDDEN_ROWS):
                self._set_hidden(i, j, self.waiting.grad_hidden(i, j, self.rows.weight), coefficient[i - a : j - a])
        self.held.clear()
        if self.waits:
            self.coefficient[a:b] = coefficient

    def result(self, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the dtypes of their inputs; 16-bit ones are rounded once, here. out: for dWeight, where D is to stay."""
        if self.waits:
            self.scale(0, self.count, self.coefficient)
            self.bias = self.waiting.column_sums(self.coefficient) if self.needs[2] else self.bias
        if self.waits and self.needs[1]:
            hidden = self.rows.take(0, self.count)
            scaled = torch.mul(hidden, self.coefficient[:, None], out=torch.empty_like(hidden, dtype=self.rows.weight.dtype))
            weight = self.waiting.product(scaled, out)
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
