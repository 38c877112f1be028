"""Triton kernel of what the host waits for: the boundaries of the sequences among the tokens that carry loss, and whether inputs are sound.

One program reads target and weights once (12 bytes a token), so that one launch and one transfer take the place of some thirty operations
of torch, whose launches took 2 ms on an H200 machine while the device had nothing to do. 8192 tokens are 16 blocks.
"""

import triton
import triton.language as tl
from torch import Tensor

from tisdpo.kernels.launch import FUSED, on, some

BLOCK = 512  # of 1024 Triton 3.8 spills registers


@triton.jit
def boundaries_kernel(
    target_ptr, weight_ptr, cu_ptr, before_ptr, out_ptr, tokens, boundaries, vocabulary, ignore_index,
    HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [1 + boundaries] int64: whether all is sound, then the boundaries among the tokens that carry loss; before [tokens + 1]: how many
    of those stand in front of every position."""
    count = tl.zeros((), tl.int64)
    wrong = tl.zeros((), tl.int32)
    tl.store(before_ptr, count)
    for start in range(0, tokens, BLOCK):
        offs = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = offs < tokens
        target = tl.load(target_ptr + offs, mask=mask, other=0)
        keep = (target != ignore_index) & mask
        wrong += tl.sum((keep & ((target < 0) | (target >= vocabulary))).to(tl.int32), 0)
        if HAS_WEIGHTS:
            weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            sound = (weight >= 0.0) & (weight < float("inf"))  # no NaN is
            wrong += tl.sum((mask & ~sound).to(tl.int32), 0)
        kept = keep.to(tl.int64)
        tl.store(before_ptr + 1 + offs, count + tl.cumsum(kept, 0), mask=mask)
        count += tl.sum(kept, 0)
    tl.debug_barrier()  # what this program wrote is read below
    for start in range(0, boundaries, BLOCK):
        offs = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = offs < boundaries
        place = tl.load(cu_ptr + offs, mask=mask, other=0).to(tl.int64)
        previous = tl.load(cu_ptr + offs - 1, mask=mask & (offs > 0), other=0).to(tl.int64)
        bad = (place < previous) | ((offs == 0) & (place != 0)) | ((offs == boundaries - 1) & (place != tokens))
        wrong += tl.sum((mask & bad).to(tl.int32), 0)
        inside = mask & (place >= 0) & (place <= tokens)
        tl.store(out_ptr + 1 + offs, tl.load(before_ptr + place, mask=inside, other=0), mask=mask)
    tl.store(out_ptr, (wrong == 0).to(tl.int64))


def boundaries(target: Tensor, token_weights: Tensor | None, cu_seqlens: Tensor, vocabulary: int, ignore_index: int) -> Tensor:
    """int64 [1 + S + 1]: 1 or 0 for sound inputs or not, and the boundaries among the tokens that carry loss; for target [N] int64,
    token_weights [N], cu_seqlens [S + 1]."""
    tokens, count = len(target), len(cu_seqlens)
    before, out = target.new_empty(tokens + 1), target.new_empty(1 + count)
    with on(target.device):
        boundaries_kernel[(1,)](
            target.contiguous(), some(token_weights, target), cu_seqlens.contiguous(), before, out, tokens, count, vocabulary, ignore_index,
            HAS_WEIGHTS=token_weights is not None, BLOCK=BLOCK, num_warps=4, **FUSED,
        )  # fmt: skip
    return out
