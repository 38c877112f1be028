"""The matrix products of the head, by the vendor library. Logits and dWeight accumulate in float32 whatever the dtype of the inputs.

16-bit inputs: a GPU's product hands out its float32 accumulators (`out_dtype`); elsewhere the weight is widened to float32 a slice of
the vocabulary at a time, so that no float32 copy of the head exists. Products of float32 operands are written as `out=` or in-place
calls: autocast, which may be on while an operator runs, would round the operands of the others to 16 bits.
"""

from functools import cache

import torch
from torch import Tensor

SLICE_BYTES = 32 << 20  # of a widened slice of the head, or of a slice of dWeight
CACHED_BYTES = 4 << 20  # of a slice of the head in the product of a CPU's logits: 5 to 20 % faster than in one call (benchmarks/NOTES.md)


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """hidden [n, H] @ weight [V, H].T into out [n, V] (float32 or float64)."""
    if hidden.dtype == out.dtype:
        for a, b in _slices(weight, out.dtype, CACHED_BYTES) if hidden.device.type == "cpu" else [(0, len(weight))]:
            torch.mm(hidden, weight[a:b].T, out=out[:, a:b])
    elif hidden.dtype in (torch.float16, torch.bfloat16) and out.dtype == torch.float32 and gives_accumulators(hidden.device):
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for a, b in _slices(weight, out.dtype):
            torch.mm(wide, weight[a:b].to(out.dtype).T, out=out[:, a:b])
    return out


def gradient_dtype(weight: Tensor, accumulation: torch.dtype) -> torch.dtype:
    """The dtype in which the two products below want dL/dlogits: that of the head where they can multiply it with float32 accumulators."""
    return weight.dtype if gives_accumulators(weight.device) else accumulation


def grad_hidden(d: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """d [n, V] @ weight [V, H] -> [n, H] in `dtype`, the accumulation dtype; d as `gradient_dtype` says."""
    if weight.dtype == dtype:
        return torch.mm(d, weight, out=d.new_empty(d.shape[0], weight.shape[1]))
    if weight.dtype == d.dtype:
        return torch.mm(d, weight, out_dtype=dtype)
    total = d.new_zeros(d.shape[0], weight.shape[1])
    for a, b in _slices(weight, d.dtype):
        total.addmm_(d[:, a:b], weight[a:b].to(d.dtype))
    return total


def add_grad_weight_(total: Tensor, d: Tensor, hidden: Tensor, *, first: bool) -> None:
    """total [V, H] += d [n, V].T @ hidden [n, H] in the dtype of total; `first` writes instead, so total need not be zeroed.

    hidden is rounded to the dtype of d, a 16-bit one where the product has float32 accumulators. No [V, H] temporary is made.
    """
    hidden = hidden.to(d.dtype)
    if d.dtype == total.dtype:
        torch.addmm(total, d.T, hidden, beta=0.0 if first else 1.0, out=total)
    elif first:
        torch.mm(d.T, hidden, out_dtype=total.dtype, out=total)
    elif adds_in_place(total.device):
        torch.addmm(total, d.T, hidden, out_dtype=total.dtype, out=total)
    else:
        for a, b in _slices(total, total.dtype):
            total[a:b] += torch.mm(d[:, a:b].T, hidden, out_dtype=total.dtype)


def column_sums(d: Tensor, coefficient: Tensor) -> Tensor:
    """d [n, V].T @ coefficient [n] -> [V] in the dtype of the coefficient."""
    if d.dtype == coefficient.dtype:
        return torch.mv(d.T, coefficient, out=coefficient.new_empty(d.shape[1]))
    return torch.mm(d.T, coefficient.to(d.dtype)[:, None], out_dtype=coefficient.dtype)[:, 0]


@cache
def gives_accumulators(device: torch.device) -> bool:
    """Whether a product of 16-bit operands on this device can be had in float32."""
    return device.type != "cpu" and _works(lambda x: torch.mm(x, x, out_dtype=torch.float32), device)


@cache
def adds_in_place(device: torch.device) -> bool:
    """Whether such a product can be added to a float32 matrix in the library (torch releases differ)."""
    total = torch.zeros(16, 16, device=device)
    return _works(lambda x: torch.addmm(total, x, x, out_dtype=torch.float32, out=total), device)


def _works(product, device: torch.device) -> bool:
    try:
        product(torch.zeros(16, 16, dtype=torch.bfloat16, device=device))
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def _slices(weight: Tensor, dtype: torch.dtype, size: int = SLICE_BYTES):
    rows = max(1, size // (max(weight.shape[1], 1) * dtype.itemsize))
    return [(a, min(a + rows, len(weight))) for a in range(0, len(weight), rows)]
