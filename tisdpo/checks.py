"""Checks of tensor arguments: shapes, dtypes, devices. Each raises one sentence with the name, what was expected and what came.

Nothing here reads a value of a tensor, so that nothing waits for a device or breaks a compiled graph; values are checked inside the
operators (`ops.values`).
"""

import math

import torch
from torch import Tensor

from tisdpo.ops import values
from tisdpo.ops.fold import Transform

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def tensor(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def option(name: str, x, kind: type):
    """x, or kind() where it is None."""
    if x is None:
        return kind()
    if not isinstance(x, kind):
        raise TypeError(f"{name} must be a tisdpo.{kind.__name__} or None, got {type(x).__name__}: {x!r}")
    return x


def floating(name: str, x, min_dim: int = 0) -> None:
    tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() < min_dim:
        raise ValueError(f"{name} must have at least {min_dim} dimension, got shape {tuple(x.shape)}")


def same(name: str, x: Tensor | None, other: str, y: Tensor, dtype: bool = True) -> None:
    """x, if given, has the shape (and dtype) of y."""
    if x is None:
        return
    floating(name, x)
    if x.shape != y.shape:
        raise ValueError(f"{name} must have the shape {tuple(y.shape)} of {other}, got {tuple(x.shape)}")
    if dtype and x.dtype != y.dtype:
        raise TypeError(f"{name} must have the dtype {y.dtype} of {other}, got {x.dtype}")


def head(name: str, weight, bias_name: str, bias, hidden_name: str, hidden: Tensor) -> None:
    """weight is [V, H] for hidden [..., H], bias [V] or None."""
    floating(name, weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name} must be [V, {hidden.shape[-1]}] to go with {hidden_name} {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        floating(bias_name, bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{bias_name} must be [{weight.shape[0]}] to go with {name} {tuple(weight.shape)}, got {tuple(bias.shape)}")


def target(x, shape, vocabulary: int, ignore_index: int | None, what: str) -> int:
    """The ignore_index that the operators take; for None one that no target has."""
    tensor("target", x)
    if x.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"target must have the shape {tuple(shape)} of {what}, got {tuple(x.shape)}")
    if ignore_index is None:
        return values.NOTHING
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer outside the vocabulary 0..{vocabulary - 1}, or None, got {ignore_index!r}")
    if 0 <= ignore_index < vocabulary:
        raise ValueError(f"ignore_index must lie outside the vocabulary 0..{vocabulary - 1}, or be None, got {ignore_index}")
    return ignore_index


def mask(name: str, x, shape) -> None:
    tensor(name, x)
    if x.dtype != torch.bool or x.shape != shape:
        raise ValueError(f"{name} must be a bool tensor of shape {tuple(shape)}, got {x.dtype} {tuple(x.shape)}")


def cu_seqlens(x, tokens: int) -> None:
    tensor("cu_seqlens", x)
    if x.dtype not in INTEGERS:
        raise TypeError(f"cu_seqlens must be int32 or int64, got {x.dtype}")
    if x.dim() != 1 or len(x) < 1:
        raise ValueError(f"cu_seqlens must be [S + 1], boundaries from 0 to {tokens}, got shape {tuple(x.shape)}")


def weights(x, like: Tensor) -> Tensor:
    floating("token_weights", x)
    if x.shape != like.shape:
        raise ValueError(f"token_weights must have one weight a token, shape {tuple(like.shape)}, got {tuple(x.shape)}")
    if x.requires_grad:
        raise ValueError("token_weights requires a gradient, but weights are constants of the loss: pass token_weights.detach()")
    return x


def constants(**tensors: Tensor | None) -> None:
    """Inputs of the reference must not ask for a gradient: they never get one."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, but the reference is a constant of the loss: pass {name}.detach()"
                + ("" if x.is_leaf else " or compute it under torch.no_grad()")
            )


def same_device(**tensors: Tensor | None) -> None:
    _all_equal("device", {name: x.device for name, x in tensors.items() if x is not None}, ValueError)


def same_dtype(**tensors: Tensor | None) -> None:
    remedy = "; convert the hidden states to the dtype of their head"
    _all_equal("dtype", {name: x.dtype for name, x in tensors.items() if x is not None}, TypeError, remedy)


def _all_equal(what: str, found: dict, error: type[Exception], remedy: str = "") -> None:
    if len(set(found.values())) > 1:
        came = ", ".join(f"{name} {value}" for name, value in found.items())
        raise error(f"{', '.join(found)} must share one {what}, got {came}{remedy}")


def transform(logit_scale: float, softcap: float | None, temperature: float) -> Transform:
    if not 0 < logit_scale < math.inf:  # math.isfinite would break a compiled graph with dynamic shapes
        raise ValueError(f"logit_scale must be positive and finite, got {logit_scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    return Transform(float(logit_scale), None if softcap is None else float(softcap), float(temperature))
