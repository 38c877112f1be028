"""Random inputs of the awkward shapes that every operator is tested on."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tisdpo import reference
from tisdpo.ops import backend

# The backends that can run on a CPU: torch, Triton in its interpreter (which a machine with a GPU does without), C++ where it was built.
BACKENDS = [name for name, reason in backend.available("cpu").items() if not reason]

# (logit_scale, softcap, temperature)
TRANSFORMS = {"plain": (1.0, None, 1.0), "scaled": (0.7, None, 1.3), "softcap": (1.1, 2.0, 0.8)}
KLS = [None, "reverse", "forward"]


@dataclass
class Case:
    """Flat sequences with heads of policy and reference. Sizes: N tokens, H hidden, V vocabulary, S sequences."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    cu_seqlens: Tensor
    token_weights: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor


def make_case(lengths=(3, 5, 1, 7), H=6, V=11, ignored=(), dtype=torch.float64, seed=0) -> Case:
    g = torch.Generator().manual_seed(seed)
    N = sum(lengths)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    target = torch.randint(0, V, (N,), generator=g)
    target[list(ignored)] = -100
    weights = torch.rand(N, generator=g, dtype=torch.float64).to(dtype) * 2
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return Case(normal(N, H), normal(V, H), normal(V), target, cu, weights, normal(N, H), normal(V, H), normal(V))


# name: (lengths of chosen_0, rejected_0, chosen_1, ...; ignored positions). One token a side, odd sizes, an empty completion on one
# side and on both, a whole sequence ignored, everything ignored.
SHAPES = {
    "plain": ((3, 5, 1, 7), ()),
    "one_token": ((1, 1), ()),
    "ignored": ((4, 3, 2, 6), (0, 5, 9)),
    "empty_side": ((0, 4, 3, 2), ()),
    "empty_pair": ((2, 3, 0, 0, 4, 1), ()),
    "ignored_sequence": ((2, 3, 4, 2), (2, 3, 4)),
    "all_ignored": ((2, 1), (0, 1, 2)),
}


def truth(z, target, q, bias, ref_bias, kl, transform):
    """(logp, ref_logp, kl) in float64 by the plain formulas, ignored rows 0; gradients can be taken through it."""
    scale, softcap, temperature = transform
    options = dict(logit_scale=scale, softcap=softcap, temperature=temperature)
    z, q = (x.double() if b is None else x.double() + b.double() for x, b in ((z, bias), (q, ref_bias)))
    z, q = (reference.transform_logits(x, **options) for x in (z, q))
    marked = target.masked_fill(target < 0, -100)
    divergence = None if kl is None else reference.token_kl(z, q, kl).masked_fill(target < 0, 0)
    return reference.token_logps(z, marked), reference.token_logps(q, marked), divergence


def in_float64(a, b, out, add=False):
    """What a device does that hands out its float32 sums; one that writes before it has read everything shows up as NaN."""
    before = out.clone() if add else 0
    if not add:
        out.fill_(math.nan)
    return out.copy_(a.double() @ b.double() + before)
