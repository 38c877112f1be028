"""The matrix products of the head, by the vendor library. Logits and dWeight accumulate in float32 whatever the dtype of the inputs.

16-bit inputs: a CUDA product hands out its float32 accumulators (`out_dtype`); elsewhere the weight is widened to float32 a slice of
the vocabulary at a time, so that no float32 copy of the head exists. Products of float32 operands are written as `out=` or in-place
calls: autocast, which may be on while an operator runs, would round the operands of the others to 16 bits.
"""

import torch
from torch import Tensor

SLICE_BYTES = 32 << 20  # of a widened slice of the head


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """hidden [n, H] @ weight [V, H].T + bias [V] into out [n, V] (float32 or float64)."""
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.device.type == "cuda":
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for a, b in _slices(weight, out.dtype):
            torch.mm(wide, weight[a:b].to(out.dtype).T, out=out[:, a:b])
    return out if bias is None else out.add_(bias)


def grad_hidden(d: Tensor, weight: Tensor) -> Tensor:
    """d [n, V] @ weight [V, H] -> [n, H] in the dtype of d."""
    if weight.dtype == d.dtype:
        return torch.mm(d, weight, out=d.new_empty(d.shape[0], weight.shape[1]))
    if d.device.type == "cuda":
        return torch.mm(d.to(weight.dtype), weight, out_dtype=d.dtype)
    total = d.new_zeros(d.shape[0], weight.shape[1])
    for a, b in _slices(weight, d.dtype):
        total.addmm_(d[:, a:b], weight[a:b].to(d.dtype))
    return total


def add_grad_weight_(total: Tensor, d: Tensor, hidden: Tensor, dtype: torch.dtype, *, first: bool) -> None:
    """total [V, H] += d [n, V].T @ hidden [n, H], all in the accumulation dtype; `first` writes instead, so total need not be zeroed.

    Where a 16-bit product with float32 accumulators exists, the operands are rounded to `dtype` (that of the model) for it.
    """
    if d.device.type == "cuda" and dtype != d.dtype:
        product = torch.mm(d.to(dtype).T, hidden.to(dtype), out_dtype=total.dtype)
        total.copy_(product) if first else total.add_(product)
    else:
        torch.addmm(total, d.T, hidden, beta=0.0 if first else 1.0, out=total)


def _slices(weight: Tensor, dtype: torch.dtype):
    rows = max(1, SLICE_BYTES // (max(weight.shape[1], 1) * dtype.itemsize))
    return [(a, min(a + rows, len(weight))) for a in range(0, len(weight), rows)]
