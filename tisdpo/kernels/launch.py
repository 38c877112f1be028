"""What every launcher needs."""

from contextlib import nullcontext

import torch
from torch import Tensor


def on(device: torch.device):
    """Triton launches on the current device: make it this one."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


def some(x: Tensor | None, other: Tensor) -> Tensor:
    """x with its values one after the other (autograd sends expanded gradients), or any pointer where a kernel does not read it."""
    return other if x is None else x.contiguous()
