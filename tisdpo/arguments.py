"""What the public functions take, checked and brought into the form the operators want.

Sizes: N tokens, H hidden, V vocabulary, S sequences.
"""

import torch
from torch import Tensor

from tisdpo import checks
from tisdpo.losses import KL_DIRECTIONS
from tisdpo.ops import values
from tisdpo.ops.backend import accumulation_dtype
from tisdpo.ops.rows import same_memory
from tisdpo.weighting import Weighting, chosen_tokens, contrast_weights


def head(hidden, weight, bias, target, ref_hidden, ref_weight, ref_bias, ignore_index):
    """(the checked inputs of the head operators, flattened to [N, ...], in the dtype autocast asks for; their ignore_index)."""
    checks.floating("hidden", hidden, min_dim=1)
    checks.head("weight", weight, "bias", bias, "hidden", hidden)
    ignore_index = checks.target(target, hidden.shape[:-1], len(weight), ignore_index, "hidden without its last dimension")
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        raise ValueError("ref_weight and ref_bias go with ref_hidden, which is missing")
    if ref_hidden is not None:
        if ref_weight is None:
            if weight.requires_grad or (bias is not None and bias.requires_grad):
                raise ValueError(
                    "ref_weight is missing and weight requires a gradient: the reference's head must not move with the policy's, "
                    "pass ref_weight"
                )
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        checks.floating("ref_hidden", ref_hidden, min_dim=1)
        if ref_hidden.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(f"ref_hidden must have the leading shape {tuple(hidden.shape[:-1])} of hidden, got {tuple(ref_hidden.shape)}")
        checks.head("ref_weight", ref_weight, "ref_bias", ref_bias, "ref_hidden", ref_hidden)
        if len(ref_weight) != len(weight):
            raise ValueError(f"ref_weight must have the vocabulary of weight, {len(weight)} rows, got {len(ref_weight)}")
        checks.constants(ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias)
    checks.same_device(
        hidden=hidden, weight=weight, bias=bias, target=target, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias
    )
    hidden, bias, ref_hidden, ref_bias = (autocast(x) for x in (rows(hidden), bias, rows(ref_hidden), ref_bias))
    weight, ref_weight = autocast_weights(weight, ref_weight)
    checks.same_dtype(hidden=hidden, weight=weight, bias=bias)
    checks.same_dtype(ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias)
    return (hidden, weight, bias, target.reshape(-1), ref_hidden, ref_weight, ref_bias), ignore_index


def rows(x: Tensor | None) -> Tensor | None:
    """[..., H] as [N, H]."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def matrices(x: Tensor | None) -> Tensor | None:
    """[..., V] as [N, V] or [B, T, V], without a copy where the logits of a row lie next to each other."""
    if x is None:
        return None
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x[None] if x.dim() == 1 else x if x.dim() <= 3 else x.reshape(-1, x.shape[-1])


def autocast(x: Tensor | None) -> Tensor | None:
    """What F.linear would do: inside an autocast region the product runs in its dtype."""
    if x is None or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def autocast_weights(weight: Tensor, ref_weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both heads in the dtype of autocast; one that they share stays shared."""
    cast = autocast(weight)
    if ref_weight is not None and cast is not weight and not torch.compiler.is_compiling() and same_memory(weight, ref_weight):
        return cast, cast.detach()
    return cast, autocast(ref_weight)


def reference_logps(ref_logps, ref_hidden, objective, target):
    if (ref_logps is None) == (ref_hidden is None):
        raise ValueError(
            f"the reference is ref_logps or ref_hidden, exactly one of them; {'neither' if ref_logps is None else 'both'} came"
        )
    if ref_logps is None:
        return None
    if objective.kl is not None:
        raise ValueError(
            f"objective.kl={objective.kl!r} needs the reference's distribution: pass ref_hidden and ref_weight instead of ref_logps"
        )
    checks.floating("ref_logps", ref_logps)
    if ref_logps.shape != target.shape:
        raise ValueError(f"ref_logps must have the shape {tuple(target.shape)} of target, got {tuple(ref_logps.shape)}")
    checks.constants(ref_logps=ref_logps)
    return ref_logps


def kl_and_reference(kl, reference, name):
    if kl not in KL_DIRECTIONS:
        raise ValueError(f"kl must be None, 'reverse' or 'forward', got {kl!r}")
    if kl is not None and reference is None:
        raise ValueError(f"kl={kl!r} needs a reference: pass {name}")


def pairs(cu_seqlens: Tensor) -> None:
    if len(cu_seqlens) % 2 == 0:
        raise ValueError(
            f"cu_seqlens must bound an even number of sequences (chosen_0, rejected_0, ...), got {len(cu_seqlens) - 1} sequences"
        )


def weights(logps, ref_logps, cu_seqlens, token_weights, pos_logps, neg_logps, weighting):
    """(token_weights, pos_logps, neg_logps, k, mu_chosen, mu_rejected, lower, upper) for the operator, checked."""
    checks.floating("logps", logps)
    if logps.dim() != 1:
        raise ValueError(f"logps must be [N] over flat sequences, got shape {tuple(logps.shape)}")
    checks.same("ref_logps", ref_logps, "logps", logps, dtype=False)
    checks.constants(ref_logps=ref_logps)
    checks.cu_seqlens(cu_seqlens, len(logps))
    if (pos_logps is None) != (neg_logps is None):
        raise ValueError(f"pos_logps and neg_logps go together; {'neg_logps' if neg_logps is None else 'pos_logps'} is missing")
    if token_weights is not None and pos_logps is not None:
        raise ValueError("the weights are token_weights or pos_logps and neg_logps, not both")
    if weighting is not None and pos_logps is None:
        raise ValueError("weighting has no effect without pos_logps and neg_logps")
    w = checks.option("weighting", weighting, Weighting)
    if w.eos_weight is not None:
        raise ValueError(
            "weighting.eos_weight needs to know the EOS tokens: form the weights by token_weights(..., is_eos=...) and pass those"
        )
    if token_weights is not None:
        token_weights = checks.weights(token_weights, logps)
    checks.same("pos_logps", pos_logps, "logps", logps, dtype=False)
    checks.same("neg_logps", neg_logps, "logps", logps, dtype=False)
    checks.same_device(
        logps=logps, ref_logps=ref_logps, cu_seqlens=cu_seqlens, token_weights=token_weights, pos_logps=pos_logps, neg_logps=neg_logps
    )
    if pos_logps is not None:
        if w.transform != "exp" or not w.elementwise:  # rules that the fused kernel does not know
            dtype = accumulation_dtype(logps.dtype)
            contrast = pos_logps.detach().to(dtype) - neg_logps.detach().to(dtype)
            if not torch.compiler.is_compiling():
                values.finite("pos_logps - neg_logps", contrast)
                values.cu_seqlens(cu_seqlens, len(logps))
            token_weights = contrast_weights(contrast, chosen_tokens(cu_seqlens, len(logps)), w, cu_seqlens=cu_seqlens)
            pos_logps = neg_logps = None
        else:
            pos_logps, neg_logps = pos_logps.detach(), neg_logps.detach()
    return token_weights, pos_logps, neg_logps, w.k, w.mu_chosen, w.mu_rejected, w.lower, w.upper
