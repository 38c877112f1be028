"""Checks of tensor values, made inside the operators: on a CPU they raise a sentence, on a device they assert without waiting for it."""

import torch
from torch import Tensor

NOTHING = -(1 << 63)  # the ignore_index of targets of which every position counts: the operators take a number


def require(condition: Tensor, message: str, worst=None) -> None:
    """Raise ValueError(message) unless every element of `condition` holds; `worst()` adds what came, on a CPU."""
    if condition.device.type != "cpu":
        torch._assert_async(condition.all(), message)
    elif not condition.all():
        raise ValueError(message + (f", got {worst()}" if worst else ""))


def target(x: Tensor, vocabulary: int, ignore_index: int) -> None:
    good = (x >= 0) & (x < vocabulary)
    good = good if ignore_index == NOTHING else good | (x == ignore_index)
    other = "" if ignore_index == NOTHING else f" or ignore_index={ignore_index}"
    require(good, f"target must be in 0..{vocabulary - 1}{other}", lambda: _first(x, good))


def token_weights(x: Tensor | None) -> None:
    if x is not None:
        good = x.isfinite() & (x >= 0)
        require(good, "token_weights must be finite and not negative", lambda: _first(x, good))


def finite(name: str, x: Tensor | None) -> None:
    if x is not None:
        good = x.isfinite()
        require(good, f"{name} must be finite", lambda: _first(x, good))


def cu_seqlens(x: Tensor, tokens: int) -> None:
    require(
        (x[:1] == 0) & (x[-1:] == tokens),
        f"cu_seqlens must start at 0 and end at the number of tokens, {tokens}",
        lambda: f"{x[0]} and {x[-1]}",
    )
    grows = x.diff() >= 0
    require(grows, "cu_seqlens must not decrease", lambda: f"{x.tolist()[:20]}")


def _first(x: Tensor, good: Tensor) -> str:
    place = (~good).flatten().nonzero()[0, 0].item()
    return f"{x.flatten()[place].item()} at position {place}"
