"""Inputs of the tests of Triton kernels, on a GPU where there is one, else on the CPU, where Triton's interpreter runs them."""

import cases
import torch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def make_case(*args, **options):
    with torch.device("cpu"):
        case = cases.make_case(*args, **options)
    for name, x in vars(case).items():
        setattr(case, name, x.to(DEVICE))
    return case


def normal(*shape, seed=0, scale=3.0, dtype=torch.float32):
    g = torch.Generator("cpu").manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu")).to(DEVICE, dtype)
