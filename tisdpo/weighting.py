"""From the raw contrast of two models to a weight for every token. Small tensors only.

Sizes: N completion tokens of all sequences, S = 2P sequences interleaved chosen_0, rejected_0, chosen_1, ...
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weighting:
    """How the contrast r_t = log pi+(y_t) - log pi-(y_t) (nats) becomes the weight w_t of a token.

    transform    "exp"        k * exp(mu_s * clamp(r_t, lower, upper))             TIS-DPO (arXiv 2410.04350); all tokens
                 "rank"       k * (low .. high) by the rank of mu_s * r_t in its sequence, ties share the average rank
                 "scale"      k * (low .. high), affine in clamp(mu_s * r_t, lower, upper)
                 "threshold"  k * clamp(mu_s * r_t, lower, upper), needs lower >= 0
                 "binary"     k for the `top` share of a sequence with the largest mu_s * r_t, 0 for the rest; ties stay together
                 "random"     "exp" of the contrasts of the same side in random order: weights of the same distribution that know nothing
                              of their tokens, the control experiment
                 "equal"      k: plain DPO with beta scaled by k
                 "swapped"    "exp" with mu_chosen and mu_rejected exchanged: the control that must hurt
    k            > 0, a common factor (the same as scaling beta)
    mu_chosen, mu_rejected   sign and sharpness of the tilt on each side
    lower, upper clamp of the contrast, nats
    low, high    range of the weights of "rank" and "scale"
    top          share in (0, 1], for "binary"
    gamma        position decay: w_t *= gamma**t with t = 0 at the first completion token, in (0, 1]
    eos_weight   weight of the EOS token; None: EOS is a token like any other
    seed         of "random"

    Raises ValueError for values outside these ranges.
    """

    transform: str = "exp"
    k: float = 1.0
    mu_chosen: float = 1.0
    mu_rejected: float = -1.0
    lower: float = -0.5
    upper: float = 1.5
    low: float = 0.7
    high: float = 1.3
    top: float = 0.5
    gamma: float = 1.0
    eos_weight: float | None = None
    seed: int = 0

    def __post_init__(self):
        if self.transform not in TRANSFORMS:
            raise ValueError(f"transform must be one of {', '.join(TRANSFORMS)}, got {self.transform!r}")
        if not (self.k > 0 and math.isfinite(self.k)):
            raise ValueError(f"k must be positive and finite, got {self.k}")
        if not (math.isfinite(self.mu_chosen) and math.isfinite(self.mu_rejected)):
            raise ValueError(f"mu_chosen and mu_rejected must be finite, got {self.mu_chosen} and {self.mu_rejected}")
        if not self.lower < self.upper:
            raise ValueError(f"lower must be below upper, got lower={self.lower}, upper={self.upper}")
        if self.transform == "threshold" and self.lower < 0:
            raise ValueError(f"transform='threshold' uses the clamped contrast as the weight and needs lower >= 0, got lower={self.lower}")
        if not 0 <= self.low <= self.high:
            raise ValueError(f"low and high must satisfy 0 <= low <= high, got low={self.low}, high={self.high}")
        if not 0 < self.top <= 1:
            raise ValueError(f"top must be in (0, 1], got {self.top}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must be in (0, 1], got {self.gamma}")
        if self.eos_weight is not None and not self.eos_weight >= 0:
            raise ValueError(f"eos_weight must not be negative, got {self.eos_weight}")

    @classmethod
    def of(cls, fields: dict | None) -> "Weighting":
        """From some fields by their names, the others as usual. ValueError for a name that is none."""
        known = cls.__dataclass_fields__
        for name in fields or {}:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
                raise ValueError(f"weighting has no field {name!r}; {hint}")
        return cls(**(fields or {}))

    @classmethod
    def preset(cls, name: str, **changes) -> "Weighting":
        """`paper`, `official-code`, `dpo`, `tdpo1` or `tdpo2`; keyword arguments change single fields.

        `official-code` is what the authors' released code runs instead of the published rule: weights by rank into 0.7..1.3 and
        EOS weight 0. Known differences from that code: ties take their average rank (there: by position), and only a real EOS
        gets weight 0 (there: the last token of a truncated response as well).
        """
        if name not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {name!r}")
        return replace(_PRESETS[name], **changes)

    @property
    def elementwise(self) -> bool:
        """The weight of a token depends on its own contrast and side alone: the rule that the fused kernel computes."""
        return self.transform in ("exp", "swapped", "equal") and self.gamma == 1.0 and self.eos_weight is None

    @property
    def needs_sequences(self) -> bool:
        """The rule looks at a whole sequence, so `cu_seqlens` must be given."""
        return self.transform in ("rank", "binary") or self.gamma != 1.0


def contrast_weights(
    contrast: Tensor, is_chosen: Tensor, weighting: Weighting, *, cu_seqlens: Tensor | None = None, is_eos: Tensor | None = None
) -> Tensor:
    """Weights [N] of tokens with raw contrast [N] (nats) on the side is_chosen [N] (bool).

    cu_seqlens [S+1] is needed by rules that look at a whole sequence (`rank`, `binary`, `gamma < 1`), is_eos [N] (bool) by
    `eos_weight`; a missing one raises ValueError. No gradient flows into the contrast.
    """
    contrast = contrast.detach()
    if weighting.needs_sequences and cu_seqlens is None:
        raise ValueError(f"transform={weighting.transform!r}, gamma={weighting.gamma} look at whole sequences: pass cu_seqlens")
    if weighting.eos_weight is not None and is_eos is None:
        raise ValueError("eos_weight is set: pass is_eos, a mask of the EOS tokens")
    weights = weighting.k * TRANSFORMS[weighting.transform](contrast, is_chosen, weighting, cu_seqlens)
    if weighting.gamma != 1.0:
        weights = weights * weighting.gamma ** positions(cu_seqlens).to(weights.dtype)
    if weighting.eos_weight is not None:
        weights = weights.masked_fill(is_eos, weighting.eos_weight)
    return weights


def _mu(contrast: Tensor, is_chosen: Tensor, chosen: float, rejected: float) -> Tensor:
    return torch.where(is_chosen, torch.full_like(contrast, chosen), torch.full_like(contrast, rejected))


def _exp(r, is_chosen, w, cu_seqlens):
    return torch.exp(_mu(r, is_chosen, w.mu_chosen, w.mu_rejected) * r.clamp(w.lower, w.upper))


def _swapped(r, is_chosen, w, cu_seqlens):
    return _exp(r, ~is_chosen, w, cu_seqlens)


def _random(r, is_chosen, w, cu_seqlens):
    # drawn on the CPU: the same weights on every device
    generator = torch.Generator().manual_seed(w.seed)
    shuffled = r.clone()
    for side in (is_chosen, ~is_chosen):
        where = side.nonzero()[:, 0]
        shuffled[where] = r[where[torch.randperm(len(where), generator=generator).to(where.device)]]
    return _exp(shuffled, is_chosen, w, cu_seqlens)


def _equal(r, is_chosen, w, cu_seqlens):
    return torch.ones_like(r)


def _signed(r, is_chosen, w):
    return _mu(r, is_chosen, w.mu_chosen, w.mu_rejected) * r


def _threshold(r, is_chosen, w, cu_seqlens):
    return _signed(r, is_chosen, w).clamp(w.lower, w.upper)


def _scale(r, is_chosen, w, cu_seqlens):
    share = (_signed(r, is_chosen, w).clamp(w.lower, w.upper) - w.lower) / (w.upper - w.lower)
    return w.low + (w.high - w.low) * share


def _rank(r, is_chosen, w, cu_seqlens):
    share = torch.cat([r[:0], *(relative_ranks(x) for x in _split(_signed(r, is_chosen, w), cu_seqlens))])
    return w.low + (w.high - w.low) * share


def _binary(r, is_chosen, w, cu_seqlens):
    def top(x: Tensor) -> Tensor:
        if not len(x):
            return x
        kept = max(1, math.ceil(w.top * len(x)))
        return (x >= x.sort(descending=True).values[kept - 1]).to(x.dtype)

    return torch.cat([r[:0], *(top(x) for x in _split(_signed(r, is_chosen, w), cu_seqlens))])


TRANSFORMS: dict[str, Callable[..., Tensor]] = {
    "exp": _exp,
    "rank": _rank,
    "scale": _scale,
    "threshold": _threshold,
    "binary": _binary,
    "random": _random,
    "equal": _equal,
    "swapped": _swapped,
}

_PRESETS = {
    "paper": Weighting(),
    "official-code": Weighting(transform="rank", eos_weight=0.0),
    "dpo": Weighting(transform="equal"),
    "tdpo1": Weighting(transform="equal"),
    "tdpo2": Weighting(transform="equal"),
}


def average_ranks(x: Tensor) -> Tensor:
    """Ranks 0 .. n-1 of x [n], float64; equal values share the average of their ranks."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last.double() - 0.5 * (counts.double() + 1))[inverse]


def relative_ranks(x: Tensor) -> Tensor:
    """`average_ranks` scaled to 0 .. 1; one half for a single value."""
    return (average_ranks(x) / (len(x) - 1)).to(x.dtype) if len(x) > 1 else torch.full_like(x, 0.5)


def _split(x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    return list(x.split(cu_seqlens.diff().tolist()))


def positions(cu_seqlens: Tensor) -> Tensor:
    """Position of every token in its sequence: cu_seqlens [S+1] -> [N], 0 at the start of each."""
    lengths = cu_seqlens.diff()
    starts = torch.repeat_interleave(cu_seqlens[:-1], lengths)
    return torch.arange(len(starts), device=cu_seqlens.device) - starts


def chosen_tokens(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """[N] bool: True for the tokens of chosen (even) sequences. `tokens` is N, so that no count is read back from a device."""
    sequence = torch.searchsorted(cu_seqlens, torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype), right=True) - 1
    return sequence % 2 == 0
