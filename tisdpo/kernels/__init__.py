"""Triton kernels and their launchers; they import torch, triton and each other. `tisdpo.ops` calls them."""
