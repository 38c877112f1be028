"""What every launcher needs."""

from contextlib import nullcontext

import torch
from torch import Tensor

# An option of every launch. Up to Triton 3.9 products and sums become fused multiply-adds unless one asks for the contrary, and that is
# what was measured; 3.9 warns that later ones will need to be asked for it.
FUSED = {"enable_fp_fusion": True}


def on(device: torch.device):
    """Triton launches on the current device: make it this one."""
    return nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)


def some(x: Tensor | None, other: Tensor) -> Tensor:
    """x with its values one after the other (autograd sends expanded gradients), or any pointer where a kernel does not read it."""
    return other if x is None else x.contiguous()
