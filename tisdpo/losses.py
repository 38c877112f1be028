"""The preference mathematics on [pairs]-sized tensors. It exists once: both plans and every trainer call it.

Sizes: P pairs, S = 2P sequences interleaved chosen_0, rejected_0, chosen_1, rejected_1, ...
"""

import math
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust")
PER_TOKEN = ("sigmoid_norm", "ipo")  # losses of scores divided by their numbers of tokens
KL_DIRECTIONS = (None, "reverse", "forward")


@dataclass(frozen=True)
class Objective:
    """What is made of the weighted log-ratios D_s and the weighted sequence KL K_s of a pair.

    The score of a sequence is D_s - alpha K_s (`kl="reverse"`, KL(policy || reference), TIS-DPO's u - eta) or D_s + alpha K_s
    (`kl="forward"`, KL(reference || policy), TDPO); z = beta * (score_chosen - score_rejected).

    loss              "sigmoid": -(1-e) log sigmoid(z) - e log sigmoid(-z), e = label_smoothing (DPO, conservative DPO)
                      "sigmoid_norm": -log sigmoid(beta * (score_w / T_w - score_l / T_l)) with T the token counts (length-normalised DPO,
                      SimPO's and Tulu 3's division with a reference)
                      "hinge": max(0, 1 - z) (SLiC)
                      "ipo": (score_w / T_w - score_l / T_l - 1 / (2 beta))^2 (IPO as its authors ran it)
                      "robust": (-(1-e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2e) (robust DPO)
    beta              > 0, strength of the pull towards the reference (with means over tokens, as in "sigmoid_norm", rather 1 to 10)
    kl                None, "reverse" or "forward"; direction and sign are this one setting
    alpha             >= 0, factor of the sequence KL
    detach_chosen_kl  no gradient through the chosen sequence's KL (TDPO2)
    label_smoothing   e in [0, 0.5), the share of flipped labels; only for "sigmoid" and "robust"
    nll_coef          >= 0, factor of -log pi(y_w | x) / T_w, added to the loss of every pair (RPO, arXiv 2404.19733, Eq. 1; there 1)

    Raises ValueError for anything outside these ranges, and for options that would have no effect.
    """

    loss: str = "sigmoid"
    beta: float = 0.1
    kl: str | None = None
    alpha: float = 1.0
    detach_chosen_kl: bool = False
    label_smoothing: float = 0.0
    nll_coef: float = 0.0

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.kl not in KL_DIRECTIONS:
            raise ValueError(f"kl must be None, 'reverse' or 'forward', got {self.kl!r}")
        for name in ("beta", "alpha", "label_smoothing", "nll_coef"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be a number of 0 or more, got {self.alpha}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ValueError(f"label_smoothing has no effect with loss={self.loss!r}; use loss='sigmoid' or 'robust'")
        if not 0 <= self.nll_coef < math.inf:
            raise ValueError(f"nll_coef must be a number of 0 or more, got {self.nll_coef}")
        if self.alpha != 1.0 and self.kl is None:
            raise ValueError(f"alpha={self.alpha} has no effect with kl=None; set kl='reverse' or 'forward'")
        if self.detach_chosen_kl and self.kl is None:
            raise ValueError("detach_chosen_kl has no effect with kl=None; set kl='forward' (TDPO2) or 'reverse'")

    @classmethod
    def preset(cls, name: str, **changes) -> "Objective":
        """`paper`, `official-code`, `dpo`, `tdpo1` or `tdpo2`; keyword arguments change single fields.

        `paper` has the sequence KL with factor 1; `official-code` is what the authors' released code runs (no KL). The weights
        that belong to them come from `Weighting.preset` of the same name.
        """
        if name not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {name!r}")
        return replace(_PRESETS[name], **changes)

    @classmethod
    def of_trainer(cls, args) -> "Objective":
        """From the fields of a trainer's configuration that have the same names; `loss` is its `loss_type`, as TRL writes it."""
        return cls(loss_of(args.loss_type), **{f.name: getattr(args, f.name) for f in fields(cls) if f.name != "loss"})

    @property
    def kl_sign(self) -> float:
        """Factor of K_s in the score: -alpha, +alpha, or 0 without KL."""
        return {None: 0.0, "reverse": -self.alpha, "forward": self.alpha}[self.kl]

    @property
    def in_one_pass(self) -> bool:
        """Whether the gradient of every token is the derivative of its score times one number, which the one-pass plan needs: not of a
        chosen token whose log-prob has two factors and whose KL has one of them."""
        return not self.nll_coef or self.kl is None or self.detach_chosen_kl


_PRESETS = {
    "paper": Objective(kl="reverse", alpha=1.0),
    "official-code": Objective(),
    "dpo": Objective(),
    "tdpo1": Objective(kl="forward", alpha=1.0),
    "tdpo2": Objective(kl="forward", alpha=0.5, detach_chosen_kl=True),
}


def loss_of(loss_type: str | list[str]) -> str:
    """The `loss` that a trainer's `loss_type` names, as TRL writes it: a name, or a list of one. ValueError for others."""
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    if len(names) != 1 or names[0] not in LOSSES:
        other = "for 'sft' beside one of them set nll_coef" if "sft" in names else "for others use trl.DPOTrainer"
        raise ValueError(f"loss_type must be one of {', '.join(LOSSES)}, got {', '.join(map(str, names))}; {other}")
    return names[0]


class PreferenceOutput(NamedTuple):
    """What a preference loss returns. `loss` is a scalar and carries the gradient; everything else is detached, one value a pair.

    losses [P]; logits [P] = chosen_rewards - rejected_rewards, the z of losses that do not divide by lengths; rewards [P] = beta * score;
    logps [P] plain, unweighted sums of the policy's log-probs (nats); kl [P] weighted sequence KL (nats), None without KL; chosen_nll [P]
    (nats a token), None without nll_coef.
    """

    loss: Tensor
    losses: Tensor
    logits: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_kl: Tensor | None
    rejected_kl: Tensor | None
    chosen_nll: Tensor | None = None


def sequence_scores(logratio: Tensor, kl: Tensor | None, objective: Objective) -> Tensor:
    """D_s + kl_sign * K_s, [S] -> [S]; with `detach_chosen_kl` the chosen K carries no gradient."""
    if objective.kl is None:
        return logratio
    if objective.detach_chosen_kl:
        kl = torch.where(chosen_mask(len(kl), kl.device), kl.detach(), kl)
    return logratio + objective.kl_sign * kl


def pairwise_losses(scores: Tensor, lengths: Tensor, objective: Objective) -> Tensor:
    """The loss of every pair: scores [S] and completion lengths [S] (tokens) -> [P]. The formulas are in `Objective`."""
    difference = _differences(scores, lengths, objective)
    z, e = objective.beta * difference, objective.label_smoothing
    if objective.loss in ("sigmoid", "sigmoid_norm"):
        return -(1 - e) * F.logsigmoid(z) - (e * F.logsigmoid(-z) if e else 0)  # not 0 times infinity
    if objective.loss == "hinge":
        return torch.relu(1 - z)
    if objective.loss == "ipo":
        return (difference - 1 / (2 * objective.beta)) ** 2
    return (-(1 - e) * F.logsigmoid(z) + (e * F.logsigmoid(-z) if e else 0)) / (1 - 2 * e)  # robust


def score_gradients(scores: Tensor, lengths: Tensor, objective: Objective) -> Tensor:
    """Derivative of the sum of `pairwise_losses` with respect to the scores, [S] -> [S].

    In closed form, because the one-pass operator needs it where autograd records nothing; tests/test_losses.py holds it to autograd.
    """
    difference = _differences(scores, lengths, objective)
    z, e = objective.beta * difference, objective.label_smoothing
    if objective.loss in ("sigmoid", "sigmoid_norm"):
        slope = objective.beta * (e * torch.sigmoid(z) - (1 - e) * torch.sigmoid(-z))
    elif objective.loss == "hinge":
        slope = -objective.beta * (z < 1).to(z.dtype)
    elif objective.loss == "ipo":
        slope = 2 * (difference - 1 / (2 * objective.beta))
    else:  # robust
        slope = -objective.beta * (e * torch.sigmoid(z) + (1 - e) * torch.sigmoid(-z)) / (1 - 2 * e)
    slopes = torch.stack([slope, -slope], 1).flatten()
    return slopes / lengths.clamp(min=1) if objective.loss in PER_TOKEN else slopes


def _differences(scores: Tensor, lengths: Tensor, objective: Objective) -> Tensor:
    """Score of the chosen less that of the rejected, or of their means over tokens, [S] -> [P]."""
    if objective.loss in PER_TOKEN:
        scores = scores / lengths.clamp(min=1)
    return scores[0::2] - scores[1::2]


def losses_with_nll(scores: Tensor, logps: Tensor, lengths: Tensor, objective: Objective) -> Tensor:
    """`pairwise_losses` and, with `nll_coef`, that times `chosen_nll`: scores, plain sums of log-probs and lengths [S] -> [P]."""
    losses = pairwise_losses(scores, lengths, objective)
    return losses + objective.nll_coef * chosen_nll(logps, lengths) if objective.nll_coef else losses


def chosen_nll(logps: Tensor, lengths: Tensor) -> Tensor:
    """-log pi(y_w | x) / T_w of every pair, without token weights: plain sums of log-probs [S], lengths [S] -> [P] (nats a token)."""
    return -logps[0::2] / lengths[0::2].clamp(min=1)


def logp_gradients(lengths: Tensor, objective: Objective) -> Tensor:
    """Derivative of nll_coef times the sum of `chosen_nll` with respect to the log-prob of any token of a sequence, [S] -> [S]."""
    slope = -objective.nll_coef / lengths.clamp(min=1)
    return torch.where(chosen_mask(len(lengths), lengths.device), slope, 0)


def preference_output(loss: Tensor | None, sums: "PairSums", objective: Objective, reduction: str, normalizer) -> PreferenceOutput:
    """Rewards, losses and statistics of `sums`; `loss` is formed here unless a one-pass operator has formed it already."""
    scores = sequence_scores(sums.logratio, sums.kl, objective)
    lengths = sums.lengths.to(scores.dtype)
    losses = losses_with_nll(scores, sums.logps, lengths, objective)
    if loss is None:
        loss = losses.sum() / resolve_normalizer(normalizer, reduction, len(losses))
    rewards = objective.beta * scores.detach()
    chosen, rejected = rewards[0::2], rewards[1::2]
    logps, kl = sums.logps.detach(), None if sums.kl is None else sums.kl.detach()
    return PreferenceOutput(
        loss,
        losses.detach(),
        chosen - rejected,
        chosen,
        rejected,
        logps[0::2],
        logps[1::2],
        *((None, None) if kl is None else (kl[0::2], kl[1::2])),
        chosen_nll(logps, lengths) if objective.nll_coef else None,
    )


class PairSums(NamedTuple):
    """Per sequence [S]: weighted log-ratio D, weighted KL K (or None), plain sum of log-probs, number of tokens."""

    logratio: Tensor
    kl: Tensor | None
    logps: Tensor
    lengths: Tensor


def chosen_mask(sequences: int, device=None) -> Tensor:
    """[S] bool: True for the chosen sequences of the interleaved order."""
    return torch.arange(sequences, device=device) % 2 == 0


def resolve_normalizer(normalizer, reduction: str, pairs: int):
    """What the sum over pairs is divided by: `normalizer` if given (pairs in the global batch), else P for "mean", 1 for "sum"."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}; per-pair losses are in the output's `losses`")
    if normalizer is None:
        return float(max(pairs, 1)) if reduction == "mean" else 1.0
    if reduction == "sum":
        raise ValueError("normalizer goes with reduction='mean'; with reduction='sum' divide the loss yourself")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must be one number, got a tensor of shape {tuple(normalizer.shape)}")
        if normalizer.device.type == "cpu" and not torch.compiler.is_compiling() and not normalizer > 0:
            raise ValueError(f"normalizer must be positive (pairs or tokens of the global batch), got {normalizer.item()}")
        return normalizer.detach().reshape(())
    if not torch.compiler.is_compiling() and not hasattr(normalizer, "__float__"):  # numpy's numbers are welcome
        raise TypeError(f"normalizer must be a number or a tensor of one, got {type(normalizer).__name__}")
    if not normalizer > 0:
        raise ValueError(f"normalizer must be positive (pairs or tokens of the global batch), got {normalizer}")
    return float(normalizer)
